"""Damaged and hostile files against every parser of foreign bytes: a thousand flips, cuts and bombs
per format.

    python benchmarks/fuzz_parsers.py [--quick] [--case NAME] [--count N] [--seed N]

Each format is parsed in a process of its own, with bounded memory and time. Only ImageError,
HeadraceError and OSError may come out; anything else, a crash, a hang or a MemoryError is a fault,
and is printed with the number of its input, which `--case NAME --only NUMBER` repeats. The last
line is one JSON object with the counts; the exit status is 1 after a fault.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gzip
import io
import json
import os
import queue
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COUNT, QUICK = 1000, 100
MEMORY_BYTES = 3 << 30  # beyond what the process has mapped once everything is imported
TIME_S = 60  # for one input; most take milliseconds


class Case(NamedTuple):
    """A format: files that are whole, files that are bombs, and what reads them."""

    suffix: str
    whole: Callable[[], list[bytes]]
    parse: Callable[[Path], None]
    bombs: Callable[[], list[bytes]] = list


# --- What reads them


def parse_image(path: Path) -> None:
    from headrace.extract.images.decoding import decode_image

    decode_image(path.read_bytes())


def parse_table(path: Path) -> None:
    from headrace.extract.images.locators import read_bytes
    from headrace.extract.sources.table import read_table_file

    table = read_table_file(path)
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
    for column in table.frame.columns if kind else ():
        with contextlib.suppress(OSError):
            read_bytes(f"{path}::{kind}:{column}:0")


def parse_members(listing: Any) -> None:
    from headrace.extract.errors import ImageError
    from headrace.extract.images.decoding import decode_image
    from headrace.extract.images.locators import read_bytes

    for path in listing.samples["path"].head(4):
        with contextlib.suppress(OSError, ImageError):
            decode_image(read_bytes(path))


def parse_bands(path: Path) -> None:
    from headrace.extract.images.bands import decode_deep

    decode_deep(path.read_bytes(), (1, 2), (0.0, 1.0)).floats(0.0)


def parse_regions(path: Path) -> None:
    """A folder's images in tiles, a table's rows by their boxes; two of them are decoded."""
    from headrace.extract.errors import ImageError
    from headrace.extract.images.crops import cut_crop, split_crop
    from headrace.extract.images.decoding import decode_image
    from headrace.extract.images.locators import read_bytes
    from headrace.extract.sources.read import read_source
    from headrace.extract.sources.regions import Boxes, Tiles
    from headrace.extract.sources.source import ImageSource

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        moved, whole = Path(folder, path.name), Path(folder, "0.png")
        moved.write_bytes(path.read_bytes())
        if path.suffix in (".csv", ".json"):
            whole.write_bytes(image("PNG")()[0])
            asked = Boxes() if path.suffix == ".json" else "auto"
            source = ImageSource("table", moved, boxes=asked)
        else:
            source = ImageSource("folder", Path(folder), tiles=Tiles(64, 4, "white"))
        for locator in read_source(source, labelled=False).samples["path"].head(2):
            image_path, crop = split_crop(str(locator))
            with contextlib.suppress(OSError, ImageError):
                decoded = decode_image(read_bytes(image_path))
                crop and cut_crop(decoded, crop)


def parse_archive(path: Path) -> None:
    from headrace.extract.sources.archive import read_archives
    from headrace.extract.sources.source import ImageSource

    parse_members(read_archives(ImageSource("archive", [path])))


def parse_array(path: Path) -> None:
    from headrace.extract.sources.array import detect_array_labels, read_array
    from headrace.extract.sources.source import ImageSource

    detect_array_labels(path)
    parse_members(read_array(ImageSource("array", path), labelled=False))


def parse_recipe(path: Path) -> None:
    from headrace.pipelines.recipe.load import load_recipe

    load_recipe(path)


def parse_weights(path: Path) -> None:
    from headrace.extract.backbones.weights_file import read_weights

    read_weights(path)


def parse_model(path: Path) -> None:
    from headrace.pipelines.models.model import load_model

    place = path.with_suffix("")
    place.mkdir()
    path.rename(place / "head.safetensors")
    (place / "head.json").write_text("{}")
    try:
        for member in load_model(place).members:
            member.head.predict_proba(np.zeros((2, 4), np.float32))
    finally:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()


def parse_side_file(path: Path) -> None:
    from headrace.extract.sources.archive import read_archives
    from headrace.extract.sources.source import ImageSource

    archive = path.with_suffix(".tar")
    try:
        with tarfile.open(archive, "w") as opened:
            for name, data in (
                ("a/1.png", image("PNG")()[0]),
                (f"a/1{path.suffix}", path.read_bytes()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                opened.addfile(entry, io.BytesIO(data))
        read_archives(ImageSource("archive", [archive]), labelled=True)
    finally:
        archive.unlink(missing_ok=True)


def parse_features(path: Path) -> None:
    from headrace.cache.exchange.external import import_features
    from headrace.cache.exchange.external_files import read_external_features

    names = [f"{n}.png" for n in range(8)]
    rows = path.with_suffix(".ids.txt")
    rows.write_text("\n".join(names))
    try:
        ids = rows if path.suffix in (".npy", ".npz") else None
        found = read_external_features(
            path, ids_path=ids, column_options=["f*"] if path.suffix == ".csv" else ()
        )
        with tempfile.TemporaryDirectory() as cache:
            import_features(
                Path(cache), "x", found, {name: f"{n:032x}" for n, name in enumerate(names)}
            )
    finally:
        rows.unlink()


def parse_ids(path: Path) -> None:
    from headrace.cache.exchange.external_files import read_external_features

    features = path.with_name("features.npy")
    np.save(features, np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32))
    try:
        read_external_features(features, ids_path=path)
    finally:
        features.unlink()


def in_directory(path: Path, names: dict[str, bytes], read: Callable[[Path], object]) -> None:
    """Read a directory of these files."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, data in names.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        read(Path(folder))


