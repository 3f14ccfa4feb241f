"""Banded heads: one penalty for each tap, chosen on a head's training rows.

The taps that are concatenated in one input are bands of features. Ridge regression with one penalty
for each band (Nunez-Elizalde, Huth & Gallant 2019; Dupré la Tour, Eickenberg, Nunez-Elizalde &
Gallant 2022) is ridge regression with one penalty on features that are scaled band by band. The
scales minimize the squared error on held-out folds of the training rows, by the method of Levenberg
(1944) and Marquardt (1963). With the kernel M = sum_b e^d_b K_b + I + 1 1', K_b the products of
rows in band b, d_b its log variance, and H = M^-1, the errors of a fold's rows F, predicted from
all others, are (H_FF)^-1 (H Y)_F. So one inverse gives the errors of all folds, and no head is
trained to choose the scales.

n sampled rows, D features, B bands, T target columns.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from headrace.heads.arrays import Array, Doubles, Index
from headrace.heads.data.fold_coordinates import fold_coordinates
from headrace.heads.data.standardize import Moments, scaled
from headrace.heads.data.training_data import TrainingData

# Of a head's training rows, which takes half a second. With 1,200 the scales differ by a tenth, or
# twofold between taps that are alike.
SAMPLED_ROWS = 800
# Random folds of the sampled rows, if these are in fewer than three of the task's folds.
DRAWN_FOLDS = 5
MAX_EVALUATIONS = 25  # 3 or 4 are needed from 300 rows on, up to 12 below
MIN_DECREASE = 1e-3  # the smallest relative decrease of the error that a step is taken for
START_DAMPING = 1e-2
MAX_LOG_STEP = 4.0  # of a log variance; further away the curvature says nothing
# Largest distance of a log variance from its start, at which all bands have the same variance.
MAX_LOG_DISTANCE = 8.0
SKETCH_COLUMNS = 8  # combinations of the target columns that the curvature is computed from
# Factor of the mean squared distance of log variances from their mean, which is added to the share
# of the target's variance that is not explained.
EQUAL_BANDS_PENALTY = 1e-3
START_SIGNAL_TO_NOISE = 10.0  # variance of all bands together over that of the noise


def with_bands(data: TrainingData, scaling: dict[int, Moments]) -> dict[int, Moments]:
    """Return `scaling` with an emphasis (D,) that gives every band its own penalty.

    scaling: {fold or REFIT: moments of its training rows}.

    The mean square of an emphasis is 1, so that a regularization strength means about the same as
    without bands. The scales of a fold's head do not depend on its held-out rows.

    Raises ValueError if the widths do not add up to D.
    """
    widths, n_features = data.band_widths, data.X.shape[1]
    if widths and sum(widths) != n_features:
        raise ValueError(
            f"bands of {list(widths)} features were given for {n_features}: the widths must add up "
            "to it"
        )
    if len(widths) < 2:
        return scaling
    return {fold: _with_emphasis(data, fold, moments) for fold, moments in scaling.items()}


def _with_emphasis(data: TrainingData, held_out: int, moments: Moments) -> Moments:
    target, band_widths = data.target, data.band_widths
    training_rows = np.flatnonzero(data.fold != held_out)
    rng = np.random.default_rng(0)
    n_sampled = min(SAMPLED_ROWS, len(training_rows))
    rows = np.sort(rng.choice(training_rows, n_sampled, replace=False))
    row_fold = data.fold[rows]
    blocks = [np.flatnonzero(row_fold == group) for group in np.unique(row_fold) if group >= 0]
    if len(blocks) < 3:  # a given split, or two folds of which one is held out
        # The views of an image are in one block: they are so similar that a model would recognize
        # one from the others.
        image_of_row = rows % (len(data.fold) // data.n_views)
        images = rng.permutation(np.unique(image_of_row))
        blocks = [
            np.flatnonzero(np.isin(image_of_row, block_images))
            for block_images in np.array_split(images, min(DRAWN_FOLDS, len(images)))
        ]
    Z = scaled(data.X[rows], moments.mean, moments.inverse_scale)
    # Imputes the side columns' missing numbers; the scales of both sides are the same.
    Z = fold_coordinates(moments, moments, moments.scale, moments.scale).rows(Z)
    Y = _target_columns(target[rows])
    Y -= Y.mean(axis=0)
    if len(rows) < 2 or not Y.any():  # a constant target
        return moments
    if target.dtype.kind == "f":  # several targets count the same whatever their units
        Y /= np.where(Y.any(axis=0), np.sqrt((Y**2).sum(axis=0)), 1.0)
    Y /= np.sqrt((Y**2).sum())
    # float32 is enough for standardized numbers, and the products take half the time.
    Z32 = Z.astype(np.float32)
    band_offsets = np.cumsum([0, *band_widths])
    kernels = np.empty((len(band_widths), len(rows), len(rows)))
    for kernel, (start, end) in zip(kernels, itertools.pairwise(band_offsets), strict=True):
        kernel[:] = Z32[:, start:end] @ Z32[:, start:end].T / (end - start)
    variances = np.exp(_best_log_variances(kernels, Y, blocks)) / np.asarray(band_widths)
    emphasis = np.repeat(np.sqrt(variances), band_widths)
    return dataclasses.replace(moments, emphasis=emphasis / np.sqrt((emphasis**2).mean()))


def _target_columns(target: Array) -> Doubles:
    """Return (n, T) float64: a column for each class present, or labels and values as they are."""
    if target.ndim == 1 and target.dtype.kind != "f":
        return np.asarray(target[:, None] == np.unique(target), np.float64)
    return target.reshape(len(target), -1).astype(np.float64)


def _best_log_variances(kernels: Doubles, Y: Doubles, blocks: Sequence[Index]) -> Doubles:
    """Return the log variances (B,) that minimize `held_out_error`.

    kernels: (B, n, n), products of rows in each band divided by its width. Y: (n, T).
    """
    start = np.full(len(kernels), np.log(START_SIGNAL_TO_NOISE / len(kernels)))
    sketch = _sketch(Y.shape[1])
    log_variances, damping = start, START_DAMPING
    error, gradient, curvature = held_out_error(start, kernels, Y, blocks, sketch)
    for _ in range(MAX_EVALUATIONS - 1):
        # Bands that hardly matter have hardly any curvature, and would move too far otherwise.
        scale = np.diag(curvature) + 1e-3 * np.diag(curvature).max()
        step = -np.linalg.solve(curvature + damping * np.diag(scale), gradient)
        step *= min(1.0, MAX_LOG_STEP / max(np.abs(step).max(), 1e-12))
        moved = np.clip(log_variances + step, start - MAX_LOG_DISTANCE, start + MAX_LOG_DISTANCE)
        step = moved - log_variances
        predicted_decrease = -(gradient @ step + step @ curvature @ step / 2)
        if predicted_decrease < MIN_DECREASE * error:
            break
        moved_error, *derivatives = held_out_error(moved, kernels, Y, blocks, sketch)
        gain_ratio = (error - moved_error) / predicted_decrease
        # Less damping after a step that did what was predicted, more after a poor one.
        damping *= 8.0 if gain_ratio < 0 else 4.0 if gain_ratio < 0.2 else 1.0
        if gain_ratio > 0.5:
            damping /= 4.0
        if gain_ratio > 0:
            log_variances, error, (gradient, curvature) = moved, moved_error, derivatives
    return log_variances


def _sketch(n_columns: int) -> Doubles:
    """Return (T, S) directions in the space of T target columns, S <= SKETCH_COLUMNS.

    The sum of squares of rows times the sketch is on average that of the rows.
    """
    if n_columns <= SKETCH_COLUMNS:
        return np.eye(n_columns)
    directions = np.random.default_rng(0).standard_normal((n_columns, SKETCH_COLUMNS))
    return np.asarray(directions / np.sqrt(SKETCH_COLUMNS))


def held_out_error(
    log_variances: Doubles, kernels: Doubles, Y: Doubles, blocks: Sequence[Index], sketch: Doubles
) -> tuple[float, Doubles, Doubles]:
    """Return the squared error of all blocks, each predicted from all others, and its derivatives.

    These are the gradient (B,), which is exact, and the curvature (B, B) by Gauss and Newton, of
    the errors times the sketch.

    log_variances: (B,). kernels: (B, n, n). Y: (n, T). blocks: row numbers. sketch: (T, S).

    Along dM the errors of block F change by dr_F = (H_FF)^-1 [H dM (H_:F r_F - H Y)]_F.
    """
    n_bands, n = len(kernels), len(Y)
    variances = np.exp(log_variances)
    # The kernel 1 1' of the intercept, whose variance of 1 penalizes it hardly at all.
    M = (variances @ kernels.reshape(n_bands, -1)).reshape(n, n) + 1.0
    M.flat[:: n + 1] += 1.0
    H = scipy.linalg.inv(M, overwrite_a=True, check_finite=False)
    HY = H @ Y
    own_blocks = [H[np.ix_(rows, rows)] for rows in blocks]
    factors = [scipy.linalg.cho_factor(block, check_finite=False) for block in own_blocks]
    r = np.zeros_like(Y)
    error_slope = np.zeros_like(M)  # derivative of half the error by the elements of M
    missed = np.empty((n, len(blocks), sketch.shape[1]))  # H_:F r_F - H Y, sketched
    for block, (rows, factor) in enumerate(zip(blocks, factors, strict=True)):
        r[rows] = scipy.linalg.cho_solve(factor, HY[rows], check_finite=False)
        g = scipy.linalg.cho_solve(factor, r[rows], check_finite=False)
        missed_by_block = H[:, rows] @ r[rows] - HY
        error_slope += (H[:, rows] @ g) @ missed_by_block.T
        missed[:, block] = missed_by_block @ sketch
    # One product for all bands and blocks: the kernels are read once.
    in_bands = (kernels.reshape(-1, n) @ missed.reshape(n, -1)).reshape(n_bands, *missed.shape)
    jacobian = np.empty((n_bands, n, sketch.shape[1]))
    for block, (rows, factor) in enumerate(zip(blocks, factors, strict=True)):
        in_block = np.concatenate(list(H[rows] @ in_bands[:, :, block]), axis=1)
        change = scipy.linalg.cho_solve(factor, in_block, check_finite=False)
        jacobian[:, rows] = change.reshape(len(rows), n_bands, -1).transpose(1, 0, 2)
    jacobian = variances[:, None] * jacobian.reshape(n_bands, -1)
    distance = log_variances - log_variances.mean()
    penalty = EQUAL_BANDS_PENALTY / n_bands
    error = float((r**2).sum() + penalty * (distance**2).sum())
    gradient = 2 * variances * (kernels.reshape(n_bands, -1) @ error_slope.ravel())
    gradient += 2 * penalty * distance
    curvature = 2 * jacobian @ jacobian.T + 2 * penalty * (np.eye(n_bands) - 1 / n_bands)
    return error, gradient, curvature
