"""Heads on bags through a whole run: leaderboard, weights of images, predictions, exports."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.exports import run_without_headrace
from support.models import run_here
from support.runs import headrace

from headrace.heads.results import read_bank
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.export.output_check import TOLERANCE
from headrace.pipelines.export.write import export_model
from headrace.pipelines.models.model import load_model
from headrace.pipelines.recipe.load import RecipeError
from headrace.pipelines.report.build import write_report
from headrace.pipelines.selection.ensemble import Member, build_ensemble

pytestmark = pytest.mark.slow

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
    table = made_patients(folder / "photos", range(48))
    table.to_csv(folder / "labels.csv", index=False)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, table, run_here(folder / "recipe.yaml")


def made_patients(photos, patients):
    """Write their images; returns the table, units mixed up."""
    generator = np.random.default_rng(min(patients))
    rows = []
    for patient in patients:
        ill = patient % 2
        size = int(generator.integers(1, 8))
        fine = set(generator.permutation(size)[: max(1, size // 3)].tolist()) if ill else set()
        for number in range(size):
            period = 4 if number in fine else 16
            wave = np.sin(np.arange(40) * 2 * np.pi / period + generator.uniform(0, 6))
            pixels = 128 + 80 * np.sign(wave)[None, :, None] + generator.normal(0, 20, (40, 40, 3))
            path = photos / f"{patient:02}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
            rows.append(
                (path.stem, str(path), ("well", "ill")[ill], f"p{patient:02}", number in fine)
            )
    table = pd.DataFrame(rows, columns=["id", "path", "label", "patient", "fine"])
    table["age"] = 50
    return table.sample(frac=1, random_state=0, ignore_index=True)


def attention_and_a_plain_head(board, held, metric, section, **rest):
    """The run's ensemble with its members given."""
    found = build_ensemble(board, held, metric, section, **rest)
    bags = board[board["spec"].str.contains("attention", regex=False)].iloc[0]
    plain = board[board["kind"] == "logistic"].iloc[0]
    members = Member(0.75, 1.0, bags, ("a",)), Member(0.25, 1.0, plain, ("a",))
    return dataclasses.replace(found, members=members, chosen=True)


@pytest.fixture(scope="module")
def ensemble_run(run):
    """On the same images and features, of attention (3/4) and a head that reads images alone."""
    folder, table, _ = run
    recipe = RECIPE.replace("heads:\n", "heads:\n  logistic: {C: [1]}\n") + "ensemble: {}\n"
    (folder / "ensemble.yaml").write_text(recipe)
    with mock.patch("headrace.pipelines.stages.select.build_ensemble", attention_and_a_plain_head):
        return folder, table, run_here(folder / "ensemble.yaml")


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


def test_an_ensembles_weights_are_its_members_averaged(ensemble_run):
    """Of attention what its fold's head says, of the other member the same for all images of a
    unit; the report shows these, and the units as the ensemble predicts them.
    """
    folder, _, result = ensemble_run
    root = folder / "headrace-runs" / "ensemble"
    weights = pd.read_csv(root / "instance-weights.csv").set_index("id")
    attention, plain = result.ensemble.members
    banks = [read_bank(member.row["path"]) for member in (attention, plain)]
    sizes = weights.groupby("unit")["weight"].transform("size")
    for fold in range(3):
        ids = banks[0].ids[banks[0].rows(fold)]
        of_attention = banks[0].arrays(attention.row["spec"], fold)["instance_weight"]
        expected = 0.75 * of_attention + 0.25 / sizes[ids]
        np.testing.assert_allclose(weights["weight"][ids], expected, atol=1e-5)
    report = write_report(root, folder / "ensemble.html", tables=True)
    assert "The selected model is an ensemble" in report.page.read_text(encoding="utf-8")
    (shown_path,) = (path for path in report.tables if path.name == "instances.csv")
    shown = pd.read_csv(shown_path, dtype=str).set_index("id")
    np.testing.assert_allclose(
        shown["weight"].astype(float), weights["weight"][shown.index], atol=1e-3
    )
    predicted = sum(
        member.weight * bank.out_of_fold_predictions(member.row["spec"])
        for member, bank in zip((attention, plain), banks, strict=True)
    )
    ill = pd.Series(predicted[:, banks[0].classes.index("ill")], banks[0].ids)[shown.index]
    of_units = ill.groupby(shown["unit"]).transform("mean")
    assert (shown["predicted"] == np.where(of_units > 0.5, "ill", "well")).all()


def test_new_images_that_decide_are_found_without_a_cache(ensemble_run):
    """Patients whose striped image is known, in no cache: it is the weightiest of its patient."""
    folder, *_ = ensemble_run
    table = made_patients(folder / "new", range(101, 125, 2))
    table.to_csv(folder / "new.csv", index=False)
    arguments = ("predict", "ensemble.yaml", "new.csv", "--path-column", "path", "--out")
    done = headrace(*arguments, "new-out.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "What each image weighs: new-out.weights.csv" in " ".join(done.stderr.split())
    weights = pd.read_csv(folder / "new-out.weights.csv").set_index("file")
    assert sorted(weights.index) == sorted(table["id"])
    assert np.allclose(weights.groupby("unit")["weight"].sum(), 1, atol=1e-4)
    assert weights["weight"].min() >= 0.25 / 7 - 1e-4  # the plain member's share of seven images
    n_fine = table.groupby("patient")["fine"].transform("sum")
    n_images = table.groupby("patient")["fine"].transform("size")
    is_told = table[(n_images > 1) & (n_fine == 1)].set_index("id")
    heaviest = weights.loc[is_told.index].groupby("unit")["weight"].idxmax()
    assert is_told["fine"][heaviest].mean() > 0.8


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
    done = headrace(*arguments, "pixels.csv", "--no-cache", cwd=folder)
    assert done.returncode == 0, done.stderr
    from_pixels = pd.read_csv(folder / "pixels.weights.csv").set_index("file")
    np.testing.assert_allclose(from_pixels["weight"][weights["file"]], weights["weight"], atol=2e-3)
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
    with pytest.raises(InvalidInput, match="Give the unit of each of the 2 images"):
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
import json
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
    run_without_headrace(ALONE, folder / "out")
    for found in json.loads((folder / "out" / "out.json").read_text()):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert "images of one unit" in (folder / "out" / "MODEL_CARD.md").read_text()
