"""The winner: chosen on validation folds alone, and stored as a model directory."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import Task
from headrace.heads.predict import probability_floor
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.network import NETWORK_FILES
from headrace.pipelines.models.reference import ModelRef


class NoWinner(HeadraceError):
    """No head was trained in every fold."""


@dataclass(frozen=True)
class Winner:
    """The setting with the best mean score over validation folds: the leaderboard's first row."""

    kind: str  # of head, as in the recipe; "finetune": a fine-tuned network
    inputs: tuple[str, ...]  # names of the feature sets that it reads, side by side
    settings: str  # in words, as the leaderboard has them
    metric: str
    score: float  # mean of `metric` over the validation folds; too good, as it was chosen by it
    standard_error: float  # of that mean
    folds: int
    features: int  # numbers that it reads of each image
    spec: str  # kind and settings as canonical JSON
    results_path: Path  # the file with its arrays and predictions, in the run's banks/


def choose_winner(board: pd.DataFrame, heads: pd.DataFrame, metric: str) -> Winner:
    """Return the first setting of the leaderboard.

    heads: one row per head and fold, with column `error`. Raises NoWinner, with the commonest
    error, if no head was trained and scored in every fold.
    """
    if board.empty or board.iloc[0]["failed"] or not board.iloc[0]["final"]:
        reasons = heads["error"].dropna().value_counts()
        reason = (
            f"The commonest reason: {reasons.index[0].rstrip('.')}"
            if len(reasons)
            else "The metric is undefined in some fold"
        )
        raise NoWinner(
            f"no head was trained and scored in every fold. {reason}. Every head is in "
            "heads.parquet and leaderboard.csv"
        )
    best = board.iloc[0]
    return Winner(
        kind=str(best["kind"]),
        inputs=tuple(best["inputs"]),
        settings=str(best["settings"]),
        metric=metric,
        score=float(best[metric]),
        standard_error=float(best["standard_error"]),
        folds=int(best["folds"]),
        features=int(best["features"]),
        spec=str(best["spec"]),
        results_path=Path(best["path"]),
    )


def save_winner(
    directory: Path,
    winner: ModelRef,
    task: Task,
    metrics: dict[str, float],
    temperature: float,
    unit_column: str | None = None,
    image_parts: ImageParts | None = None,
) -> Path:
    """Write the winner, trained on every training row, in place of an earlier winner: head.* for a
    head, network.* for a network. Returns the path of its weights.

    temperature: from `temperature_of`; fitted on units if unit_column is given. Raises ModelError
    for a network whose file is gone or damaged.
    """
    rule = None
    if unit_column is not None:
        floor = probability_floor(winner.spec, task.kind, len(task.classes))
        rule = UnitRule(unit_column, task.unit_aggregation, temperature, floor)
        temperature = 1.0  # of its images, as in `save_ensemble`
    weights_path = winner.load(task, metrics, temperature, rule, image_parts).save(directory)
    # A reader would take the files of an earlier winner of the other kind for this one's.
    for name in HEAD_FILES if winner.kind == "finetune" else NETWORK_FILES:
        (directory / name).unlink(missing_ok=True)
    return weights_path
