"""Predictions of units from those of their images, against plain loops; metrics of a fold's
units.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, strategies as st

from headrace.heads.data.task import TEST, Task, load_task, save_task
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.units import aggregate_units, held_out_metrics, scored_rows, unit_rows
from headrace.heads.unit_rule import UnitRule, read_unit_rule, rule_fields

KINDS = ("single", "multi", "regression")


def by_loop(kind, predicted, unit_of_row, how):
    """What aggregation means, unit by unit."""
    rows = []
    for unit in range(unit_of_row.max() + 1):
        own = predicted[unit_of_row == unit].astype(np.float64)
        if how == "mean":
            rows.append(own.mean(0))
        elif kind != "single":
            rows.append(own.max(0))
        elif own.shape[1] == 2:
            rows.append(own[own[:, 1].argmax()])
        else:
            rows.append(own.max(0) / own.max(0).sum())
    return np.stack(rows)


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sampled_from(KINDS),
)
def test_aggregation_is_the_plain_loop(n_rows, n_units, n_outputs, seed, kind):
    rng = np.random.default_rng(seed)
    n_units, n_outputs = min(n_units, n_rows), n_outputs + (kind == "single")
    unit_of_row = rng.permutation(
        np.append(np.arange(n_units), rng.integers(0, n_units, n_rows - n_units))
    )
    predicted = rng.random((2, n_rows, n_outputs))
    if kind == "single":
        predicted /= predicted.sum(2, keepdims=True)
    for how in ("mean", "max"):
        found = aggregate_units(kind, predicted, unit_of_row, how)
        expected = [by_loop(kind, head, unit_of_row, how) for head in predicted]
        assert np.allclose(found, expected, rtol=1e-12)
        float32 = aggregate_units(kind, predicted.astype(np.float32), unit_of_row, how)
        assert float32.dtype == np.float32
        assert np.allclose(float32, expected, atol=1e-6)


def test_a_prediction_that_all_images_of_a_unit_share_is_the_units():
    """So a head that predicts units as a whole needs no rule of its own."""
    whole = np.array([[0.2, 0.8], [0.7, 0.3]], np.float32)
    unit_of_row = np.array([0, 1, 1, 0, 0])
    for how in ("mean", "max"):
        assert np.allclose(aggregate_units("single", whole[unit_of_row], unit_of_row, how), whole)


def test_an_image_without_a_prediction_leaves_its_unit_without_one():
    predicted = np.array([[0.2, 0.8], [np.nan, np.nan], [0.5, 0.5]])
    found = aggregate_units("single", predicted, np.array([0, 0, 1]), "mean")
    assert np.isnan(found[0]).all()
    assert (found[1] == 0.5).all()


def made_task(kind="single", how="mean"):
    rng = np.random.default_rng(3)
    unit_of_row = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    target_of_unit = {
        "single": np.arange(12) % 3,
        "multi": rng.integers(0, 2, (12, 2)).astype(np.uint8),
        "regression": rng.normal(size=(12, 2)),
    }[kind]
    rows = rng.permutation(len(unit_of_row))
    unit_of_row = unit_of_row[rows]
    ids = np.array([f"image {row}" for row in rows])
    return Task(
        kind,
        ("a", "b", "c")[: 3 if kind == "single" else 2],
        ids,
        np.array([f"{row:032x}" for row in rows], "S32"),
        target_of_unit[unit_of_row],
        (unit_of_row % 4 - 1).astype(np.int16),
        np.ones(len(rows)),
        np.array([f"p{unit}" for unit in unit_of_row]),
        how,
    )


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_a_fold_are_those_of_its_units(kind, how):
    task = made_task(kind, how).without_test()
    rows = np.flatnonzero(task.fold == 1)
    predicted = np.random.default_rng(0).random((len(rows), len(task.classes)))
    first_rows, unit_of_row = unit_rows(task.units[rows])
    expected = by_loop(kind, predicted, unit_of_row, how)
    metrics = held_out_metrics(task, 1, predicted)
    for name, value in metrics.items():
        assert value == pytest.approx(score(kind, task.target[rows][first_rows], expected, name))
    target, together = scored_rows(task, rows, predicted)
    assert len(target) == len(together) == len(set(task.units[rows]))
    assert held_out_metrics(task, 1, None) == {}


def test_a_task_keeps_its_units(tmp_path):
    task = made_task(how="max")
    save_task(task, tmp_path / "task.npz")
    stored = load_task(tmp_path / "task.npz")
    assert stored.digest == task.digest
    assert stored.unit_aggregation == "max"
    assert (stored.units == task.units).all()
    assert (task.without_test().units == task.units[task.fold != TEST]).all()
    # Each of these is another task: heads are scored otherwise.
    others = {
        dataclasses.replace(task, units=None).digest,
        dataclasses.replace(task, unit_aggregation="mean").digest,
        dataclasses.replace(task, units=task.units[::-1]).digest,
        task.digest,
    }
    assert len(others) == 4


RULE = UnitRule("patient", "max", 1.5)


def test_a_description_holds_the_rule_of_units():
    """Of a model of images alone it says nothing."""
    assert read_unit_rule(rule_fields(RULE)) == RULE
    assert rule_fields(None) == {}
    assert read_unit_rule({"format": 1}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"column": 3},
        {"aggregation": "sum"},
        {"temperature": 0},
        {"temperature": "1"},
        {"floor": 1},
        {"more": 1},
    ],
)
def test_what_is_no_rule_of_units_is_refused(changed):
    """As a file of a model could say it."""
    with pytest.raises((ValueError, TypeError)):
        read_unit_rule({"unit_rule": dataclasses.asdict(RULE) | changed})
