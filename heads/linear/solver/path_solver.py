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
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.linear.solver.active_set import (
    ITERATIONS_PER_PRECONDITIONER,
    MANY_WEIGHTS,
    ActiveSet,
    BankProblem,
)
from headrace.heads.linear.solver.design import DesignMatrix
from headrace.heads.linear.solver.lbfgs import StoppedProblem, minimise
from headrace.heads.linear.solver.regularization_path import (
    PathSchedule,
    RegularizationPath,
    SolvedHead,
    predict_start,
    sort_by_distance,
)

Array = npt.NDArray[Any]
CURVATURE_PAIRS = 8
# With 100 classes eight take 1.1 of the CPU time, which is that of reading them (gaps of 1e-5 and
# 3e-7); with ten as much as six, and float32 stalls less often before a gap of 3e-7.
CURVATURE_PAIRS_OF_MANY_WEIGHTS = 6
MAX_ITERATIONS = 600  # of a head
# Free weight vectors of the heads in the active set. Bounds their memory (42 MB of curvature pairs
# at 1,280 features); without it, a bank takes as long (0.99).
MAX_COLUMNS = 512
# Streamed rows are worth more columns a pass than one head of each path has, even for more passes.
COLUMNS_WORTH_A_PASS, MAX_CHAINS = 24, 4


@dataclass(frozen=True)
class HeadSolution:
    """A solved head in the design's coordinates."""

    u: Array  # (n_outputs, R + 1)
    objective: float
    gap_bound: float  # proven upper bound of objective - optimum
    n_iterations: int
    seconds: float
    converged: bool


def solve_paths(
    design: DesignMatrix,
    paths: list[RegularizationPath],
    n_outputs: int,
    *,
    gap: float,
    deadline: float | None,
    starts: dict[tuple[int, float], Array] | None = None,
    device: str = "cpu",
) -> dict[tuple[int, float], HeadSolution]:
    """Return the solutions by (path index, L2 strength).

    n_outputs: C for softmax paths (all with label -1), 1 for sigmoid paths.
    deadline: time.monotonic() seconds at which the iterations end early; every bound stays true.
    starts: points (n_outputs, R + 1) of heads that need not be predicted.
    device: "cpu", or torch's name of the device where the products run.
    """
    began = time.perf_counter()
    problem = BankProblem(design, paths, n_outputs, device)
    n_free = max(n_outputs - 1, 1)
    n_heads = sum(len(path.l2_strengths) for path in paths)
    n_slots = min(n_heads, max(MAX_COLUMNS // n_free, 1))
    active_set = ActiveSet(problem, n_slots)
    n_chains = 1
    if design.streamed_rows is not None:
        n_chains = max(1, min(COLUMNS_WORTH_A_PASS // (len(paths) * n_free), MAX_CHAINS))
    schedule = PathSchedule(paths, n_chains)
    solved: list[dict[float, SolvedHead]] = [{} for _ in paths]
    paused: dict[tuple[int, float], SolvedHead] = {}

    def out_of_time() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def load_problem(slot: int) -> tuple[Array, Array | None] | None:
        head = schedule.next_head()
        if head is None:
            return None
        path_index, l2_strength = head
        neighbour = paused.get(head)
        if neighbour is None and solved[path_index]:
            nearest = sort_by_distance(list(solved[path_index]), l2_strength)[0]
            neighbour = solved[path_index][nearest]
        if head in paused:
            start = paused[head].u
        elif starts and head in starts:
            start = starts[head]
        else:
            start = predict_start(
                solved[path_index], l2_strength, (n_outputs, design.n_coordinates), design.dtype
            )
        # Between two solved heads a few iterations are left: fewer than a preconditioner of its own
        # would cost (1.05 of the CPU time).
        shared_preconditioner = None
        if neighbour is not None and head not in paused:
            lies_between = min(solved[path_index]) < l2_strength < max(solved[path_index])
            shared_preconditioner = neighbour.preconditioner if lies_between else None
        n_iterations = paused[head].n_iterations if head in paused else 0
        active_set.load(slot, path_index, l2_strength, start, n_iterations, shared_preconditioner)
        x = active_set.preconditioners[slot].to_scaled(start).ravel()
        return x, None if neighbour is None else active_set.transfer_pairs(slot, neighbour)

    def on_stopped(slot: int, stopped: StoppedProblem) -> None:
        path_index = int(active_set.path_index[slot])
        l2_strength = float(active_set.l2_strength[slot])
        head = path_index, l2_strength
        preconditioner = active_set.preconditioners[slot]
        n_iterations = stopped.n_iterations
        if head in paused:
            n_iterations += paused[head].n_iterations
        # A mean loss near the rounding of one row's loss (which is of the order of 1) says nothing
        # about convergence.
        total_weight = float(problem.class_sums[path_index][:, -1].sum())
        rounding = 1e3 * float(np.finfo(design.dtype).eps) * total_weight
        result = SolvedHead(
            preconditioner.from_scaled(stopped.point.reshape(active_set.shape)),
            preconditioner.gradient_from_scaled(stopped.gradient.reshape(active_set.shape)),
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
            and not out_of_time()
        ):
            # It goes on with a preconditioner made for where it is now.
            paused[head] = result
            schedule.resume(path_index, l2_strength)
        else:
            solved[path_index][l2_strength] = result
            schedule.complete(path_index, l2_strength)

    n_weights = math.prod(active_set.shape)
    minimise(
        active_set.evaluate,
        load_problem,
        on_stopped,
        n_slots=n_slots,
        n_parameters=n_weights,
        n_pairs=CURVATURE_PAIRS if n_weights < MANY_WEIGHTS else CURVATURE_PAIRS_OF_MANY_WEIGHTS,
        dtype=design.dtype,
        gap=gap,
        max_iterations=ITERATIONS_PER_PRECONDITIONER,
        out_of_time=out_of_time,
        gradient_is_small=active_set.gradient_is_small,
    )
    heads = [(i, l2) for i, path in enumerate(paths) for l2 in path.l2_strengths]
    gap_bounds = problem.gap_bounds([(i, solved[i][l2]) for i, l2 in heads])
    if problem.threads is not None:
        problem.threads.shutdown()
    total_iterations = sum(solved[i][l2].n_iterations for i, l2 in heads)
    seconds_per_iteration = (time.perf_counter() - began) / max(total_iterations, 1)
    return {
        (i, l2): HeadSolution(
            head.u,
            head.objective,
            gap_bound,
            head.n_iterations,
            seconds_per_iteration * head.n_iterations,
            head.converged,
        )
        for (i, l2), gap_bound in zip(heads, gap_bounds, strict=True)
        for head in [solved[i][l2]]
    }
