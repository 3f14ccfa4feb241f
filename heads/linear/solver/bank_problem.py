"""The problem that the heads of a bank share: rows, weights of classes, samples of rows, bounds.

C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a sigmoid), R + 1 coordinates
(the intercept last), n sampled rows.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from headrace.heads.arrays import Array
from headrace.heads.linear.solver.compiled_blocks import load_compiled_kernels
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.passes import RowWeighting
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
    from headrace.heads.linear.solver.torch_blocks import DeviceBlocks

# Threads share a row block; fewer than a hundred rows each are not worth waking a thread.
MAX_THREADS = 8
# Values of the heads whose gap bounds are computed together: 32 MB for each of a few arrays.
BOUND_VALUES_PER_CHUNK = 1 << 22


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
        self.n_threads = 1 if self.kernels is None else min(_n_blas_threads(), MAX_THREADS)
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


def _n_blas_threads() -> int:
    """Return how many threads BLAS may use: one in a worker of a run, all cores in a notebook."""
    return max(
        (int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"),
        default=1,
    )
