"""What every bank asks of its features before it starts."""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError


class BadFeatures(HeadraceError, ValueError):
    """The features cannot be one head's input."""


def check_finite(X: npt.NDArray[Any]) -> None:
    """Raises BadFeatures naming the first row of X (…, N, D) with a feature that is NaN or infinite."""
    rows = X.reshape(-1, X.shape[-1])
    for start in range(0, len(rows), 8192):
        bad = ~np.isfinite(rows[start : start + 8192]).all(1)
        if bad.any():
            row = (start + int(np.argmax(bad))) % X.shape[-2]
            raise BadFeatures(
                f"features of row {row} are NaN or infinite: remove the row, or extract its features again"
            )
