"""The winner: chosen on validation folds alone, and stored as a model directory."""

from pathlib import Path

import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import Task
from headrace.heads.predict import floor_of
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.network import NETWORK_FILES
from headrace.pipelines.models.reference import ModelRef


class NoWinner(HeadraceError):
    """No head was trained in every fold."""


def choose_winner(board: pd.DataFrame, heads: pd.DataFrame) -> pd.Series:
    """Return the first row of the leaderboard.

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
    return board.iloc[0]


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

    The backbones of a head's features are recorded, so that the directory can be used away from its
    run.

    temperature: from `temperature_of`; fitted on units if unit_column is given. Raises ModelError
    for a network whose file is gone or damaged.
    """
    rule = None
    if unit_column is not None:
        floor = floor_of(winner.spec, task.kind, len(task.classes))
        rule = UnitRule(unit_column, task.unit_aggregation, temperature, floor)
        temperature = 1.0  # of its images, as in `save_ensemble`
    weights_path = winner.load(task, metrics, temperature, rule, image_parts).save(directory)
    # A reader would take the files of an earlier winner of the other kind for this one's.
    for name in HEAD_FILES if winner.kind == "finetune" else NETWORK_FILES:
        (directory / name).unlink(missing_ok=True)
    return weights_path
