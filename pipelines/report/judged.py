"""Images with splits, labels, predictions and the user's columns, for the map and the slices."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from headrace.heads.arrays import Array, Doubles, Index, Strings
from headrace.heads.evaluate.metrics import row_hits, row_losses
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.recipe.targets import target_columns
from headrace.pipelines.report.selected_model import TestPredictions

VALIDATION, TRAINING, TEST = "validation", "training", "test"


@dataclass(frozen=True)
class JudgedSide:
    """The n images of one side with predictions by models that did not train on them."""

    name: str  # "validation" or "test"
    ids: Strings  # (n,)
    content: Strings  # (n,) content hashes
    target: Array  # (n, ...) as in Task.target
    predicted: Array  # (n, C)
    groups: Index  # (n,) images of one group are not independent of each other


def judged_sides(run: FinishedRun, tested: TestPredictions | str) -> tuple[JudgedSide, ...]:
    """Return the validation images, and the test images if their evaluation is on record."""
    rows = run.held_out_rows
    dataset = None if isinstance(run.images, str) else run.images.dataset
    content = run.bank.content.astype(str)
    # Without the listing the user's groups are not known; exact copies are.
    groups = np.unique(content, return_inverse=True)[1] if dataset is None else dataset.groups
    validation = JudgedSide(
        VALIDATION,
        run.bank.ids[rows],
        content[rows],
        run.bank.target[rows],
        run.out_of_fold_predictions[rows],
        np.asarray(groups, np.int64)[rows],
    )
    if isinstance(tested, str) or dataset is None:
        return (validation,)
    test, groups = tested.test, dataset.test_groups
    content = test.content.astype(str)
    judged_test = JudgedSide(TEST, test.ids, content, test.target, tested.of_images, groups)
    return validation, judged_test


def side_values(run: FinishedRun, side: JudgedSide) -> tuple[str, Doubles]:
    """Return a metric that is a mean over images, and its values: for accuracy 0 or 1, (n,) or for
    several labels (n, L); for a regression absolute errors (n,).
    """
    if run.task_kind == "regression":
        return "mae", row_losses("regression", side.target, side.predicted, "mae")
    metric = "accuracy" if run.task_kind == "single" else "hamming_accuracy"
    return metric, row_hits(run.task_kind, side.target, side.predicted, metric)


def class_texts(run: FinishedRun, values: Array, separator: str = ", ") -> list[str]:
    """Return labels or predictions in words: (n,) class positions, (n, C) 0/1 or probabilities."""
    names = np.asarray(run.classes, object)
    if run.task_kind == "single":
        return list(names[values if values.ndim == 1 else values.argmax(1)])
    return [separator.join(names[is_on]) or "none" for is_on in values >= 0.5]


def one_by_one(run: FinishedRun) -> str:
    """Return a sentence for sections on single images of a task with units; "" for other tasks."""
    unit = run.recipe.task.unit
    return "" if unit is None else f" Images are taken one by one here, not by their {unit}."


def user_columns(run: FinishedRun) -> pd.DataFrame:
    """Return the user's columns except target, id and path, by image id; none without images."""
    if isinstance(run.images, str):
        return pd.DataFrame()
    # The target would colour the map by the answer, and be a slice of itself.
    left_out = {"path", "content", *target_columns(run.recipe.task)}
    samples = run.images.samples.drop_duplicates("id").set_index("id")
    columns = samples[[name for name in samples.columns if name not in left_out]]
    return columns.apply(_as_numbers)


def _as_numbers(column: pd.Series) -> pd.Series:
    """Return a column as numbers if all its values are; the reader of tables leaves them text."""
    if column.dtype != object and not pd.api.types.is_string_dtype(column):
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if numbers.notna().sum() == column.notna().sum() else column


def image_table(run: FinishedRun, sides: tuple[JudgedSide, ...]) -> pd.DataFrame:
    """Return a row per image that can be shown: id, content, split, label, the winner's prediction,
    its outcome, and the user's columns.

    Images that are always trained on have no prediction. Test images are there only if their
    evaluation is on record.
    """
    frames = [_side_frame(run, side) for side in sides]
    always_trained = np.setdiff1d(np.arange(len(run.bank.ids)), run.held_out_rows)
    if len(always_trained):
        training = _labels(run, run.bank.target[always_trained]).assign(
            id=run.bank.ids[always_trained],
            content=run.bank.content[always_trained].astype(str),
            split=TRAINING,
        )
        frames.append(training)
    images = pd.concat(frames, ignore_index=True)
    # A column of the user's may be called `label` or `split`, as ours are.
    user_table = user_columns(run).rename(
        columns=lambda name: f"{name} (column)" if name in images else str(name)
    )
    return images.merge(user_table, left_on="id", right_index=True, how="left")


def _labels(run: FinishedRun, target: Array) -> pd.DataFrame:
    if run.task_kind == "single":
        return pd.DataFrame({"label": class_texts(run, target)})
    if run.task_kind == "multi":
        target = np.where(target > 0, "yes", "no")
    return pd.DataFrame(target, columns=list(run.classes))


def _side_frame(run: FinishedRun, side: JudgedSide) -> pd.DataFrame:
    frame = _labels(run, side.target).assign(id=side.ids, content=side.content, split=side.name)
    _, values = side_values(run, side)
    if run.task_kind == "regression":
        return frame.assign(error=values)
    if run.task_kind == "single":
        frame["predicted"] = class_texts(run, side.predicted)
        frame["probability"] = side.predicted.max(1)
    # Of several labels, all must be right.
    is_right = values.reshape(len(values), -1).all(1)
    return frame.assign(outcome=np.where(is_right, "right", "wrong"))