def predict_pixels(place: Path) -> None:
    """What `headrace predict` does with a model directory, on one image."""
    from headrace.pipelines.models.model import load_model

    load_model(place).predict_proba(pixels()[None])


def parse_network(path: Path) -> None:
    in_directory(
        path, {"network.safetensors": path.read_bytes(), "network.json": b"{}"}, predict_pixels
    )


def parse_network_text(path: Path) -> None:
    from safetensors.torch import save

    text = path.read_text(errors="replace")
    data = save(network_tensors(), metadata={"headrace": text})
    in_directory(path, {"network.safetensors": data, "network.json": b"{}"}, predict_pixels)


def parse_ensemble(path: Path) -> None:
    members = {f"members/{n}/head.safetensors": data for n, data in enumerate(exported_heads())}
    members |= {f"members/{n}/head.json": b"{}" for n in range(2)}
    weights = {"backbone_0.safetensors": exported_weights()}
    in_directory(path, {"ensemble.json": path.read_bytes(), **members, **weights}, predict_pixels)


def parse_exported_head(path: Path) -> None:
    files = {
        "head.safetensors": path.read_bytes(),
        "head.json": b"{}",
        "backbone_0.safetensors": exported_weights(),
    }
    in_directory(path, files, predict_pixels)


def parse_exported_text(path: Path) -> None:
    from safetensors.numpy import load, save

    data = save(
        load(exported_heads("")[0]), metadata={"headrace": path.read_text(errors="replace")}
    )
    files = {
        "head.safetensors": data,
        "head.json": b"{}",
        "backbone_0.safetensors": exported_weights(),
    }
    in_directory(path, files, predict_pixels)


def parse_sent_run(path: Path) -> None:
    """What `headrace predict` looks up of a model that lies in a run's directory."""
    from headrace.pipelines.models.model import load_model
    from headrace.pipelines.run_directory import stored_recipe

    def read(folder: Path) -> None:
        from headrace.cache.errors import HeadraceError
        from headrace.pipelines.paths import RunPaths

        for look in (
            lambda: stored_recipe(RunPaths(folder)),
            lambda: load_model(folder),
        ):
            with contextlib.suppress(HeadraceError, OSError):
                look()

    files = {
        "recipe.json": path.read_bytes(),
        "winner/head.safetensors": exported_heads("")[0],
        "winner/head.json": b"{}",
        "winner/backbone_0.safetensors": exported_weights(),
        "ensemble/ensemble.json": ensemble_text()[0],
    }
    in_directory(path, files, read)


def parse_parts(path: Path) -> None:
    """What a model's description says of boxes or tiles, and a listing by it."""
    from headrace.extract.sources.read import read_source
    from headrace.extract.sources.source import ImageSource
    from headrace.pipelines.models.image_parts import read_image_parts

    def read(folder: Path) -> None:
        parts = read_image_parts(fields, folder)
        if parts is None:
            return
        for source in (
            ImageSource("folder", folder / "photos", tiles=parts.tiles),
            ImageSource("table", folder / "boxes.csv", boxes=parts.boxes),
        ):
            read_source(source, labelled=False)

    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # whose reader is that of the whole file
        return
    photo = image("PNG")()[0]
    files = {"boxes.csv": boxes_csv()[0], "0.png": photo, "photos/1.png": photo}
    in_directory(path, files, read)


def predict_beside(place: Path) -> None:
    """What `headrace predict` does with a head on units and side columns."""
    from headrace.pipelines.models.model import load_model

    model = load_model(place)
    rule = model.unit_rule
    assert rule is None or rule.column
    assert model.image_parts is None or model.image_parts.boxes
    beside = {"age": [1.0, None], "site": ["north", ""]}
    units = ["a", "a"] if model.takes_units else None
    predicted = model.predict_proba([pixels(), pixels()], side_columns=beside, units=units)
    if rule is not None:
        rule.predict(model.task_kind, predicted, np.array([0, 0]))


def parse_beside_text(path: Path) -> None:
    """A description of a head on bags where it says so, else on side columns."""
    from safetensors.numpy import load, save

    text = path.read_text(errors="replace")
    arrays = load(beside_heads()["bags" if '"bags"' in text else "ridge"])
    files = {
        "head.safetensors": save(arrays, metadata={"headrace": text}),
        "head.json": b"{}",
        "backbone_0.safetensors": exported_weights(),
    }
    in_directory(path, files, predict_beside)


def parse_exported_weights(path: Path) -> None:
    files = {
        "head.safetensors": exported_heads("")[0],
        "head.json": b"{}",
        "backbone_0.safetensors": path.read_bytes(),
    }
    in_directory(path, files, predict_pixels)


# --- Whole files


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


def image(
    kind: str, modes: tuple[str, ...] = ("RGB",), **options: Any
) -> Callable[[], list[bytes]]:
    def made() -> list[bytes]:
        from PIL import Image

        found = []
        for mode in modes:
            stored = io.BytesIO()
            shown = Image.fromarray(pixels())
            if mode == "I;16":
                shown = Image.fromarray(pixels()[:, :, 0].astype(np.uint16) * 257)
            elif mode != "RGB":
                shown = shown.convert(mode)
            shown.save(stored, kind, **options)
            found.append(stored.getvalue())
        return found

    return made


