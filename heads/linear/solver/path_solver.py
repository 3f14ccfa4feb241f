"""Solve whole regularization paths of logistic heads on one design, of all folds and class weights.

A heads in the active set, C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a
sigmoid), R + 1 coordinates (the intercept last).

The heads of all paths are in the active set together, in the order of `PathSchedule`, and one that
has ended makes room for the next. A head starts from the solutions of its path (`predict_start`)
and takes over the curvature pairs of its nearest solved neighbour, corrected for the new strength
(`ActiveSet.transfer_pairs`).
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array
from headrace.heads.linear.solver.active_set import (
    ITERATIONS_PER_PRECONDITIONER,
    MANY_WEIGHTS,
    ActiveSet,
    BankProblem,
)
from headrace.heads.linear.solver.design import DesignMatrix
from headrace.heads.linear.solver.lbfgs import StoppedProblem, minimize
from headrace.heads.linear.solver.regularization_path import (
    PathSchedule,
    RegularizationPath,
    SolvedHead,
    predict_start,
    sort_by_distance,
)

CURVATURE_PAIRS = 8
# With 100 classes, eight pairs take 1.1 of the CPU time of six, all of it for reading them (gaps of
# 1e-5 and 3e-7). With ten classes they take as much as six, and float32 stalls less often before a
# gap of 3e-7.
CURVATURE_PAIRS_OF_MANY_WEIGHTS = 6
MAX_ITERATIONS = 600  # of a head
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
    deadline: float | None,
    starts: dict[tuple[int, float], Array],
    device: str,
) -> dict[tuple[int, float], HeadSolution]:
    """Return the solutions by (path index, L2 strength).

    n_outputs: C for softmax paths (all with label -1), 1 for sigmoid paths.
    deadline: time.monotonic() seconds at which the iterations end early; every bound stays true.
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
    progress = _Progress(active_set, PathSchedule(paths, n_chains), starts, deadline)
    n_weights = math.prod(active_set.shape)
    minimize(
        active_set.evaluate,
        progress.load_next,
        progress.store_stopped,
        n_slots=n_slots,
        n_parameters=n_weights,
        n_pairs=CURVATURE_PAIRS if n_weights < MANY_WEIGHTS else CURVATURE_PAIRS_OF_MANY_WEIGHTS,
        dtype=design.dtype,
        gap=gap,
        max_iterations=ITERATIONS_PER_PRECONDITIONER,
        out_of_time=progress.out_of_time,
        gradient_is_small=active_set.gradient_is_small,
    )
    solved = [progress.solved[i][l2] for i, l2 in heads]
    gap_bounds = problem.gap_bounds([(i, head) for (i, _), head in zip(heads, solved, strict=True)])
    if problem.threads is not None:
        problem.threads.shutdown()
    return {
        key: HeadSolution(head.u, head.objective, gap_bound, head.n_iterations, head.converged)
        for key, head, gap_bound in zip(heads, solved, gap_bounds, strict=True)
    }


class _Progress:
    """What `solve_paths` has solved so far: it gives the next head a start, and keeps the result.

    Heads are (path index, L2 strength). A paused one gets a new preconditioner where it stands.
    """

    def __init__(
        self,
        active_set: ActiveSet,
        schedule: PathSchedule,
        starts: dict[tuple[int, float], Array],
        deadline: float | None,
    ) -> None:
        self.active_set, self.problem = active_set, active_set.problem
        self.schedule, self.starts, self.deadline = schedule, starts, deadline
        self.solved: list[dict[float, SolvedHead]] = [{} for _ in self.problem.paths]
        self.paused: dict[tuple[int, float], SolvedHead] = {}

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

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
            and not self.out_of_time()
        ):
            self.paused[head] = result
            self.schedule.resume(path_index, l2_strength)
        else:
            self.solved[path_index][l2_strength] = result
            self.schedule.complete(path_index, l2_strength)
