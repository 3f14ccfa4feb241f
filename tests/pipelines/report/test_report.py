"""The report of a run: what its sections say is so, what it may not show, and what it does when
things are gone.
"""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support.reports import COPIES, FLIPPED, HOSTILE, finished_run
from support.runs import headrace

from headrace.pipelines.finished import read_finished_run
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.records import read_record, write_record
from headrace.pipelines.report.build import write_report
from headrace.pipelines.report.label_errors import (
    confident_classes,
    likely_errors_by_label,
    likely_label_errors,
)
from headrace.pipelines.report.page.blocks import (
    Column,
    Gallery,
    Headline,
    Note,
    Picture,
    Section,
    Table,
    plain_text,
)
from headrace.pipelines.report.page.render import format_cell, render_page
from headrace.pipelines.report.selection_and_advice import (
    advice_section,
    choice_section,
    ensemble_section,
    expected_text,
)
from headrace.pipelines.selection.duplicates import similar_pairs, standardized


@pytest.fixture(scope="module")
def folder(hostile_run):
    """The data, and a finished run of them with its report and tables. The tests leave
    it as it is.
    """
    write_report(hostile_run / "single.yaml", tables=True)
    return hostile_run


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "runs" / "single" / "report.html").read_text()


def table(folder, name):
    return pd.read_parquet(folder / "runs" / "single" / "report-tables" / f"{name}.parquet")


@pytest.mark.slow
def test_the_page_needs_nothing_else(page):
    """No address is loaded from anywhere, and the policy allows one script, by its hash."""
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page
    assert page.count("<script>") == 1


def test_users_words_are_text(page):
    """Class names, ids and reasons stand in the page escaped, whatever is in them."""
    assert "<img src=x" not in page
    assert "<svg onload" not in page
    assert "&lt;script&gt;window.pwned = 1&lt;/script&gt;" in page
    assert "\u202e" not in page
    assert "\x07" not in page


def test_every_table_is_a_file_of_the_same_rows(folder):
    """CSV and Parquet, in full precision; the leaderboard is the run's own."""
    tables = folder / "runs" / "single" / "report-tables"
    names = {path.stem for path in tables.iterdir()}
    assert {
        "leaderboard",
        "taps",
        "confusion-validation",
        "classes-test",
        "mistakes",
        "near-duplicates",
        "stages",
    } <= names
    assert len(list(tables.iterdir())) == 2 * len(names)
    board = pd.read_csv(folder / "runs" / "single" / "leaderboard.csv")
    for shown in (table(folder, "leaderboard"), pd.read_csv(tables / "leaderboard.csv")):
        assert shown["accuracy"].tolist() == board["accuracy"].tolist()


def test_the_confusion_matrix_counts_every_held_out_row(folder):
    """Its trace is the pooled accuracy of the winner's out-of-fold predictions."""
    run = read_finished_run(folder / "runs" / "single")
    counts = table(folder, "confusion-validation").iloc[:, 1:].to_numpy()
    assert counts.sum() == len(run.held_out_rows)
    right = (
        run.out_of_fold_predictions[run.held_out_rows].argmax(1)
        == run.bank.target[run.held_out_rows]
    ).sum()
    assert np.trace(counts) == right
    assert counts.sum() - right == len(table(folder, "mistakes"))


def test_flipped_labels_are_found(folder):
    """Whoever is held out in some fold and carries the other class's label is on the list of likely
    label errors.
    """
    run = read_finished_run(folder / "runs" / "single")
    labels = pd.read_csv(folder / "labels.csv")
    flipped = set(labels["id"][~labels["id"].str.startswith("copy")].iloc[:FLIPPED]) & set(
        run.bank.ids[run.held_out_rows]
    )
    assert flipped
    assert flipped <= set(table(folder, "label-errors")["id"])


def test_re_encoded_copies_on_two_sides_are_found(folder):
    """Every copy that stands on another side than its original is among the near-duplicates."""
    run = read_finished_run(folder / "runs" / "single")
    assert not isinstance(run.images, str)
    train, test = run.images.dataset.train, run.images.dataset.test
    side = dict(
        zip([*train.ids, *test.ids], [*train.fold, *np.full(len(test.ids), -9)], strict=True)
    )
    originals = {
        name: f"<b>{name.removeprefix('copy of ')}</b>"
        for name in side
        if name.startswith("copy of ")
    }
    assert len(originals) == COPIES
    apart = {frozenset(pair) for pair in originals.items() if side[pair[0]] != side[pair[1]]}
    assert apart
    found = table(folder, "near-duplicates")
    assert apart <= {
        frozenset(pair) for pair in zip(found["first_id"], found["second_id"], strict=True)
    }


