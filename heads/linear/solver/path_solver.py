"""Solve whole regularization paths of logistic heads on one design, of all folds and class weights.

A heads in the active set, C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a
sigmoid), c = C - 1 free weight vectors (1 for a sigmoid), P = c (R + 1) parameters of a head, R + 1
coordinates (the intercept last), m curvature pairs.

The heads of all paths are in the active set together, in the order of `PathSchedule`, all evaluated
by one pass over the rows, and one that has ended makes room for the next. A head starts from the
solutions of its path (`predict_start`) and takes over the curvature pairs of its nearest solved
neighbour, corrected for the new strength (`ActiveSet.transfer_pairs`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.linear.solver.bank_problem import BankProblem
from headrace.heads.linear.solver.compiled_blocks import CompiledPass
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.lbfgs import Slots, StoppedProblem
from headrace.heads.linear.solver.passes import HeadsByFolds, NumpyPass
from headrace.heads.linear.solver.preconditioner import Preconditioner
from headrace.heads.linear.solver.regularization_path import (
    PathSchedule,
    RegularizationPath,
    SolvedHead,
    predict_start,
    sort_by_distance,
)

if TYPE_CHECKING:
    from headrace.heads.linear.solver.torch_blocks import DevicePass

CURVATURE_PAIRS = 8
# With 100 classes, eight pairs take 1.1 of the CPU time of six, all of it for reading them (gaps of
# 1e-5 and 3e-7). With ten classes they take as much as six, and float32 stalls less often before a
# gap of 3e-7.
CURVATURE_PAIRS_OF_MANY_WEIGHTS = 6
MAX_ITERATIONS = 600  # of a head
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
# Number of a head's weights from which operations on its curvature pairs take a noticeable time.
MANY_WEIGHTS = 1 << 16
MAX_CURVATURE_RATIO = 1e6  # largest factor by which curvature pairs are corrected
PREFETCHED_BLOCKS = 8  # of streamed rows, read from disk while as many are multiplied
# Free weight vectors of the heads in the active set. Bounds their memory (42 MB of curvature pairs
# at 1,280 features); without the bound, a bank takes as long (0.99).
MAX_COLUMNS = 512
# A pass over streamed rows costs their reading: it should serve more columns than one head of each
# path has, even if that makes more passes.
COLUMNS_WORTH_A_PASS, MAX_CHAINS = 24, 4


@dataclass(frozen=True)
class HeadSolution:
    """A solved head in the design's coordinates."""

    u: Array  # (n_outputs, R + 1)
    objective: float
    gap_bound: float  # proven upper bound of objective - optimum
    n_iterations: int
    converged: bool