def array_file(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def frame() -> Any:
    import pandas as pd

    return pd.DataFrame(
        {"path": [f"{n}.png" for n in range(12)], "label": list("abc") * 4, "n": range(12)}
    )


def csv_file() -> list[bytes]:
    return [frame().to_csv(index=False).encode()]


def json_file(lines: bool) -> Callable[[], list[bytes]]:
    return lambda: [frame().to_json(orient="records", lines=lines).encode()]


def table_of_images() -> Any:
    import pyarrow as pa

    data = image("PNG")()[0]
    cells = [{"bytes": data, "path": f"{n}.png"} for n in range(3)]
    return pa.table({"image": pa.array(cells), "label": ["a", "b", "a"], "list": [[1], [2, 3], []]})


def parquet_file() -> list[bytes]:
    import pyarrow.parquet as pq

    stored = io.BytesIO()
    pq.write_table(table_of_images(), stored)
    return [stored.getvalue()]


def arrow_file() -> list[bytes]:
    import pyarrow as pa

    found = []
    for writer in (pa.ipc.new_stream, pa.ipc.new_file):
        stored = io.BytesIO()
        with writer(stored, table_of_images().schema) as opened:
            opened.write_table(table_of_images())
        found.append(stored.getvalue())
    return found


def members() -> dict[str, bytes]:
    data = image("PNG")()[0]
    return {"a/1.png": data, "b/2.png": data, "b/2.json": b'{"label": 1}', "b/2.cls": b"1"}


def tar_file(mode: str) -> Callable[[], list[bytes]]:
    def made() -> list[bytes]:
        stored = io.BytesIO()
        with tarfile.open(fileobj=stored, mode=mode) as archive:  # type: ignore[call-overload]
            for name, data in members().items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return [stored.getvalue()]

    return made


def zip_file() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stored = io.BytesIO()
        with zipfile.ZipFile(stored, "w", method) as archive:
            for name, data in members().items():
                archive.writestr(name, data)
        found.append(stored.getvalue())
    return found


def npz_file() -> list[bytes]:
    images, labels = np.stack([pixels()] * 3), np.arange(3)
    found = []
    for save in (np.savez, np.savez_compressed):
        stored = io.BytesIO()
        save(stored, images=images, labels=labels)
        found.append(stored.getvalue())
    return found


def h5_file() -> list[bytes]:
    import h5py

    found = []
    for options in ({}, {"chunks": (1, 24, 20, 3), "compression": "gzip"}):
        stored = io.BytesIO()
        with h5py.File(stored, "w") as file:
            file.create_dataset("images", data=np.stack([pixels()] * 3), **options)
            file["labels"] = np.arange(3)
        found.append(stored.getvalue())
    return found


def idx_file() -> list[bytes]:
    images = np.stack([pixels()[:, :, 0]] * 3)
    return [b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()]


RECIPE = b"""\
images: {folder: photos, exclude: [a, b]}
task: {folds: 2, target: label}
backbones:
  - {name: "timm:test_resnet", weights: "random:0", image_size: 64, taps: [layer2.avg, layer4.avg]}
heads:
  logistic: {C: &grid [0.01, 1e-3, 0x10], inputs: [each, all]}
  ridge: {alpha: *grid}
compute: {workers: 1, images_per_shard: 16}
"""


def pth_file() -> list[bytes]:
    import torch

    found = []
    for zipped in (True, False):
        stored = io.BytesIO()
        state = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3, dtype=torch.float16)}
        torch.save({"state_dict": state}, stored, _use_new_zipfile_serialization=zipped)
        found.append(stored.getvalue())
    return found


def safetensors_file() -> list[bytes]:
    from safetensors.numpy import save

    return [save({"a.weight": np.ones((3, 4), np.float32), "a.bias": np.zeros(3, np.float16)})]


def model_file() -> list[bytes]:
    from safetensors.numpy import save

    from headrace.cache.spec import FeatureSpec
    from headrace.heads.linear.kind import RidgeSpec
    from headrace.heads.sklearn.kind import SklearnSpec
    from headrace.heads.spec import spec_to_json

    feature = FeatureSpec(
        "timm:test_resnet",
        "w" * 64,
        "fc",
        "avg",
        "{}",
        '{"index": 0}',
        "p",
        "float32",
        "float16",
        (4,),
    )
    found = []
    for spec in (RidgeSpec(1.0), SklearnSpec("sklearn.naive_bayes.GaussianNB", "{}")):
        about = {
            "format": 1,
            "spec": json.loads(spec_to_json(spec)),
            "task_kind": "single",
            "classes": ["a", "b"],
            "features": [json.loads(feature.to_json())],
            "backbones": [{"name": "timm:test_resnet", "weights": "random:0"}],
            "metrics": {"validation_accuracy": 0.5},
        }
        arrays = {"weight": np.ones((1, 4), np.float32), "bias": np.zeros(1, np.float32)}
        if isinstance(spec, SklearnSpec):
            arrays = {"features": np.eye(4, dtype=np.float32), "target": np.array([0, 1, 0, 1])}
            arrays |= {"sample_weight": np.ones(4), "outputs": np.array([2])}
        found.append(save(arrays, metadata={"headrace": json.dumps(about)}))
    return found


def features() -> Any:
    import pandas as pd

    values = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    return pd.DataFrame(values, columns=[f"f{n}" for n in range(5)]).assign(
        id=[f"{n}.png" for n in range(8)]
    )


def features_npz() -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        stored = io.BytesIO()
        save(stored, features=features()[["f0", "f1"]].to_numpy())
        found.append(stored.getvalue())
    return found


def features_h5() -> list[bytes]:
    import h5py

    found = []
    for options in ({}, {"chunks": (4, 5), "compression": "gzip"}):
        stored = io.BytesIO()
        with h5py.File(stored, "w") as file:
            file.create_dataset(
                "features", data=features().drop(columns="id").to_numpy(), **options
            )
            file["id"] = [name.encode() for name in features()["id"]]
        found.append(stored.getvalue())
    return found


