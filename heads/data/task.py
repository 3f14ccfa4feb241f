"""The task of a run: rows, targets and folds, written once and read by every bank."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays
from headrace.heads.arrays import Array, Arrays, Doubles
from headrace.heads.data.side_columns import SideColumns

TaskKind = Literal["single", "multi", "regression"]

# Values of `Task.fold` beside the folds 0..F-1.
TEST = -1  # never seen by training or selection
TRAIN_ONLY = -2  # trains in every fold, held out in none (a given training/validation split)
# Fold number of a head that is trained on every training row, with none held out; no row has it.
REFIT = -3


# How the predictions of a unit's images become the unit's, see `heads/evaluate/units.py`.
UnitAggregation = Literal["mean", "max"]

_ROW_FIELDS = ("ids", "content", "target", "fold", "weight")  # of Task, with a row axis in front


class BadTaskFile(HeadraceError, ValueError):
    """The file holds no task, or has changed since it was written."""


@dataclass(frozen=True)
class Task:
    """The targets and folds of N rows, in the order of every bank and every stored prediction."""

    kind: TaskKind
    # single: class names; multi: label columns; regression: target columns.
    classes: tuple[str, ...]
    ids: npt.NDArray[np.str_]  # (N,) sample ids
    content: npt.NDArray[np.bytes_]  # (N,) content hashes, by which feature sets are joined
    # single: (N,) int64 class index; multi: (N, L) uint8; regression: (N, L) float64.
    target: Array
    fold: npt.NDArray[np.int16]  # (N,) 0..F-1: held out in that fold; TEST; TRAIN_ONLY
    weight: Doubles  # (N,) sample weights, 1.0 by default
    # (N,) the unit of each image, such as a patient, a slide or a sequence, that is scored as one.
    # Rows of one unit have one target and one fold. None: each image is scored by itself.
    units: npt.NDArray[np.str_] | None = None
    unit_aggregation: UnitAggregation = "mean"
    # Tabular columns. They are not in the digest, because heads without them do not depend on them,
    # and `save_task` leaves them out (see `save_side_columns`).
    side: SideColumns | None = None

    @property
    def n_folds(self) -> int:
        return int(self.fold.max(initial=-1)) + 1

    @property
    def digest(self) -> str:
        """First 24 hex digits of the SHA-256 of all fields but `side`, for a head's identity."""
        hasher = hashlib.sha256(json.dumps(self._header).encode())
        units = () if self.units is None else (self.units.astype(np.str_),)
        rows = (self.ids.astype(np.str_), self.content, self.target, self.fold, self.weight)
        for array in (*rows, *units):
            hasher.update(str((array.dtype.str, array.shape)).encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()[:24]

    @property
    def _header(self) -> list[Any]:
        # Without units the header has no aggregation, so older tasks keep their digests.
        aggregation = [] if self.units is None else [self.unit_aggregation]
        return [self.kind, self.classes, *aggregation]

    def without_test(self) -> "Task":
        """Return the task without test rows, which is what banks get."""
        return self.take(self.fold != TEST)

    def take(self, rows: Array) -> "Task":
        """Return the task of some rows: a mask (N,), or row numbers (n,) in the new order."""
        units = None if self.units is None else self.units[rows]
        side = None if self.side is None else self.side.take(rows)
        row_fields = {name: getattr(self, name)[rows] for name in _ROW_FIELDS}
        return dataclasses.replace(self, **row_fields, units=units, side=side)


def seed_of_fold(fold: int) -> int:
    """Return the number of a fold's random stream: 1, 2, … for folds, 0 for REFIT."""
    return 0 if fold == REFIT else fold + 1


def save_task(task: Task, path: Path, **more_arrays: Array) -> None:
    """Write the task, with more arrays, as a sealed `.npz` without pickles.

    Raises PublishFailed.
    """
    task_header = np.frombuffer(json.dumps(task._header).encode(), np.uint8)
    row_fields = {name: getattr(task, name) for name in _ROW_FIELDS}
    if task.units is not None:
        row_fields["units"] = task.units.astype(np.str_)
    publish_replace(
        path,
        sealed_arrays(
            {"header": task_header, **row_fields, "ids": task.ids.astype(np.str_), **more_arrays}
        ),
    )


def load_task(path: Path) -> Task:
    """Read the task that `save_task` wrote. Raises BadTaskFile."""
    return read_task(path)[0]


def read_task(path: Path) -> tuple[Task, Arrays]:
    """Read the task that `save_task` wrote, and the other arrays by name. Raises BadTaskFile."""
    try:
        stored_arrays = read_sealed_arrays(path.read_bytes())
        task_kind, classes, *aggregation = json.loads(stored_arrays.pop("header").tobytes())
        fields: dict[str, Any] = {name: stored_arrays.pop(name) for name in _ROW_FIELDS}
        if aggregation:
            fields |= {"units": stored_arrays.pop("units"), "unit_aggregation": aggregation[0]}
        return Task(task_kind, tuple(classes), **fields), stored_arrays
    except (ValueError, KeyError, TypeError) as error:
        raise BadTaskFile(
            f"{path} has changed since it was written, or is no task: {error}. `headrace run "
            "RECIPE` writes it again"
        ) from error
