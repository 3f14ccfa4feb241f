"""The design of fewer rows than features: by the representer theorem heads lie in the span of their rows, exactly.

n rows, D features, R <= n coordinates, F folds.

One eigendecomposition of all rows' products serves every fold. What a fold's own standardisation changes, its penalty, becomes a
triangular factor near the identity (`rotation.Span`), with which its copy of the rows is multiplied: that costs a tenth of an
eigendecomposition of its own, coordinates mean nearly the same in all folds, and all heads can be in flight together. Where the
folds' scales differ too much for float32 (`design.same_scales`), or their copies of the rows do not fit (`worth_a_copy`), each
fold goes its own way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.design import Design, Group, coordinates, make_tiles, scaled_rows, worth_copies
from headrace.heads.rotation import Span
from headrace.heads.standardize import Features, Moments

Array = npt.NDArray[Any]
MOST_BYTES = 1 << 29  # of the folds' copies of the rows, float32
THINNEST = 1e-3  # direction of rows, over the thickest, that float32 can be divided by: three of its seven digits


def worth_a_copy(scaling: dict[int, Moments], folds: Sequence[int], rows: int) -> bool:
    """Whether the copies that standardised heads of these folds keep in a design of so many rows fit."""
    return sum(scaling[fold].count for fold in folds) * rows * 4 <= MOST_BYTES


def few_rows_design(
    X: Features, groups: Sequence[Group], scaling: dict[int, Moments], *, standardize: bool, dtype: Any
) -> Design:
    """Design of the given groups of rows of X (N, D), for the folds in `scaling` (fold: moments of its training rows).

    Standardised heads of several folds take one group for each fold, of its own training rows; others share their groups. The
    tiles come without labels, which the caller adds.
    """
    whole, factor, ratio, unit = coordinates(scaling, standardize=standardize, dtype=dtype)
    every = np.unique(np.concatenate([rows for _, rows in groups]))
    Z = scaled_rows(X, every, whole.mean, factor, dtype)
    wide = Z.astype(np.float64)
    # In float64: a direction is divided by the root of its eigenvalue, and all but those lost in rounding are kept.
    eigenvalues, left = scipy.linalg.eigh(wide @ wide.T, driver="evd", overwrite_a=True, check_finite=False)
    floor = eigenvalues.max(initial=0.0) * max(len(every), 1) * np.finfo(np.float64).eps
    keep = np.flatnonzero(eigenvalues > floor)[::-1]  # the largest first
    left, lengths = left[:, keep], np.sqrt(eigenvalues[keep])
    thick = lengths.size and lengths[-1] > THINNEST * lengths[0]
    exact = np.dtype(dtype) if thick else np.dtype(np.float64)
    combined, rotated = (left / lengths).astype(exact), (left * lengths).astype(dtype)
    roots = {}
    if ratio:
        Q = (Z if exact == Z.dtype else wide).T @ combined
        real = np.einsum("dr,dr->r", Q, Q) > 0.5  # what is rounding alone may pass the floor: no row lies along it
        if not real.all():
            Q, combined, rotated = Q[:, real], combined[:, real], np.ascontiguousarray(rotated[:, real])
        Q = Q.astype(dtype, copy=False)
        for fold, own in ratio.items():
            stretched = Q / own[:, None]
            roots[fold] = scipy.linalg.cholesky(stretched.T @ stretched, lower=True, check_finite=False)
    span = Span(Z, combined, roots, {fold: own.astype(np.float64) for fold, own in ratio.items()})
    tiles = []
    twice = worth_copies(sum(len(rows) for _, rows in groups) * span.rank, dtype)
    for folds, rows in groups:
        values = rotated[np.searchsorted(every, rows)]
        if folds[0] in roots:
            values = _times_lower(values, roots[folds[0]])
        tiles += make_tiles(folds, rows, values.__getitem__, span.rank, dtype, twice=twice)
    return Design(tiles, np.dtype(dtype), span, whole.mean, factor, {}, {}, unit)


def _times_lower(values: Array, root: Array) -> Array:
    """values (n, R) root, lower triangular (R, R) of the same type: half of a product's work."""
    (multiply,) = scipy.linalg.get_blas_funcs(("trmm",), (values, root))
    return np.ascontiguousarray(multiply(1.0, root.T, values.T).T)
