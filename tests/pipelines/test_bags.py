"""Heads on bags through a whole run: leaderboard, weights of images, predictions, exports."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.models import run_here
from support.runs import headrace

from headrace.heads.kind import CannotPredict
from headrace.pipelines.export.output_check import TOLERANCE
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.model import load_model
from headrace.pipelines.recipe.load import RecipeError
from headrace.pipelines.report.build import write_report

RECIPE = """\
images:
  table: labels.csv
  path_column: path
task:
  unit: patient
  folds: 3
  side_columns: [age]
backbones:
  - name: torchvision:resnet18
    weights: random:0
    image_size: 32
    crop_fraction: 1.0
    taps: [layer1.avg]
heads:
  bags: {pooling: [attention, mean, max], hidden: [[16]], dropout: [0], learning_rate: [0.003], epochs: 25}
compute:
  workers: 2
  images_per_shard: 64
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Patients of 1 to 7 images; of the ill ones a third of the images has fine stripes."""
    folder = tmp_path_factory.mktemp("bags")
    generator = np.random.default_rng(0)
    rows = []
    for patient in range(48):
        ill = patient % 2
        size = int(generator.integers(1, 8))
        fine = set(generator.permutation(size)[: max(1, size // 3)].tolist()) if ill else set()
        for number in range(size):
            period = 4 if number in fine else 16
            wave = np.sin(np.arange(40) * 2 * np.pi / period + generator.uniform(0, 6))
            pixels = 128 + 80 * np.sign(wave)[None, :, None] + generator.normal(0, 20, (40, 40, 3))
            path = folder / "photos" / f"{patient:02}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
            rows.append(
                (path.stem, str(path), ("well", "ill")[ill], f"p{patient:02}", number in fine)
            )
    table = pd.DataFrame(rows, columns=["id", "path", "label", "patient", "fine"])
    table["age"] = 50
    table = table.sample(frac=1, random_state=0, ignore_index=True)  # units are mixed up
    table.to_csv(folder / "labels.csv", index=False)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, table, run_here(folder / "recipe.yaml")


def test_bags_are_ranked_by_units_and_keep_the_weights_of_images(run):
    folder, table, result = run
    assert result.failed_heads == 0, result.heads["error"].dropna().unique()
    assert set(result.board["inputs"]) == {("layer1.avg",)}
    assert any(note.startswith("side columns are no input of bags") for note in result.notes)
    best = {
        json.loads(spec)["pooling"]: value
        for spec, value in result.board[["spec", "accuracy"]].values
    }
    assert max(best["attention"], best["max"]) > 0.8
    weights = pd.read_csv(folder / "headrace-runs" / "recipe" / "instance-weights.csv")
    assert weights.columns.tolist() == ["unit", "id", "weight", "fold"]
    assert np.allclose(weights.groupby("unit")["weight"].sum(), 1, atol=1e-4)
    assert set(weights["id"]) < set(table["id"])  # test patients have none
    assert (weights.groupby("id").size() == 1).all()


def test_the_report_shows_the_images_that_decide(run):
    """Every image that was held out stands in its table, with the outcome of its unit."""
    folder, table, _ = run
    report = write_report(folder / "headrace-runs" / "recipe", folder / "report.html", tables=True)
    assert "The images that decide" in report.page.read_text(encoding="utf-8")
    (shown_path,) = (path for path in report.tables if path.name == "instances.csv")
    shown = pd.read_csv(shown_path, dtype=str)
    truth = table.set_index("id")
    assert set(shown["id"]) < set(table["id"])
    assert (shown["unit"] == truth.loc[shown["id"], "patient"].to_numpy()).all()
    assert (shown["label"] == truth.loc[shown["id"], "label"].to_numpy()).all()
    is_right = shown["label"] == shown["predicted"]
    assert (shown["outcome"] == np.where(is_right, "right", "wrong")).all()
    assert is_right.mean() > 0.75


def test_predictions_are_those_of_units_wherever_their_images_stand(run):
    folder, table, _ = run
    arguments = ("predict", "recipe.yaml", "labels.csv", "--path-column", "path", "--out")
    done = headrace(*arguments, "out.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    predicted = pd.read_csv(folder / "out.csv")
    weights = pd.read_csv(folder / "out.weights.csv")
    assert sorted(weights["file"]) == sorted(table["id"])
    assert (weights["unit"] == table.set_index("id").loc[weights["file"], "patient"].array).all()
    assert np.allclose(weights.groupby("unit")["weight"].sum(), 1, atol=1e-4)
    (folder / "out.weights.csv").unlink()
    assert headrace(*arguments, "out.csv", cwd=folder).returncode == 0
    assert weights.equals(pd.read_csv(folder / "out.weights.csv"))
    model = load_model(folder / "headrace-runs" / "recipe")
    assert model.takes_units
    probabilities = model.predict_proba(table["path"].tolist(), units=table["patient"])
    for patient in table["patient"].unique():
        of_patient = probabilities[table["patient"] == patient]
        assert len(np.unique(of_patient, axis=0)) == 1
        alone = table[table["patient"] == patient]
        found = model.predict_proba(alone["path"].tolist(), units=[0] * len(alone))
        np.testing.assert_allclose(found, of_patient, atol=1e-5)
    by_file = predicted.set_index("file")["class"]
    assert (by_file[table["id"]].to_numpy() == table["label"]).mean() > 0.75
    with pytest.raises(CannotPredict, match="Give the unit of each of the 2 images"):
        model.predict_proba(table["path"].tolist()[:2])
    table.drop(columns="patient").to_csv(folder / "without.csv", index=False)
    done = headrace("predict", "recipe.yaml", "without.csv", "--out", "none.csv", cwd=folder)
    assert done.returncode != 0
    assert "there is no column patient" in " ".join(done.stderr.split())


def test_bags_without_units_are_refused_before_anything_is_extracted(run, tmp_path):
    _, table, _ = run
    table.to_csv(tmp_path / "labels.csv", index=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("  unit: patient\n", ""))
    with pytest.raises(RecipeError, match="the task names none: name their column"):
        run_here(tmp_path / "recipe.yaml")


ALONE = """\
import json, sys
sys.modules["headrace"] = None  # as if it were not there
from preprocess import load
import numpy as np, onnxruntime, torch
rows = json.load(open("rows.json"))
pixels = np.stack([load(path) for path, _ in rows])
units = np.array([unit for _, unit in rows])
program = torch.export.load("model.pt2").module()
found = program(torch.tensor(pixels), torch.tensor(units)).numpy()
session = onnxruntime.InferenceSession("model.onnx")
onnx = session.run(None, {"images": pixels, "units": units})[0]
json.dump([found.tolist(), onnx.tolist()], open("out.json", "w"))
"""


@pytest.mark.slow
def test_an_export_takes_units_where_headrace_is_not(run, caplog):
    folder, table, _ = run
    model = load_model(folder / "headrace-runs" / "recipe")
    exported = export_model(model, folder / "out", ["torch", "onnx", "safetensors"])
    assert max(exported.differences.values()) <= TOLERANCE
    assert "empty sequence" not in caplog.text  # of the converter to ONNX
    rows = table[:25]
    units = pd.factorize(rows["patient"])[0]
    expected = model.predict_proba(rows["path"].tolist(), units=units)
    plain = list(zip(rows["path"].tolist(), units.tolist(), strict=True))
    (folder / "out" / "rows.json").write_text(json.dumps(plain))
    subprocess.run([sys.executable, "-c", ALONE], cwd=folder / "out", check=True)
    for found in json.loads((folder / "out" / "out.json").read_text()):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert "images of one unit" in (folder / "out" / "MODEL_CARD.md").read_text()
