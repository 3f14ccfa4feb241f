"""The record of test evaluations is kept twice, and believed only as it was written."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support.models import run_here
from support.runs import make_photos

from headrace.heads.evaluate.intervals import proportion_interval
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.models.model import load_model
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.selection.evaluation_record import (
    read_test_evaluations,
    repair_test_evaluations,
    write_test_evaluations,
)
from headrace.pipelines.stages.select import withdraw

RECIPE = """\
images: {folder: photos}
task: {folds: 2}
backbones:
  - {name: timm:test_resnet, weights: random:0, image_size: 32, crop_fraction: 1.0, taps: [layer2.avg, layer4.avg]}
heads:
  ridge: {alpha: [1, 3], inputs: [[layer4.avg]]}
compute: {workers: 1, images_per_shard: 64}
"""
EVALUATIONS = [{"winner": {"n": n}, "result": {"value": n / 8}, "images": ["a"]} for n in range(3)]


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "test-evaluations.jsonl"
    write_test_evaluations(path, EVALUATIONS)
    return path


DAMAGES = {
    "digit": lambda data: data.replace(b"0.125", b"0.725"),
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "line": lambda data: data[: data.index(b"\n") + 1],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_file_of_two_is_written_again(record, damage):
    """And told; nothing that it said is lost."""
    good = record.read_bytes()
    assert repair_test_evaluations(record) == []
    record.write_bytes(DAMAGES[damage](good))
    assert read_test_evaluations(record) == EVALUATIONS
    (told,) = repair_test_evaluations(record)
    assert str(record) in told
    assert record.read_bytes() == good
    record.unlink()
    (told,) = repair_test_evaluations(record)
    assert "is gone" in told
    assert record.read_bytes() == good


@pytest.mark.parametrize("damage", ["digit", "empty", "cut"])
def test_two_damaged_files_are_an_error_that_says_how_to_go_on(record, damage):
    """What it tells to type is possible, and then the count starts again."""
    copy = record.with_name(".test-evaluations.jsonl")
    for path in (record, copy):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(InvalidInput, match=r"rm .*test-evaluations.jsonl .*test-evaluations.jsonl"):
        repair_test_evaluations(record)
    record.unlink()
    copy.unlink()
    assert repair_test_evaluations(record) == []
    assert read_test_evaluations(record) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_written_again_and_is_no_record_of_nothing(record, damage):
    """Left as it was, the next loss of the record would have let the count start again."""
    copy = record.with_name(".test-evaluations.jsonl")
    good = copy.read_bytes()
    copy.write_bytes(DAMAGES[damage](good))
    assert repair_test_evaluations(record) == []
    assert copy.read_bytes() == good
    copy.write_bytes(good[:-3])
    record.unlink()
    with pytest.raises(InvalidInput, match="jsonl is gone, and its copy has changed"):
        read_test_evaluations(record)


def test_a_record_of_an_earlier_version_gets_its_seals_and_its_copy(tmp_path):
    """It had neither."""
    path = tmp_path / "test-evaluations.jsonl"
    path.write_text("".join(json.dumps(evaluation) + "\n" for evaluation in EVALUATIONS))
    assert repair_test_evaluations(path) == []
    path.write_bytes(b"")
    assert read_test_evaluations(path) == EVALUATIONS


@pytest.mark.parametrize("name", ["test-openings.jsonl", ".test-openings.jsonl"])
def test_a_record_of_an_earlier_version_is_refused(tmp_path, name):
    """Its name has changed: ignored, the test images would count as never seen."""
    make_photos(tmp_path / "photos", n=24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    paths = load_recipe(recipe).paths
    paths.root.mkdir(parents=True)
    (paths.root / name).write_text("{}")
    with pytest.raises(InvalidInput, match=r"earlier version .* rm .*test-openings.jsonl"):
        run_here(recipe)
    with pytest.raises(InvalidInput, match="earlier version"):
        read_test_evaluations(paths.test_evaluations)
    assert {path.name for path in paths.root.iterdir()} == {name}


@pytest.mark.slow
def test_a_run_is_not_deceived_and_withdraws_what_is_true_no_more(tmp_path):
    """A changed score, an emptied record; an ensemble whose run has none any more; a damaged
    winner.
    """
    make_photos(tmp_path / "photos", n=24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "ensemble: {}\n")
    first = run_here(recipe)
    paths, value = first.paths, first.test.value
    assert (paths.ensemble / "ensemble.json").exists()
    good = paths.test_evaluations.read_bytes()
    assert f'"value": {value}'.encode() in good
    head = paths.winner / "head.safetensors"
    winner = head.read_bytes()
    for bad in (good.replace(f'"value": {value}'.encode(), b'"value": 0.123'), b""):
        paths.test_evaluations.write_bytes(bad)
        head.write_bytes(winner[:-8] + b"\1" * 8)
        again = run_here(recipe)
        assert again.test == first.test
        assert any("test-evaluations.jsonl" in note for note in again.notes)
        assert paths.test_evaluations.read_bytes() == good
        load_model(paths.winner)
    recipe.write_text(RECIPE.replace("[1, 3]", "[7]") + "ensemble: {}\n")
    after = run_here(recipe)
    assert after.ensemble is None
    assert not paths.ensemble.exists()
    assert [member.head.spec.alpha for member in load_model(paths.root).members] == [7.0]


def test_the_interval_is_over_groups_and_an_earlier_method_is_replaced(tmp_path):
    """Photographs of one module count as one where all are right; a record with a percentile
    bootstrap's interval keeps its score and its date, and is given the interval of this version,
    without another evaluation.
    """
    make_photos(tmp_path / "photos", n=24)
    rows = [(path, path.parent.name) for path in sorted((tmp_path / "photos").rglob("*.*"))]
    table = pd.DataFrame(rows, columns=["path", "label"])
    table["module"] = table.groupby("label").cumcount() // 2
    table.to_csv(tmp_path / "photos.csv", index=False)
    recipe = tmp_path / "recipe.yaml"
    source = "images: {table: photos.csv}\ntask: {folds: 2, group: module}"
    recipe.write_text(RECIPE.replace("images: {folder: photos}\ntask: {folds: 2}", source))
    first = run_here(recipe)
    groups = first.test.groups
    assert groups < first.test.images
    assert read_test_evaluations(first.paths.test_evaluations)[0]["result"]["groups"] == groups
    (evaluation,) = read_test_evaluations(first.paths.test_evaluations)
    right = np.arange(first.test.images) < round(first.test.value * first.test.images)
    assert first.test.high - first.test.low > np.diff(proportion_interval(right))
    old = {key: value for key, value in evaluation.items() if key != "interval"}
    old["result"] = {
        key: value for key, value in evaluation["result"].items() if key != "groups"
    } | {"low": 1.0}
    write_test_evaluations(first.paths.test_evaluations, [old | {"evaluated": "long ago"}])
    again = run_here(recipe)
    assert again.test == first.test
    (mended,) = read_test_evaluations(first.paths.test_evaluations)
    assert mended == evaluation | {"evaluated": "long ago"}


def test_a_withdrawn_directory_is_gone_with_what_an_earlier_withdrawal_left(tmp_path):
    """And what is not there is no error."""
    for name in ("ensemble", ".ensemble.0f.partial"):
        (tmp_path / name / "members").mkdir(parents=True)
    (tmp_path / "selection.json").touch()
    withdraw(tmp_path / "ensemble", tmp_path / "selection.json", tmp_path / "winner")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "test", "value"), [("auc", "b", 0.1), ("log_loss", "a", 0.2), ("log_loss", "b", 0.3)]
)
def test_a_report_shows_the_evaluation_of_its_metric_and_its_test_images(metric, test, value):
    """The same winner was evaluated before: by another metric, and before a label was corrected."""
    model = {"train": "t", "bank": "x.h5", "spec": "{}"}
    run = FinishedRun(None, None, metric, None, None)
    vars(run).update(
        bank=SimpleNamespace(task_digest="t", path=Path("banks/x.h5")),
        winner=SimpleNamespace(spec="{}"),
        images=SimpleNamespace(dataset=SimpleNamespace(test=SimpleNamespace(digest=test))),
        test_evaluations=[
            {"winner": {**model, "test": shown}, "result": {"metric": of, "value": number}}
            for shown, of, number in (
                ("b", "auc", 0.1),
                ("a", "log_loss", 0.2),
                ("b", "log_loss", 0.3),
            )
        ],
    )
    assert run.winner_evaluation["result"]["value"] == value
