"""What every bank asks of its features before it starts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError

# Weights that a bank can tell from nothing and from everything: below, products with features
# vanish in float32; above, no digit is left for the penalty and the other rows.
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e15


class BadFeatures(HeadraceError, ValueError):
    """The features cannot be one head's input."""


def check_finite(X: npt.NDArray[Any]) -> None:
    """Raises BadFeatures naming the first row of X (…, N, D) with a feature that is NaN or
    infinite.
    """
    rows = X.reshape(-1, X.shape[-1])
    for start in range(0, len(rows), 8192):
        bad = ~np.isfinite(rows[start : start + 8192]).all(1)
        if bad.any():
            row = (start + int(np.argmax(bad))) % X.shape[-2]
            raise BadFeatures(
                f"features of row {row} are NaN or infinite: remove the row, or extract its "
                "features again"
            )


def check_specs(specs: Sequence[object], example: str) -> None:
    """Raises ValueError where there is no head to train; `example` is what one is written like."""
    if not len(specs):
        raise ValueError(
            "specs is empty, so that there is no head to train: give at least one, such as "
            f"{example}"
        )


def row_weights(sample_weight: npt.NDArray[Any] | None, n: int) -> npt.NDArray[np.float64]:
    """(n,) float64 weights, ones where none are given.

    Raises ValueError naming the first weight that is not finite, is negative, or is too small or
    too large to count.
    """
    weight = np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64)
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError(
            "sample weights must be finite and not negative; give a row weight 0 to leave it out"
        )
    beyond = (weight != 0) & ((weight < LEAST_WEIGHT) | (weight > MOST_WEIGHT))
    if beyond.any():
        row = int(np.argmax(beyond))
        raise ValueError(
            f"sample weights must be 0 or lie in {LEAST_WEIGHT:g}..{MOST_WEIGHT:g}, found "
            f"{weight[row]:g} for row {row}: divide them by their mean, and give weight 0 to a row "
            "that is to be left out"
        )
    return weight