def features_parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    lists = pa.table(
        {
            "id": features()["id"],
            "v": [list(row) for row in features().drop(columns="id").to_numpy()],
        }
    )
    for table in (lists, pa.table({"id": features()["id"], "f": features()["f0"]})):
        stored = io.BytesIO()
        pq.write_table(table, stored)
        found.append(stored.getvalue())
    return found


def ids_npy() -> list[bytes]:
    return [array_file(features()["id"].to_numpy(str)), array_file(np.arange(8))]


def side_json() -> list[bytes]:
    return [
        b'{"label": "cat", "n": 1.5, "tags": ["a"], "more": {"deep": [1]}}',
        b"3",
        b'"cat"',
        b"[1, 2]",
    ]


@functools.cache
def network_tensors() -> dict[str, Any]:
    import torch

    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.spec import BackboneSpec

    module = load_backbone(BackboneSpec("timm:test_resnet", "random:0")).module
    tensors = {
        f"backbone.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()
    }
    width = module.state_dict()["layer4.0.bn2.weight"].shape[0]
    tensors |= {"head.centre": torch.zeros(width), "head.scale": torch.ones(width)}
    return tensors | {
        "head.layers.0.weight": torch.ones(2, width),
        "head.layers.0.bias": torch.zeros(2),
    }


def network_text() -> list[bytes]:
    import dataclasses

    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.spec import BackboneSpec
    from headrace.heads.linear.kind import LogisticSpec
    from headrace.heads.spec import spec_to_json
    from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

    loaded = load_backbone(BackboneSpec("timm:test_resnet", "random:0"))
    width = len(network_tensors()["head.centre"])
    about = {
        "format": 1,
        "kind": "network",
        "backbone": dataclasses.asdict(loaded.spec),
        "preprocess": dataclasses.asdict(loaded.preprocessing),
        "tap": ["layer4.avg"],
        "head": {"convolutions": [], "layers": [[2, width]], "gain": 1.0, "features": width},
        "spec": json.loads(
            spec_to_json(FineTuneSpec(head=spec_to_json(LogisticSpec(1.0)), train_above="all"))
        ),
        "task_kind": "single",
        "classes": ["a", "b"],
        "metrics": {},
    }
    return [json.dumps(about).encode()]


def network_file() -> list[bytes]:
    from safetensors.torch import save

    return [save(network_tensors(), metadata={"headrace": network_text()[0].decode()})]


@functools.cache
def exported_weights() -> bytes:
    from safetensors.torch import save

    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.spec import BackboneSpec

    module = load_backbone(BackboneSpec("timm:test_resnet", "random:0")).module
    return bytes(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}))


@functools.cache
def exported_heads(up: str = "../../") -> tuple[bytes, bytes]:
    """Two heads as an export writes them, on weights that lie beside the model, `up` from them."""
    from safetensors.numpy import load, save

    found = []
    for number in range(2):
        about = json.loads(exported_text()[0])
        about["backbones"][0]["weights"] = f"{up}backbone_0.safetensors"
        arrays = load(model_file()[0])
        width = about["features"][0]["shape"][0]
        arrays["weight"] = np.full((1, width), number + 1, np.float32)
        found.append(save(arrays, metadata={"headrace": json.dumps(about)}))
    return found[0], found[1]


def exported_text() -> list[bytes]:
    import dataclasses

    from headrace.extract.spec import BackboneSpec
    from headrace.extract.taps.spec_cache import load_feature_specs
    from headrace.heads.linear.kind import RidgeSpec
    from headrace.heads.spec import spec_to_json

    spec = BackboneSpec("timm:test_resnet", "random:0", image_size=32, crop_fraction=1.0)
    with tempfile.TemporaryDirectory() as folder:
        feature = load_feature_specs(spec, ["layer4.avg"], cache_root=Path(folder)).specs[0]
    about = {
        "format": 1,
        "spec": json.loads(spec_to_json(RidgeSpec(1.0))),
        "task_kind": "single",
        "classes": ["a", "b"],
        "features": [json.loads(feature.to_json())],
        "backbones": [
            dataclasses.asdict(dataclasses.replace(spec, weights="backbone_0.safetensors"))
        ],
        "metrics": {},
    }
    return [json.dumps(about).encode()]


