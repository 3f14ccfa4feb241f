"""How a model's predictions of images become those of units; a model's file holds the rule.

n images, U units, C outputs.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from headrace.heads.arrays import Array
from headrace.heads.data.task import TaskKind, UnitAggregation
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.evaluate.units import aggregate_units
from headrace.heads.link import tempered


@dataclass(frozen=True)
class UnitRule:
    """The column that names the units, and how predictions of their images become theirs."""

    column: str
    aggregation: UnitAggregation
    # Divides a unit's log-odds. Images are predicted at temperature 1: labels belong to units.
    temperature: float
    floor: float = FLOOR  # smaller probabilities count as this one, see `probability_floor`

    def predict(self, task_kind: TaskKind, predicted: Array, unit_of_row: Array) -> Array:
        """Return (U, C) float32 predictions of units from those (n, C) of their images.

        unit_of_row: (n,) integers 0..U-1, each at least once.
        """
        unit_predictions = aggregate_units(task_kind, predicted, unit_of_row, self.aggregation)
        return tempered(unit_predictions, task_kind, self.temperature, self.floor)


def rule_fields(rule: UnitRule | None) -> dict[str, Any]:
    """Return what a model's description says of units: nothing where it predicts images alone."""
    return {} if rule is None else {"unit_rule": dataclasses.asdict(rule)}


def read_unit_rule(description: Mapping[str, Any]) -> UnitRule | None:
    """Return the rule of a description (see `rule_fields`), or None.

    Raises ValueError or TypeError for fields that make no rule.
    """
    if "unit_rule" not in description:
        return None
    rule = UnitRule(**description["unit_rule"])
    is_rule = isinstance(rule.column, str) and rule.aggregation in get_args(UnitAggregation)
    if not (is_rule and 1e-6 <= rule.temperature <= 1e6 and 0 <= rule.floor < 1):
        raise ValueError(f"it predicts units by {str(description['unit_rule'])[:80]}")
    return rule
