"""Baselines that need no training: k nearest neighbours and nearest class mean.

N rows, D features, C outputs, q query rows of one block, m the largest k.

Every row is held out once, so all folds together cost one pass over the inner products.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrace.heads.arrays import Array, Arrays, Doubles, Floats, Index
from headrace.heads.data.checks import check_finite, check_folds, check_specs, row_weights
from headrace.heads.data.standardize import Features, chunks, sweep
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import REFIT, TEST, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.temperature import keep_decisions
from headrace.heads.link import softmax, within_floor
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.spec import FitResult

Metric = Literal["cosine", "euclidean"]
# Indices of references and their distances, both (q, k), nearest first.
Neighbours = tuple[Index, Doubles]

QUERY_ROWS = 1024  # rows of one block of inner products
REFERENCE_ROWS = 1 << 14  # columns of it: the block and what is made of it take half a gigabyte
STORED_ROWS_BYTES = 1 << 30  # more training rows than this are not copied into a results file
# Distances this small beside the norms are computed again: float32 products err by about 1e-6.
EXACT_BELOW = 1e-4
SUM_ROWS = 4096  # rows of one sum of a class mean
# Factors of the similarity in the softmax. Cosines differ by at most 2, and would make all classes
# about equally probable otherwise.
SIMILARITY_FACTOR = {"cosine": 10.0, "euclidean": 1.0}


@dataclass(frozen=True)
class References:
    """The rows that may be neighbours, n of them, in the form that distances are computed from."""

    rows: Floats  # (n, D) centred
    center: Doubles  # (D,)
    square: Doubles  # (n,) squared norms of the centred rows
    offset: Doubles  # (n,) inner products of the centred rows with the centre
    length: Doubles  # (n,) norms of the rows as they are

    @classmethod
    def of(cls, rows: Array, center: Doubles | None = None) -> "References":
        center = rows.mean(0, dtype=np.float64) if center is None else center
        # A squared distance is a difference of numbers as large as the norms, and loses the digits
        # that a common offset takes. The cosine needs the offset, which comes back in float64.
        centred = (rows - center).astype(np.float32)
        square = np.einsum("nd,nd->n", centred, centred, dtype=np.float64)
        offset = centred @ center
        length = np.sqrt(np.maximum(square + 2 * offset + center @ center, 0))
        # A row of zeros has length 0 exactly, and so cosine 0 with everything, which rounding would
        # lose.
        return cls(centred, center, square, offset, np.where((rows == 0).all(1), 0.0, length))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Array | slice) -> "References":
        """Return some of the rows."""
        row_statistics = (values[chosen] for values in (self.square, self.offset, self.length))
        return References(self.rows[chosen], self.center, *row_statistics)

    only = take  # rows in memory are not read later, as those of `StreamedReferences` are


@dataclass(frozen=True)
class StreamedReferences:
    """Rows that may be neighbours and stay on disk: `take` reads a slice of them."""

    source: StreamedRows
    chosen: Index
    center: Doubles

    @classmethod
    def of(cls, source: StreamedRows) -> "StreamedReferences":
        """Return all rows of a source."""
        total = np.zeros(source.shape[1])
        for _, rows in sweep(source, np.zeros(len(source), np.int64)):
            total += source[rows].sum(0, dtype=np.float64)
        return cls(source, np.arange(len(source)), total / len(source))

    def __len__(self) -> int:
        return len(self.chosen)

    def only(self, chosen: Array) -> "StreamedReferences":
        """Return some of the rows, not read yet."""
        return StreamedReferences(self.source, self.chosen[chosen], self.center)

    def take(self, chosen: slice) -> References:
        """Read and return a slice of the rows."""
        return References.of(self.source[self.chosen[chosen]], self.center)


def fit_knn_bank(
    data: TrainingData, specs: Sequence[KNNSpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit every k, metric and weighting on every fold in one pass over the inner products.

    data: X (N, D), in memory or streamed. A fold's heads have predictions and no arrays. The arrays
    of the REFIT head are the training rows themselves, the same objects for all specs (a results
    file stores them once); it has an error if they are more than STORED_ROWS_BYTES. A neighbour
    votes with its sample weight. A spec whose k exceeds the training rows of a fold has an error
    there. Raises HeadError (a ValueError) for features that are not finite.
    """
    check_specs(specs, "KNNSpec(5)")
    X, fold = data.X, data.fold
    started = time.perf_counter()
    weight = row_weights(data.sample_weight, len(X))
    votes = encode_votes(data.target, data.n_outputs, data.task_kind)
    usable = np.flatnonzero((fold != TEST) & (weight > 0))
    all_references: References | StreamedReferences
    if isinstance(X, StreamedRows):
        all_references = StreamedReferences.of(X)
    else:
        check_finite(X)
        all_references = References.of(np.asarray(X, np.float32))
    predictions: dict[tuple[int, int], Floats] = {}
    errors: dict[tuple[int, int], str | None] = {}
    for held_out_fold in data.folds:
        reference_rows = usable[fold[usable] != held_out_fold]
        for i, spec in enumerate(specs):
            errors[i, held_out_fold] = knn_error(spec, len(reference_rows))
        searchable = [i for i in range(len(specs)) if errors[i, held_out_fold] is None]
        neighbours = search_neighbours(
            all_references.only(data.held_out_rows(held_out_fold)),
            all_references.only(reference_rows),
            [specs[i] for i in searchable],
        )
        for i, (index, distance) in zip(searchable, neighbours, strict=True):
            rows = reference_rows[index]
            predictions[i, held_out_fold] = vote(specs[i], distance, votes[rows], weight[rows])
    seconds_per_head = (time.perf_counter() - started) / max(1, len(errors))
    stored_bytes = len(usable) * X.shape[1] * 4
    stored, too_large = {}, None
    if stored_bytes > STORED_ROWS_BYTES:
        too_large = (
            f"a neighbour head is its training rows, here {stored_bytes / 1e9:.1f} GB, more than "
            f"the {STORED_ROWS_BYTES / 1e9:.1f} GB that are copied into a results file: predict "
            "with another kind"
        )
    elif refit:
        stored = {
            "features": np.ascontiguousarray(X[usable], np.float32),
            "target": votes[usable],
            "sample_weight": weight[usable].astype(np.float32),
        }
    fits = []
    for i, spec in enumerate(specs):
        for held_out_fold in data.folds:
            key = i, held_out_fold
            fits.append(
                FitResult(
                    spec,
                    held_out_fold,
                    seconds=seconds_per_head,
                    validation=predictions.get(key),
                    error=errors[key],
                )
            )
        if refit:
            error = knn_error(spec, len(usable)) or too_large
            fits.append(FitResult(spec, REFIT, {} if error else stored, error=error))
    return fits


