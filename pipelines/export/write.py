"""`headrace export`: a model as files that need no headrace, compared with headrace's own
predictions before they appear.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from headrace.cache.atomic_io import PARTIAL_SUFFIX
from headrace.cache.errors import HeadraceError
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.views import Symmetries, is_exact_view, mirror_pixels
from headrace.extract.run.decode_ahead import PixelBatch
from headrace.extract.spec import BackboneSpec
from headrace.pipelines.cluster.task_leases import driver_lives, driver_lock, driver_name
from headrace.pipelines.export.model_card import Exported, model_card
from headrace.pipelines.export.preprocessing_file import NAME, preprocess_file
from headrace.pipelines.models.ensemble import EnsembleModel
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.images import open_engine, predict_batch
from headrace.pipelines.models.model import Model, load_model
from headrace.pipelines.models.network import NetworkModel
from headrace.pipelines.models.torch_graph import Input, ModelGraph, fits_graph, pixels_of

FORMATS = ("torch", "onnx", "safetensors")
# Of probabilities, absolute; of regression values, relative to the largest. Sums in another order
# move a feature by some 1e-7 of its size, and now and then over the edge of its float16, by 5e-4.
TOLERANCE = 2e-3
# of networks that were run in half precision: an exported graph runs in float32
HALF_TOLERANCE = 3e-2
MARKER = ".headrace-export"  # by which a folder is known that --force may replace
_MARKER_TEXT = (
    "This folder was written by `headrace export`, which replaces it as a whole when it is told "
    "--force.\n"
)
_CHECKED = 8  # images that the comparison uses


class ExportError(HeadraceError, ValueError):
    """The model cannot be exported as asked; nothing was written."""


@dataclass(frozen=True)
class _Check:
    """Pixels for every input of the graph, and what headrace predicts from them."""

    pixels: list[Tensor]
    expected: npt.NDArray[np.float32]
    tolerance: float

    def difference(self, found: npt.NDArray[Any]) -> float:
        """The largest; relative for values beyond one."""
        scale = max(1.0, float(np.abs(self.expected).max()))
        return float(np.abs(np.asarray(found, np.float64) - self.expected).max()) / scale


def export_model(
    model: Model, out: Path, formats: Sequence[str], *, force: bool = False
) -> Exported:
    """Write `out`: the model in these formats (torch, onnx, safetensors), preprocess.py, model.json
    and MODEL_CARD.md.

    Every format is loaded again and its predictions compared with headrace's own before the
    directory appears. Raises ExportError where they differ, where `out` is there or cannot be
    written, and for heads that have no such form.
    force: replace what an earlier export wrote; nothing else is ever deleted.
    """
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise ExportError(f"format {unknown[0]!r}: expected one or several of {', '.join(FORMATS)}")
    _require_replaceable(out, force=force)
    if "onnx" in formats:
        _require_onnx()
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = f".{out.name}.{driver_name()}"
    temporary = out.with_name(f"{writer}{PARTIAL_SUFFIX}")
    with driver_lock(
        out.parent, writer
    ):  # by which others know that it is not what a killed export left
        try:
            temporary.mkdir()
            exported = _write(model, temporary, list(dict.fromkeys(formats)))
            _replace(temporary, out)
        except OSError as error:
            where = getattr(error, "filename", None) or temporary.parent
            reason = getattr(error, "strerror", None) or error
            raise ExportError(
                f"{where}: {reason}. Nothing was written: make room, or give another folder"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_dead(out)
    return exported


def _remove_dead(out: Path) -> None:
    """Remove what exports to `out` that were killed have left beside it: their locks, and folders
    that have our marker.
    """
    place = glob.escape(f".{out.name}.")
    for lock in out.parent.glob(f"{place}*.driver"):
        driver_lives(out.parent, lock.stem)  # removes that of a dead one
    alive = tuple(lock.stem for lock in out.parent.glob(f"{place}*.driver"))
    for left in out.parent.glob(f"{place}*{PARTIAL_SUFFIX}"):
        if (
            not left.name.startswith(alive)
            and left.is_dir()
            and (_is_export(left) or not any(left.iterdir()))
        ):
            shutil.rmtree(left, ignore_errors=True)


def _write(model: Model, folder: Path, formats: list[str]) -> Exported:
    # First: if no more than this comes of the folder, it is known for ours all the same.
    (folder / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
    differences: dict[str, float] = {}
    graphed = [name for name in formats if name != "safetensors"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export's own future
        if graphed:
            single = evaluation_only(model)
            graph = single.to_torch()
            assert isinstance(graph, ModelGraph)
            inputs = graph.inputs
            check = _check(single, inputs)
            with _untraceable():
                program = torch.export.export(
                    graph,
                    tuple(check.pixels),
                    dynamic_shapes=((*({0: torch.export.Dim("n", min=1)} for _ in inputs),),),
                    strict=False,
                )
        else:
            inputs = _inputs_of(model)
        if "torch" in formats:
            # By way of memory: torch's own writer ends the process where the disk is full.
            packed = io.BytesIO()
            torch.export.save(program, packed)
            (folder / "model.pt2").write_bytes(packed.getbuffer())
            loaded = torch.export.load(folder / "model.pt2").module()
            differences["torch"] = _compare(
                check, lambda pixels: np.asarray(loaded(*pixels).numpy()), "model.pt2", model
            )
        if "onnx" in formats:
            _write_onnx(program, inputs, folder / "model.onnx")
            differences["onnx"] = _compare(
                check, _onnx_runner(folder / "model.onnx", inputs), "model.onnx", model
            )
        if "safetensors" in formats:
            _write_directory(model, folder)
            whole = _check(model, inputs)
            again = _check(load_model(folder, trust_code=model.trust_code), inputs)
            differences["safetensors"] = whole.difference(again.expected)
            if differences["safetensors"] > whole.tolerance:
                raise ExportError(
                    f"the copy predicts otherwise, by {differences['safetensors']:.2g}; nothing "
                    "was written"
                )
    version = importlib.metadata.version("headrace")
    (folder / NAME).write_text(preprocess_file(inputs, version), encoding="utf-8")
    tolerance = _tolerance(model)
    exported = Exported(model, tuple(inputs), differences, tolerance, fits_graph(model))
    about = {
        "headrace": version,
        "formats": formats,
        "task_kind": model.task_kind,
        "classes": list(model.classes),
        "inputs": [
            {"name": each.name, "dtype": "uint8", "shape": ["n", *each.preprocessing.crop, 3]}
            | {"preprocessing": json.loads(each.preprocessing.to_json())}
            for each in inputs
        ],
        "output": {"name": "probabilities", "dtype": "float32", "shape": ["n", len(model.classes)]},
        "metrics": model.metrics,
        "tolerance": tolerance,
        "differences": differences,
    }
    (folder / "model.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(model_card(exported), encoding="utf-8")
    return exported


def evaluation_only(model: Model) -> Model:
    """Return the model on the evaluation crop (and its symmetries) alone, without the random views
    that it may average over.
    """
    return _map_members(model, _without_random_views)


def _without_random_views(member: HeadModel | NetworkModel) -> HeadModel | NetworkModel:
    if isinstance(member, NetworkModel):
        return member
    head = member.head
    exact = [index for index, feature in enumerate(head.features) if is_exact_view(feature.view)]
    features = tuple(head.features[index] for index in exact)
    backbones = tuple(head.backbones[index] for index in exact)
    return replace(member, head=replace(head, features=features, backbones=backbones))


def _map_members(
    model: Model, change: Callable[[HeadModel | NetworkModel], HeadModel | NetworkModel]
) -> Model:
    return model.map_members(change) if isinstance(model, EnsembleModel) else change(model)


def check_pixels(inputs: Sequence[Input], count: int = _CHECKED) -> list[Tensor]:
    """uint8 pixels (count, H, W, 3) per input: smooth random pictures with noise, the same ones at
    every size.
    """
    found = []
    for each in inputs:
        draw = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 5, 5, generator=draw)
        smooth = torch.nn.functional.interpolate(coarse, each.preprocessing.crop, mode="bilinear")
        noise = 0.1 * torch.rand(smooth.shape, generator=draw)
        found.append(
            (255 * (0.9 * smooth + noise)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        )
    return found


def _check(model: Model, inputs: Sequence[Input]) -> _Check:
    """Through the same passes as `headrace predict`. Random views all see the same pixels here."""
    pixels = check_pixels(inputs)
    engine = open_engine(model)
    by_pixels = {
        pixels_of(each.preprocessing): value for each, value in zip(inputs, pixels, strict=True)
    }
    seen = []
    for each in engine.renderings:
        own = by_pixels[pixels_of(each.preprocessing)]
        if isinstance(each.augmentation, Symmetries):
            own = torch.from_numpy(
                np.stack([mirror_pixels(image, each.index) for image in own.numpy()])
            )
        seen.append(own)
    batch = PixelBatch(list(range(_CHECKED)), seen)
    predicted = predict_batch(engine, batch)
    if predicted.failed:
        raise ExportError(
            f"the model cannot be compared on test pictures: {predicted.failed[0][1]}"
        )
    return _Check(pixels, predicted.probabilities, _tolerance(model))


def _compare(check: _Check, run: Any, name: str, model: Model) -> float:
    """Also one image at a time: a graph that has the batch size baked in is found here."""
    whole = check.difference(run(check.pixels))
    alone = [run([value[place : place + 1] for value in check.pixels]) for place in range(2)]
    ones = replace(check, expected=check.expected[:2]).difference(np.concatenate(alone))
    worst = max(whole, ones)
    if not worst <= check.tolerance:  # also NaN
        raise ExportError(
            f"{name} predicts otherwise than headrace, by {worst:.2g} at most where "
            f"{check.tolerance:g} is allowed; nothing was written. The heads: "
            f"{', '.join(sorted({member.kind for member in model.members}))}. headrace predict and "
            "--format safetensors are exact"
        )
    return worst


def _tolerance(model: Model) -> float:
    half = any(
        feature.compute_dtype != "float32"
        for member in model.members
        for feature in member.features
    )
    return HALF_TOLERANCE if half else TOLERANCE


@contextlib.contextmanager
def _untraceable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch.export raises many kinds, some of its own
        raise ExportError(
            f"torch.export cannot trace this network ({type(error).__name__}: {str(error)[:300]}). "
            "headrace predict works with it, and --format safetensors"
        ) from error


def _write_onnx(program: Any, inputs: Sequence[Input], path: Path) -> None:
    import onnx

    with contextlib.redirect_stdout(io.StringIO()):
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[each.name for each in inputs],
            output_names=["probabilities"],
            external_data=False,
        )
        assert onnx_program is not None
        onnx_program.save(path, external_data=False)
    onnx.checker.check_model(str(path), full_check=True)


def _onnx_runner(path: Path, inputs: Sequence[Input]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in inputs]
    return lambda pixels: session.run(
        None, {name: value.numpy() for name, value in zip(names, pixels, strict=True)}
    )[0]


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise HeadraceError(
                f"exporting to ONNX needs the library {name}, which is not installed: pip install "
                "'headrace[onnx]'"
            )


def _write_directory(model: Model, folder: Path) -> None:
    """Write a model directory as a run does, with the weights of its networks beside it."""
    weights_files: dict[BackboneSpec, BackboneSpec] = {}
    for backbone in _frozen_backbones(model):
        loaded = load_backbone(backbone)
        name = f"backbone_{len(weights_files)}.safetensors"
        tensors = {
            key: value.detach().contiguous().clone()
            for key, value in loaded.module.state_dict().items()
        }
        (folder / name).write_bytes(save(tensors))  # save_file's files are readable by nobody else
        preprocessing = loaded.preprocessing
        # In full: without its tag, a network would come with its library's preprocessing of today.
        weights_files[backbone] = replace(
            backbone,
            weights=name,
            weights_match="name",
            image_size=preprocessing.crop[0],
            crop_fraction=preprocessing.crop[0] / preprocessing.resize[0],
            mean=preprocessing.mean,
            std=preprocessing.std,
            interpolation=preprocessing.interpolation,
            pixel_range=preprocessing.pixel_range,
        )
    # From members/NAME the weights files lie two folders up.
    to_root = "../../" if isinstance(model, EnsembleModel) else ""

    def with_own_weights(member: HeadModel | NetworkModel) -> HeadModel | NetworkModel:
        if isinstance(member, NetworkModel):
            return member
        backbones = [weights_files[backbone] for backbone in member.backbones]
        fields = tuple(
            dataclasses.asdict(replace(backbone, weights=f"{to_root}{backbone.weights}"))
            for backbone in backbones
        )
        return replace(member, head=replace(member.head, backbones=fields))

    if isinstance(model, EnsembleModel):  # how a run names its members says nothing elsewhere
        names = tuple(f"members/{place}" for place in range(len(model.members)))
        model = replace(model, names=names)
    _map_members(model, with_own_weights).save(folder)


def _frozen_backbones(model: Model) -> list[BackboneSpec]:
    """Return the networks that heads of the model stand on, each once."""
    return list(
        dict.fromkeys(backbone for member in model.members for backbone in member.backbones)
    )


def _inputs_of(model: Model) -> list[Input]:
    inputs: dict[Any, Input] = {}
    networks = [member for member in model.members if isinstance(member, NetworkModel)]
    frozen = [load_backbone(backbone) for backbone in _frozen_backbones(model)]
    for preprocessing in (
        *(network.preprocessing for network in networks),
        *(backbone.preprocessing for backbone in frozen),
    ):
        inputs.setdefault(pixels_of(preprocessing), Input("images", preprocessing))
    if len(inputs) == 1:
        return list(inputs.values())
    return [
        replace(model_input, name=f"images_{index}")
        for index, model_input in enumerate(inputs.values())
    ]


def _require_replaceable(out: Path, *, force: bool) -> None:
    """Raises ExportError for what an export must not replace: everything but an empty folder and,
    with force, an export.
    """
    if out.is_symlink() or not out.exists():
        if out.is_symlink():
            raise ExportError(f"{out} is a link: give the folder that it leads to, or another name")
        return
    here, place = Path.cwd().resolve(), out.resolve()
    if place == here or place in here.parents:
        raise ExportError(
            f"{out} is the working directory, or holds it: give the name of a new folder, "
            f"{out / 'model'}"
        )
    if os.path.ismount(place):
        raise ExportError(
            f"{out} is where a disk is mounted: give the name of a new folder in it, "
            f"{out / 'model'}"
        )
    if not out.is_dir():
        raise ExportError(f"{out} is a file: give another name, or delete it yourself")
    if not any(out.iterdir()):
        return
    if not _is_export(out):
        raise ExportError(
            f"{out} is a folder that headrace export did not write (it has no {MARKER}): it is not "
            f"replaced, with --force neither. Give another name, such as {out / 'model'}, or "
            "delete it yourself"
        )
    if not force:
        raise ExportError(f"{out} is there: give another name, or --force to replace it")


def _is_export(folder: Path) -> bool:
    """Whether an export wrote the folder.

    Those of earlier versions have no marker, but their own two files.
    """
    try:
        if (folder / MARKER).read_text(encoding="utf-8") == _MARKER_TEXT:
            return True
    except (OSError, ValueError):
        pass
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return (
        isinstance(about, dict)
        and {"headrace", "formats"} <= set(about)
        and "Written by `headrace export`." in card
    )


def _replace(temporary: Path, out: Path) -> None:
    """Put the finished directory in its place; what was there goes only when the new one is whole,
    if an export wrote it.

    A folder of somebody else, put there meanwhile, is kept beside it: here alone something is
    deleted.
    """
    if not out.exists():
        temporary.rename(out)
        return
    ours = out.is_dir() and (_is_export(out) or not any(out.iterdir()))
    kept = out.with_name(f"{out.name}.kept-{uuid.uuid4().hex[:8]}")
    old = temporary.with_suffix(f".old{PARTIAL_SUFFIX}") if ours else kept
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    if ours:
        shutil.rmtree(old)
