"""Bands, boxes and tiles from a recipe to predictions, a fine-tuned network and an export."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from rich.console import Console
from support.models import run_here
from support.networks import make_case
from support.runs import headrace

from headrace.extract.images.crops import Crop
from headrace.extract.sources.regions import Boxes
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.task import REFIT
from headrace.heads.errors import HeadError
from headrace.heads.results import read_bank
from headrace.pipelines.cli.main import main
from headrace.pipelines.export.write import export_model
from headrace.pipelines.finetune.task import FoldJob, train_fold
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.model import load_model
from headrace.pipelines.predict.bulk import predict_table
from headrace.pipelines.predict.listing import list_images, unrecorded_parts_note
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.recipe.text import RecipeError

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
NETWORK = 'name: "timm:test_resnet", weights: "random:0", image_size: 32, crop_fraction: 1.0'
TASK = "task: {folds: 2, test_fraction: 0.25}\n"
HEADS = "heads: {logistic: {C: [1], inputs: [each]}}\ncompute: {workers: 1}\n"


def scene(path: Path, label: int) -> None:
    """A picture of five bands of 16 bits, whose second tells its class."""
    values = RNG.integers(200, 1200, (24, 24, 5), dtype=np.uint16)
    values[:, :, 1] += 2500 * label
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 24 scenes."""
    folder = tmp_path_factory.mktemp("bands")
    for number in range(24):
        target = folder / "scenes" / f"class{number % 2}"
        target.mkdir(parents=True, exist_ok=True)
        scene(target / f"{number}.tif", number % 2)
    (folder / "bands.yaml").write_text(
        "images: {folder: scenes, pixel_range: [0, 10000]}\n" + TASK + "backbones:\n"
        f"  - {{{NETWORK}, bands: [2, 1, 3, 5], taps: [layer1.avg]}}\n" + HEADS
    )
    run_here(folder / "bands.yaml")
    scene(folder / "new.tif", 1)
    return folder