@functools.cache
def beside_heads() -> dict[str, bytes]:
    """A head on bags, and one on side columns, both with a rule of units, as they are saved."""

    from headrace.cache.spec import FeatureSpec
    from headrace.heads.bags.kind import BagsSpec
    from headrace.heads.data.side_columns import SideColumn
    from headrace.heads.linear.kind import RidgeSpec
    from headrace.heads.persist import TrainedHead, save_head
    from headrace.heads.unit_rule import UnitRule

    about = json.loads(exported_text()[0])
    about["backbones"][0]["weights"] = "backbone_0.safetensors"
    feature = FeatureSpec.from_json(json.dumps(about["features"][0]))
    width = feature.shape[0]
    bags = BagsSpec(hidden=(4,), attention_width=3)
    side = (SideColumn("age", None, True, 30.0, 5.0), SideColumn("site", ("", "north")))
    values = np.random.default_rng(0).normal(size=(1, width + 4)).astype(np.float32)
    shapes = {"weight0": (4, width), "bias0": (4,), "weight1": (2, 4), "bias1": (2,)}
    shapes |= {"attention": (3,)}
    for name in ("tanh", "sigmoid"):
        shapes |= {f"{name}_weight": (3, 4), f"{name}_bias": (3,)}
    pooled = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    kinds = {
        "bags": (bags, pooled, ()),
        "ridge": (RidgeSpec(1.0), {"weight": values, "bias": values[0, :1]}, side),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (spec, arrays, columns) in kinds.items():
            head = TrainedHead(
                spec,
                "single",
                ("a", "b"),
                (feature,),
                {},
                arrays,
                tuple(about["backbones"]),
                side_columns=columns,
                unit_rule=UnitRule("patient", "mean", 1.2),
                image_parts=json.loads(parts_json()[0]),
            )
            found[name] = save_head(Path(folder, name), head).read_bytes()
    return found


def beside_text() -> list[bytes]:
    from headrace.cache.format.sealed import tensor_metadata

    return [tensor_metadata(data)["headrace"].encode() for data in beside_heads().values()]


def recipe_json() -> list[bytes]:
    """A recipe as a run keeps it, without its digest."""
    from headrace.pipelines.recipe.load import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.yaml").write_bytes(RECIPE)
        recipe = load_recipe(Path(folder, "recipe.yaml")).model_dump(mode="json")
    recipe["images"]["tiles"] = {"size": 16, "overlap": 0}
    recipe["ensemble"] = {}
    return [json.dumps(recipe).encode()]


def parts_json() -> list[bytes]:
    from headrace.extract.sources.regions import Boxes, Tiles
    from headrace.pipelines.models.image_parts import ImageParts

    kinds = (
        ImageParts(tiles=Tiles(16, 4, "white")),
        ImageParts(boxes=Boxes(("x", "y", "width", "height"), "xyxy", "pixels")),
        ImageParts(boxes="auto", min_confidence=0.2),
    )
    return [json.dumps(dataclasses.asdict(parts)).encode() for parts in kinds]


def boxes_csv() -> list[bytes]:
    rows = "".join(f"0.png,{'ab'[n % 2]},{n},{n},9,8\n" for n in range(6))
    shares = "".join(f"0.png,{'ab'[n % 2]},.1,.2,.5,.6\n" for n in range(6))
    return [
        f"path,label,x,y,width,height\n{rows}".encode(),
        f"path,label,xmin,ymin,xmax,ymax\n{shares}".encode(),
    ]


def boxes_json() -> list[bytes]:
    coco = {
        "images": [{"id": 1, "file_name": "0.png", "width": 20, "height": 24}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": [n, 2, 5, 6], "iscrowd": n % 2}
            for n in range(4)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    detector = {"images": [{"file": "0.png", "detections": [{"bbox": [0.1, 0.2, 0.3, 0.4]}]}]}
    return [json.dumps(coco).encode(), json.dumps(detector).encode()]


def bands_tiff() -> list[bytes]:
    import tifffile

    values = np.random.default_rng(0).normal(size=(4, 48, 32)).astype(np.float32)
    found = []
    for options in (
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
        {"photometric": "minisblack", "byteorder": ">", "metadata": {"axes": "CYX"}},
        {"planarconfig": "separate", "compression": "lzw", "predictor": True},
    ):
        stored = io.BytesIO()
        tifffile.imwrite(stored, values, **options)
        found.append(stored.getvalue())
    return found


def tiff_bombs() -> list[bytes]:
    """Two hundred bytes that declare more pixels than a file of their size can hold."""

    def tiff(width: int, height: int) -> bytes:
        tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1)]
        tags += [(278, height), (279, 10)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        start = b"II*\0" + struct.pack("<IH", 8, len(tags))
        return start + entries + bytes(104)

    return [tiff(200_000, 200_000), tiff(2**31 - 1, 2**31 - 1), tiff(2**32 - 1, 1)]


def ensemble_text() -> list[bytes]:
    about = {
        "format": 2,
        "kind": "ensemble",
        "members": [
            {"model": f"members/{n}", "weight": 0.5, "temperature": 1.0 + n} for n in range(2)
        ],
        "temperature": 1.2,
        "task_kind": "single",
        "classes": ["a", "b"],
        "metrics": {"accuracy": 0.5},
    }
    return [json.dumps(about).encode()]


# --- Bombs: few bytes that ask for much


def png_bombs() -> list[bytes]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(1 << 28), 9)
    return [
        png(2**31 - 1, 2**31 - 1),
        png(2**31 - 1, 1),
        png(9000, 9000, chunk(b"IDAT", zeros[:4096]), depth=16, colour=6),
        png(8, 8, chunk(b"IDAT", zeros)),
        png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"IDAT", zeros)),
        png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros), chunk(b"IDAT", zeros)),
        png(8, 8, *[chunk(b"tEXt", b"a\0" + bytes(1000))] * 5000),
    ]


def npy_bombs() -> list[bytes]:
    def npy(header: str, data: bytes = b"") -> bytes:
        text = header.encode() + b"\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data

    shapes = (
        "(9999999999, 8, 8)",
        "(0, 8)",
        "(99999999999, 0, 3)",
        "(2, 99999999, 99999999)",
        "(" * 5000,
        "(1,)*9999999",
    )
    found = [
        npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", bytes(64))
        for shape in shapes
    ]
    return [
        *found,
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 8, 8), }", b"cos\nsystem\n"),
        npy("[" * 9000),
    ]


def npz_bombs() -> list[bytes]:
    found = []
    for data in (*npy_bombs(), array_file(np.zeros((1000, 600, 600), np.uint8))):
        stored = io.BytesIO()
        with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", data)
        found.append(stored.getvalue())
    return found


