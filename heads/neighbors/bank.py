"""Baselines that need no training: k nearest neighbours and nearest class mean.

N rows, D features, C outputs, q query rows of one block, m the largest k.

One product of the held-out rows with the training rows serves every k, both metrics and both
weightings: a squared distance and a cosine are both functions of inner products and norms. Every
row is held out once, so all folds together cost one pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.heads.data.checks import check_finite, check_specs, row_weights
from headrace.heads.data.standardize import Features, sweep
from headrace.heads.data.streamed import Streamed
from headrace.heads.data.task import REFIT, TEST, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.temperature import FARTHEST, keep_decisions
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.spec import FitResult

Metric = Literal["cosine", "euclidean"]
Floats = npt.NDArray[Any]

METRICS_OF_DISTANCE: tuple[Metric, ...] = ("cosine", "euclidean")
QUERY_ROWS = 1024  # rows of one block of inner products
REFERENCE_ROWS = 1 << 14  # its columns: the block and what is made of it take half a gigabyte
STORED_ROWS_BYTES = 1 << 30  # more training rows than this are not copied into a results file
# distances this small beside the norms are computed again: float32 products err by about 1e-6
EXACT_BELOW = 1e-4
SUM_ROWS = 4096  # rows of one sum of a class mean
CENTROID_TEMPERATURE = {"cosine": 10.0, "euclidean": 1.0}


@dataclass(frozen=True)
class References:
    """The rows that may be neighbours, n of them, in the form that distances are computed from.

    Rows are centred: a squared distance is a difference of numbers as large as the norms, and loses
    the digits that a common offset takes. The cosine is not free of the offset, which comes back in
    float64.
    """

    rows: npt.NDArray[np.float32]  # (n, D) centred
    center: npt.NDArray[np.float64]  # (D,)
    square: npt.NDArray[np.float64]  # (n,) squared norms of the centred rows
    offset: npt.NDArray[np.float64]  # (n,) inner products of the centred rows with the centre
    length: npt.NDArray[np.float64]  # (n,) norms of the rows as they are

    @classmethod
    def of(cls, rows: Floats, center: npt.NDArray[np.float64] | None = None) -> "References":
        middle = rows.mean(0, dtype=np.float64) if center is None else center
        centred = (rows - middle).astype(np.float32)
        square = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
        offset = centred @ middle
        length = np.sqrt(np.maximum(square + 2 * offset + middle @ middle, 0))
        # A row of zeros has length 0 exactly, and so cosine 0 with everything, which rounding would
        # lose.
        return cls(centred, middle, square, offset, np.where((rows == 0).all(1), 0.0, length))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: npt.NDArray[Any] | slice) -> "References":
        """Some of the rows."""
        return References(
            self.rows[chosen],
            self.center,
            self.square[chosen],
            self.offset[chosen],
            self.length[chosen],
        )


@dataclass(frozen=True)
class StreamedReferences:
    """The same for rows that stay on disk: a slice of them is read when it is taken."""

    source: Streamed
    chosen: npt.NDArray[np.intp]
    center: npt.NDArray[np.float64]

    @classmethod
    def of(cls, source: Streamed) -> "StreamedReferences":
        """All rows."""
        total = np.zeros(source.shape[1])
        for _, rows in sweep(source, np.zeros(len(source), np.int64)):
            total += source[rows].sum(0, dtype=np.float64)
        return cls(source, np.arange(len(source)), total / len(source))

    def __len__(self) -> int:
        return len(self.chosen)

    def only(self, chosen: npt.NDArray[Any]) -> "StreamedReferences":
        """Some of the rows, not read yet."""
        return StreamedReferences(self.source, self.chosen[chosen], self.center)

    def take(self, chosen: slice) -> References:
        """A slice of the rows, read."""
        return References.of(self.source[self.chosen[chosen]], self.center)


def fit_knn_bank(
    data: TrainingData, specs: Sequence[KNNSpec], *, refit: bool = True
) -> list[FitResult]:
    """Every k, metric and weighting on every fold from one pass over the inner products.

    data: X (N, D), in memory or streamed. Fold heads have predictions and
    no arrays; the REFIT head's arrays are the training rows themselves, the same objects for all
    specs (a results file stores them once), and it has an error where they are more than a results
    file is meant for. A neighbour votes with its sample weight. A spec whose k exceeds the training
    rows of a fold has an error there. Raises BadFeatures (a ValueError) for features that are not
    finite.
    """
    check_specs(specs, "KNNSpec(5)")
    X, fold = data.X, data.fold
    if not isinstance(X, Streamed):
        check_finite(X)
    started = time.perf_counter()
    weight = row_weights(data.sample_weight, len(X))
    values = encoded(data.target, data.n_outputs, data.task_kind)
    usable = np.flatnonzero((fold != TEST) & (weight > 0))
    rows = (
        StreamedReferences.of(X)
        if isinstance(X, Streamed)
        else References.of(np.asarray(X, np.float32))
    )
    folds = data.folds
    found: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
    error: dict[tuple[int, int], str | None] = {}
    for number in folds:
        others = usable[fold[usable] != number]
        asked = [place for place, spec in enumerate(specs) if knn_error(spec, len(others)) is None]
        held = np.flatnonzero(fold == number)
        queries, references = (
            rows.only(which) if isinstance(rows, StreamedReferences) else rows.take(which)
            for which in (held, others)
        )
        neighbours = search(queries, references, [specs[place] for place in asked])
        for place, (near, distance) in zip(asked, neighbours, strict=True):
            found[place, number] = vote(
                specs[place], distance, values[others[near]], weight[others[near]]
            )
        error |= {(place, number): knn_error(spec, len(others)) for place, spec in enumerate(specs)}
    share = (time.perf_counter() - started) / max(1, len(specs) * len(folds))
    room = len(usable) * X.shape[1] * 4
    stored = {}
    if refit and room <= STORED_ROWS_BYTES:
        stored = {
            "features": np.ascontiguousarray(X[usable], np.float32),
            "target": values[usable],
            "sample_weight": weight[usable].astype(np.float32),
        }
    fits = []
    for place, spec in enumerate(specs):
        for number in folds:
            key = place, number
            fits.append(_fit(spec, number, {}, found.get(key), error[key], share))
        if refit:
            reason = knn_error(spec, len(usable))
            if not stored and reason is None:
                reason = (
                    f"a neighbour head is its training rows, here {room / 1e9:.1f} GB, more than "
                    f"the {STORED_ROWS_BYTES / 1e9:.1f} GB that are copied into a results file: "
                    "predict with another kind"
                )
            fits.append(_fit(spec, REFIT, {} if reason else stored, None, reason, 0.0))
    return fits


def predict_knn(
    spec: KNNSpec, arrays: dict[str, npt.NDArray[Any]], X: Floats
) -> npt.NDArray[np.float32]:
    """(n, C) the weighted mean of the neighbours' targets. X (n, D)."""
    references = References.of(arrays["features"])
    queries = References.of(np.asarray(X, np.float32), references.center)
    ((near, distance),) = search(queries, references, [spec])
    return vote(spec, distance, arrays["target"][near], arrays["sample_weight"][near])