def predict_knn(spec: KNNSpec, arrays: Arrays, X: Array) -> Floats:
    """Return the weighted mean (n, C) of the neighbours' targets. X (n, D)."""
    references = References.of(arrays["features"])
    queries = References.of(np.asarray(X, np.float32), references.center)
    ((index, distance),) = search_neighbours(queries, references, [spec])
    return vote(spec, distance, arrays["target"][index], arrays["sample_weight"][index])


def knn_error(spec: KNNSpec, available: int) -> str | None:
    """Return why the neighbours cannot be searched among `available` rows, or None."""
    if not 1 <= spec.k <= available:
        return (
            f"k = {spec.k} neighbours, but there are {available} training rows: k must be between "
            f"1 and {available}"
        )
    return None


def search_neighbours(
    queries: References | StreamedReferences,
    references: References | StreamedReferences,
    specs: Sequence[KNNSpec],
) -> list[Neighbours]:
    """Return for each spec the k nearest references of each query, nearest first, ties by position.

    One product per block of queries and references serves all specs.
    """
    largest_k: dict[Metric, int] = {}
    for spec in specs:
        largest_k[spec.metric] = max(spec.k, largest_k.get(spec.metric, 0))
    # The neighbours of each block of queries. The first block has no query, so that without queries
    # the arrays are empty and have their k columns.
    blocks = {
        metric: [(np.zeros((0, k), np.int64), np.zeros((0, k)))] for metric, k in largest_k.items()
    }
    for query_start in range(0, len(queries), QUERY_ROWS):
        query_block = queries.take(slice(query_start, query_start + QUERY_ROWS))
        best_so_far: dict[Metric, Neighbours] = {}
        for reference_start in range(0, len(references), REFERENCE_ROWS):
            reference_block = references.take(
                slice(reference_start, reference_start + REFERENCE_ROWS)
            )
            # It serves every k, both metrics and both weightings: a squared distance and a cosine
            # are functions of inner products and norms.
            product = query_block.rows @ reference_block.rows.T
            for metric, k in largest_k.items():
                index, distance = nearest(
                    product, query_block, reference_block, metric, min(k, len(reference_block))
                )
                neighbours = index + reference_start, distance
                if reference_start:
                    neighbours = _merged(best_so_far[metric], neighbours, k)
                best_so_far[metric] = neighbours
        for metric, neighbours in best_so_far.items():
            blocks[metric].append(neighbours)
    joined = {
        metric: [np.concatenate(arrays) for arrays in zip(*metric_blocks, strict=True)]
        for metric, metric_blocks in blocks.items()
    }
    return [
        (joined[spec.metric][0][:, : spec.k], joined[spec.metric][1][:, : spec.k]) for spec in specs
    ]


def _merged(earlier: Neighbours, later: Neighbours, n_kept: int) -> Neighbours:
    index, distance = (np.concatenate(pair, axis=1) for pair in zip(earlier, later, strict=True))
    return _sorted(index, distance, n_kept)