def h5_bombs() -> list[bytes]:
    import h5py

    def h5(make: Callable[[Any], object]) -> bytes:
        stored = io.BytesIO()
        with h5py.File(stored, "w") as file:
            make(file)
        return stored.getvalue()

    def link(kind: Any) -> Callable[[Any], object]:
        return lambda file: file.__setitem__("images", kind)

    def chunked(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Callable[[Any], object]:
        return lambda file: file.create_dataset("images", shape=shape, dtype="u1", chunks=chunks)

    return [
        h5(chunked((2**40, 8, 8), (1, 8, 8))),
        h5(chunked((2, 2**20, 2**20), (1, 64, 64))),
        h5(chunked((2**40, 1, 3), (1, 1, 3))),
        h5(link(h5py.ExternalLink("/etc/passwd", "x"))),
        h5(link(h5py.SoftLink("/images"))),
        h5(
            lambda f: f.create_dataset(
                "images", (5, 8, 8), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
            )
        ),
    ]


def text_bombs() -> list[bytes]:
    deep = b"[" * 200_000
    return [
        deep,
        b'{"a":' * 100_000,
        b"path" + b"," * 1_000_000 + b"\n",
        b"path\n" + b'"' * 1_000_001,
        b"\0" * 1_000_000,
        b"9" * 1_000_000,
        b'[{"path": ' + b"9" * 100_000 + b"}]",
        b'{"path": ' + deep + b"}",
        b"\xff\xfe" + b"a\0" * 1000,
        b"",
    ]


def recipe_bombs() -> list[bytes]:
    merges = "x0: &x0 {k: v}\n" + "".join(
        f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, 40)
    )
    lists = "x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))
    keys = "".join(f"key{i}: 1\n" for i in range(20_000))
    return [
        merges.encode() + RECIPE,
        lists.encode() + RECIPE,
        RECIPE + keys.encode(),
        *text_bombs(),
    ]


def gzip_bombs() -> list[bytes]:
    return [
        gzip.compress(bytes(1 << 26)) * 64,
        gzip.compress(idx_file()[0]),
    ]  # the first: 4 GiB in 4 MB


def tar_bombs() -> list[bytes]:
    head = tarfile.TarInfo("a/1.png")
    head.size = 2**33 - 1
    return [head.tobuf() + bytes(2048), tarfile.TarInfo("x" * 90 + ".png").tobuf() * 20_000]


def zip_bombs() -> list[bytes]:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(1 << 28))
    lied = stored.getvalue().replace(struct.pack("<I", 1 << 28), struct.pack("<I", 1000))
    return [stored.getvalue(), lied]


def weights_bombs() -> list[bytes]:
    import pickle

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("false",)

    header = b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}}'
    return [
        pickle.dumps(Call()),
        b"\x80\x02" + b"(" * 500_000 + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", len(header)) + header + bytes(4),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        b"",
    ]


def network_bombs() -> list[bytes]:
    about = json.loads(network_text()[0])
    heads = [
        {"features": 2**40},
        {"features": 2**33},
        {"layers": [[2**31, 2**31]]},
        {"layers": [[2, 8]] * 100_000},
        {"convolutions": [[2**20, 2**20]]},
    ]
    return [
        json.dumps({**about, "head": {**about["head"], **head}}).encode() for head in heads
    ] + text_bombs()


def features_h5_bombs() -> list[bytes]:
    import h5py

    def h5(make: Callable[[Any], object]) -> bytes:
        stored = io.BytesIO()
        with h5py.File(stored, "w") as file:
            make(file)
            file["id"] = [b"a", b"b"]
        return stored.getvalue()

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((5, 8), "f4")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (5, 8))
        file.create_virtual_dataset("features", layout)

    outside = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    return [
        h5(lambda file: file.create_dataset("features", (2**40, 8), "f4", chunks=(1, 8))),
        h5(lambda file: file.create_dataset("features", (2, 2**33), "f4", chunks=(1, 64))),
        h5(lambda file: file.create_dataset("features", (5, 8), "f4", external=outside)),
        h5(virtual),
        h5(lambda file: file.__setitem__("features", h5py.ExternalLink("/etc/passwd", "x"))),
    ]


def features_parquet_bombs() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = io.BytesIO()
    with pq.ParquetWriter(stored, pa.schema([("id", pa.string()), ("f", pa.float32())])) as writer:
        for _ in range(40):  # 400 million rows of one value in some kilobytes
            writer.write_table(
                pa.table({"id": pa.nulls(10**7, pa.string()), "f": pa.nulls(10**7, pa.float32())})
            )
    return [stored.getvalue()]


