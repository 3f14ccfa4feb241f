"""Baselines that need no training: k nearest neighbours and nearest class mean.

N rows, D features, C outputs, q query rows of one block, m the largest k.

One product of the features with themselves serves every k, both metrics, both weightings and every fold: a squared
distance and a cosine are both functions of the inner products and the norms, and a fold is a mask.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.heads.checks import check_finite
from headrace.heads.metrics import TaskKind
from headrace.heads.spec import FULL, CentroidSpec, HeadFit, KNNSpec
from headrace.heads.task import TEST

Metric = Literal["cosine", "euclidean"]
Floats = npt.NDArray[Any]

QUERY_ROWS = 1024  # rows of one block of similarities
CENTROID_TEMPERATURE = {"cosine": 10.0, "euclidean": 1.0}


def fit_knn_bank(
    X: Floats,
    target: npt.NDArray[Any],
    *,
    n_classes: int,
    fold: npt.NDArray[np.int16],
    specs: Sequence[KNNSpec],
    full: bool = True,
    sample_weight: npt.NDArray[np.float64] | None = None,
    task: TaskKind = "single",
) -> list[HeadFit]:
    """Every k, metric and weighting on every fold from one pass over the N × N similarities.

    X (N, D), target and fold as in `Task`. Fold heads have predictions and no arrays; the FULL head's arrays are the
    training rows themselves, the same objects for all specs (a results file stores them once). A neighbour votes with
    its sample weight. A spec whose k exceeds the training rows of a fold has an error there.
    Raises ValueError for features that are not finite.
    """
    check_finite(X)
    started = time.perf_counter()
    weight = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    rows = np.ascontiguousarray(X, np.float32)
    values = encoded(target, n_classes, task)
    trains = (fold != TEST) & (weight > 0)
    largest = max((spec.k for spec in specs), default=1)
    folds = sorted(int(number) for number in np.unique(fold[fold >= 0]))
    error: dict[tuple[int, int], str] = {}
    predicted: dict[tuple[int, int], Floats] = {}
    metrics = sorted({spec.metric for spec in specs})
    reference = np.flatnonzero(trains)
    for number in folds:
        available = int(np.count_nonzero(fold[reference] != number))
        for place, spec in enumerate(specs):
            if reason := knn_error(spec, available):
                error[place, number] = reason
            else:
                predicted[place, number] = np.empty((np.count_nonzero(fold == number), n_classes), np.float32)
    # The whole block of similarities serves all folds: queries are taken in fold order so that a block's mask is a
    # range of columns, and the references too.
    queries = np.concatenate([np.flatnonzero(fold == number) for number in folds] or [np.zeros(0, np.int64)])
    square = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    reference_rows = rows[reference]
    done = dict.fromkeys(folds, 0)
    for start in range(0, len(queries), QUERY_ROWS):
        block = queries[start : start + QUERY_ROWS]
        product = rows[block] @ reference_rows.T
        for number in np.unique(fold[block]):
            own = fold[block] == number
            allowed = fold[reference] != number
            similar = product[own][:, allowed]
            candidates, asked = reference[allowed], block[own]
            for metric in metrics:
                wanted = [
                    place for place, spec in enumerate(specs) if spec.metric == metric and (place, number) in predicted
                ]
                if wanted:
                    near, distance = nearest(
                        similar, square[asked], square[candidates], metric, min(largest, len(candidates))
                    )
                    at = slice(done[int(number)], done[int(number)] + len(asked))
                    voters = candidates[near]
                    for place in wanted:
                        predicted[place, int(number)][at] = vote(
                            specs[place],
                            distance,
                            values[voters[:, : specs[place].k]],
                            weight[voters[:, : specs[place].k]],
                        )
            done[int(number)] += int(np.count_nonzero(own))
    share = (time.perf_counter() - started) / max(1, len(specs) * len(folds))
    stored = {
        "features": reference_rows,
        "target": values[reference],
        "sample_weight": weight[reference].astype(np.float32),
    }
    fits = []
    for place, spec in enumerate(specs):
        fits += [
            _fit(spec, number, {}, predicted.get((place, number)), error.get((place, number)), share)
            for number in folds
        ]
        if full:
            reason = knn_error(spec, len(reference))
            fits.append(_fit(spec, FULL, {} if reason else stored, None, reason, 0.0))
    return fits


def predict_knn(
    spec: KNNSpec, arrays: dict[str, npt.NDArray[Any]], X: Floats, task: TaskKind
) -> npt.NDArray[np.float32]:
    """(n, C) the weighted mean of the neighbours' targets. X (n, D)."""
    reference = arrays["features"]
    square = np.einsum("nd,nd->n", reference, reference, dtype=np.float64)
    predicted = np.empty((len(X), arrays["target"].shape[1]), np.float32)
    for start in range(0, len(X), QUERY_ROWS):
        block = np.ascontiguousarray(X[start : start + QUERY_ROWS], np.float32)
        own = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        near, distance = nearest(block @ reference.T, own, square, spec.metric, spec.k)
        predicted[start : start + QUERY_ROWS] = vote(
            spec, distance, arrays["target"][near], arrays["sample_weight"][near]
        )
    return predicted


