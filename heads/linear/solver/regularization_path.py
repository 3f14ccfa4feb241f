"""Regularization paths: the order of heads that differ only in L2 strength, and their starts.

C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a sigmoid), R + 1 coordinates
(the intercept last).
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Array
from headrace.heads.linear.solver.preconditioner import Preconditioner


@dataclass(frozen=True)
class RegularizationPath:
    """Heads of one fold, class weighting and label that differ in L2 strength only."""

    fold: int
    class_factors: Array  # (C,) weights of the classes for a softmax, (2,) for a sigmoid
    label: int  # row of a block's labels; -1: a softmax over the block's classes
    class_weight: str  # paths with equal label and class_weight differ in fold only
    l2_strengths: tuple[float, ...]  # penalty factors 1 / C of scikit-learn's C, descending


@dataclass(frozen=True)
class SolvedHead:
    """A head that is solved or paused, with what its neighbours on the path start from."""

    u: Array  # (n_outputs, R + 1)
    gradient: Array  # (n_outputs, R + 1)
    objective: float
    curvature_pairs: Array  # (2m, P) in the preconditioner's scaled coordinates
    preconditioner: Preconditioner
    l2_strength: float
    n_iterations: int
    converged: bool


class PathSchedule:
    """The order in which the heads of all paths are solved.

    Every second strength of a path is an anchor. Anchors are solved in turn from strong to weak,
    each started from the previous ones, in `n_chains` chains side by side that each cover a range
    of strengths. The heads in between have solved neighbours on both sides: their starts are
    interpolated, which is far more accurate than to extrapolate (at weak regularization they often
    end after one evaluation), and they widen the products while the chains go on.
    """

    def __init__(self, paths: list[RegularizationPath], n_chains: int) -> None:
        self.ready: deque[tuple[int, float]] = deque()
        # path -> heads that are not ready, and the strengths that each waits for
        self.waiting: dict[int, list[tuple[float, set[float]]]] = {}
        for path_index, path in enumerate(paths):
            strengths = path.l2_strengths
            n_heads = len(strengths)
            anchors = sorted({*range(0, n_heads, 2), n_heads - 1})
            chains = [list(part) for part in np.array_split(anchors, n_chains) if len(part)]
            waiting = [
                (strengths[following], {strengths[anchor]})
                for chain in chains
                for anchor, following in itertools.pairwise(chain)
            ]
            # The others wait for both neighbours and one anchor beyond, perhaps of another chain: a
            # cubic needs two nodes on either side.
            interpolated = [k for k in range(n_heads) if k not in anchors]
            waiting += [
                (strengths[k], {strengths[i] for i in (k - 1, k + 1, min(k + 3, n_heads - 1))})
                for k in interpolated
            ]
            self.waiting[path_index] = waiting
            self.ready.extend((path_index, strengths[chain[0]]) for chain in chains)

    def next_head(self) -> tuple[int, float] | None:
        """Return the path and L2 strength of the head to start now, or None."""
        return self.ready.popleft() if self.ready else None

    def resume(self, path_index: int, l2_strength: float) -> None:
        """Put a paused head first in the queue."""
        self.ready.appendleft((path_index, l2_strength))

    def complete(self, path_index: int, l2_strength: float) -> None:
        """Release the heads that waited for this one."""
        still_waiting = []
        for head, missing in self.waiting[path_index]:
            missing.discard(l2_strength)
            if missing:
                still_waiting.append((head, missing))
            else:
                self.ready.append((path_index, head))
        self.waiting[path_index] = still_waiting


def sort_by_distance(l2_strengths: list[float], l2_strength: float) -> list[float]:
    """Return the strengths, the nearest on a log scale first."""
    return sorted(l2_strengths, key=lambda other: abs(math.log(other / l2_strength)))


def predict_start(
    solved_heads: dict[float, SolvedHead], l2_strength: float, shape: tuple[int, int], dtype: Any
) -> Array:
    """Return the start (n_outputs, R + 1) of a head, from the solved heads of its path.

    A polynomial in the log of the strength through the solutions, zero without any. It has four
    nodes where the strength lies between solved ones, and three where it lies outside: the nearest
    alone if that is further away than 1.5 times the distance of the two nearest.
    """
    if not solved_heads:
        return np.zeros(shape, dtype)
    if l2_strength in solved_heads:
        return solved_heads[l2_strength].u
    by_distance = sort_by_distance(list(solved_heads), l2_strength)
    interpolates = min(solved_heads) < l2_strength < max(solved_heads)
    nodes = by_distance[:4] if interpolates else by_distance[:3]
    if not interpolates and len(nodes) > 1:
        distance = abs(math.log(nodes[0] / l2_strength))
        if distance > 1.5 * abs(math.log(nodes[0] / nodes[1])):
            nodes = nodes[:1]
    log_nodes, log_strength = np.log(nodes), math.log(l2_strength)
    start = np.zeros(shape, np.float64)
    for i, node in enumerate(nodes):
        other_logs = np.delete(log_nodes, i)
        lagrange = float(np.prod((log_strength - other_logs) / (log_nodes[i] - other_logs)))
        start += lagrange * solved_heads[node].u
    return start.astype(dtype)
