"""The temperature of the winner, from the predictions of its fold heads, and what it does to the
calibration error.

The head that is handed out was trained on all rows and has no rows left to be calibrated on; its
fold heads, of the same settings, have predicted every row that they had not seen. Their temperature
is taken for it, as scikit-learn's `CalibratedClassifierCV(ensemble=False)` does. Trained on more
rows, it is if anything a little less sure than it could be.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.data.task import Task
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import FLOOR, cross_fitted, fit_temperature
from headrace.heads.predict import floor_of
from headrace.pipelines.selection.predictions import (
    ValidationRows,
    selection_parts,
    stacked_predictions,
    validation_rows,
)


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the winner without it and with it on the rows that it was fitted on, all
    folds together.

    `after` is cross-fitted: each fold's rows at the temperature of the other folds.
    """

    temperature: float
    images: int
    error_before: float  # expected calibration error
    error_after: float
    loss_before: float  # log loss, nats
    loss_after: float

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def temperature_of(winner: pd.Series, task: Task) -> float:
    """The temperature of one row of the leaderboard; 1 for regression and where a row has no
    out-of-fold prediction.
    """
    held = validation_rows(task)
    if task.kind == "regression" or len(held.rows) == 0:
        return 1.0
    _, predicted = stacked_predictions(winner.to_frame().T, held)
    floor = floor_of(winner["spec"], task.kind, len(task.classes))
    return (
        fit_temperature(task.kind, held.target, predicted[0], held.weight, floor)
        if len(predicted)
        else 1.0
    )


def calibrate(
    held: ValidationRows, predicted: npt.NDArray[Any], floor: float = FLOOR
) -> Calibration | None:
    """Of out-of-fold predictions (N, C) of the held-out rows; None for regression. floor:

    `floor_of` the head.
    """
    kind = held.task.kind
    if kind == "regression":
        return None
    told = calibrated(held, predicted, floor)
    before, after = (
        [score(kind, held.target, values, name) for name in ("calibration_error", "log_loss")]
        for values in (predicted, told)
    )
    temperature = fit_temperature(kind, held.target, predicted, held.weight, floor)
    return Calibration(temperature, len(held.rows), before[0], after[0], before[1], after[1])


def calibrated(
    held: ValidationRows, predicted: npt.NDArray[Any], floor: float = FLOOR
) -> npt.NDArray[np.float64]:
    """(N, C) out-of-fold predictions, those of each fold at the temperature that the other folds
    give.
    """
    return cross_fitted(
        held.task.kind, held.target, predicted, selection_parts(held), held.weight, floor
    )
