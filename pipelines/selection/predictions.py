"""Stored out-of-fold predictions of many heads, read block by block.

K heads, N rows, C outputs. Only rows that some fold holds out have such predictions; the others (a
given training split) are left out here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.data.task import Task
from headrace.heads.results import BankResult, read_bank

BLOCK_BYTES = 256 * 2**20
PARTS = 5  # of the rows, where the run has fewer than three folds of its own


@dataclass(frozen=True)
class ValidationRows:
    """The rows of a task that are held out once: what all evidence is measured on."""

    task: Task
    rows: npt.NDArray[np.int64]  # (N,) positions in the task
    target: npt.NDArray[Any]  # (N, ...) as in Task.target
    fold: npt.NDArray[np.int16]  # (N,) >= 0
    # (N,) rows that are resampled together: of one group, or copies of one image
    groups: npt.NDArray[np.int64]

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """(N,) as in Task.weight."""
        return self.task.weight[self.rows]


def validation_rows(task: Task, groups: npt.NDArray[Any] | None = None) -> ValidationRows:
    """The held-out rows. groups:

    (rows of the task,), by default the images' content, so that copies stay together.
    """
    rows = np.flatnonzero(task.fold >= 0)
    named = (task.content if groups is None else np.asarray(groups))[rows]
    return ValidationRows(
        task, rows, task.target[rows], task.fold[rows], np.unique(named, return_inverse=True)[1]
    )


def selection_parts(held: ValidationRows, seed: int = 0) -> npt.NDArray[np.int64]:
    """(N,) what of the rows is left out while the others decide: the run's own folds where there
    are three, else groups dealt at random to PARTS.
    """
    if len(np.unique(held.fold)) >= 3:
        return held.fold.astype(np.int64)
    dealt = np.random.default_rng(seed).permutation(int(held.groups.max(initial=0)) + 1) % PARTS
    return np.asarray(dealt[held.groups], np.int64)


def complete_heads(board: pd.DataFrame) -> pd.DataFrame:
    """The leaderboard's heads that can win: trained in every fold and on all rows, the metric
    defined.
    """
    return board[(board["failed"] == 0) & board["final"]]


def read_predictions(
    board: pd.DataFrame, held: ValidationRows
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Blocks of (places in the board, predictions (k, N, C)), file by file; each head of the board
    is in one block.

    board: rows with `path` and `spec`. A results file whose rows are not those of the task is
    matched by id; a head without a prediction for each row is in no block.
    """
    for path, found in board.reset_index(drop=True).groupby("path", sort=False).indices.items():
        places = np.asarray(found, np.int64)
        result = read_bank(str(path))
        order = _order(result, held)
        if order is None:
            continue
        specs = board["spec"].to_numpy()[places]
        step = max(1, BLOCK_BYTES // (4 * len(result.ids) * max(1, len(result.classes))))
        for start in range(0, len(places), step):
            at = slice(start, start + step)
            block = result.out_of_fold_stack([str(spec) for spec in specs[at]])[:, order]
            complete = np.isfinite(block).all((1, 2))
            if complete.any():
                yield places[at][complete], block[complete]


def stacked_predictions(
    board: pd.DataFrame, held: ValidationRows
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """All blocks at once: places in the board, rising, and (K, N, C).

    For as many heads as memory holds.
    """
    blocks = list(read_predictions(board, held))
    if not blocks:
        return np.zeros(0, np.int64), np.zeros(
            (0, len(held.rows), len(held.task.classes)), np.float32
        )
    places = np.concatenate([part for part, _ in blocks])
    order = np.argsort(places)
    return places[order], np.concatenate([part for _, part in blocks])[order]


def _order(result: BankResult, held: ValidationRows) -> npt.NDArray[np.int64] | None:
    """Where the held-out rows are in a results file; None when it lacks one of them, or holds other
    folds.
    """
    ids, content = held.task.ids[held.rows], held.task.content[held.rows]
    found: Sequence[int] | npt.NDArray[Any]
    if np.array_equal(result.ids, held.task.ids):
        found = held.rows
    else:
        position = {name: place for place, name in enumerate(result.ids.tolist())}
        found = [position.get(name, -1) for name in ids.tolist()]
    order = np.asarray(found, np.int64)
    same = (
        (order >= 0).all()
        and (result.content[order] == content).all()
        and (result.fold[order] == held.fold).all()
    )
    return order if same else None
