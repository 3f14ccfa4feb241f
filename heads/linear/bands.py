"""A penalty for every tap: how much each of the inputs that stand side by side counts, found on a
head's training rows.

Ridge regression with one penalty for each band of features (Nunez-Elizalde, Huth & Gallant 2019;
Dupré la Tour, Eickenberg, Nunez-Elizalde & Gallant 2022) is ridge regression with one penalty on
features that are scaled band by band. The scales are those of least squared error on held-out folds
of the training rows, by gradient descent. With the kernel M = sum_b e^d_b K_b + I + 1 1', K_b the
products of rows of band b, and H = M^-1, the errors of all held-out rows come from one inverse: a
fold's rows F are missed by (H_FF)^-1 (H Y)_F. So no head is trained while the scales are sought.

n sampled rows, D features, B bands, T target columns.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize

from headrace.heads.data.standardize import Features, Moments, scaled

Array = npt.NDArray[np.float64]

# of a head's training rows, drawn: half a second. With 1,200 the scales differ by a tenth, or
# twofold where taps are alike
ROWS = 800
FOLDS = 5  # drawn, where the head's own training rows have not three folds of their own
STEPS = 25  # of L-BFGS; it ends after 8 to 20 evaluations
FARTHEST = 8.0  # of a log variance from the one where all bands count the same
# a pull to where all bands count the same, in units of the share of the variance that is missed
TOWARDS_EQUAL = 1e-3
START = 10.0  # the variance of all bands together over that of the noise


def with_bands(
    X: Features,
    target: npt.NDArray[Any],
    fold: npt.NDArray[np.int64],
    scaling: dict[int, Moments],
    widths: Sequence[int],
    views: int = 1,
) -> dict[int, Moments]:
    """`scaling` (fold or REFIT: moments of its training rows), with an emphasis (D,) that gives
    every band its own penalty.

    X: (N, D). target: (N,) int classes, (N, T) labels or real values. fold: (N,) the fold that
    holds a row out, or TRAIN_ONLY.
    widths: (B,) features of each band, in order; none are one band. views: of each image; the rows
    come one view after another. The mean square of an emphasis is 1, so that strengths mean what
    they mean without bands. The scales of a fold's head are found without the rows that it is
    judged by. Raises ValueError where the widths do not add up to D.
    """
    if widths and sum(widths) != X.shape[1]:
        raise ValueError(
            f"bands of {list(widths)} features were given for {X.shape[1]}: the widths must add up "
            "to it"
        )
    if len(widths) < 2:
        return scaling
    return {
        key: _emphasised(X, target, fold, np.flatnonzero(fold != key), own, widths, views)
        for key, own in scaling.items()
    }


def _emphasised(
    X: Features,
    target: npt.NDArray[Any],
    fold: npt.NDArray[np.int64],
    rows: npt.NDArray[np.intp],
    own: Moments,
    widths: Sequence[int],
    views: int,
) -> Moments:
    draw = np.random.default_rng(0)
    rows = np.sort(draw.choice(rows, min(ROWS, len(rows)), replace=False))
    blocks = [np.flatnonzero(fold[rows] == group) for group in np.unique(fold[rows]) if group >= 0]
    if len(blocks) < 3:  # a split of the user's own, or two folds, one of which is held out
        image = rows % (len(fold) // views)  # never on two sides: its other views would tell
        images = draw.permutation(np.unique(image))
        blocks = [
            np.flatnonzero(np.isin(image, part))
            for part in np.array_split(images, min(FOLDS, len(images)))
        ]
    Z = scaled(X[rows], own.mean, np.where(own.constant, 0.0, 1.0 / own.scale))
    Y = _columns(target[rows])
    Y -= Y.mean(axis=0)
    if len(rows) < 2 or not Y.any():  # nothing to tell apart
        return own
    if target.dtype.kind == "f":  # numbers in units of their own
        Y /= np.where(Y.any(axis=0), np.sqrt((Y**2).sum(axis=0)), 1.0)
    Y /= np.sqrt((Y**2).sum())
    bounds = np.cumsum([0, *widths])
    rows32 = Z.astype(np.float32)  # of standardised numbers: products in half the time
    kernels = np.stack(
        [rows32[:, a:b] @ rows32[:, a:b].T / (b - a) for a, b in itertools.pairwise(bounds)]
    )
    kernels = kernels.astype(np.float64)
    variances = np.exp(_log_variances(kernels, Y, blocks)) / np.asarray(widths)
    emphasis = np.repeat(np.sqrt(variances), widths)
    return dataclasses.replace(own, emphasis=emphasis / np.sqrt((emphasis**2).mean()))


def _columns(target: npt.NDArray[Any]) -> Array:
    """(n, T) float64: a column for each class that is there, labels and numbers as they are."""
    if target.ndim == 1 and target.dtype.kind != "f":
        return np.asarray(target[:, None] == np.unique(target), np.float64)
    return target.reshape(len(target), -1).astype(np.float64)


def _log_variances(kernels: Array, Y: Array, blocks: Sequence[npt.NDArray[np.intp]]) -> Array:
    """(B,) of least squared error on held-out blocks: kernels (B, n, n), each of a band's average
    over its features; Y (n, T).
    """
    start = np.full(len(kernels), np.log(START / len(kernels)))
    found = scipy.optimize.minimize(
        held_out_error,
        start,
        args=(kernels, Y, blocks),
        jac=True,
        method="L-BFGS-B",
        bounds=[(value - FARTHEST, value + FARTHEST) for value in start],
        options={"maxiter": STEPS, "ftol": 1e-4},
    )
    return np.asarray(found.x)


def held_out_error(
    d: Array, kernels: Array, Y: Array, blocks: Sequence[npt.NDArray[np.intp]]
) -> tuple[float, Array]:
    """Squared error of the rows of each block, predicted from all others, and its gradient (B,) by
    the log variances d (B,).

    The derivative along dM is 2 sum_F g_F' [H_F: dM (H_:F r_F - H Y)], with the errors r_F and g_F
    = (H_FF)^-1 r_F.
    """
    variances = np.exp(d)
    # The ones are the intercept's kernel, with a variance that costs next to nothing.
    M = np.einsum("b,bij->ij", variances, kernels) + 1.0
    M.flat[:: len(M) + 1] += 1.0
    H = scipy.linalg.inv(M, overwrite_a=True, check_finite=False)
    HY = H @ Y
    errors, pulls = np.zeros_like(Y), np.zeros_like(Y)
    slope = np.zeros_like(M)
    for rows in blocks:
        factor = scipy.linalg.cho_factor(H[np.ix_(rows, rows)], check_finite=False)
        errors[rows] = scipy.linalg.cho_solve(factor, HY[rows], check_finite=False)
        pulls[rows] = scipy.linalg.cho_solve(factor, errors[rows], check_finite=False)
        slope += (H[:, rows] @ pulls[rows]) @ (H[:, rows] @ errors[rows] - HY).T
    apart = d - d.mean()
    gradient = 2 * variances * np.einsum(
        "bij,ij->b", kernels, slope
    ) + 2 * TOWARDS_EQUAL * apart / len(d)
    return float((errors**2).sum() + TOWARDS_EQUAL * (apart**2).mean()), gradient