def knn_error(spec: KNNSpec, available: int) -> str | None:
    """Why a search among so many rows cannot be done, or None."""
    if not 1 <= spec.k <= available:
        return (
            f"k = {spec.k} neighbours, but there are {available} training rows: k must be between "
            f"1 and {available}"
        )
    return None


def search(
    queries: References | StreamedReferences,
    references: References | StreamedReferences,
    specs: Sequence[KNNSpec],
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """For each spec the k nearest references of each query, nearest first, ties by position:
    indices and distances, both (q, k). One product per block of queries and of references serves
    all specs.
    """
    largest = {
        metric: max((s.k for s in specs if s.metric == metric), default=0)
        for metric in METRICS_OF_DISTANCE
    }
    parts: dict[Metric, list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]] = {
        "cosine": [],
        "euclidean": [],
    }
    for start in range(0, len(queries), QUERY_ROWS):
        block = queries.take(slice(start, start + QUERY_ROWS))
        best: dict[Metric, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = {}
        for first in range(0, len(references), REFERENCE_ROWS):
            some = references.take(slice(first, first + REFERENCE_ROWS))
            product = block.rows @ some.rows.T
            for metric in METRICS_OF_DISTANCE:
                if largest[metric]:
                    near, distance = nearest(
                        product, block, some, metric, min(largest[metric], len(some))
                    )
                    found = near + first, distance
                    best[metric] = _merged(best[metric], found, largest[metric]) if first else found
        for metric, found in best.items():
            parts[metric].append(found)
    joined = {}
    for metric in METRICS_OF_DISTANCE:
        empty = (np.zeros((0, largest[metric]), np.int64), np.zeros((0, largest[metric])))
        joined[metric] = [
            np.concatenate(arrays) for arrays in zip(empty, *parts[metric], strict=True)
        ]
    return [
        (joined[spec.metric][0][:, : spec.k], joined[spec.metric][1][:, : spec.k]) for spec in specs
    ]


def _merged(
    earlier: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]],
    later: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]],
    m: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The m nearest of both, nearest first; of equal distances the earlier block's come first."""
    near, distance = (np.concatenate(pair, axis=1) for pair in zip(earlier, later, strict=True))
    order = np.argsort(distance, axis=1, kind="stable")[:, :m]
    return np.take_along_axis(near, order, axis=1), np.take_along_axis(distance, order, axis=1)


