"""Lines of logistic heads, those that differ in strength only: in which order they are solved, and
where each starts.

C classes (rows of a head: C for a softmax, 1 for a sigmoid), R + 1 coordinates (the intercept
last).
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.linear.solver.preconditioner import Frame

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Line:
    """Heads that differ in strength only."""

    fold: int
    multiplier: Array  # class weights: (C,) for a softmax, (2,) for a sigmoid
    label: int  # which row of a tile's labels; -1: a softmax of the tile's classes
    kind: str  # of class weight: lines of a kind differ in fold only
    strengths: tuple[float, ...]  # penalty factors mu = 1/C, descending


@dataclass(frozen=True)
class Solved:
    """A head, solved or paused, and what it leaves to its neighbours on the line."""

    u: Array  # (C, R + 1)
    gradient: Array  # (C, R + 1)
    value: float
    pairs: Array
    frame: Frame
    mu: float
    iterations: int
    converged: bool


class Plan:
    """Which head to start next.

    Along a line every second strength is solved in turn, each started from the previous ones (in
    `number` turns side by side, each over a part of the strengths). The others lie between two
    solved neighbours; their starts are interpolated, which is far more accurate than to extrapolate
    (at weak regularisation they are often done after one evaluation), and they fill the products
    while the turns go on.
    """

    def __init__(self, lines: list[Line], number: int) -> None:
        self.ready: deque[tuple[int, float]] = deque()
        self.waiting: dict[
            int, list[tuple[float, set[float]]]
        ] = {}  # line -> heads and what they wait for
        for i, line in enumerate(lines):
            count = len(line.strengths)
            anchors = sorted({*range(0, count, 2), count - 1})
            chains = [list(part) for part in np.array_split(anchors, number) if len(part)]
            waiting = [
                (line.strengths[b], {line.strengths[a]})
                for chain in chains
                for a, b in itertools.pairwise(chain)
            ]
            # The others wait for both neighbours and one beyond: two nodes on either side make a
            # cubic.
            others = [k for k in range(count) if k not in anchors]
            waiting += [
                (line.strengths[k], {line.strengths[min(k + 3, count - 1)]}) for k in others
            ]
            self.waiting[i] = waiting
            self.ready.extend((i, line.strengths[chain[0]]) for chain in chains)

    def next(self) -> tuple[int, float] | None:
        return self.ready.popleft() if self.ready else None

    def again(self, i: int, mu: float) -> None:
        self.ready.appendleft((i, mu))

    def finished(self, i: int, mu: float) -> None:
        still = []
        for head, needs in self.waiting[i]:
            needs.discard(mu)
            if needs:
                still.append((head, needs))
            else:
                self.ready.append((i, head))
        self.waiting[i] = still


def nearest(known: list[float], mu: float) -> list[float]:
    """Known strengths, the nearest in log mu first."""
    return sorted(known, key=lambda other: abs(math.log(other / mu)))


def predict_start(
    solved: dict[float, Solved], mu: float, shape: tuple[int, int], dtype: Any
) -> Array:
    """The start at strength mu: a polynomial in log mu through known solutions, zero where there is
    none.

    Four nodes where mu lies between known strengths; three or two where it lies outside, and only
    if no further from them than they are apart.
    """
    if not solved:
        return np.zeros(shape, dtype)
    if mu in solved:
        return solved[mu].u
    order = nearest(list(solved), mu)
    inside = min(solved) < mu < max(solved)
    nodes = order[:4] if inside else order[:3]
    if not inside and len(nodes) > 1:
        reach = abs(math.log(nodes[0] / mu))
        if reach > 1.5 * abs(math.log(nodes[0] / nodes[1])):
            nodes = nodes[:1]
    logs, x = np.log(nodes), math.log(mu)
    total = np.zeros(shape, np.float64)
    for i, node in enumerate(nodes):
        others = np.delete(logs, i)
        total += float(np.prod((x - others) / (logs[i] - others))) * solved[node].u
    return total.astype(dtype)