def test_a_head_on_five_bands_predicts_and_is_exported(bands: Path, tmp_path: Path) -> None:
    """From a file, an array and an array with its channels first; as ONNX with four channels."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = load_model(bands / "headrace-runs" / "bands")
    new = bands / "new.tif"
    values = tifffile.imread(new)
    expected = model.predict_proba(str(new))
    assert expected[0].argmax() == 1
    # A batch of two differs from one of one in the last digits of features.
    np.testing.assert_allclose(
        model.predict_proba([values, np.moveaxis(values, 2, 0)])[1:], expected, rtol=1e-4
    )
    np.testing.assert_array_equal(model.predict_proba(values[None]), expected)
    export_model(model, tmp_path / "exported", ["onnx", "safetensors"])
    session = onnxruntime.InferenceSession(str(tmp_path / "exported" / "model.onnx"))
    (graph_input,) = session.get_inputs()
    assert (graph_input.shape[1:], graph_input.type) == ([32, 32, 4], "tensor(float)")
    namespace: dict[str, object] = {"__name__": "preprocess"}
    exec((tmp_path / "exported" / "preprocess.py").read_text(), namespace)
    pixels = namespace["load"](new)  # type: ignore[operator]
    (graph_output,) = session.run(None, {graph_input.name: pixels[None]})
    np.testing.assert_allclose(graph_output, expected, atol=1e-5)
    again = load_model(tmp_path / "exported")
    np.testing.assert_allclose(again.predict_proba(str(new)), expected, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_a_network_of_two_bands_is_fine_tuned(tmp_path: Path) -> None:
    """From its pixels, in 32-bit floats: its file is loaded, predicts, and is exported."""
    backbone = BackboneSpec(
        "timm:test_resnet", "random:0", image_size=64, crop_fraction=1.0, bands=(3, 1)
    )
    case = make_case(tmp_path, backbone=backbone)
    job = case.job(backbone=backbone, train_above="all", cut=None)
    train_fold(FoldJob(job, REFIT, epochs=1))
    boxes = ImageParts(boxes=Boxes(("l", "t", "r", "b"), "xyxy"))
    dataclasses.replace(load_model(job.model), image_parts=boxes).save(tmp_path / "winner")
    network = load_model(tmp_path / "winner")
    assert network.preprocessing.bands == (3, 1)
    photos = [str(path) for path in sorted((tmp_path / "photos").rglob("*.png"))[:3]]
    expected = network.predict_proba(photos)
    export_model(network, tmp_path / "exported", ["torch", "safetensors"])
    again = load_model(tmp_path / "exported")
    assert again.image_parts == boxes
    np.testing.assert_allclose(again.predict_proba(photos), expected, atol=1e-6)


def test_boxes_of_a_table(tmp_path: Path) -> None:
    """A class per box: rows of one image stay on one side, boxes are predicted with their ids."""
    rows = []
    for number in range(16):
        values = RNG.integers(0, 60, (40, 80, 3), dtype=np.uint8)
        for column, label in enumerate(("dark", "light")):
            left = 40 * column
            values[:, left : left + 40] += np.uint8(150 * column)
            rows.append((f"{number}.png", left, 0, 45 if column else 40, 40, label))
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    table = pd.DataFrame(rows, columns=["path", "x", "y", "width", "height", "label"])
    table.to_csv(tmp_path / "boxes.csv", index=False)
    (tmp_path / "boxes.yaml").write_text(
        "images: {table: boxes.csv}\n"
        + TASK
        + f"backbones: [{{{NETWORK}, taps: [layer1.avg]}}]\n"
        + HEADS
    )
    run_here(tmp_path / "boxes.yaml")
    run = tmp_path / "headrace-runs" / "boxes"
    (bank_file,) = (run / "banks").rglob("*.h5")
    bank = read_bank(bank_file)
    folds_of_image: dict[str, set[int]] = {}
    for row_id, fold in zip(bank.ids, bank.fold, strict=True):
        folds_of_image.setdefault(row_id.split("#")[0], set()).add(int(fold))
    assert len(folds_of_image) == 12
    assert all(len(folds) == 1 for folds in folds_of_image.values())
    model = load_model(run)
    images = list_images([tmp_path / "boxes.csv"]).samples
    predict_table(model, images, tmp_path / "p.csv", "csv", console=Console(quiet=True))
    predicted = pd.read_csv(tmp_path / "p.csv")
    assert list(predicted["file"])[:2] == ["0.png#0,0,40,40", "0.png#40,0,45,40"]
    assert (predicted["class"] == table["label"]).mean() > 0.9
    path = str(tmp_path / "3.png")
    np.testing.assert_allclose(
        model.predict_proba([Crop(40, 0, 40, 40).locator(path)]),
        model.predict_proba([Image.open(path).crop((40, 0, 80, 40))]),
        atol=1e-6,
    )


def test_tiles_from_a_run_to_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """New images are cut as those of the run were, by a copy of the model's own two files and by an
    export; a graph predicts the same of the same parts. Of a file that does not say it, and of one
    that was changed there, the user hears.
    """
    for number in range(16):
        values = RNG.integers(0, 60, (32, 64, 3), dtype=np.uint8) + np.uint8(120 * (number % 2))
        target = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(target)
    (tmp_path / "tiles.yaml").write_text(
        "images: {folder: photos, tiles: {size: 32, overlap: 8}}\n"
        + TASK
        + f"backbones: [{{{NETWORK}, taps: [layer1.avg]}}]\n"
        + HEADS
    )
    run_here(tmp_path / "tiles.yaml")
    run = tmp_path / "headrace-runs" / "tiles"
    stored = pd.read_parquet(run / "predictions.parquet").set_index("id")
    export_model(load_model(run), tmp_path / "out", ["torch", "safetensors"])
    winner, copied = run / "winner", tmp_path / "copied"
    copied.mkdir()
    for name in HEAD_FILES:
        shutil.copy(winner / name, copied)
    assert {path.name for path in winner.iterdir()} == set(HEAD_FILES)
    for model in (copied, tmp_path / "out"):
        command = ["predict", model, "photos", "--no-cache", "-o", tmp_path / "p.csv", "--force"]
        done = headrace(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        predicted = pd.read_csv(tmp_path / "p.csv")
        assert len(predicted) == 3 * 16  # of 64 pixels, at 0, 24 and 32
        same = stored.loc[[name.removeprefix("photos/") for name in predicted["file"]]]
        np.testing.assert_allclose(predicted["p_class1"], same["p_class1"], atol=1e-3)
    done = headrace(*command, "--whole-images", cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / "p.csv")) == 16
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["parts"]["tiles"]["overlap"] == 8
    namespace: dict[str, Any] = {"__name__": "preprocess"}
    exec((tmp_path / "out" / "preprocess.py").read_text(), namespace)
    names = predicted["file"][:6]
    pixels = []
    for name in names:
        path, _, corner = name.partition("#")
        box = (*map(int, corner.split(",")), 32, 32)
        pixels.append(namespace["load"](tmp_path / path, box=box))
    with pytest.raises(ValueError, match="the box holds no pixel"):
        namespace["load"](tmp_path / path, box=(99, 0, 9, 9))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    found = program(torch.tensor(np.stack(pixels))).numpy()
    np.testing.assert_allclose(found[:, 1], predicted["p_class1"][:6], atol=1e-5)

    assert unrecorded_parts_note(copied) == []  # lies in no run
    silent = load_model(run)
    dataclasses.replace(silent, head=dataclasses.replace(silent.head, image_parts=None)).save(
        winner
    )
    photos, table = tmp_path / "photos", tmp_path / "old.csv"
    monkeypatch.setattr(
        "sys.argv", ["headrace", "predict", str(run), str(photos), "--no-cache", "-o", str(table)]
    )
    with pytest.raises(SystemExit):
        main()
    assert "its run's recipe has images.tiles" in capsys.readouterr().err
    weights = copied / "head.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data.replace(b'\\"overlap\\": 8', b'\\"overlap\\": 9'))
    assert weights.read_bytes() != data
    with pytest.raises(HeadError, match="has changed since it was written"):
        load_model(copied)


def test_a_recipe_says_what_goes_together(tmp_path: Path) -> None:
    for text, said in (
        ("bands: [1, 2], mean: [0.5]", "mean has 1 value; expected 2, one for each of the bands"),
        ("mean: [0.5, 0.5]", "mean has 2 values; expected 3"),
        ("band_ranges: [[0, 1], [0, 1], [0, 1]]", "band_ranges goes with bands"),
        ("bands: [0]", "greater than 0"),
    ):
        (tmp_path / "r.yaml").write_text(
            "images: {folder: x}\n" + TASK + f"backbones: [{{{NETWORK}, {text}}}]\n" + HEADS
        )
        with pytest.raises(RecipeError, match=said):
            load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(
        "images: {folder: x, tiles: {size: 8, overlap: 8}}\n"
        + TASK
        + f"backbones: [{{{NETWORK}}}]\n"
        + HEADS
    )
    with pytest.raises(
        RecipeError, match="8 pixels that overlap by 8: expected an overlap from 0 to 0"
    ):
        load_recipe(tmp_path / "r.yaml")
