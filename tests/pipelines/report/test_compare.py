"""Two runs compared: differences by hand, intervals that cover, and what is refused."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from support.reports import HOSTILE, RECIPE
from support.runs import headrace
from typer.testing import CliRunner

from headrace.heads.evaluate.metrics import score
from headrace.pipelines.cli.main import app
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.report.compare import (
    PairedSide,
    _pair,
    _right_or_wrong_blocks,
    require_same_task,
    write_comparison,
)
from headrace.pipelines.report.judged import JudgedSide
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.report.paired import paired_metrics, paired_proportion_interval
from headrace.pipelines.run import run_recipe


@pytest.fixture(scope="module")
def runs(hostile_run, tmp_path_factory):
    """The hostile run, and one of its images at 16 pixels, the first ten left out."""
    folder = tmp_path_factory.mktemp("compare") / "data"
    shutil.copytree(hostile_run, folder)
    table = pd.read_csv(folder / "labels.csv")
    table.iloc[10:].to_csv(folder / "labels.csv", index=False)
    text = RECIPE.format(kind="single", target="label", heads="  knn:\n    k: [1, 3]\n")
    text = text.replace("image_size: 32", "image_size: 16").replace("runs/single", "runs/other")
    (folder / "other.yaml").write_text(text)
    run_recipe(load_recipe(folder / "other.yaml"), console=Console(quiet=True))
    return hostile_run / "runs" / "single", folder / "runs" / "other"


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "compared.html"
    return write_comparison(*runs, out, tables=True)


def frame(compared, name):
    return pd.read_parquet(compared.page.with_name("compared-tables") / f"{name}.parquet")


@pytest.mark.slow
def test_only_common_images_are_compared_and_that_is_said(runs, compared):
    """The validation images of both; each metric of both is `score` of these very rows."""
    first, second = (read_finished_run(run) for run in runs)
    common = set(first.bank.content[first.held_out_rows]) & set(
        second.bank.content[second.held_out_rows]
    )
    paired = frame(compared, "paired")
    rows = paired[paired["side"] == "validation"].set_index("metric")
    assert set(rows["images"]) == {len(common)}
    for run, column in ((first, "first"), (second, "second")):
        _, of_image = np.unique(run.bank.content[run.held_out_rows], return_index=True)
        kept = run.held_out_rows[of_image]
        kept = kept[[content in common for content in run.bank.content[kept]]]
        expected = score(
            "single", run.bank.target[kept], run.out_of_fold_predictions[kept], "accuracy"
        )
        assert rows[column]["accuracy"] == pytest.approx(expected)
    assert rows["difference"].tolist() == pytest.approx((rows["second"] - rows["first"]).tolist())
    text = compared.page.read_text()
    assert "The two validation splits are not the same images" in text
    agreement = frame(compared, "agreement-validation")
    assert agreement[["right", "wrong"]].to_numpy().sum() == len(common)


def test_users_words_are_text_there_too(compared):
    """Class names and ids stand in the page escaped."""
    text = compared.page.read_text()
    assert "<img src=x" not in text
    assert "<svg onload" not in text
    assert text.count("<script>") == 1
    assert HOSTILE[0] in set(frame(compared, "recalls")["class"])


def test_the_order_of_the_classes_does_not_matter():
    """The second run's numbers are taken for the classes that they mean."""
    ids = np.array(["x", "y", "z"])
    first = JudgedSide("test", ids, ids, np.array([0, 1, 2]), np.eye(3), np.arange(3))
    # The same labels and predictions, with the classes in the order 2, 0, 1.
    second = JudgedSide("test", ids, ids, np.array([1, 2, 0]), np.eye(3)[[1, 2, 0]], np.arange(3))
    side = _pair("single", first, second, [1, 2, 0])
    assert (side.relabelled, side.alone) == (0, (0, 0))
    assert np.array_equal(side.predictions[0], side.predictions[1])
    relabelled = JudgedSide("test", ids, ids, np.array([1, 2, 1]), np.eye(3), np.arange(3))
    assert _pair("single", first, relabelled, [1, 2, 0]).relabelled == 1


def test_images_that_changed_are_listed_with_what_both_say():
    """The surest first; those on which both are right, or both wrong, are not among them."""
    ids = np.array(["same", "lost", "won", "both wrong"])
    first = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])
    second = np.array([[0.7, 0.3], [0.1, 0.9], [0.6, 0.4], [0.2, 0.8]])
    side = PairedSide(
        "test", ids, ids, np.zeros(4, int), np.stack([first, second]), np.arange(4), (0, 0), 0
    )
    run = SimpleNamespace(task_kind="single", classes=("cat", "dog"))
    agreement, won, lost, table = _right_or_wrong_blocks(run, side, Thumbnails({}))
    assert agreement.frame[["right", "wrong"]].to_numpy().tolist() == [[1, 1], [1, 1]]
    assert table.frame.to_numpy().tolist() == [
        ["lost", "became wrong", "cat", "cat", "dog"],
        ["won", "became right", "cat", "dog", "cat"],
    ]
    assert [picture.title for picture in (*won.pictures, *lost.pictures)] == ["won", "lost"]