def nearest(
    product: Floats, queries: References, references: References, metric: Metric, m: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The m nearest references of each query by their inner products (q, n) of centred rows.

    Cosine distance is 1 - cosine; a zero row has cosine 0 with everything.
    """
    if metric == "cosine":
        raw = product + (
            queries.offset[:, None] + (references.offset + references.center @ references.center)
        )
        lengths = np.outer(
            np.where(queries.length > 0, queries.length, 1),
            np.where(references.length > 0, references.length, 1),
        )
        zero = (queries.length == 0)[:, None] | (references.length == 0)
        distance = np.where(zero, 1.0, 1 - raw / lengths)
        scale: Floats = np.ones(1)
    else:
        distance = queries.square[:, None] + references.square - 2.0 * product
        scale = queries.square[:, None] + references.square
    if m < distance.shape[1]:
        near = np.argpartition(distance, m - 1, axis=1)[:, :m]
    else:
        near = np.broadcast_to(np.arange(distance.shape[1]), distance.shape).copy()
    near.sort(axis=1)  # then a stable sort by distance breaks ties by position
    chosen = np.take_along_axis(distance, near, axis=1)
    bound = np.take_along_axis(np.broadcast_to(scale, distance.shape), near, axis=1) * EXACT_BELOW
    row, column = np.nonzero(chosen < bound)
    for start in range(0, len(row), QUERY_ROWS):
        r, c = row[start : start + QUERY_ROWS], column[start : start + QUERY_ROWS]
        chosen[r, c] = _exact(queries, references, r, near[r, c], metric)
    chosen = np.sqrt(np.maximum(chosen, 0)) if metric == "euclidean" else chosen
    order = np.argsort(chosen, axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1), np.take_along_axis(chosen, order, axis=1)


def _exact(
    queries: References,
    references: References,
    row: npt.NDArray[Any],
    near: npt.NDArray[Any],
    metric: Metric,
) -> Floats:
    """Distances of single pairs in float64, from differences:

    0 for equal rows, where products leave rounding.
    """
    a, b = queries.rows[row].astype(np.float64), references.rows[near].astype(np.float64)
    if metric == "cosine":
        a = (a + queries.center) / np.maximum(queries.length[row], 1e-300)[:, None]
        b = (b + references.center) / np.maximum(references.length[near], 1e-300)[:, None]
        return np.asarray(0.5 * np.square(a - b).sum(1))
    return np.asarray(np.square(a - b).sum(1))


def vote(
    spec: KNNSpec, distance: Floats, values: Floats, weight: Floats
) -> npt.NDArray[np.float32]:
    """(q, C) mean of the neighbours' values (q, k, C) by sample weight (q, k), over distance where
    the spec says so.

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
    data: TrainingData, specs: Sequence[CentroidSpec], *, refit: bool = True
) -> list[FitResult]:
    """Class means of every fold as differences of one sum: the total minus the fold's own share.

    data: X (N, D), in memory or streamed, single-label target (N,). Euclidean heads
    work on standardised features, as a nearest mean under one diagonal covariance; cosine heads on
    features centred on the mean of the training rows.
    """
    check_specs(specs, "CentroidSpec()")
    X, fold = data.X, data.fold
    if not isinstance(X, Streamed):
        check_finite(X)
    folds = data.folds_to_fit(refit=refit)
    if data.task_kind != "single":
        reason = (
            f"a class mean needs one class per row, this is a {data.task_kind} task: use knn, "
            "ridge or mlp"
        )
        return [_fit(spec, number, {}, None, reason, 0.0) for spec in specs for number in folds]
    weight = row_weights(data.sample_weight, len(X))
    usable = np.where(fold != TEST, weight, 0.0)
    for number in data.folds:
        if not usable[fold != number].any():
            raise ValueError(
                f"fold {number} leaves no row with a weight to train on: use fewer folds, or add "
                "images"
            )
    started = time.perf_counter()
    parts = _sums(X, data.target, fold, usable, data.n_outputs)
    total = tuple(np.sum([part[place] for part in parts.values()], axis=0) for place in range(3))
    fits = []
    for spec in specs:
        for number in folds:
            sums = (
                total
                if number == REFIT
                else tuple(t - p for t, p in zip(total, parts[number], strict=True))
            )
            arrays = centroid_arrays(spec, *sums)
            own = (
                None
                if number == REFIT
                else _predict_rows(spec, arrays, X, np.flatnonzero(fold == number))
            )
            seconds, started = time.perf_counter() - started, time.perf_counter()
            fits.append(_fit(spec, number, arrays, own, None, seconds))
    return fits