def knn_error(spec: KNNSpec, available: int) -> str | None:
    """Why a search among so many rows cannot be done, or None."""
    if not 1 <= spec.k <= available:
        return f"k = {spec.k} neighbours, but there are {available} training rows: k must be between 1 and {available}"
    return None


def nearest(
    product: Floats, own: Floats, other: Floats, metric: Metric, m: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The m nearest references of each query, nearest first, ties by position: indices and distances, both (q, m).

    product (q, n) inner products, own (q,) and other (n,) squared norms. Cosine distance is 1 - cosine; a zero vector
    has cosine 0 with everything.
    """
    if metric == "cosine":
        norms = np.sqrt(np.outer(np.where(own > 0, own, 1), np.where(other > 0, other, 1)))
        distance = 1 - product / norms
    else:
        distance = np.maximum(own[:, None] + other - 2.0 * product, 0)
    if m < distance.shape[1]:
        near = np.argpartition(distance, m - 1, axis=1)[:, :m]
    else:
        near = np.broadcast_to(np.arange(distance.shape[1]), distance.shape).copy()
    near.sort(axis=1)  # then a stable sort by distance breaks ties by position
    chosen = np.take_along_axis(distance, near, axis=1)
    order = np.argsort(chosen, axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, order, axis=1)
    return np.take_along_axis(near, order, axis=1), np.sqrt(chosen) if metric == "euclidean" else np.maximum(chosen, 0)


def vote(spec: KNNSpec, distance: Floats, values: Floats, weight: Floats) -> npt.NDArray[np.float32]:
    """(q, C) mean of the neighbours' values (q, k, C) by sample weight (q, k), over distance where the spec says so.

    As in scikit-learn, neighbours at distance zero then decide alone.
    """
    share = weight.astype(np.float64)
    if spec.weighting == "distance":
        near = distance[:, : spec.k]
        zero = near == 0
        share = share * np.where(zero.any(1, keepdims=True), zero, 1 / np.where(zero, 1, near))
    mean = np.einsum("qk,qkc->qc", share, values) / share.sum(1, keepdims=True)
    return np.asarray(mean, np.float32)


def encoded(target: npt.NDArray[Any], outputs: int, task: TaskKind) -> npt.NDArray[np.float32]:
    """(N, C) what neighbours vote with: indicator of the class, labels, or target values."""
    if task == "single":
        return np.asarray(np.eye(outputs, dtype=np.float32)[target])
    return np.asarray(target, np.float32).reshape(len(target), outputs)


def fit_centroid_bank(
    X: Floats,
    target: npt.NDArray[Any],
    *,
    n_classes: int,
    fold: npt.NDArray[np.int16],
    specs: Sequence[CentroidSpec],
    full: bool = True,
    sample_weight: npt.NDArray[np.float64] | None = None,
    task: TaskKind = "single",
) -> list[HeadFit]:
    """Class means of every fold as differences of one sum: the total minus the fold's own share.

    X (N, D), single-label target (N,), fold as in `Task`. Euclidean heads work on standardised features, as a nearest
    mean under one diagonal covariance; cosine heads on features centred on the mean of the training rows.
    """
    check_finite(X)
    if task != "single":
        reason = f"a class mean needs one class per row, this is a {task} task: use knn, ridge or mlp"
        folds = sorted({int(number) for number in fold[fold >= 0]}) + [FULL] * full
        return [_fit(spec, number, {}, None, reason, 0.0) for spec in specs for number in folds]
    weight = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    usable = np.where(fold != TEST, weight, 0.0)
    folds = sorted(int(number) for number in np.unique(fold[fold >= 0]))
    started = time.perf_counter()
    parts = {
        number: _sums(X, target, np.where(fold == number, usable, 0.0), n_classes)
        for number in sorted(set(fold.tolist()))
    }
    total = tuple(np.sum([part[place] for part in parts.values()], axis=0) for place in range(3))
    fits = []
    for spec in specs:
        for number in [*folds, FULL] if full else folds:
            sums = total if number == FULL else tuple(t - p for t, p in zip(total, parts[number], strict=True))
            arrays = centroid_arrays(spec, *sums)
            own = None if number == FULL else predict_centroid(spec, arrays, X[fold == number])
            seconds, started = time.perf_counter() - started, time.perf_counter()
            fits.append(_fit(spec, number, arrays, own, None, seconds))
    return fits


def centroid_arrays(spec: CentroidSpec, sums: Floats, squares: Floats, counts: Floats) -> dict[str, npt.NDArray[Any]]:
    """means (C, D), center (D,), inverse_scale (D,), present (C,) of class sums (C, D), squares (D,), counts (C,)."""
    weight = counts.sum()
    center = sums.sum(0) / weight
    variance = np.maximum(squares / weight - center**2, 0)
    deviation = np.sqrt(np.where(variance > 1e-12 * center**2, variance, 0))
    scale = np.where(deviation > 0, deviation, 1.0) if spec.metric == "euclidean" else np.ones_like(center)
    means = sums / np.maximum(counts, np.finfo(np.float64).tiny)[:, None]
    return {
        "means": means.astype(np.float32),
        "center": center.astype(np.float32),
        "inverse_scale": (1 / scale).astype(np.float32),
        "present": (counts > 0).astype(np.uint8),
    }


def predict_centroid(spec: CentroidSpec, arrays: dict[str, npt.NDArray[Any]], X: Floats) -> npt.NDArray[np.float32]:
    """(n, C) softmax over classes of the scaled similarity; a class without training rows has probability 0."""
    means = (arrays["means"] - arrays["center"]) * arrays["inverse_scale"]
    rows = (X.astype(np.float32, copy=False) - arrays["center"]) * arrays["inverse_scale"]
    if spec.metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) * np.linalg.norm(means, axis=1)
        similar = rows @ means.T / np.where(lengths > 0, lengths, 1)
    else:
        # Minus half the mean squared distance over features; the row's own norm is the same for every class.
        similar = (rows @ means.T - 0.5 * (means**2).sum(1)) / np.sqrt(rows.shape[1])
    decision = CENTROID_TEMPERATURE[spec.metric] * similar.astype(np.float64)
    decision[:, arrays["present"] == 0] = -np.inf
    shifted = np.exp(decision - decision.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)


def _sums(X: Floats, target: npt.NDArray[Any], weight: Floats, outputs: int) -> tuple[Floats, Floats, Floats]:
    sums, squares = np.zeros((outputs, X.shape[1])), np.zeros(X.shape[1])
    for start in range(0, len(X), 4096):
        at = slice(start, start + 4096)
        inside = weight[at] > 0
        if inside.any():
            rows = X[at][inside].astype(np.float64)
            weighted = rows * weight[at][inside, None]
            sums += np.eye(outputs)[target[at][inside]].T @ weighted
            squares += (weighted * rows).sum(0)
    return sums, squares, np.bincount(target, weights=weight, minlength=outputs).astype(np.float64)


def _fit(
    spec: KNNSpec | CentroidSpec,
    fold: int,
    arrays: dict[str, npt.NDArray[Any]],
    validation: npt.NDArray[np.float32] | None,
    error: str | None,
    seconds: float,
) -> HeadFit:
    return HeadFit(spec, fold, arrays, float("nan"), float("nan"), 0, seconds, validation, error)