def _sorted(index: Array, distance: Array, n_kept: int) -> Neighbours:
    """Return the `n_kept` nearest, nearest first; of equal distances the earlier first."""
    order = np.argsort(distance, axis=1, kind="stable")[:, :n_kept]
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(distance, order, axis=1)


def nearest(
    product: Array, queries: References, references: References, metric: Metric, n_nearest: int
) -> Neighbours:
    """Return the `n_nearest` references of each query.

    product: (q, n) inner products of the centred rows. Cosine distance is 1 - cosine; a row of
    zeros has cosine 0 with everything.
    """
    if metric == "cosine":
        # Of the rows as they are: (a + c)'(b + c) = a'b + a'c + b'c + c'c for centred a and b.
        inner_product = product + (
            queries.offset[:, None] + (references.offset + references.center @ references.center)
        )
        lengths = np.outer(
            np.where(queries.length > 0, queries.length, 1),
            np.where(references.length > 0, references.length, 1),
        )
        is_zero = (queries.length == 0)[:, None] | (references.length == 0)
        distance = np.where(is_zero, 1.0, 1 - inner_product / lengths)
        scale: Array = np.ones(1)
    else:
        distance = queries.square[:, None] + references.square - 2.0 * product
        scale = queries.square[:, None] + references.square
    if n_nearest < distance.shape[1]:
        neighbour_index = np.argpartition(distance, n_nearest - 1, axis=1)[:, :n_nearest]
    else:
        neighbour_index = np.broadcast_to(np.arange(distance.shape[1]), distance.shape).copy()
    neighbour_index.sort(axis=1)  # so that a stable sort by distance breaks ties by position
    chosen_distance = np.take_along_axis(distance, neighbour_index, axis=1)
    chosen_scale = np.take_along_axis(np.broadcast_to(scale, distance.shape), neighbour_index, 1)
    close_row, close_column = np.nonzero(chosen_distance < chosen_scale * EXACT_BELOW)
    # In parts, because equal rows can make all pairs close ones.
    for start in range(0, len(close_row), QUERY_ROWS):
        pair_rows = close_row[start : start + QUERY_ROWS]
        pair_columns = close_column[start : start + QUERY_ROWS]
        chosen_distance[pair_rows, pair_columns] = _exact(
            queries, references, pair_rows, neighbour_index[pair_rows, pair_columns], metric
        )
    if metric == "euclidean":
        chosen_distance = np.sqrt(np.maximum(chosen_distance, 0))
    return _sorted(neighbour_index, chosen_distance, n_nearest)


def _exact(
    queries: References,
    references: References,
    query_index: Array,
    neighbour_index: Array,
    metric: Metric,
) -> Array:
    """Return distances of pairs, float64, from differences, which are exactly 0 for equal rows.

    Euclidean distances are squared; 1 - cosine is half the squared distance of unit vectors.
    """
    a = queries.rows[query_index].astype(np.float64)
    b = references.rows[neighbour_index].astype(np.float64)
    if metric == "cosine":
        a_length, b_length = queries.length[query_index], references.length[neighbour_index]
        a = (a + queries.center) / np.maximum(a_length, 1e-300)[:, None]
        b = (b + references.center) / np.maximum(b_length, 1e-300)[:, None]
        return np.asarray(0.5 * np.square(a - b).sum(1))
    return np.asarray(np.square(a - b).sum(1))


def vote(spec: KNNSpec, distance: Array, values: Array, weight: Array) -> Floats:
    """Return the mean (q, C) of the neighbours' values (q, k, C), by sample weight (q, k).

    The weight is divided by the distance if the spec says so; as in scikit-learn, neighbours at
    distance zero then decide alone.
    """
    vote_weight = weight.astype(np.float64)
    if spec.weighting == "distance":
        used_distance = distance[:, : spec.k]
        at_zero = used_distance == 0
        vote_weight = vote_weight * np.where(
            at_zero.any(1, keepdims=True), at_zero, 1 / np.where(at_zero, 1, used_distance)
        )
    mean = np.einsum("qk,qkc->qc", vote_weight, values) / vote_weight.sum(1, keepdims=True)
    return np.asarray(mean, np.float32)


def encode_votes(target: Array, outputs: int, task: TaskKind) -> Floats:
    """Return what neighbours vote with (N, C): an indicator of the class, labels, or targets."""
    if task == "single":
        return np.asarray(np.eye(outputs, dtype=np.float32)[target])
    return np.asarray(target, np.float32).reshape(len(target), outputs)