def test_other_tasks_are_refused():
    """With what differs, and what to type."""

    def run(kind, *classes):
        return SimpleNamespace(task_kind=kind, classes=classes, paths=SimpleNamespace(root="r"))

    with pytest.raises(InvalidInput, match=r"not in both: 'b', 'c'.*headrace report RUN"):
        require_same_task(run("single", "a", "b"), run("single", "a", "c"))
    with pytest.raises(InvalidInput, match="a single task and r a multi one"):
        require_same_task(run("single", "a", "b"), run("multi", "a", "b"))


def test_options_of_one_page_are_refused_for_two_runs():
    """They would be without effect."""
    for option in ("--watts", "--pictures"):
        arguments = ["report", "a.yaml", "b.yaml", option, "9"]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
        assert done.exit_code == 2
        assert "are for the page of one" in done.output


def test_three_runs_and_runs_without_a_common_image_are_refused(runs, tmp_path, monkeypatch):
    """A sentence and exit code 2, no traceback."""
    done = headrace("report", *runs, runs[0], cwd=tmp_path)
    assert done.returncode == 2
    assert "expected one, or two to compare" in " ".join(done.stderr.split())
    from headrace.pipelines.report import compare

    real = compare.judged_sides

    def apart(run, tested):
        return tuple(
            JudgedSide(s.name, s.ids, np.char.add(s.content, str(run.paths.root)), *rest(s))
            for s in real(run, tested)
        )

    def rest(side):
        return side.target, side.predicted, side.groups

    monkeypatch.setattr(compare, "judged_sides", apart)
    with pytest.raises(InvalidInput, match="have judged no image in common"):
        write_comparison(*runs, tmp_path / "no.html")


def test_a_run_against_itself_differs_nowhere(runs, tmp_path):
    """Every difference is 0, and no image changed."""
    report = write_comparison(runs[0], runs[0], tmp_path / "same.html", tables=True)
    paired = pd.read_parquet(report.page.with_name("same-tables") / "paired.parquet")
    assert (paired["difference"] == 0).all()
    assert "Both are right and wrong on the same images." in report.page.read_text()


def test_damaged_lines_of_either_run_are_told(runs, tmp_path):
    """Of stages.jsonl, say, whose times are then missing from what the run has taken."""
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[0], damaged)
    with (damaged / "stages.jsonl").open("a") as file:
        file.write("{\n")
    page = write_comparison(runs[0], damaged, tmp_path / "page.html").page.read_text()
    assert "B: Damaged lines of stages.jsonl, left out here: 1." in page


def test_the_paired_interval_turns_with_its_arguments():
    """Swapped, it is the negative; it holds the difference; equal predictors have one around 0."""
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 50)) < np.array([[0.9], [0.7]])
    low, high = paired_proportion_interval(first, second)
    assert low < second.mean() - first.mean() < high
    assert paired_proportion_interval(second, first) == pytest.approx((-high, -low))
    low, high = paired_proportion_interval(first, first)
    assert low < 0 < high


@pytest.mark.parametrize("group_size", [1, 5])
def test_the_paired_interval_covers(group_size):
    """At least 93 % of the time, of 60 rows, also where rows of a group are alike."""
    rng = np.random.default_rng(0)
    groups = np.arange(60) // group_size
    held = []
    for _ in range(400):
        # Of each group, whether a row is hard for both and whether for one alone.
        hard = (rng.random(groups.max() + 1) < 0.2)[groups]
        first = ~hard & (rng.random(60) < 0.9)
        second = ~(hard & (rng.random(groups.max() + 1) < 0.5)[groups]) & (rng.random(60) < 0.9)
        low, high = paired_proportion_interval(first, second, groups)
        held.append(low <= 0.09 <= high)  # 0.9 × (1 - 0.1) - 0.9 × (1 - 0.2)
    assert np.mean(held) >= 0.93


def test_every_metric_has_its_difference():
    """`score` of each; a better second has intervals above 0 for accuracy, below for losses."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 300)
    noise = rng.random((2, 300, 3))
    good = noise + np.eye(3)[target] * np.array([0.3, 2.0])[:, None, None]
    predictions = good / good.sum(2, keepdims=True)
    table = paired_metrics("single", target, predictions, np.arange(300)).set_index("metric")
    for metric in ("accuracy", "auc", "log_loss", "macro_f1"):
        assert table["second"][metric] == score("single", target, predictions[1], metric)
    assert table["low"]["accuracy"] > 0
    assert table["low"]["auc"] > 0
    assert table["high"]["log_loss"] < 0
