"""How a model's predictions of images become those of units, recorded beside the model's files."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from headrace.heads.data.task import Task, TaskKind, UnitAggregation
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.evaluate.units import aggregate_units
from headrace.heads.link import tempered
from headrace.pipelines.records import RunDamaged, read_record, write_record

UNIT_RULE = "unit.json"


@dataclass(frozen=True)
class UnitRule:
    """The column that names the units, and what their images' predictions go through."""

    column: str
    aggregation: UnitAggregation
    # Of a unit's log-odds; its images are predicted without one, for a label belongs to the unit.
    temperature: float
    floor: float = FLOOR  # the smallest probability that the temperature looks at

    def predict(
        self, task_kind: TaskKind, predicted: npt.NDArray[Any], unit_of_row: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """Return (U, C) float32 predictions of units from those (n, C) of their images.

        unit_of_row: (n,) integers 0..U-1, each at least once.
        """
        together = aggregate_units(task_kind, predicted, unit_of_row, self.aggregation)
        return tempered(together, task_kind, self.temperature, self.floor)

    def save(self, model_directory: Path) -> None:
        """Write the rule into a model's directory."""
        write_record(model_directory / UNIT_RULE, dataclasses.asdict(self))


def save_unit_rule(
    model_directory: Path,
    task: Task,
    column: str | None,
    temperature: float,
    floor: float = FLOOR,
) -> float:
    """Write the rule of a task whose units a column names, or remove that of an earlier model;
    return the temperature that is left for the images: 1 where the units have it.
    """
    rule_path = model_directory / UNIT_RULE
    if column is None:
        rule_path.unlink(missing_ok=True)
        return temperature
    model_directory.mkdir(parents=True, exist_ok=True)
    UnitRule(column, task.unit_aggregation, temperature, floor).save(model_directory)
    return 1.0


def read_unit_rule(model_directory: Path) -> UnitRule | None:
    """Return the rule of a model; None for one that predicts images alone.

    Raises RunDamaged.
    """
    rule_path = model_directory / UNIT_RULE
    try:
        fields = read_record(rule_path)
    except FileNotFoundError:
        return None
    try:
        rule = UnitRule(**fields)
        if rule.aggregation not in ("mean", "max") or not 0 < rule.temperature < 1e6:
            raise ValueError(fields)
        return rule
    except (TypeError, ValueError) as error:
        raise RunDamaged(
            f"{rule_path} is no rule of units of this version: run the recipe again, or fetch the "
            "model again"
        ) from error
