"""Whole regularisation paths of logistic heads on one design, all folds and class weights at once.

A heads in flight, C classes (rows of a head: C for a softmax, 1 for a sigmoid), R + 1 coordinates
(the intercept last), n rows of a tile.

A line is heads that differ in strength only. Along a line every second strength is solved in turn,
from strong to weak, each start extrapolated in log C from the line's previous solutions; the heads
between are interpolated. Heads of all lines are in flight together, and one that is done makes room
for the next. A head takes over the curvature pairs of its nearest solved neighbour, corrected for
the new strength (`Flight.carried`).
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.linear.solver.active_set import (
    ITERATIONS_PER_FRAME,
    PARAMETERS_OF_WIDE_HEADS,
    Batch,
    Flight,
)
from headrace.heads.linear.solver.design import Design
from headrace.heads.linear.solver.lbfgs import Stopped, minimise
from headrace.heads.linear.solver.regularization_path import (
    Line,
    Plan,
    Solved,
    nearest,
    predict_start,
)

Array = npt.NDArray[Any]
PAIRS, PAIRS_OF_WIDE_HEADS = 8, 6  # at 100 classes reading eight costs more than they save
MOST_ITERATIONS = 600
COLUMNS_IN_FLIGHT = 512
# Streamed rows are worth more columns a pass than one head of each line has, even for more passes.
COLUMNS_WORTH_A_PASS, MOST_CHAINS = 24, 4
# In memory it pays for sigmoids, whose heads are one column each: five folds and twenty strengths
# take 0.55 s instead of 0.85. A softmax head is wide enough, and needs its neighbours more.
MOST_CHAINS_IN_MEMORY = 2


@dataclass(frozen=True)
class Solution:
    """One head in the design's coordinates."""

    u: Array  # (C, R + 1)
    objective: float
    bound: float  # proven upper bound of objective - optimum
    iterations: int
    seconds: float
    converged: bool


def solve_lines(
    design: Design,
    lines: list[Line],
    rows: int,
    *,
    gap: float,
    deadline: float | None,
    starts: dict[tuple[int, float], Array] | None = None,
    device: str = "cpu",
) -> dict[tuple[int, float], Solution]:
    """Solutions by (line, mu).

    `rows` is C for softmax lines (all with label -1) and 1 for sigmoid lines.

    deadline, in time.monotonic() seconds, ends the iterations early; every bound stays true.
    starts: points (C, R + 1) of heads that need not be predicted. device: "cpu" for NumPy,
    otherwise torch's name of where the products run.
    """
    began = time.perf_counter()
    batch = Batch(design, lines, rows, device)
    free = max(rows - 1, 1)
    slots = min(sum(len(line.strengths) for line in lines), max(COLUMNS_IN_FLIGHT // free, 1))
    flight = Flight(batch, slots)
    chains = 1
    if design.source is not None or rows == 1:
        most = MOST_CHAINS if design.source is not None else MOST_CHAINS_IN_MEMORY
        chains = max(1, min(COLUMNS_WORTH_A_PASS // (len(lines) * free), most))
    plan = Plan(lines, chains)
    solved: list[dict[float, Solved]] = [{} for _ in lines]
    paused: dict[tuple[int, float], Solved] = {}

    def late() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def load(slot: int) -> tuple[Array, Array | None] | None:
        head = plan.next()
        if head is None:
            return None
        i, mu = head
        before = paused.get(head)
        if before is None and solved[i]:
            before = solved[i][nearest(list(solved[i]), mu)[0]]
        if head in paused:
            start = paused[head].u
        elif starts and head in starts:
            start = starts[head]
        else:
            start = predict_start(solved[i], mu, (rows, design.width), design.dtype)
        # Between two solved heads a few iterations are left: fewer than a frame of its own would
        # cost.
        given = None
        if before is not None and head not in paused and min(solved[i]) < mu < max(solved[i]):
            given = before.frame
        flight.load(slot, i, mu, start, paused[head].iterations if head in paused else 0, given)
        return flight.frames[slot].scaled(
            start
        ).ravel(), None if before is None else flight.carried(slot, before)

    def done(slot: int, stopped: Stopped) -> None:
        i, mu, frame = int(flight.lines[slot]), float(flight.mu[slot]), flight.frames[slot]
        u = frame.unscaled(stopped.point.reshape(flight.shape))
        gradient = frame.unscaled_gradient(stopped.gradient.reshape(flight.shape))
        spent = stopped.iterations + (paused[i, mu].iterations if (i, mu) in paused else 0)
        # A mean loss near the rounding of one row's loss (which is of the order of 1) says nothing
        # about convergence.
        meaningful = stopped.value > 1e3 * float(np.finfo(design.dtype).eps) * float(
            batch.sums[i][:, -1].sum()
        )
        converged = stopped.converged and meaningful
        now = Solved(u, gradient, stopped.value, stopped.pairs, frame, mu, spent, converged)
        if (
            stopped.iterations >= ITERATIONS_PER_FRAME
            and not stopped.ended
            and spent < MOST_ITERATIONS
            and not late()
        ):
            paused[i, mu] = now  # go on in a frame made for where it is now
            plan.again(i, mu)
        else:
            solved[i][mu] = now
            plan.finished(i, mu)

    minimise(
        flight.evaluate,
        load,
        done,
        slots=slots,
        parameters=math.prod(flight.shape),
        memory=PAIRS if math.prod(flight.shape) < PARAMETERS_OF_WIDE_HEADS else PAIRS_OF_WIDE_HEADS,
        dtype=design.dtype,
        gap=gap,
        max_iterations=ITERATIONS_PER_FRAME,
        out_of_time=late,
        settled=flight.settled,
    )
    heads = [(i, mu) for i, line in enumerate(lines) for mu in line.strengths]
    bounds = batch.bounds([(i, solved[i][mu]) for i, mu in heads])
    if batch.threads is not None:
        batch.threads.shutdown()
    share = (time.perf_counter() - began) / max(sum(solved[i][mu].iterations for i, mu in heads), 1)
    return {
        (i, mu): Solution(
            one.u, one.value, bound, one.iterations, share * one.iterations, one.converged
        )
        for (i, mu), bound in zip(heads, bounds, strict=True)
        for one in [solved[i][mu]]
    }
