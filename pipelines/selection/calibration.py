"""Temperature of the winner, fitted on the predictions of its fold heads."""

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from headrace.heads.arrays import Array, Doubles
from headrace.heads.data.task import Task
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import FLOOR, cross_fitted, fit_temperature
from headrace.heads.predict import probability_floor
from headrace.pipelines.selection.predictions import (
    ValidationRows,
    selection_parts,
    stacked_predictions,
    validation_rows,
)


@dataclass(frozen=True)
class Calibration:
    """A temperature fitted on the held-out rows of all folds, and the winner's errors on these rows
    before and, cross-fitted, after.
    """

    temperature: float
    images: int  # held-out rows: images, or units where the task has them
    error_before: float  # expected calibration error
    error_after: float
    loss_before: float  # log loss, nats
    loss_after: float

    def summary(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return asdict(self)


def temperature_of(winner: pd.Series, task: Task) -> float:
    """Return the temperature of one row of the leaderboard; 1 for regression and where a row has no
    out-of-fold prediction.
    """
    validation = validation_rows(task)
    if task.kind == "regression" or len(validation) == 0:
        return 1.0
    _, predicted = stacked_predictions(winner.to_frame().T, validation)
    if len(predicted) == 0:
        return 1.0
    # The winner was trained on all rows and has none left to be calibrated on. Its fold heads, of
    # the same settings, have predicted every row that they had not seen: it takes their
    # temperature, as in scikit-learn's `CalibratedClassifierCV(ensemble=False)`. It was trained on
    # more rows than they were, and so it is at most a little less confident than it could be.
    floor = probability_floor(winner["spec"], task.kind, len(task.classes))
    return fit_temperature(task.kind, validation.target, predicted[0], validation.weight, floor)


def calibrate(
    validation: ValidationRows, predicted: Array, floor: float = FLOOR
) -> Calibration | None:
    """Return the calibration of out-of-fold predictions (N, C) of the held-out rows; None for
    regression.

    floor: the head's smallest meaningful probability, from `probability_floor`.
    """
    task_kind = validation.task.kind
    if task_kind == "regression":
        return None
    # A temperature flatters the rows that it was fitted on: each fold has that of the others.
    at_temperature = calibrated(validation, predicted, floor)
    error_before, error_after = (
        score(task_kind, validation.target, values, "calibration_error")
        for values in (predicted, at_temperature)
    )
    loss_before, loss_after = (
        score(task_kind, validation.target, values, "log_loss")
        for values in (predicted, at_temperature)
    )
    temperature = fit_temperature(task_kind, validation.target, predicted, validation.weight, floor)
    return Calibration(
        temperature, len(validation), error_before, error_after, loss_before, loss_after
    )


def calibrated(validation: ValidationRows, predicted: Array, floor: float = FLOOR) -> Doubles:
    """Return out-of-fold predictions (N, C), each fold's at the other folds' temperature."""
    return cross_fitted(
        validation.task.kind,
        validation.target,
        predicted,
        selection_parts(validation),
        validation.weight,
        floor,
    )
