"""The design of fewer rows than features: by the representer theorem heads lie in the span of their
rows, exactly.

n rows, D features, R <= n coordinates, F folds.

The coordinates are a Cholesky factor of the rows' products, in float64 and with pivots, turned so
that the rows' longest directions come first. Whole eigenvectors would take several times as long
and save no iterations: frames (`precondition.py`) look at the longest directions and at the
diagonal of the rest. Folds have coordinates of their own, of their own training rows, centre and
scales, and all their heads can be in flight together. Where the folds' scales differ too much for
float32 (`design.same_scales`), or their copies of the rows do not fit (`worth_a_copy`), each fold
goes its own way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.data.standardize import Features, Moments
from headrace.heads.linear.solver.design import (
    Design,
    Group,
    coordinates,
    make_tiles,
    scaled_rows,
    worth_copies,
)
from headrace.heads.linear.solver.rotation import Basis, Span, turn

Array = npt.NDArray[Any]
MOST_BYTES = 1 << 29  # of the folds' copies of the rows, float32
# direction of rows, over the thickest, that float32 can be divided by: three of its seven digits
THINNEST = 1e-3
LONGEST, ROUNDS = (
    64,
    2,
)  # directions that are looked for, and how often rows are multiplied to find them
COLUMNS_AT_ONCE = 4096  # of rows in float64


def worth_a_copy(scaling: dict[int, Moments], folds: Sequence[int], rows: int) -> bool:
    """Whether the copies that these folds keep in a design of so many rows fit."""
    return sum(scaling[fold].count for fold in folds) * rows * 4 <= MOST_BYTES


def few_rows_design(
    X: Features,
    groups: Sequence[Group],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
) -> Design:
    """Design of rows of X (N, D) for the folds in `scaling` (fold: moments of its training rows),
    one group for each fold: its own training rows. The tiles come without labels, which the caller
    adds.
    """
    whole, factor, ratio, unit = coordinates(scaling, standardize=standardize, dtype=dtype)
    every = np.unique(np.concatenate([rows for _, rows in groups]))
    Z = scaled_rows(X, every, whole.mean, factor, dtype)
    bases: dict[int, Basis] = {}
    rotated = []  # each group's coordinates
    thinnest = 1.0
    for (fold,), rows in groups:
        values, bases[fold], thin = _own_basis(Z, np.searchsorted(every, rows), ratio.get(fold))
        rotated.append(values)
        thinnest = min(thinnest, thin)
    span = Span(Z, bases, np.dtype(dtype) if thinnest > THINNEST else np.dtype(np.float64))
    tiles = []
    twice = worth_copies(sum(len(rows) for _, rows in groups) * span.rank, dtype)
    for (folds, rows), values in zip(groups, rotated, strict=True):
        padded = np.pad(values, ((0, 0), (0, span.rank - values.shape[1])))
        tiles += make_tiles(folds, rows, padded.__getitem__, span.rank, dtype, twice=twice)
    return Design(tiles, np.dtype(dtype), span, whole.mean, factor, {}, {}, unit)


def _own_basis(
    Z: Array, own: npt.NDArray[np.intp], ratio: Array | None
) -> tuple[Array, Basis, float]:
    """Coordinates (n, R) of the rows Z[own] in Z's type, their basis, and how thin their last
    direction is by its pivot.
    """
    centre = Z[own].mean(axis=0, dtype=np.float64)
    products = np.zeros((len(own), len(own)), order="F")
    for first in range(0, Z.shape[1], COLUMNS_AT_ONCE):
        some = slice(first, first + COLUMNS_AT_ONCE)
        part = Z[own, some] - centre[some]
        if ratio is not None:
            part /= ratio[some]
        products = scipy.linalg.blas.dsyrk(
            1.0, part.T, beta=1.0, c=products, trans=1, lower=1, overwrite_c=1
        )
    # Ends where what is left is rounding alone.
    floor = len(own) * np.finfo(np.float64).eps * products.diagonal().max(initial=0.0)
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(products, tol=floor, lower=1, overwrite_a=1)
    order, lower = order - 1, np.tril(factor[:, :rank])
    pivots, narrow = lower.diagonal(), lower.astype(Z.dtype)
    reflectors, lengths = _longest(narrow)
    values = np.empty((len(own), rank), Z.dtype)
    values[order] = turn(reflectors.astype(Z.dtype), lengths.astype(Z.dtype), narrow, side="R")
    wide = None if ratio is None else ratio.astype(np.float64)
    basis = Basis(own[order[:rank]], lower[:rank], reflectors, lengths, centre, wide)
    return values, basis, float(pivots[-1] / pivots[0]) if rank else 1.0


def _longest(lower: Array) -> tuple[Array, Array]:
    """Orthogonal V (R, R), as LAPACK's geqrf leaves it, float64, whose first columns are the
    longest directions of the rows `lower` (n, R), the longest first: a subspace iteration (Halko,
    Martinsson & Tropp, SIAM Review 2011, algorithm 4.4) that starts from the first pivots, rows
    that are long and point apart.
    """
    span = lower.T @ lower[:, : min(LONGEST, lower.shape[1])]
    for _ in range(ROUNDS):
        span = lower.T @ (lower @ np.linalg.qr(span)[0])
    span = np.linalg.qr(span)[0]
    seen = lower @ span
    span = span @ np.linalg.eigh(seen.T @ seen)[1][:, ::-1]
    (reflectors, lengths), _ = scipy.linalg.qr(
        span.astype(np.float64), mode="raw", check_finite=False
    )
    return reflectors, lengths
