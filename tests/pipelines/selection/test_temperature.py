"""The winner's temperature: fitted on its out-of-fold predictions, the same wherever the winner
predicts, told before and after.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from support.exports import CASES, fitted
from support.models import run_here
from support.runs import make_photos

from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.sealed import SEAL, UNSEALED, seal, tensor_metadata
from headrace.extract.sources.samples import list_folder
from headrace.heads.data.features import load_rows
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import fit_temperature, with_temperature
from headrace.heads.persist import TrainedHead, load_head
from headrace.heads.results import read_bank
from headrace.pipelines.export.write import export_model
from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.models.model import load_model
from headrace.pipelines.models.torch_head import probability_module
from headrace.pipelines.predict.bulk import predict_table
from headrace.pipelines.predict.listing import list_images
from headrace.pipelines.records import read_record
from headrace.pipelines.report.build import write_report
from headrace.pipelines.selection.evaluation_record import (
    read_test_evaluations,
    write_test_evaluations,
)

RECIPE = """\
images: {folder: photos}
task: {folds: 3, metric: log_loss, test_fraction: 0.3}
backbones:
  - {name: timm:test_resnet, weights: random:0, image_size: 32, crop_fraction: 1.0, taps: [layer2.avg, layer4.avg]}
heads:
  logistic: {C: [3], inputs: [all]}