CASES = {
    "png": Case(".png", image("PNG", ("RGB", "RGBA", "P", "I;16", "1")), parse_image, png_bombs),
    "jpg": Case(".jpg", image("JPEG", ("RGB", "L", "CMYK")), parse_image),
    "webp": Case(".webp", image("WEBP", ("RGB", "RGBA")), parse_image),
    "tiff": Case(".tif", image("TIFF", ("RGB", "I;16", "F", "CMYK", "1")), parse_image),
    "tiff-lzw": Case(".tif", image("TIFF", ("RGB", "I;16"), compression="tiff_lzw"), parse_image),
    "gif": Case(
        ".gif",
        image("GIF"),
        parse_image,
        lambda: [b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",;"],
    ),
    "bmp": Case(".bmp", image("BMP", ("RGB", "L")), parse_image),
    "jp2": Case(".jp2", image("JPEG2000"), parse_image),
    "avif": Case(".avif", image("AVIF"), parse_image),
    "ppm": Case(
        ".ppm",
        image("PPM", ("RGB", "L")),
        parse_image,
        lambda: [b"P6 999999999 9 255\n", b"P3 2 2 65535 " + b"9" * 10**6],
    ),
    "npy-image": Case(".npy", lambda: [array_file(pixels())], parse_image, npy_bombs),
    "npy-bands": Case(
        ".npy",
        lambda: [array_file(np.random.default_rng(0).normal(size=(5, 24, 20)).astype("f4"))],
        parse_bands,
        npy_bombs,
    ),
    "tiff-bands": Case(".tif", bands_tiff, parse_bands, tiff_bombs),
    "tiles": Case(".tif", image("TIFF", ("RGB", "L"), tile=(16, 16)), parse_regions, tiff_bombs),
    "tiles-npy": Case(".npy", lambda: [array_file(pixels())], parse_regions, npy_bombs),
    "boxes-csv": Case(".csv", boxes_csv, parse_regions, text_bombs),
    "boxes-json": Case(".json", boxes_json, parse_regions, text_bombs),
    "csv": Case(".csv", csv_file, parse_table, text_bombs),
    "csv.gz": Case(".csv.gz", lambda: [gzip.compress(csv_file()[0])], parse_table, gzip_bombs),
    "jsonl": Case(".jsonl", json_file(lines=True), parse_table, text_bombs),
    "json": Case(".json", json_file(lines=False), parse_table, text_bombs),
    "parquet": Case(".parquet", parquet_file, parse_table),
    "arrow": Case(".arrow", arrow_file, parse_table),
    "tar": Case(".tar", tar_file("w"), parse_archive, tar_bombs),
    "tgz": Case(".tgz", tar_file("w:gz"), parse_archive, gzip_bombs),
    "zip": Case(".zip", zip_file, parse_archive, zip_bombs),
    "npy": Case(".npy", lambda: [array_file(np.stack([pixels()] * 3))], parse_array, npy_bombs),
    "npz": Case(".npz", npz_file, parse_array, npz_bombs),
    "h5": Case(".h5", h5_file, parse_array, h5_bombs),
    "idx": Case(
        "-idx3-ubyte",
        idx_file,
        parse_array,
        lambda: [b"\0\0\x08\x03" + b"\xff" * 12, b"\0\0\x08\xff" + bytes(1020)],
    ),
    "idx.gz": Case(
        "-idx3-ubyte.gz", lambda: [gzip.compress(idx_file()[0])], parse_array, gzip_bombs
    ),
    "recipe": Case(".yaml", lambda: [RECIPE], parse_recipe, recipe_bombs),
    "pth": Case(".pth", pth_file, parse_weights, weights_bombs),
    "safetensors": Case(".safetensors", safetensors_file, parse_weights, weights_bombs),
    "model": Case(".safetensors", model_file, parse_model, weights_bombs),
    "network": Case(".safetensors", network_file, parse_network, weights_bombs),
    "network-text": Case(".json", network_text, parse_network_text, network_bombs),
    "exported-head": Case(
        ".safetensors", lambda: list(exported_heads("")), parse_exported_head, weights_bombs
    ),
    "exported-text": Case(".json", exported_text, parse_exported_text, text_bombs),
    "exported-weights": Case(
        ".safetensors", lambda: [exported_weights()], parse_exported_weights, weights_bombs
    ),
    "beside-text": Case(".json", beside_text, parse_beside_text, text_bombs),
    "parts": Case(".json", parts_json, parse_parts),
    "sent-run": Case(".json", recipe_json, parse_sent_run, text_bombs),
    "ensemble": Case(".json", ensemble_text, parse_ensemble, text_bombs),
    "side-json": Case(".json", side_json, parse_side_file, text_bombs),
    "side-cls": Case(".cls", lambda: [b"3\n"], parse_side_file, text_bombs),
    "side-txt": Case(".txt", lambda: ["Käse\n".encode()], parse_side_file, text_bombs),
    "features-npy": Case(".npy", lambda: [array_file(np.eye(8, 5))], parse_features, npy_bombs),
    "features-npz": Case(".npz", features_npz, parse_features, npz_bombs),
    "features-h5": Case(".h5", features_h5, parse_features, features_h5_bombs),
    "features-csv": Case(
        ".csv", lambda: [features().to_csv(index=False).encode()], parse_features, text_bombs
    ),
    "features-parquet": Case(".parquet", features_parquet, parse_features, features_parquet_bombs),
    "ids-npy": Case(".npy", ids_npy, parse_ids, npy_bombs),
    "ids-csv": Case(".csv", lambda: [features()[["id"]].to_csv().encode()], parse_ids, text_bombs),
    "ids-txt": Case(".txt", lambda: ["\n".join(features()["id"]).encode()], parse_ids, text_bombs),
}


# --- Damage


def inputs(case: Case, count: int, seed: int) -> Iterator[bytes]:
    """The bombs, then whole files with damage: bytes flipped, cut, repeated, numbers made large,
    parts of another file.
    """
    yield from case.bombs()
    whole = case.whole()
    yield from whole
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        # Half of the damaged JSON is JSON again, with another value somewhere.
        as_text = case.suffix == ".json" and number % 2
        yield (
            altered(whole[number // 2 % len(whole)], rng)
            if as_text
            else damaged(whole, number, rng)
        )


ODD = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, 0.5, "", "x", "9" * 5000, "../..", "python:os:getcwd", "\0", "\ud800",
       [], [[]], {}, [None], [1e9, 1e9], ["a"] * 1000]  # fmt: skip


def altered(text: bytes, rng: np.random.Generator) -> bytes:
    """A JSON text with one to three of its values replaced by odd ones, or left out."""
    root = [json.loads(text)]
    for _ in range(int(rng.integers(1, 4))):
        node: Any = root
        places: list[Any] = [0]
        while True:
            key = places[int(rng.integers(len(places)))]
            below = node[key]
            deeper = (
                list(below)
                if isinstance(below, dict)
                else list(range(len(below)))
                if isinstance(below, list)
                else []
            )
            if not deeper or rng.random() < 0.2:
                break
            node, places = below, deeper
        odd = int(rng.integers(len(ODD) + 1))
        if odd < len(ODD):
            node[key] = copy.deepcopy(ODD[odd])
        elif isinstance(node, dict):
            del node[key]
    return json.dumps(root[0]).encode()


def damaged(whole: list[bytes], number: int, rng: np.random.Generator) -> bytes:
    data = bytearray(whole[number % len(whole)])
    # Headers, at the ends, are where the interesting numbers are.
    near = min(len(data), 256) if rng.random() < 0.6 else len(data)
    for _ in range(int(rng.choice([1, 1, 2, 4, 16]))):
        place = (
            int(rng.integers(near))
            if rng.random() < 0.7
            else len(data) - 1 - int(rng.integers(near))
        )
        kind = rng.integers(7)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place] = int(rng.integers(256))
        elif kind == 2:
            data[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)]
            )
        elif kind == 3 and rng.random() < 0.3:
            del data[place:]
        elif kind == 4:
            data[place:place] = data[place : place + int(rng.integers(1, 64))] * int(
                rng.choice([1, 2, 100])
            )
        elif kind == 5:
            del data[place : place + int(rng.integers(1, 16))]
        else:
            data[place : place + 1] = rng.choice([b"9", b"[", b"{", b'"', b"\n", b"-", b"\0"])
        if not data:
            return b""
        near = min(near, len(data))
    return bytes(data)