def test_the_test_split_is_not_opened_by_looking(folder, tmp_path):
    """A second report adds no evaluation; its confusions of the test images are those that the
    evaluation has scored.
    """
    evaluations = folder / "runs" / "single" / "test-evaluations.jsonl"
    before = evaluations.read_bytes()
    write_report(folder / "runs" / "single", tmp_path / "again.html")
    assert evaluations.read_bytes() == before
    result = json.loads(before)["result"]
    counts = table(folder, "confusion-test").iloc[:, 1:].to_numpy()
    assert counts.sum() == result["images"]
    assert np.trace(counts) / counts.sum() == pytest.approx(result["metrics"]["accuracy"])


def test_a_winner_that_was_not_shown_the_test_split_has_no_confusions_there(folder, tmp_path):
    """Without its record there is no test score and no test prediction, though the features are
    there.
    """
    root = tmp_path / "run"
    shutil.copytree(folder / "runs" / "single", root)
    for name in ("test-evaluations.jsonl", ".test-evaluations.jsonl"):  # it is kept twice
        (root / name).unlink()
    report = write_report(root, tables=True)
    names = {path.stem for path in report.tables}
    assert "confusion-validation" in names
    assert not [name for name in names if name.endswith("-test") or name.startswith("test")]


@pytest.mark.slow
def test_the_page_is_the_same_twice(folder, tmp_path, page):
    """But for the minute it was written in."""
    left = tmp_path / f".again.html.{'0a' * 16}.partial"  # by a call that was killed
    left.touch()
    os.utime(left, (0, 0))
    again = write_report(folder / "single.yaml", tmp_path / "again.html").page.read_text()
    assert not left.exists()
    minute = r"written \d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.sub(minute, "", again) == re.sub(minute, "", page)


@pytest.mark.slow
def test_what_is_gone_is_said(folder, tmp_path):
    """Labels that have changed, then images and features that are gone: a report all the same, with
    the reason.
    """
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stored = copy / "runs" / "single" / "recipe.json"
    recipe = read_record(stored)
    recipe["images"]["table"], recipe["cache"] = (
        str(copy / "labels.csv"),
        str(copy / "headrace-cache"),
    )
    write_record(stored, recipe)
    labels = pd.read_csv(copy / "labels.csv")
    labels.iloc[::-1].assign(label=labels["label"].to_numpy()).to_csv(
        copy / "labels.csv", index=False
    )
    text = write_report(copy / "runs" / "single").page.read_text()
    assert "have changed since the run" in text
    (copy / "labels.csv").unlink()
    shutil.rmtree(copy / "headrace-cache")
    text = write_report(copy / "runs" / "single").page.read_text()
    assert "the images and their features are not as they were" in text
    assert "not there any more" in text