def solve_paths(
    design: DesignMatrix,
    paths: list[RegularizationPath],
    n_outputs: int,
    *,
    gap: float,
    starts: dict[tuple[int, float], Array],
    device: str,
) -> dict[tuple[int, float], HeadSolution]:
    """Return the solutions by (path index, L2 strength).

    n_outputs: C for softmax paths (all with label -1), 1 for sigmoid paths.
    starts: points (n_outputs, R + 1) of heads that need not be predicted.
    device: "cpu", or torch's name of the device where the products run.
    """
    problem = BankProblem(design, paths, n_outputs, device)
    n_free = max(n_outputs - 1, 1)
    heads = [(i, l2) for i, path in enumerate(paths) for l2 in path.l2_strengths]
    n_slots = min(len(heads), max(MAX_COLUMNS // n_free, 1))
    n_chains = 1
    if design.streamed_rows is not None:
        n_chains = max(1, min(COLUMNS_WORTH_A_PASS // (len(paths) * n_free), MAX_CHAINS))
    active_set = ActiveSet(problem, n_slots)
    progress = _Progress(active_set, PathSchedule(paths, n_chains), starts)
    n_weights = math.prod(active_set.shape)
    slots = Slots(
        n_slots,
        n_weights,
        CURVATURE_PAIRS if n_weights < MANY_WEIGHTS else CURVATURE_PAIRS_OF_MANY_WEIGHTS,
        design.dtype,
        gap=gap,
        max_iterations=ITERATIONS_PER_PRECONDITIONER,
    )
    _solve_all(active_set, progress, slots)
    solved = [progress.solved[i][l2] for i, l2 in heads]
    gap_bounds = problem.gap_bounds([(i, head) for (i, _), head in zip(heads, solved, strict=True)])
    if problem.threads is not None:
        problem.threads.shutdown()
    return {
        key: HeadSolution(head.u, head.objective, gap_bound, head.n_iterations, head.converged)
        for key, head, gap_bound in zip(heads, solved, gap_bounds, strict=True)
    }


def _solve_all(active_set: "ActiveSet", progress: "_Progress", slots: Slots) -> None:
    """Solve the heads of a schedule, as many at a time as there are slots."""
    while True:
        # A slot that becomes free is loaded at once, so that the products of a pass stay wide.
        for slot in np.flatnonzero(~slots.occupied).tolist():
            if (loaded := progress.load_next(slot)) is None:
                break
            slots.load(slot, *loaded)
        running = np.flatnonzero(slots.occupied)
        if not running.size:
            return
        x = slots.trial_points(running)
        objectives, gradients = active_set.evaluate(running, x)
        ended = slots.advance(running, x, objectives, gradients, active_set.gradient_is_small)
        for slot in ended.tolist():
            progress.store_stopped(slot, slots.unload(slot))


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
        row_pass = self._start_pass(path_index, block_weights, heads_by_folds)
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

    def _start_pass(
        self, path_index: Index, weights: Array, heads_by_folds: HeadsByFolds
    ) -> "NumpyPass | CompiledPass | DevicePass":
        """Return a pass for heads with weights (A, c, W) on the given paths (A,).

        W: columns of the blocks' values, see `DesignMatrix.read`.
        """
        problem = self.problem
        heads = problem.weighting, path_index, weights, heads_by_folds
        if problem.device_blocks is not None:
            # Imported here, because a bank on the CPU does not import torch.
            from headrace.heads.linear.solver import torch_blocks

            return torch_blocks.DevicePass(problem.device_blocks, *heads)
        if problem.kernels is None:
            return NumpyPass(problem.design, *heads)
        threads = problem.threads, problem.n_threads
        return CompiledPass(problem.design, *heads, problem.kernels, *threads)


def _prefetched_blocks(design: DesignMatrix) -> Iterator[RowBlock]:
    """Yield the row blocks; the rows of later ones are read ahead if they are streamed."""
    for i, block in enumerate(design.row_blocks):
        if design.streamed_rows is not None and i % PREFETCHED_BLOCKS == 0:
            ahead = design.row_blocks[i + PREFETCHED_BLOCKS : i + 2 * PREFETCHED_BLOCKS]
            if ahead:
                design.streamed_rows.prefetch(np.concatenate([after.row_index for after in ahead]))
        yield block


class _Progress:
    """What `solve_paths` has solved so far: it gives the next head a start, and keeps the result.

    Heads are (path index, L2 strength). A paused one gets a new preconditioner where it stands.
    """

    def __init__(
        self,
        active_set: ActiveSet,
        schedule: PathSchedule,
        starts: dict[tuple[int, float], Array],
    ) -> None:
        self.active_set, self.problem = active_set, active_set.problem
        self.schedule, self.starts = schedule, starts
        self.solved: list[dict[float, SolvedHead]] = [{} for _ in self.problem.paths]
        self.paused: dict[tuple[int, float], SolvedHead] = {}

    def load_next(self, slot: int) -> tuple[Array, Array | None] | None:
        """Load the next head into a slot of the active set; return its start and curvature pairs.

        Returns None if no head is ready, and pairs None for the first head of a path.
        """
        head = self.schedule.next_head()
        if head is None:
            return None
        path_index, l2_strength = head
        solved = self.solved[path_index]
        shared_preconditioner = None
        neighbour = self.paused.get(head)
        if neighbour is not None:
            start, n_iterations = neighbour.u, neighbour.n_iterations
        else:
            start, n_iterations = self._start(path_index, l2_strength), 0
            if solved:
                neighbour = solved[sort_by_distance(list(solved), l2_strength)[0]]
                # Between two solved heads a few iterations are left: fewer than a preconditioner of
                # its own would cost (1.05 of the CPU time).
                if min(solved) < l2_strength < max(solved):
                    shared_preconditioner = neighbour.preconditioner
        self.active_set.load(
            slot, path_index, l2_strength, start, n_iterations, shared_preconditioner
        )
        x = self.active_set.preconditioners[slot].to_scaled(start).ravel()
        return x, None if neighbour is None else self.active_set.transfer_pairs(slot, neighbour)

    def _start(self, path_index: int, l2_strength: float) -> Array:
        if (path_index, l2_strength) in self.starts:
            return self.starts[path_index, l2_strength]
        design = self.problem.design
        shape = self.problem.n_outputs, design.n_coordinates
        return predict_start(self.solved[path_index], l2_strength, shape, design.dtype)

    def store_stopped(self, slot: int, stopped: StoppedProblem) -> None:
        """Keep the head of a slot as solved, or pause it if iterations are left for it."""
        path_index = int(self.active_set.path_index[slot])
        l2_strength = float(self.active_set.l2_strength[slot])
        head, shape = (path_index, l2_strength), self.active_set.shape
        preconditioner = self.active_set.preconditioners[slot]
        n_iterations = stopped.n_iterations
        if head in self.paused:
            n_iterations += self.paused[head].n_iterations
        # A mean loss near the rounding of one row's loss (which is of the order of 1) says nothing
        # about convergence.
        total_weight = float(self.problem.class_sums[path_index][:, -1].sum())
        rounding = 1e3 * float(np.finfo(self.problem.design.dtype).eps) * total_weight
        result = SolvedHead(
            preconditioner.from_scaled(stopped.point.reshape(shape)),
            preconditioner.gradient_from_scaled(stopped.gradient.reshape(shape)),
            stopped.value,
            stopped.curvature_pairs,
            preconditioner,
            l2_strength,
            n_iterations,
            stopped.gap_reached and stopped.value > rounding,
        )
        if (
            stopped.n_iterations >= ITERATIONS_PER_PRECONDITIONER
            and not stopped.finished
            and n_iterations < MAX_ITERATIONS
        ):
            self.paused[head] = result
            self.schedule.resume(path_index, l2_strength)
        else:
            self.solved[path_index][l2_strength] = result
            self.schedule.complete(path_index, l2_strength)