def outcome(case: Case, path: Path) -> str:
    """parsed, refused, or what went wrong."""
    from headrace.cache.errors import HeadraceError
    from headrace.extract.errors import ImageError

    try:
        case.parse(path)
    except (ImageError, HeadraceError, OSError):
        return "refused"
    except BaseException as error:  # noqa: BLE001 (whatever else comes out is what is looked for)
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            each
            for each in traceback.extract_tb(error.__traceback__)
            if "headrace" in each.filename
        ][-1:]
        where = ", called by ".join(
            f"{Path(each.filename).name}:{each.lineno}" for each in (last, *ours)
        )
        return f"{type(error).__name__}: {str(error)[:100]} ({where})"
    return "parsed"


def child(name: str, count: int, seed: int, start: int, stop: int | None) -> None:
    """Parse the inputs from `start` on; a line before each, and one with what came of it."""
    case = CASES[name]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for data in case.whole():  # everything is imported before memory is counted
            path = Path(folder) / f"whole{case.suffix}"
            path.write_bytes(data)
            outcome(case, path)
            path.unlink(missing_ok=True)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
        for number, data in enumerate(inputs(case, count, seed)):
            if number < start or (stop is not None and number >= stop):
                continue
            print(json.dumps([number, None]), flush=True)
            path = Path(folder) / f"{number}{case.suffix}"
            path.write_bytes(data)
            print(json.dumps([number, outcome(case, path)]), flush=True)
            path.unlink(missing_ok=True)


def fuzz(
    name: str, count: int, seed: int, start: int = 0, stop: int | None = None
) -> dict[int, str]:
    """What came of each input by its number.

    After a crash or a hang a new process goes on with the next one.
    """
    found: dict[int, str] = {}
    while True:
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            str(count),
            str(seed),
            str(start),
            str(stop or ""),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_feed, args=(process, lines), daemon=True).start()
        current, problem = None, None
        while problem is None:
            try:
                line = lines.get(timeout=TIME_S * 2 if current is None else TIME_S)
            except queue.Empty:
                process.kill()
                problem = f"no end within {TIME_S} s"
                break
            if line is None:
                status = process.wait()
                if status == 0:
                    return found
                problem = f"the process ended with {status}"
                break
            current, what = json.loads(line)
            if what is not None:
                found[current] = what
        if current is None:
            raise SystemExit(f"{name}: {problem}, before the first input")
        found[current] = problem
        start = current + 1


def _feed(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):  # parsers print too
            lines.put(line)
    process.stdout.close()
    lines.put(None)


def main() -> None:
    """Fuzz, and print a table."""
    if sys.argv[1:2] == ["--child"]:
        name, count, seed, start, stop = sys.argv[2:]
        child(name, int(count), int(seed), int(start), int(stop) if stop else None)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} inputs per format instead of {COUNT}"
    )
    parser.add_argument(
        "--case",
        choices=CASES,
        action="append",
        help="this format alone; may be given several times",
    )
    parser.add_argument("--count", type=int, help="damaged inputs per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone")
    asked = parser.parse_args()
    count = asked.count or (QUICK if asked.quick else COUNT)
    only = (0, None) if asked.only is None else (asked.only, asked.only + 1)
    totals: collections.Counter[str] = collections.Counter()
    print(f"{'format':12} {'inputs':>7} {'parsed':>7} {'refused':>8} {'faults':>7} {'seconds':>8}")
    for name in asked.case or CASES:
        began = time.perf_counter()
        found = fuzz(name, count, asked.seed, *only)
        faults = {
            number: what for number, what in found.items() if what not in ("parsed", "refused")
        }
        kinds = collections.Counter(found.values())
        row = {
            "inputs": len(found),
            "parsed": kinds["parsed"],
            "refused": kinds["refused"],
            "faults": len(faults),
        }
        totals.update(row)
        seconds = time.perf_counter() - began
        print(
            f"{name:12} {len(found):7} {row['parsed']:7} {row['refused']:8} {row['faults']:7} "
            f"{seconds:8.1f}"
        )
        shown: set[str] = set()
        for number, what in faults.items():
            if what not in shown and len(shown) < 12:
                shown.add(what)
                print(f"    {number}: {what}")
        sys.stdout.flush()
    print(json.dumps({"formats": len(asked.case or CASES), **totals, "seed": asked.seed}))
    sys.exit(1 if totals["faults"] else 0)


if __name__ == "__main__":
    main()