def centroid_arrays(
    spec: CentroidSpec, sums: Floats, squares: Floats, counts: Floats
) -> dict[str, npt.NDArray[Any]]:
    """means (C, D), center (D,), inverse_scale (D,), present (C,) of class sums (C, D), squares
    (D,), counts (C,).
    """
    weight = counts.sum()
    center = sums.sum(0) / weight
    variance = np.maximum(squares / weight - center**2, 0)
    deviation = np.sqrt(np.where(variance > 1e-12 * center**2, variance, 0))
    scale = (
        np.where(deviation > 0, deviation, 1.0)
        if spec.metric == "euclidean"
        else np.ones_like(center)
    )
    means = sums / np.maximum(counts, np.finfo(np.float64).tiny)[:, None]
    return {
        "means": means.astype(np.float32),
        "center": center.astype(np.float32),
        "inverse_scale": (1 / scale).astype(np.float32),
        "present": (counts > 0).astype(np.uint8),
    }


def predict_centroid(
    spec: CentroidSpec, arrays: dict[str, npt.NDArray[Any]], X: Floats, temperature: float = 1.0
) -> npt.NDArray[np.float32]:
    """(n, C) softmax over classes of the scaled similarity; a class without training rows has
    probability 0.
    """
    means = (arrays["means"] - arrays["center"]) * arrays["inverse_scale"]
    rows = (X.astype(np.float32, copy=False) - arrays["center"]) * arrays["inverse_scale"]
    if spec.metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) * np.linalg.norm(means, axis=1)
        similar = rows @ means.T / np.where(lengths > 0, lengths, 1)
    else:
        # Minus half the mean squared distance over features; the row's own norm is the same for
        # every class.
        similar = (rows @ means.T - 0.5 * (means**2).sum(1)) / np.sqrt(rows.shape[1])
    decision = CENTROID_TEMPERATURE[spec.metric] * similar.astype(np.float64)
    decision[:, arrays["present"] == 0] = -np.inf
    told = _softmax(decision)
    if temperature == 1:
        return told
    behind = np.maximum(decision - decision.max(1, keepdims=True), -FARTHEST)
    return keep_decisions("single", told, _softmax(behind / temperature))


def _softmax(decision: Floats) -> npt.NDArray[np.float32]:
    shifted = np.exp(decision - decision.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)


def _predict_rows(
    spec: CentroidSpec, arrays: dict[str, npt.NDArray[Any]], X: Features, rows: npt.NDArray[np.intp]
) -> npt.NDArray[np.float32]:
    parts = [rows[start : start + SUM_ROWS] for start in range(0, len(rows), SUM_ROWS)] or [rows]
    return np.concatenate([predict_centroid(spec, arrays, X[part]) for part in parts])


def _sums(
    X: Features, target: npt.NDArray[Any], fold: npt.NDArray[Any], weight: Floats, outputs: int
) -> dict[int, tuple[Floats, Floats, Floats]]:
    """Class sums (C, D), sums of squares (D,) and class weights (C,) of each group of rows."""
    dim = X.shape[1]
    groups = {
        int(number): (
            np.zeros((outputs, dim)),
            np.zeros(dim),
            np.bincount(target, np.where(fold == number, weight, 0.0), minlength=outputs).astype(
                np.float64
            ),
        )
        for number in np.unique(fold)
    }
    for number, part in sweep(X, fold, SUM_ROWS, weight > 0):
        rows = X[part].astype(np.float64)
        weighted = rows * weight[part, None]
        groups[number][0][...] += np.eye(outputs)[target[part]].T @ weighted
        groups[number][1][...] += (weighted * rows).sum(0)
    return groups


def _fit(
    spec: KNNSpec | CentroidSpec,
    fold: int,
    arrays: dict[str, npt.NDArray[Any]],
    validation: npt.NDArray[np.float32] | None,
    error: str | None,
    seconds: float,
) -> FitResult:
    return FitResult(spec, fold, arrays, float("nan"), float("nan"), 0, seconds, validation, error)
