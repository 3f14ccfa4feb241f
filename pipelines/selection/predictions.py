"""Stored out-of-fold predictions of many heads, read block by block.

K heads, N rows, C outputs. Only rows that some fold holds out have such predictions; rows that are
always trained on (where the user gives the validation split) are left out here. Where the task has
units (patients, slides), the N rows are units, each predicted by its images together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.arrays import Array, Doubles, Floats, Index
from headrace.heads.data.task import Task
from headrace.heads.evaluate.units import aggregate_units, unit_rows
from headrace.heads.results import BankResult, read_bank

BLOCK_BYTES = 256 * 2**20  # of predictions in memory at once
RANDOM_PARTS = 5  # for nested selection, where the run has fewer than three folds


@dataclass(frozen=True)
class ValidationRows:
    """The rows of a task that are held out once. All selection and advice is measured on them."""

    task: Task
    images: Index  # (n,) positions of the held-out images in the task
    row_of_image: Index  # (n,) 0..N-1, the row that each image is scored in
    first_images: Index  # (N,) position in `images` of each row's first image
    target: Array  # (N, ...) as in Task.target
    fold: npt.NDArray[np.int16]  # (N,) >= 0
    # (N,) rows of one number (one group, or copies of one image) are resampled together
    groups: Index

    def __len__(self) -> int:
        return len(self.fold)

    @property
    def weight(self) -> Doubles:
        """Weights (N,), as in Task.weight."""
        return self.task.weight[self.images[self.first_images]]

    def aggregate(self, predicted: Array) -> Array:
        """Return predictions (..., N, C) of the rows from those (..., n, C) of their images."""
        if self.task.units is None:
            return predicted
        aggregation = self.task.unit_aggregation
        return np.asarray(
            aggregate_units(self.task.kind, predicted, self.row_of_image, aggregation)
        )


def validation_rows(task: Task, groups: Array | None = None) -> ValidationRows:
    """Return the held-out rows of a task.

    groups: (rows of the task,), by default the images' content.
    """
    images = np.flatnonzero(task.fold >= 0)
    if task.units is None:
        first_images = row_of_image = np.arange(len(images))
    else:
        first_images, row_of_image = unit_rows(task.units[images])
    scored_images = images[first_images]
    # By default copies of an image stay together.
    group_labels = (task.content if groups is None else np.asarray(groups))[scored_images]
    return ValidationRows(
        task,
        images,
        row_of_image,
        first_images,
        task.target[scored_images],
        task.fold[scored_images],
        np.unique(group_labels, return_inverse=True)[1],
    )


def selection_parts(validation: ValidationRows) -> Index:
    """Return the part (N,) of each row, for nested selection: the choice is made on all parts but
    one, and scored on that one.

    Parts are the run's folds if there are three or more, else RANDOM_PARTS random ones that split
    no group.
    """
    # With two folds, only half of the rows would choose.
    if len(np.unique(validation.fold)) >= 3:
        return validation.fold.astype(np.int64)
    n_groups = int(validation.groups.max(initial=0)) + 1
    part_of_group = np.random.default_rng(0).permutation(n_groups) % RANDOM_PARTS
    return np.asarray(part_of_group[validation.groups], np.int64)


def complete_heads(board: pd.DataFrame) -> pd.DataFrame:
    """Return the heads that can win: trained in every fold and on all rows, with a finite score."""
    return board[(board["failed"] == 0) & board["final"]]


def read_predictions(
    board: pd.DataFrame, validation: ValidationRows
) -> Iterator[tuple[Index, Floats]]:
    """Yield blocks of (positions in the board, predictions (k, N, C)), file by file.

    board: columns `path` (results file) and `spec`. A results file whose rows are not those of the
    task is matched by id. Each head is in one block; one without a prediction for each row is in
    none.
    """
    by_file = board.reset_index(drop=True).groupby("path", sort=False).indices
    for results_path, positions_in_file in by_file.items():
        positions = np.asarray(positions_in_file, np.int64)
        bank = read_bank(str(results_path))
        row_order = _rows_in_bank(bank, validation)
        if row_order is None:
            continue
        spec_texts = board["spec"].to_numpy()[positions]
        heads_per_block = max(1, BLOCK_BYTES // (4 * len(bank.ids) * max(1, len(bank.classes))))
        for start in range(0, len(positions), heads_per_block):
            block_slice = slice(start, start + heads_per_block)
            predicted = bank.out_of_fold_predictions_of(list(map(str, spec_texts[block_slice])))
            block = validation.aggregate(predicted[:, row_order])
            is_complete = np.isfinite(block).all((1, 2))
            if is_complete.any():
                yield positions[block_slice][is_complete], block[is_complete]


def stacked_predictions(board: pd.DataFrame, validation: ValidationRows) -> tuple[Index, Floats]:
    """Return board positions (K,), ascending, and predictions (K, N, C), all in memory at once."""
    no_predictions = np.zeros((0, len(validation), len(validation.task.classes)), np.float32)
    blocks = list(read_predictions(board, validation)) or [(np.zeros(0, np.int64), no_predictions)]
    positions = np.concatenate([block for block, _ in blocks])
    position_order = np.argsort(positions)
    return positions[position_order], np.concatenate([block for _, block in blocks])[position_order]


def _rows_in_bank(bank: BankResult, validation: ValidationRows) -> Index | None:
    """Return the positions (n,) of the held-out images in a results file; None if it lacks one of
    them, or has one in another fold.
    """
    task, images = validation.task, validation.images
    row_order = images
    if not np.array_equal(bank.ids, task.ids):
        position_of_id = {row_id: position for position, row_id in enumerate(bank.ids.tolist())}
        positions = [position_of_id.get(row_id, -1) for row_id in task.ids[images].tolist()]
        row_order = np.array(positions, np.int64)
    same_rows = (
        (row_order >= 0).all()
        and (bank.content[row_order] == task.content[images]).all()
        and (bank.fold[row_order] == task.fold[images]).all()
    )
    return row_order if same_rows else None
