"""The active set: heads that are solved together, all evaluated by one pass over the rows.

A heads in the active set, C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a
sigmoid), c = C - 1 free weight vectors (1 for a sigmoid), P = c (R + 1) parameters of a head, R + 1
coordinates (the intercept last), n rows of a block, m curvature pairs.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.linear.solver.compiled_blocks import load_compiled_kernels
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.passes import (
    CompiledPass,
    HeadsByFolds,
    NumpyPass,
    RowWeighting,
    n_blas_threads,
)
from headrace.heads.linear.solver.preconditioner import (
    SAMPLED_ROWS,
    SAMPLED_ROWS_PER_CLASS,
    Preconditioner,
    dense_coordinates,
    dense_pair_products,
    make_preconditioner,
)
from headrace.heads.linear.solver.regularization_path import RegularizationPath, SolvedHead

if TYPE_CHECKING:
    from headrace.heads.linear.solver.torch_blocks import DeviceBlocks, DevicePass

# After so many iterations a head gets a new preconditioner, made at its current point. On a whole
# path that is rare (0.99 of the CPU time without), but a single strength, started from zero, takes
# 1.5 times as long without it at C = 1, 3.7 times at C = 100.
ITERATIONS_PER_PRECONDITIONER = 20
# Gradient of a head's mean loss at which it may end: root mean square over its weights, for
# standardized features and ten classes; beyond ten it shrinks with the root of their number, as
# gradients do. scikit-learn's default is 1e-4 for the largest entry, about 1e-5 by this measure. By
# the gap alone, heads at strong regularization ended with objectives a little above scikit-learn's;
# with this condition, two iterations more, they end far below (a gap below 1e-6).
MAX_GRADIENT, GRADIENT_CLASSES = 8e-6, 10
# Threads share a row block; fewer than a hundred rows each are not worth waking a thread.
MAX_THREADS = 8
# Values of the heads whose gap bounds are computed together: 32 MB for each of a few arrays.
BOUND_VALUES_PER_CHUNK = 1 << 22
# Number of a head's weights from which operations on its curvature pairs take a noticeable time.
MANY_WEIGHTS = 1 << 16
MAX_CURVATURE_RATIO = 1e6  # largest factor by which curvature pairs are corrected
PREFETCHED_BLOCKS = 8  # of streamed rows, read from disk while as many are multiplied


@dataclass(frozen=True)
class RowSample:
    """Sampled rows, from which preconditioners are made."""

    parts: list[tuple[RowBlock, slice]]  # blocks, and the sampled rows in each
    values: Array  # (n, R + 1)
    squared_values: Array
    pair_products: Array  # `preconditioner.dense_pair_products`


class BankProblem:
    """Data that all heads share: rows, class weights, row samples and class sums for the bounds."""

    def __init__(
        self, design: DesignMatrix, paths: list[RegularizationPath], n_outputs: int, device: str
    ) -> None:
        self.design, self.paths, self.n_outputs = design, paths, n_outputs
        self.device_blocks: DeviceBlocks | None = None
        uses_kernels = device == "cpu" and design.dtype == np.float32
        self.kernels = load_compiled_kernels() if uses_kernels else None
        self.n_threads = 1 if self.kernels is None else min(n_blas_threads(), MAX_THREADS)
        self.threads = ThreadPoolExecutor(self.n_threads) if self.n_threads > 1 else None
        if device != "cpu":
            # Imported here, because a bank on the CPU does not import torch.
            from headrace.heads.linear.solver import torch_blocks

            self.device_blocks = torch_blocks.DeviceBlocks(design, n_outputs, device)
        self.folds = np.array([path.fold for path in paths])
        class_factors = np.stack([path.class_factors for path in paths]).astype(design.dtype)
        labels = np.array([path.label for path in paths])
        has_weights = any(block.sample_weight is not None for block in design.row_blocks)
        weighted = has_weights or bool((class_factors != 1).any())
        self.weighting = RowWeighting(n_outputs, class_factors, labels, weighted)
        # {folds of a block: which paths train on its rows, (paths,) bool}
        self.trains_on = {
            folds: np.isin(self.folds, folds)
            for folds in dict.fromkeys(block.folds for block in design.row_blocks)
        }
        class_sums: list[Array | float] = [0.0] * len(paths)
        # One sample of all rows; or, if coordinates are per fold, one of each fold's rows. These
        # are fewer than features, so nearly orthogonal: rows of one fold say nothing about
        # directions of another's.
        self.samples: dict[int | None, RowSample] = {}
        sample_folds = np.unique(self.folds).tolist() if design.has_per_fold_coordinates else [None]
        for fold in sample_folds:
            self.samples[fold] = self._read_blocks(fold, class_sums)
        # Weighted class sums of the rows, (paths, C or 2, R + 1) float64; the last column has the
        # sums of the weights.
        self.class_sums = np.stack(
            [design.from_block_coordinates(np.asarray(sums)) for sums in class_sums]
        )

    def _read_blocks(self, fold: int | None, class_sums: list[Array | float]) -> RowSample:
        """Return a sample of the rows of a fold (None: all), and add to the paths' class sums."""
        design = self.design
        blocks = [block for block in design.row_blocks if fold is None or fold in block.folds]
        # If several folds have copies of the rows, the last copy is sampled: REFIT's, if there is
        # one.
        last_copy = {int(block.row_index[0]): block for block in blocks}
        sample_size = max(SAMPLED_ROWS, SAMPLED_ROWS_PER_CLASS * self.n_outputs)
        n_rows = sum(len(block.row_index) for block in last_copy.values())
        step = max(n_rows // sample_size, 1)
        parts, sampled = [], []
        n_passed = 0
        for block in blocks:
            block_values = design.read(block)
            if last_copy[int(block.row_index[0])] is block:
                # Every step-th row of all rows, not of each block, which may have fewer than
                # `step`.
                rows = slice(-n_passed % step, None, step)
                n_passed += len(block.row_index)
                parts.append((block, rows))
                # A copy: of streamed rows a view would keep every block in memory.
                sampled.append(block_values[rows].copy())
            for i in np.flatnonzero(self.trains_on[block.folds]).tolist():
                class_sums[i] = class_sums[i] + self._block_class_sums(block, block_values, i)
        values = design.from_block_coordinates(np.concatenate(sampled))
        dense = dense_coordinates(self.n_outputs, design.n_coordinates)
        return RowSample(parts, values, values**2, dense_pair_products(values, dense))

    def _block_class_sums(self, block: RowBlock, values: Array, path_index: int) -> Array:
        n_rows, dtype = len(block.row_index), self.design.dtype
        label_row = self.weighting.labels[path_index]
        if label_row < 0:
            in_class = np.zeros((self.n_outputs, n_rows), dtype)
            for k in range(self.n_outputs):
                in_class[k, block.class_offsets[k] : block.class_offsets[k + 1]] = 1
        else:
            label = block.labels[label_row]
            in_class = np.stack([1 - label, label])
        if block.sample_weight is not None:
            in_class *= block.sample_weight
        sums = (in_class @ values).astype(np.float64)
        return np.asarray(sums * self.weighting.class_factors[path_index][:, None])

    def preconditioner_key(self, path_index: int) -> tuple[int, str, int | None]:
        """Return the key of a path; paths with equal keys share preconditioners."""
        path = self.paths[path_index]
        fold = path.fold if self.design.has_per_fold_coordinates else None
        return path.label, path.class_weight, fold

    def make_preconditioner(self, u: Array, path_index: int, l2_strength: float) -> Preconditioner:
        """Return a preconditioner made at u (n_outputs, R + 1), for all paths of this one's key."""
        sample = self.samples[self.preconditioner_key(path_index)[-1]]
        weight_parts = []
        for block, rows in sample.parts:
            block_weights = self.weighting.row_weights(block, np.array([path_index]))
            if block_weights is None:
                block_weights = np.ones((1, len(block.row_index)), self.design.dtype)
            weight_parts.append(block_weights[0, rows])
        row_weights = np.concatenate(weight_parts)
        if not row_weights.any():  # no sampled row has a weight
            row_weights += 1
        row_weights *= self.class_sums[path_index][:, -1].sum() / row_weights.sum()
        return make_preconditioner(
            u, sample.values, sample.squared_values, sample.pair_products, row_weights, l2_strength
        )

    def start_pass(
        self, path_index: Index, weights: Array, heads_by_folds: HeadsByFolds
    ) -> "NumpyPass | CompiledPass | DevicePass":
        """Return a pass for heads with weights (A, c, W) on the given paths (A,).

        W: columns of the blocks' values, see `DesignMatrix.read`.
        """
        heads = self.weighting, path_index, weights, heads_by_folds
        if self.device_blocks is not None:
            from headrace.heads.linear.solver import torch_blocks

            return torch_blocks.DevicePass(self.device_blocks, *heads)
        if self.kernels is None:
            return NumpyPass(self.design, *heads)
        return CompiledPass(self.design, *heads, self.kernels, self.threads, self.n_threads)

    def gap_bounds(self, heads: list[tuple[int, SolvedHead]]) -> list[float]:
        """Return upper bounds of objective - optimum for heads (path index, head).

        These are Fenchel duality gaps at feasible dual points near the heads' residuals. With the
        residuals w(p - y) as dual point the gap is |g|^2 / (2 l2), but with an unpenalized
        intercept that point is feasible only if the intercept's gradient g_b is zero. So p is mixed
        with a constant q, p' = (1 - e) p + e q, with the smallest e for which the class masses are
        right and q >= 0. The concavity of the entropy then gives, with G the gradient of the loss
        and d = -e (G + sum_i w_i (y_i - q) z_i):
            gap <= |g|^2/(2 l2) + b.g_b + e (loss - V.G - b.g_b) + (G.d + |d|^2/2) / l2,
        norms and products over features being those of the inverse penalty matrix.
        """
        values_per_head = self.n_outputs * self.design.n_coordinates
        heads_per_chunk = max(BOUND_VALUES_PER_CHUNK // values_per_head, 1)
        path_index = np.array([i for i, _ in heads])
        distinct_paths, position = np.unique(path_index, return_inverse=True)
        class_sums = self.design.inverse_penalty_root(
            self.class_sums[distinct_paths][..., :-1], self.folds[distinct_paths]
        )
        bounds = []
        for start in range(0, len(heads), heads_per_chunk):
            chunk = slice(start, start + heads_per_chunk)
            folds = self.folds[path_index[chunk]]
            weights = np.stack([head.u[:, :-1] for _, head in heads[chunk]])
            weights = self.design.penalty_root(weights, folds)
            gradients = np.stack([head.gradient[:, :-1] for _, head in heads[chunk]])
            gradients = self.design.inverse_penalty_root(gradients, folds)
            for (i, head), p, v, g in zip(
                heads[chunk], position[chunk].tolist(), weights, gradients, strict=True
            ):
                bounds.append(self._gap_bound(head, self.class_sums[i][:, -1], class_sums[p], v, g))
        return bounds

    def _gap_bound(
        self, head: SolvedHead, class_mass: Array, class_sums: Array, V: Array, g: Array
    ) -> float:
        """Return a head's bound, see `gap_bounds`.

        class_mass: (C or 2,) sum of the weights of each class's rows. V: `penalty_root` of the
        weights; class_sums and g: `inverse_penalty_root` of the path's class sums and the gradient.
        """
        l2 = head.l2_strength
        b, g_b = head.u[:, -1].astype(np.float64), head.gradient[:, -1].astype(np.float64)
        G = g - l2 * V
        excess_mass = g_b if self.n_outputs > 1 else np.array([-g_b[0], g_b[0]])
        ratio = float((excess_mass / class_mass).max(initial=0.0))
        terms = [float(np.vdot(g, g)) / (2 * l2), *(b * g_b).tolist()]
        if ratio > 0:
            e = ratio / (1 + ratio)
            q = class_mass / class_mass.sum() - excess_mass / (class_mass.sum() * ratio)
            drift = class_sums - q[:, None] * class_sums.sum(axis=0)
            d = -e * (G + (drift[1:] if self.n_outputs == 1 else drift))
            loss = head.objective - 0.5 * l2 * float(np.vdot(V, V))
            terms += [e * loss, -e * float(np.vdot(V, G)), *(-e * b * g_b).tolist()]
            terms += [float(np.vdot(G, d)) / l2, float(np.vdot(d, d)) / (2 * l2)]
        # Terms cancel, and their rounding errors may be larger than their sum; so the bound
        # includes those errors.
        rounding = float(np.finfo(self.design.dtype).eps) * sum(map(abs, terms))
        bound = sum(terms) + rounding
        return max(bound, 0.0) if math.isfinite(bound) else math.inf


class ActiveSet:
    """Heads that are solved together: each slot has a path, an L2 strength and a preconditioner."""

    def __init__(self, problem: BankProblem, n_slots: int) -> None:
        self.problem = problem
        self.path_index = np.zeros(n_slots, np.intp)
        self.l2_strength = np.zeros(n_slots)
        self.preconditioners: dict[int, Preconditioner] = {}  # {slot: preconditioner}
        # {(*preconditioner key, L2 strength, renewals): preconditioner}
        self.shared: dict[tuple[int, str, int | None, float, int], Preconditioner] = {}
        # Of a head in scaled coordinates, (c, R + 1).
        self.shape = (max(problem.n_outputs - 1, 1), problem.design.n_coordinates)

    def load(
        self,
        slot: int,
        path_index: int,
        l2_strength: float,
        start: Array,
        n_iterations: int,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        """Put the head of a path at an L2 strength into a slot.

        start: (n_outputs, R + 1). n_iterations: iterations that the head has had before.
        preconditioner: None to share the one of the first head with the same key, strength and
        number of renewals.
        """
        if preconditioner is None:
            renewals = n_iterations // ITERATIONS_PER_PRECONDITIONER
            key = (*self.problem.preconditioner_key(path_index), l2_strength, renewals)
            if key not in self.shared:
                # Shared, because one for every fold takes 1.14 times the CPU time.
                self.shared[key] = self.problem.make_preconditioner(start, path_index, l2_strength)
            preconditioner = self.shared[key]
        self.path_index[slot], self.l2_strength[slot] = path_index, l2_strength
        self.preconditioners[slot] = preconditioner

    def transfer_pairs(self, slot: int, other: SolvedHead) -> Array:
        """Return another head's curvature pairs (2m, P), corrected for the head of this slot.

        A head that gets a new preconditioner keeps its Hessian: its pairs are converted to u and
        back. Along a path the two parts of the Hessian change by one factor each: the penalty's by
        the ratio of the strengths, the loss's, towards weak regularization, by nearly as much. In
        u, pairs become s and y' = r (y - l2 s) + l2' s, with r the ratio of the preconditioners'
        loss curvatures.
        """
        # The penalty matrix is taken for the identity: with 100 classes its product costs a pass.
        # Without any pairs a bank takes 1.09 times the CPU time (5,000 x 512, 10 classes), with
        # uncorrected ones 1.02.
        m = len(other.curvature_pairs) // 2
        ours, theirs = self.preconditioners[slot], other.preconditioner
        l2_before, l2_now = other.l2_strength, float(self.l2_strength[slot])
        if ours is theirs and l2_now == l2_before:
            return other.curvature_pairs
        if ours is not theirs and math.prod(self.shape) >= MANY_WEIGHTS:
            # Not corrected, only converted to the other basis: in scaled coordinates all Hessians
            # are near the identity. With 100 classes corrected pairs take 1.05 times the CPU time;
            # with ten, these take 4 % more iterations.
            scaled_pairs = other.curvature_pairs.reshape(2 * m, *self.shape)
            return ours.from_class_basis_of(theirs, scaled_pairs).reshape(2 * m, -1)
        steps = theirs.from_scaled(other.curvature_pairs[:m].reshape(m, *self.shape))
        changes = theirs.gradient_from_scaled(other.curvature_pairs[m:].reshape(m, *self.shape))
        if l2_now != l2_before:
            ratio = ours.loss_curvature / max(theirs.loss_curvature, 1e-30)
            ratio = float(np.clip(ratio, 1 / MAX_CURVATURE_RATIO, MAX_CURVATURE_RATIO))
            to_dtype = changes.dtype.type
            changes *= to_dtype(ratio)
            changes[..., :-1] += to_dtype(l2_now - ratio * l2_before) * steps[..., :-1]
        pairs = np.concatenate([ours.to_scaled(steps), ours.gradient_to_scaled(changes)])
        return pairs.reshape(2 * m, -1)

    def gradient_is_small(self, slot: int, scaled_gradient: Array) -> bool:
        """Return whether a head's gradient is as small as scikit-learn's when it ends."""
        scaled_gradient = scaled_gradient.reshape(self.shape)
        gradient = self.preconditioners[slot].gradient_from_scaled(scaled_gradient)
        n_classes = self.problem.n_outputs
        limit = MAX_GRADIENT * math.sqrt(GRADIENT_CLASSES / max(n_classes, GRADIENT_CLASSES))
        n_weights = n_classes * len(self.problem.design.mean)
        total_weight = self.problem.class_sums[self.path_index[slot]][:, -1].sum()
        return float(np.linalg.norm(gradient)) <= limit * float(total_weight) * math.sqrt(n_weights)

    def evaluate(self, slots: Index, x: Array) -> tuple[Array, Array]:
        """Return the objectives (A,) float64 and gradients (A, P) of the heads in slots (A,).

        x: (A, P), points in scaled coordinates, in which the gradients are too.
        """
        problem, design = self.problem, self.problem.design
        path_index = self.path_index[slots]
        l2 = self.l2_strength[slots].astype(design.dtype)
        rows_by_preconditioner: dict[int, list[int]] = {}
        for row, slot in enumerate(slots.tolist()):
            rows_by_preconditioner.setdefault(id(self.preconditioners[slot]), []).append(row)
        # Heads with the same preconditioner are converted together. A single row is a slice, which
        # gives a view instead of a copy.
        groups = [
            (
                self.preconditioners[int(slots[rows[0]])],
                rows if len(rows) > 1 else slice(rows[0], rows[0] + 1),
            )
            for rows in rows_by_preconditioner.values()
        ]
        # From here on the last class has no weights: they are minus the sum of the others.
        u = np.empty((len(slots), *self.shape), design.dtype)
        for preconditioner, rows in groups:
            u[rows] = preconditioner.free_from_scaled(x[rows].reshape(-1, *self.shape))
        weights = u[..., :-1]
        if design.coordinates:
            # A view without the intercept's column, copied once and not in every product.
            weights = np.ascontiguousarray(weights)
            penalty_gradient = design.multiply_by_penalty(weights, problem.folds[path_index])
            penalty_gradient *= l2[:, None, None]
        else:
            penalty_gradient = weights * l2[:, None, None]
        objective = 0.5 * np.einsum("acr,acr->a", weights, penalty_gradient).astype(np.float64)
        if problem.n_outputs > 1:
            last = weights.sum(axis=1), penalty_gradient.sum(axis=1)  # of the last class, negated
            objective += 0.5 * np.einsum("ar,ar->a", *last)
        heads_by_folds = {
            folds: heads
            for folds, trains in problem.trains_on.items()
            if (heads := np.flatnonzero(trains[path_index])).size
        }
        block_weights = design.to_block_coordinates(u.reshape(-1, design.n_coordinates))
        block_weights = block_weights.reshape(*u.shape[:2], -1)
        row_pass = problem.start_pass(path_index, block_weights, heads_by_folds)
        for block in _prefetched_blocks(design):
            if block.folds in heads_by_folds:
                row_pass.add(block)
        objective += row_pass.losses()
        total = row_pass.gradient()
        gradient = design.from_block_coordinates(total.reshape(-1, total.shape[-1]))
        gradient = gradient.reshape(u.shape)
        gradient[..., :-1] += penalty_gradient
        scaled_gradient = np.empty_like(x)
        for preconditioner, rows in groups:
            scaled = preconditioner.gradient_to_scaled(gradient[rows])
            scaled_gradient[rows] = scaled.reshape(-1, x.shape[1])
        return objective, scaled_gradient


def _prefetched_blocks(design: DesignMatrix) -> Iterator[RowBlock]:
    """Yield the row blocks; the rows of later ones are read ahead if they are streamed."""
    for i, block in enumerate(design.row_blocks):
        if design.streamed_rows is not None and i % PREFETCHED_BLOCKS == 0:
            ahead = design.row_blocks[i + PREFETCHED_BLOCKS : i + 2 * PREFETCHED_BLOCKS]
            if ahead:
                design.streamed_rows.prefetch(np.concatenate([after.row_index for after in ahead]))
        yield block