storage: {dtype: float32}  # float16 rounds by what else is in a batch
compute: {workers: 1, images_per_shard: 64}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose one head is far too sure: a third of the labels are drawn, and nothing holds its
    weights back.
    """
    folder = tmp_path_factory.mktemp("temperature")
    make_photos(folder / "photos", n=90)
    for number in range(0, 90, 3):
        name, other = (("coarse", "fine"), ("fine", "coarse"))[number % 2]
        (folder / "photos" / name / f"{number:03}.png").rename(
            folder / "photos" / other / f"{number:03}.png"
        )
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder, run_here(folder / "recipe.yaml")


def test_it_is_fitted_on_what_the_folds_heads_said(run):
    """The one that the stored out-of-fold predictions give, in the winner's directory and in the
    selection's record, with the errors on either side; what is called "after" has been told by the
    other folds' temperatures.
    """
    _, result = run
    bank = read_bank(result.winner.results_path)
    told = bank.out_of_fold_predictions(result.winner.spec)
    expected = fit_temperature("single", bank.target, told)
    head = load_head(result.paths.winner)
    assert head.temperature == expected > 1.5
    found = read_record(result.paths.selection)["calibration"]
    assert found["temperature"] == expected
    assert found["error_before"] == pytest.approx(
        score("single", bank.target, told, "calibration_error")
    )
    after = told.astype(np.float64)
    for fold in range(3):
        own, others = bank.fold == fold, bank.fold != fold
        after[own] = with_temperature(
            "single", told[own], fit_temperature("single", bank.target[others], told[others])
        )
    assert found["error_after"] == pytest.approx(
        score("single", bank.target, after, "calibration_error")
    )
    assert found["loss_after"] == pytest.approx(score("single", bank.target, after, "log_loss"))
    assert found["error_after"] < found["error_before"]
    assert found["loss_after"] < found["loss_before"]


def test_what_is_expected_is_of_the_winner_at_its_temperature(run):
    """The leaderboard's log loss is of the head as trained; the expected one has what the
    temperature gains, no more.
    """
    selection = run[1].selection
    assert selection.validation == run[1].winner.score
    assert selection.calibrated < selection.validation - 0.05
    assert selection.low < selection.expected < selection.high
    assert selection.optimism == pytest.approx(selection.expected - selection.calibrated)
    assert read_record(run[1].paths.selection)["calibrated"] == selection.calibrated


@pytest.mark.slow
def test_every_way_of_predicting_has_it(run, tmp_path):
    """From the run, its directory, a table, features, a torch program, ONNX and safetensors;
    decisions are the head's own.
    """
    folder, result = run
    model = load_model(folder / "recipe.yaml")
    (member,) = model.members
    assert member.temperature == load_head(result.paths.winner).temperature
    listed = list_folder(folder / "photos")
    paths = listed["path"].tolist()
    expected = model.predict_proba(paths)
    plain = model.at_temperature(1.0).predict_proba(paths)
    clear = plain.max(1) < 0.9999  # of surer ones a float32 says little
    assert clear.sum() > 20
    np.testing.assert_allclose(
        expected[clear], with_temperature("single", plain[clear], member.temperature), atol=1e-3
    )
    assert np.abs(expected - plain).max() > 0.05
    assert (expected.argmax(1) == plain.argmax(1)).all()

    predict_table(
        model, list_images(paths).samples, tmp_path / "out.csv", "csv", console=Console(quiet=True)
    )
    table = pd.read_csv(tmp_path / "out.csv")
    np.testing.assert_allclose(table[["p_coarse", "p_fine"]], expected, atol=1e-6)

    features = [
        open_feature_set(path)
        for name in result.winner.inputs
        for path in result.feature_paths[name]
    ]
    content = dict(zip(features[0].ids(), features[0].content_hashes(), strict=True))
    X, _ = load_rows(features, np.array([content[name] for name in listed["id"]]))
    np.testing.assert_allclose(load_head(result.paths.winner).predict_proba(X), expected, atol=2e-3)

    exported = export_model(model, tmp_path / "model", ["torch", "onnx", "safetensors"])
    assert (
        max(exported.differences.values()) < 1e-5
    )  # the networks' own sums; the temperature adds nothing
    again = load_model(tmp_path / "model")
    assert again.members[0].temperature == member.temperature
    assert again.digest == model.digest
    other = load_model(rewritten(tmp_path / "model", tmp_path / "other", temperature=1.0))
    assert (other.members[0].temperature, other.digest == model.digest) == (1.0, False)
    np.testing.assert_array_equal(again.predict_proba(paths[:8]), model.predict_proba(paths[:8]))
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    assert f"at temperature {member.temperature:.3g}" in card
    assert "calibration error, before the temperature" in card
    assert f"**test log_loss** | {result.test.value:.4f}" in card


def test_the_test_score_is_of_what_is_handed_out(run):
    """The record has the temperature.

    One of an earlier version had none: its head is scored again, the date stays, and no second
    winner is counted.
    """
    folder, result = run
    (evaluation,) = read_test_evaluations(result.paths.test_evaluations)
    temperature = load_head(result.paths.winner).temperature
    assert evaluation["temperature"] == temperature
    report = read_finished_run(result.paths.root)
    model, test = load_model(result.paths.root), report.images.dataset.test
    predicted = model.predict_proba(
        [report.images.image_paths[content.decode()] for content in test.content]
    )
    assert result.test.value == pytest.approx(
        score("single", test.target, predicted, "log_loss"), rel=1e-3
    )

    earlier = {name: value for name, value in evaluation.items() if name != "temperature"}
    earlier |= {
        "evaluated": "2020-01-01T00:00:00+00:00",
        "result": evaluation["result"] | {"value": 99.0},
    }
    write_test_evaluations(result.paths.test_evaluations, [earlier])
    again = run_here(folder / "recipe.yaml")
    assert again.test == result.test
    assert read_test_evaluations(result.paths.test_evaluations) == [
        evaluation | {"evaluated": "2020-01-01T00:00:00+00:00"}
    ]


@pytest.mark.slow
def test_the_report_shows_both(run):
    """Two reliability diagrams of the validation images, the temperature, and both errors."""
    report = write_report(run[1].paths.root, tables=True)
    page = report.page.read_text()
    found = read_record(run[1].paths.selection)["calibration"]
    assert f"{found['error_before']:.3f} without it, {found['error_after']:.3f} with it" in page
    tables = {path.stem: path for path in report.tables if path.suffix == ".csv"}
    for name, error in (
        ("reliability-validation", "error_before"),
        ("reliability-calibrated", "error_after"),
    ):
        bins = pd.read_csv(tables[name])
        gap = (bins["rows"] * (bins["probability"] - bins["right"]).abs()).sum() / bins[
            "rows"
        ].sum()
        assert gap == pytest.approx(found[error], abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "kind"), CASES, ids=[f"{spec.kind}-{kind}" for spec, kind in CASES]
)
@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_a_graph_has_the_temperature_inside(spec, kind, temperature):
    """Of every kind of head, to 1e-6 of what headrace says; of neighbours as far as their distances
    are known.
    """
    head, unseen = fitted(spec, kind)
    head = dataclasses.replace(head, temperature=temperature)
    expected = head.predict_proba(unseen)
    with torch.no_grad():
        found = probability_module(head, temperature)(torch.from_numpy(unseen)).numpy()
    scale = max(1, np.abs(expected).max()) if kind == "regression" else 1
    np.testing.assert_allclose(
        found, expected, atol=(2e-5 if spec.kind in ("knn", "conv") else 5e-6) * scale
    )
    if kind == "single":
        assert (found.argmax(1) == expected.argmax(1)).all()


def rewritten(source: Path, place: Path, **changes: object) -> Path:
    """The head's directory with other values in its description, sealed anew; None leaves a key
    out.
    """
    shutil.copytree(source, place)
    data = (place / "head.safetensors").read_bytes()
    from safetensors.numpy import load, save

    about = json.loads(tensor_metadata(data)["headrace"]) | changes
    text = json.dumps({name: value for name, value in about.items() if value is not None})
    (place / "head.safetensors").write_bytes(
        seal(save(load(data), metadata={"headrace": text, SEAL: UNSEALED}))
    )
    return place


def test_a_head_of_an_earlier_version_has_a_temperature_of_one(run, tmp_path):
    """Format 1 has none. One of a later format, or a number that is no temperature, is refused."""
    winner = run[1].paths.winner
    assert (
        load_head(rewritten(winner, tmp_path / "old", format=1, temperature=None)).temperature == 1
    )
    with pytest.raises(HeadError, match="update headrace"):
        load_head(rewritten(winner, tmp_path / "new", format=4))
    for number, value in enumerate((0, -1, "x", [1], 1e999)):
        with pytest.raises(HeadError, match="not a saved head"):
            load_head(rewritten(winner, tmp_path / str(number), temperature=value))


@pytest.mark.slow
def test_views_are_averaged_before(tmp_path):
    """What the temperature was fitted to is the mean over views; so it is applied to the mean."""
    make_photos(tmp_path / "photos", n=40)
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("taps: [layer2.avg", "views: flips, taps: [layer2.avg")
    )
    result = run_here(tmp_path / "recipe.yaml")
    model = load_model(result.paths.winner)
    (member,) = model.members
    assert member.n_views == 4
    assert member.temperature != 1
    paths = list_folder(tmp_path / "photos")["path"].tolist()[:10]
    plain = model.at_temperature(1.0).predict_proba(paths)
    expected = with_temperature("single", plain, member.temperature)
    np.testing.assert_allclose(model.predict_proba(paths), expected, atol=1e-6)
    exported = export_model(model, tmp_path / "out", ["torch", "safetensors"])
    assert max(exported.differences.values()) < 1e-4
    assert isinstance(member.head, TrainedHead)
