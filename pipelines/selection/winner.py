"""The winner of a run as a model directory."""

from pathlib import Path

from headrace.heads.data.task import Task
from headrace.heads.predict import probability_floor
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.head import HEAD_FILES
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.network import NETWORK_FILES
from headrace.pipelines.models.reference import ModelRef


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