def fit_centroid_bank(
    data: TrainingData, specs: Sequence[CentroidSpec], *, refit: bool = True
) -> list[FitResult]:
    """Fit the class means of every fold: the sums of all rows less those of the fold's own rows.

    data: X (N, D), in memory or streamed, single-label target (N,). Euclidean heads work on
    standardized features, which makes them nearest means under one diagonal covariance; cosine
    heads on features centred on the mean of the training rows.
    """
    check_specs(specs, "CentroidSpec()")
    X, fold = data.X, data.fold
    if not isinstance(X, StreamedRows):
        check_finite(X)
    folds = data.folds_to_fit(refit=refit)
    if data.task_kind != "single":
        reason = (
            f"a class mean needs one class per row, this is a {data.task_kind} task: use knn, "
            "ridge or mlp"
        )
        return [FitResult(spec, fold, error=reason) for spec in specs for fold in folds]
    weight = row_weights(data.sample_weight, len(X))
    usable_weight = np.where(fold != TEST, weight, 0.0)
    check_folds(data, usable_weight)
    started = time.perf_counter()
    sums_of_fold = _sums(X, data.target, fold, usable_weight, data.n_outputs)
    total = tuple(np.sum(parts, axis=0) for parts in zip(*sums_of_fold.values(), strict=True))
    fits = []
    for spec in specs:
        for held_out_fold in folds:
            sums, validation = total, None
            if held_out_fold != REFIT:
                held_out_sums = sums_of_fold[held_out_fold]
                sums = tuple(a - b for a, b in zip(total, held_out_sums, strict=True))
            arrays = centroid_arrays(spec, *sums)
            if held_out_fold != REFIT:
                # In parts: streamed rows are read as they are indexed.
                parts = chunks(data.held_out_rows(held_out_fold), SUM_ROWS)
                validation = np.concatenate(
                    [predict_centroid(spec, arrays, X[rows]) for rows in parts]
                )
            seconds, started = time.perf_counter() - started, time.perf_counter()
            fits.append(
                FitResult(spec, held_out_fold, arrays, seconds=seconds, validation=validation)
            )
    return fits


def centroid_arrays(spec: CentroidSpec, sums: Array, squares: Array, counts: Array) -> Arrays:
    """Return means (C, D), center and inverse_scale (D,), present (C,) from weighted class sums."""
    weight = counts.sum()
    center = sums.sum(0) / weight
    variance = np.maximum(squares / weight - center**2, 0)
    # A variance that small beside the mean is what the subtraction above leaves of a constant.
    deviation = np.sqrt(np.where(variance > 1e-12 * center**2, variance, 0))
    scale = np.where((deviation > 0) & (spec.metric == "euclidean"), deviation, 1.0)
    means = sums / np.maximum(counts, np.finfo(np.float64).tiny)[:, None]
    return {
        "means": means.astype(np.float32),
        "center": center.astype(np.float32),
        "inverse_scale": (1 / scale).astype(np.float32),
        "present": (counts > 0).astype(np.uint8),
    }


def predict_centroid(
    spec: CentroidSpec, arrays: Arrays, X: Array, temperature: float = 1.0
) -> Floats:
    """Return the softmax (n, C) of scaled similarities; 0 for a class without training rows."""
    means = (arrays["means"] - arrays["center"]) * arrays["inverse_scale"]
    rows = (X.astype(np.float32, copy=False) - arrays["center"]) * arrays["inverse_scale"]
    if spec.metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) * np.linalg.norm(means, axis=1)
        similarity = rows @ means.T / np.where(lengths > 0, lengths, 1)
    else:
        # Minus half the squared distance, over the root of the number of features. The row's own
        # norm is left out: it is the same for every class.
        similarity = (rows @ means.T - 0.5 * (means**2).sum(1)) / np.sqrt(rows.shape[1])
    decision = SIMILARITY_FACTOR[spec.metric] * similarity.astype(np.float64)
    decision[:, arrays["present"] == 0] = -np.inf
    probabilities = softmax(decision)
    if temperature == 1:
        return probabilities
    log_odds = within_floor(decision, "single")
    return keep_decisions("single", probabilities, softmax(log_odds / temperature))


def _sums(
    X: Features, target: Array, fold: Array, weight: Array, outputs: int
) -> dict[int, tuple[Array, Array, Array]]:
    """Return class sums (C, D), sums of squares (D,) and class weights (C,) of each fold's rows."""
    dim = X.shape[1]
    groups = {}
    for group in np.unique(fold).tolist():
        counts = np.bincount(target, np.where(fold == group, weight, 0.0), minlength=outputs)
        groups[group] = np.zeros((outputs, dim)), np.zeros(dim), counts
    for group, row_block in sweep(X, fold, SUM_ROWS, weight > 0):
        block_values = X[row_block].astype(np.float64)
        weighted_values = block_values * weight[row_block, None]
        groups[group][0][...] += np.eye(outputs)[target[row_block]].T @ weighted_values
        groups[group][1][...] += (weighted_values * block_values).sum(0)
    return groups
