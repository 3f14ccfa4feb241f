"""The task of a run: which rows, which targets, which folds. Written once, read by every bank."""

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

TaskKind = Literal["single", "multi", "regression"]

# Values of `Task.fold` beside the folds 0..F-1.
TEST = -1  # never seen by training or selection
TRAIN_ONLY = -2  # trains in every fold, held out in none (a given training/validation split)
# Fold number of a head that is trained on every training row, with none held out; no row has it.
REFIT = -3


_ROW_FIELDS = ("ids", "content", "target", "fold", "weight")  # of Task, with a row axis in front


class BadTaskFile(HeadraceError, ValueError):
    """The file holds no task, or another one than was written."""


@dataclass(frozen=True)
class Task:
    """What to predict, row by row.

    N rows, in the order that every bank and every stored prediction uses.
    """

    kind: TaskKind
    # single: class names; multi: label columns; regression: target columns
    classes: tuple[str, ...]
    ids: npt.NDArray[np.str_]  # (N,) sample ids
    content: npt.NDArray[np.bytes_]  # (N,) content hashes, the key into every feature set
    # single: (N,) int64 class index; multi: (N, L) uint8; regression: (N, L) float64
    target: npt.NDArray[Any]
    fold: npt.NDArray[np.int16]  # (N,) 0..F-1: held out in that fold; TEST; TRAIN_ONLY
    weight: npt.NDArray[np.float64]  # (N,) sample weights, 1.0 by default

    @property
    def n_folds(self) -> int:
        return int(self.fold.max(initial=-1)) + 1

    @property
    def digest(self) -> str:
        """First 24 hex digits of the SHA-256 over every field: part of every head's identity."""
        hasher = hashlib.sha256(json.dumps([self.kind, self.classes]).encode())
        for array in (self.ids.astype(np.str_), self.content, self.target, self.fold, self.weight):
            hasher.update(str((array.dtype.str, array.shape)).encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()[:24]

    def without_test(self) -> "Task":
        """The same task with the test rows left out: what banks are given, so that no bank can see
        a test row.
        """
        return self.take(self.fold != TEST)

    def take(self, rows: npt.NDArray[Any]) -> "Task":
        """Return the task of some rows: a mask (N,), or row numbers (n,) in the order wanted."""
        return dataclasses.replace(
            self, **{name: getattr(self, name)[rows] for name in _ROW_FIELDS}
        )


def seed_of_fold(fold: int) -> int:
    """Return a number for the seed of a fold's random stream: 1, 2, … for folds, 0 for REFIT."""
    return 0 if fold == REFIT else fold + 1


def save_task(task: Task, path: Path, **beside: npt.NDArray[Any]) -> None:
    """Publish the task, and arrays beside it, as an `.npz` without pickles that carries its digest.

    Raises PublishFailed.
    """
    task_header = np.frombuffer(json.dumps([task.kind, task.classes]).encode(), np.uint8)
    row_fields = {name: getattr(task, name) for name in _ROW_FIELDS}
    publish_replace(
        path,
        sealed_arrays(
            {"header": task_header, **row_fields, "ids": task.ids.astype(np.str_), **beside}
        ),
    )


def load_task(path: Path) -> Task:
    """Inverse of `save_task`. Raises BadTaskFile."""
    return read_task(path)[0]


def read_task(path: Path) -> tuple[Task, dict[str, npt.NDArray[Any]]]:
    """Inverse of `save_task`, with the arrays beside it by name. Raises BadTaskFile."""
    try:
        stored_arrays = read_sealed_arrays(path.read_bytes())
        task_kind, classes = json.loads(stored_arrays.pop("header").tobytes())
        row_fields = [stored_arrays.pop(name) for name in _ROW_FIELDS]
        return Task(task_kind, tuple(classes), *row_fields), stored_arrays
    except (ValueError, KeyError, TypeError) as error:
        raise BadTaskFile(
            f"{path} has changed since it was written, or is no task: {error}. `headrace run "
            "RECIPE` writes it again"
        ) from error
