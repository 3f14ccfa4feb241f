"""The stage that predicts every image of the run, labelled or not, by the selected model."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.cache.feature_set import open_feature_set
from headrace.heads.data.task import Task
from headrace.heads.evaluate.units import unit_rows
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.reference import ModelAverage
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.predict.parts import part_slices
from headrace.pipelines.predict.tables import Columns, outcome_columns, target_columns
from headrace.pipelines.records import RunDamaged, publish_table, read_table
from headrace.pipelines.stages.services import Services

_KEY = b"headrace"  # the key in a table's metadata, under which `_key` stands
_BLOCK = 8192  # images whose features are in memory at a time


def predict(state: RunState, services: Services) -> RunState:
    """Write `predictions.parquet` with every image that has features and, if the task has units,
    `unit-predictions.parquet` with every unit; each row says its side of the split.

    Training rows are predicted by a model that has seen them.
    """
    with services.timed("predict") as report_done, lease(state.paths.conclusion_lock):
        assert state.selected is not None
        model, section, rule = state.selected.model, state.recipe.task, None
        if section.unit is not None:
            rule = UnitRule(section.unit, section.unit_aggregation, model.temperature, model.floor)
        unlabelled = _with_features(state.dataset.unlabelled, model)
        sides = {"train": state.dataset.train, "test": state.dataset.test, "unlabelled": unlabelled}
        key = _key(model, rule, sides)
        n_images = sum(len(side.ids) for side in sides.values())
        tables = [state.paths.predictions]
        if rule is not None:
            tables.append(state.paths.unit_predictions)
        else:
            state.paths.unit_predictions.unlink(missing_ok=True)
        # Tables of the same model and images are left as they are.
        if all(_has_key(table, key) for table in tables):
            report_done("nothing missing")
        else:
            predicted = {name: _predict_rows(model, side) for name, side in sides.items()}
            publish_table(state.paths.predictions, _parquet(_image_columns(sides, predicted), key))
            if rule is not None:
                unit_table = _parquet(_unit_columns(sides, predicted, rule), key)
                publish_table(state.paths.unit_predictions, unit_table)
            n_unlabelled = len(unlabelled.ids)
            report_done(
                count_text(n_images, "image")
                + (f", {n_unlabelled:,} of them without a label" if n_unlabelled else "")
            )
    n_lacking = len(state.dataset.unlabelled.ids) - len(unlabelled.ids)
    if not n_lacking:
        return state
    note = (
        f"{count_text(n_lacking, 'image')} without a label and without a row in the external "
        "features that the selected model reads: no prediction"
    )
    return replace(state, notes=(*state.notes, note))


def _with_features(task: Task, model: ModelAverage) -> Task:
    """Return the rows that all members have features of; external features may lack some."""
    has_features = np.ones(len(task.ids), np.bool_)
    for member in model.members:
        for feature_path in member.model.feature_paths:
            has_features &= open_feature_set(feature_path).locate(task.content) >= 0
    return task.take(has_features)


def _predict_rows(model: ModelAverage, task: Task) -> npt.NDArray[np.float32]:
    """Return predictions (n, C) of a task's rows, made in blocks of whole units."""
    predicted = np.empty((len(task.ids), len(task.classes)), np.float32)
    order, units = np.arange(len(task.ids)), None
    if task.units is not None:
        order = np.argsort(task.units, kind="stable")
        units = task.units[order]
    for block in part_slices(len(order), _BLOCK, units):
        _, predicted[order[block]] = model.predict_images(task.take(order[block]))
    return predicted


def _key(model: ModelAverage, rule: UnitRule | None, sides: dict[str, Task]) -> bytes:
    """Return a hash of everything that these predictions depend on."""
    identity = [
        [[member.weight, member.temperature, member.model.identity()] for member in model.members],
        model.temperature if rule is None else 1.0,  # of images
        None if rule is None else vars(rule),
        {name: side.digest for name, side in sides.items()},
        # Side columns, which a task's digest does not cover.
        {name: rows.side.fingerprint for name, rows in sides.items() if rows.side is not None},
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest().encode()


def _has_key(table: Path, key: bytes) -> bool:
    try:
        return (pq.read_schema(read_table(table)).metadata or {}).get(_KEY) == key
    # A table that cannot be read is written again.
    except (OSError, RunDamaged, pa.ArrowException):
        return False


def _image_columns(
    sides: dict[str, Task], predicted: dict[str, npt.NDArray[np.float32]]
) -> Columns:
    ids = np.concatenate([side.ids for side in sides.values()])
    split = np.repeat(list(sides), [len(side.ids) for side in sides.values()])
    columns = {"id": ids.astype(object), "split": split.astype(object)}
    train = sides["train"]
    if train.units is not None:
        units = [side.units for side in sides.values() if side.units is not None]
        columns["unit"] = np.concatenate(units).astype(object)
    targets = [(side.target, name != "unlabelled") for name, side in sides.items()]
    columns |= target_columns(targets, train.kind, train.classes)
    probabilities = np.concatenate(list(predicted.values()))
    return outcome_columns(columns, probabilities, train.kind, train.classes)


def _unit_columns(
    sides: dict[str, Task], predicted: dict[str, npt.NDArray[np.float32]], rule: UnitRule
) -> Columns:
    """Return the columns of a table with a row per unit and side of the split."""
    units, split, n_images, targets, probabilities = [], [], [], [], []
    train = sides["train"]
    for name, side in sides.items():
        assert side.units is not None
        if not len(side.ids):
            continue
        first_rows, unit_of_row = unit_rows(side.units)
        units.append(side.units[first_rows])
        split += [name] * len(first_rows)
        n_images.append(np.bincount(unit_of_row))
        targets.append((side.target[first_rows], name != "unlabelled"))
        probabilities.append(rule.predict(train.kind, predicted[name], unit_of_row))
    columns = {
        "unit": np.concatenate(units).astype(object),
        "split": np.array(split, object),
        "images": np.concatenate(n_images),
        **target_columns(targets, train.kind, train.classes),
    }
    return outcome_columns(columns, np.concatenate(probabilities), train.kind, train.classes)


def _parquet(columns: Columns, key: bytes) -> bytes:
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_KEY: key}), buffer)
    return buffer.getvalue()
