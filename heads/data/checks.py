"""Checks of features, specs and weights that every bank makes before it starts."""

from collections.abc import Sequence

import numpy as np

from headrace.heads.arrays import Array, Doubles
from headrace.heads.errors import HeadError

# Smaller weights vanish in products with float32 features; larger ones leave no digit for the
# penalty and the other rows.
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e15


def check_finite(X: Array) -> None:
    """Raise HeadError naming the first row of X (…, N, D) with NaN or infinity."""
    flat_rows = X.reshape(-1, X.shape[-1])
    for first_row in range(0, len(flat_rows), 8192):
        is_bad = ~np.isfinite(flat_rows[first_row : first_row + 8192]).all(1)
        if is_bad.any():
            bad_row = (first_row + int(np.argmax(is_bad))) % X.shape[-2]
            raise HeadError(
                f"features of row {bad_row} are NaN or infinite: remove the row, or extract its "
                "features again"
            )


def check_specs(specs: Sequence[object], example: str) -> None:
    """Raise ValueError if there are no specs; `example` is the code of one, for the message."""
    if not len(specs):
        raise ValueError(
            "specs is empty, so that there is no head to train: give at least one, such as "
            f"{example}"
        )


def row_weights(sample_weight: Array | None, n_rows: int) -> Doubles:
    """Return the weights as (n,) float64, ones for None.

    Raises ValueError for weights that are negative or not finite, and naming the first one beyond
    LEAST_WEIGHT..MOST_WEIGHT.
    """
    weight_of_row = (
        np.ones(n_rows) if sample_weight is None else np.asarray(sample_weight, np.float64)
    )
    if not (np.isfinite(weight_of_row).all() and (weight_of_row >= 0).all()):
        raise ValueError(
            "sample weights must be finite and not negative; give a row weight 0 to leave it out"
        )
    is_out_of_range = (weight_of_row != 0) & (
        (weight_of_row < LEAST_WEIGHT) | (weight_of_row > MOST_WEIGHT)
    )
    if is_out_of_range.any():
        bad_row = int(np.argmax(is_out_of_range))
        raise ValueError(
            f"sample weights must be 0 or lie in {LEAST_WEIGHT:g}..{MOST_WEIGHT:g}, found "
            f"{weight_of_row[bad_row]:g} for row {bad_row}: divide them by their mean, and give "
            "weight 0 to a row that is to be left out"
        )
    return weight_of_row