@pytest.mark.slow
def test_features_that_are_gone_are_counted(folder, tmp_path):
    """A feature set without its manifest holds no rows: the page says so, and is written."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stored = copy / "runs" / "single" / "recipe.json"
    write_record(stored, read_record(stored) | {"cache": str(copy / "headrace-cache")})
    run = read_finished_run(copy / "runs" / "single")
    for name, left_out in (
        (list(run.feature_specs)[-1], "have no features"),
        (run.winner.inputs[0], "are not on the map, for they have no features"),
    ):
        manifest = run.open_features(name)[0].path / "manifest.jsonl"
        rows = manifest.read_bytes()
        manifest.unlink()
        text = write_report(copy / "runs" / "single").page.read_text()
        assert re.search(rf"\d+ images {left_out} in {manifest} any more: .*headrace run", text)
        manifest.write_bytes(rows)


@pytest.mark.slow
def test_a_record_that_is_gone_or_cut_is_said_where_it_would_be_shown(folder, tmp_path):
    """No section and no picture is left out in silence."""
    root = tmp_path / "run"
    shutil.copytree(folder / "runs" / "single", root)
    recipe = read_record(root / "recipe.json")
    write_record(
        root / "recipe.json", recipe | {"finetune": {}}
    )  # what a network asked for would have left is not there
    (root / "stages.jsonl").unlink()
    (root / "comparisons.csv").unlink()
    (root / "images.json").unlink()
    tasks = list((root / "tasks").glob("*.npz"))
    for task in tasks:
        task.write_bytes(task.read_bytes()[:-100])
    text = write_report(root).page.read_text()
    assert "candidates.json is not there" in text
    assert "stages.jsonl is not there" in text
    assert "comparisons.csv is not there" in text
    assert "images.json is not there" in text
    assert any(f"{task.name} has changed since it was written" in text for task in tasks)


@pytest.mark.parametrize(
    "name", ["selection.json", "finetune/candidates.json", "ensemble/ensemble.json"]
)
def test_a_damaged_record_costs_its_own_section_alone(folder, tmp_path, name):
    root = tmp_path / "run"
    shutil.copytree(folder / "runs" / "single", root)
    recipe = read_record(root / "recipe.json")
    write_record(root / "recipe.json", recipe | {"ensemble": {}})
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text('{"cut": ')
    text = write_report(root).page.read_text()
    assert "Left out: " in text
    assert f"{Path(name).name} has changed since it was written" in text
    # Nor does the winner's test score stand in the place of the selected model's.
    assert ("Which model is selected is not known" in text) == name.startswith("ensemble")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_other_tasks_have_what_makes_sense_for_them(folder, kind):
    """Labels one by one; targets with their errors. Neither has a confusion matrix."""
    finished_run(folder, kind)
    report = write_report(folder / f"{kind}.yaml", tables=True)
    names = {path.stem for path in report.tables}
    expected = {
        "multi": {"labels-validation", "labels-test", "label-errors"},
        "regression": {"targets-validation"},
    }[kind]
    assert expected | {"mistakes", "leaderboard", "near-duplicates"} <= names
    assert not {name for name in names if name.startswith("confusion")}
    assert "<i>stripes" not in report.page.read_text()


def test_what_is_no_run_is_said(folder, tmp_path):
    """A folder above the run names it; a run that did not end says so; no traceback."""
    done = headrace("report", folder, cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean" in done.stderr
    root = tmp_path / "half"
    shutil.copytree(folder / "runs" / "single", root)
    (root / "leaderboard.csv").unlink()
    done = headrace("report", root, cwd=tmp_path)
    assert done.returncode == 2
    assert "has not come to its end" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_not_measured_names_the_command_that_does(tmp_path):
    """An absent file is a line with the command; one of another version, or damaged, is a line too;
    never an error.
    """
    run = SimpleNamespace(paths=RunPaths(tmp_path), metric="accuracy", feature_sets={"a.avg": ()})
    assert "headrace run" in choice_section(run).blocks[0].text
    assert "ensemble:" in ensemble_section(run).blocks[0].text
    assert "headrace advise" in advice_section(run).blocks[0].text
    assert expected_text(run) is None
    run.paths.advice_folder.mkdir()
    run.paths.advice.write_text('{"half": ')
    assert "headrace advise" in advice_section(run).blocks[0].text
    run.paths.advice.write_text('{"other": 1}')
    assert "another version" in advice_section(run).blocks[0].text


def test_the_advice_is_shown_with_its_curve(tmp_path):
    """The sentence, its reasons, and the learning curve: measured sizes, then two and four times as
    many images.
    """
    run = SimpleNamespace(paths=RunPaths(tmp_path), metric="accuracy", feature_sets={"a.avg": ()})
    run.paths.advice_folder.mkdir()
    gain = {
        "2": {"value": 0.02, "low": 0.01, "high": 0.03},
        "4": {"value": 0.03, "low": 0.01, "high": 0.05},
    }
    curve = {"images": [100.0, 200.0], "error": [0.2, 0.15]}
    ahead = {
        "2": {"value": 0.13, "low": 0.1, "high": 0.17},
        "4": {"value": 0.12, "low": 0.0, "high": 0.17},
    }
    evidence = {
        "curve": curve,
        "gain": gain,
        "ahead": ahead,
        "scores": [{"name": "a.avg", "logme": -0.4}],
    }
    run.paths.advice.write_text(
        json.dumps({"sentence": "Collect.", "reasons": ["So."], "evidence": evidence})
    )
    first, reason, figure, scores = advice_section(run).blocks
    assert (first.text, reason.text) == ("Collect.", "So.")
    assert figure.table.frame["images"].tolist() == [100, 200, 400, 800]
    assert figure.table.frame["error"].tolist() == pytest.approx([0.2, 0.15, 0.13, 0.12])
    assert figure.table.frame["low"].tolist()[2:] == pytest.approx([0.1, 0.0])
    assert scores.frame["logme"].tolist() == [-0.4]


def test_confident_learning_by_hand():
    """Thresholds are mean probabilities of a class over its own rows; a row is suspected where it
    passes another's.
    """
    label = np.array([0, 0, 0, 1, 1])
    probability = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7]])
    # thresholds: class 0: (0.9 + 0.7 + 0.2) / 3 = 0.6; class 1: 0.8
    assert confident_classes(label, probability).tolist() == [0, 0, 1, 1, -1]
    assert likely_label_errors(label, probability).tolist() == [2]
    rows, labels = likely_errors_by_label(label[:, None], probability[:, 1:])
    assert (rows.tolist(), labels.tolist()) == ([2], [0])


@pytest.mark.parametrize("columns", [5, 200])
def test_like_pairs_are_those_of_brute_force(columns):
    """The projection misses no pair, whatever the number of columns; pairs on one side are left
    out.
    """
    rng = np.random.default_rng(0)
    base = rng.normal(size=(300, columns))
    vectors = np.concatenate(
        [base, base[:100] + rng.normal(size=(100, columns)) * np.linspace(0, 0.5, 100)[:, None]]
    )
    side = rng.integers(0, 3, len(vectors))
    found = similar_pairs(vectors, side, 0.95)
    X = standardized(vectors)
    close = np.triu(X @ X.T >= 0.95, 1) & (side[:, None] != side)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == set(
        zip(*np.nonzero(close), strict=True)
    )
    assert (np.diff(found.similarity) <= 0).all()
    assert len(similar_pairs(vectors, side, 0.95, max_pairs=7).first) == 7


def test_cells_are_written_for_people():
    """Shares as per cent, thousands apart, four digits, and a dash for nothing."""
    assert format_cell(0.87125, "share") == "87.13 %"  # as JavaScript rounds
    assert format_cell(1234567, "count") == "1,234,567"
    assert (
        format_cell(0.5, "number"),
        format_cell(-2.58e-6, "number"),  # among numbers of four digits
        format_cell(-2.58e-6, "small"),
        format_cell(12345.678, "number"),
    ) == ("0.5000", "0.0000", "-2.58e-6", "12,345.7")
    assert (format_cell(None, "share"), format_cell(True, "yes"), format_cell(1536, "bytes")) == (
        "–",
        "yes",
        "1.5 kB",
    )


def test_what_cannot_be_shown_is_marked():
    """Control characters and marks that turn the order of text become the sign for that; other
    scripts stay.
    """
    assert plain_text("a\x07b\u202ec") == "a\ufffdb\ufffdc"
    assert plain_text("Ünïcödé 日本語 🙂") == "Ünïcödé 日本語 🙂"


def test_a_picture_s_path_and_a_sentence_s_code_are_text():
    """A path that would end its attribute; back-quotes, which are set as code, with HTML in them."""
    path = 'a"><img src=x onerror="window.pwned=4">.png'
    picture = Picture(("data:,",), ("alt",), "title", (), (path,))
    note = Note("type `headrace <b>run</b>`, then `report`")
    section = Section("s", "S", "", (Gallery("pictures", (picture,)), note))
    text = render_page("title", "made", Headline(()), (section,))
    assert "<img src=x" not in text
    assert "a&#34;&gt;&lt;img src=x" in text
    assert "<code>headrace &lt;b&gt;run&lt;/b&gt;</code>, then <code>report</code>" in text


def test_a_table_of_no_rows_is_a_table():
    """An empty frame renders and is written."""
    empty = Table(
        "t",
        "nothing",
        (Column("a", "A"), Column("b", "B", "share")),
        pd.DataFrame({"a": [], "b": []}),
    )
    text = render_page("title", "made", Headline(()), (Section("s", "S", "", (empty,)),))
    assert "nothing" in text


def test_hostile_names_are_what_the_tests_think():
    """The cases hold what would do harm: else the tests above could not fail."""
    assert "<script>" in HOSTILE[0]
    assert "onerror" in HOSTILE[1]
