"""A number with its uncertainty, as the values that it takes on resampled rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value and what it becomes on resampled rows; nan draws (nothing to measure) count as not
    known.
    """

    value: float
    draws: npt.NDArray[np.float64]  # (B,)
    # The 95 % interval where resampled rows do not give it: a share of which few rows are has no
    # error in any resample.
    ends: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """Of the 95 % interval."""
        return self._quantile(0.025) if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        return self._quantile(0.975) if self.ends is None else self.ends[1]

    def above(self, threshold: float) -> float:
        """The share of resamples in which the number is above a threshold: how sure that is, 0 to
        1.
        """
        found = self.draws[np.isfinite(self.draws)]
        return float((found > threshold).mean()) if len(found) else 0.0

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference, draw by draw: both must come from the same resamples."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def summary(self) -> dict[str, Any]:
        """For JSON: an undefined number is None."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {
            name: None if not np.isfinite(value) else float(value) for name, value in values.items()
        }

    def _quantile(self, share: float) -> float:
        found = self.draws[np.isfinite(self.draws)]
        return float(np.quantile(found, share)) if len(found) else float("nan")
