"""A number with its uncertainty: its values on resampled rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Doubles


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, and its values on resampled rows; nan draws (nothing to measure) are left out."""

    value: float
    draws: Doubles  # (B,)
    # The 95 % interval, where that of the draws is wrong: a share of no row, or of every row, is
    # the same in each resample, and would have an interval of length zero.
    ends: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self._quantile(0.025) if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        return self._quantile(0.975) if self.ends is None else self.ends[1]

    def above(self, threshold: float) -> float:
        """Return the share of resamples in which the number is above a threshold, 0 to 1."""
        finite_draws = self.draws[np.isfinite(self.draws)]
        return float((finite_draws > threshold).mean()) if len(finite_draws) else 0.0

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the difference, draw by draw; both must come from the same resamples."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def summary(self) -> dict[str, Any]:
        """Return a dictionary for JSON; an undefined number is None."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {
            name: None if not np.isfinite(value) else float(value) for name, value in values.items()
        }

    def _quantile(self, probability: float) -> float:
        finite_draws = self.draws[np.isfinite(self.draws)]
        return float(np.quantile(finite_draws, probability)) if len(finite_draws) else float("nan")
