"""Whole regularisation paths of logistic heads on one design, all folds and class weights at once.

A heads in flight, C classes (rows of a head: C for a softmax, 1 for a sigmoid), R + 1 coordinates (the intercept last),
n rows of a tile.

A line is heads that differ in strength only. Strengths are visited from strong to weak; at each, every line's head is
solved in one batch. The start is extrapolated in log C from the line's previous solutions, and the curvature pairs of
the previous strength are carried along, corrected for the new strength: y = H s, and H changes by a multiple of P.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.design import Design, Tile
from headrace.heads.lbfgs import Memory, minimise
from headrace.heads.loss import sigmoid_loss, softmax_loss

Array = npt.NDArray[Any]
PAIRS = 10


@dataclass(frozen=True)
class Line:
    """Heads that differ in strength only."""

    fold: int
    multiplier: Array  # class weights: (C,) for a softmax, (2,) for a sigmoid
    label: int  # which row of a tile's labels; -1: a softmax of the tile's classes
    strengths: tuple[float, ...]  # penalty factors mu = 1/C, descending


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
    design: Design, lines: list[Line], rows: int, *, gap: float, deadline: float | None
) -> dict[tuple[int, float], Solution]:
    """Solutions by (line, mu). `rows` is C for softmax lines (all with label -1) and 1 for sigmoid lines.

    deadline, in time.monotonic() seconds, ends the iterations early; every bound stays true.
    """
    batch = _Batch(design, lines, rows)
    solutions: dict[tuple[int, float], Solution] = {}
    history: list[list[tuple[float, Array]]] = [[] for _ in lines]
    carried: dict[int, tuple[Array, Array, float]] = {}
    for mu in sorted({mu for line in lines for mu in line.strengths}, reverse=True):
        began = time.perf_counter()
        members = np.array([i for i, line in enumerate(lines) if mu in line.strengths])
        problem = _Level(batch, members, mu)
        start = np.stack([_predict(history[i], mu, (rows, design.width), design.dtype) for i in members])
        memory = Memory.empty(len(members), PAIRS, rows * design.width, design.dtype)
        for row, i in enumerate(members):
            if i in carried:
                problem.carry(memory, row, *carried[i])
        memory.refresh()
        found = minimise(
            problem.evaluate,
            problem.scaled(start),
            memory,
            gap=gap,
            out_of_time=lambda: deadline is not None and time.monotonic() > deadline,
        )
        u = problem.unscaled(found.point)
        gradient = problem.unscaled(found.gradient, inverse=True)
        share = (time.perf_counter() - began) / max(found.iterations.sum(), 1)
        for row, i in enumerate(members):
            bound = batch.bound(i, mu, u[row], gradient[row], float(found.value[row]))
            spent = int(found.iterations[row])
            solutions[int(i), mu] = Solution(
                u[row], float(found.value[row]), bound, spent, share * spent, bool(found.converged[row])
            )
            history[i] = [*history[i][-2:], (mu, u[row])]
            carried[int(i)] = (found.memory.pairs[row], problem.scale[row], mu)
    return solutions


def _predict(history: list[tuple[float, Array]], mu: float, shape: tuple[int, int], dtype: Any) -> Array:
    """The start at strength mu: a polynomial in log mu through the last solutions, zero where there is none."""
    if not history:
        return np.zeros(shape, dtype)
    nodes = np.log([m for m, _ in history])
    x = np.log(mu)
    if len(nodes) > 1 and abs(x - nodes[-1]) > 1.5 * abs(nodes[-1] - nodes[-2]):
        return history[-1][1].copy()  # too far from what is known to extrapolate
    degree = 2 if len(nodes) == 3 else 1 if len(nodes) == 2 else 0
    nodes, points = nodes[-degree - 1 :], [u for _, u in history[-degree - 1 :]]
    weights = [
        np.prod([(x - nodes[j]) / (nodes[i] - nodes[j]) for j in range(len(nodes)) if j != i])
        for i in range(len(nodes))
    ]
    return np.asarray(sum(float(w) * u for w, u in zip(weights, points, strict=True)), dtype)


class _Batch:
    """What is the same at every strength: rows, class weights, and the sums that the bounds need."""

    def __init__(self, design: Design, lines: list[Line], rows: int) -> None:
        self.design, self.lines, self.rows = design, lines, rows
        self.folds = np.array([line.fold for line in lines])
        self.multipliers = np.stack([line.multiplier for line in lines]).astype(design.dtype)  # (lines, C or 2)
        self.weighted = bool((self.multipliers != 1).any()) or any(tile.weight is not None for tile in design.tiles)
        self.labels = np.array([line.label for line in lines])
        # Weighted class sums of the rows, (lines, C or 2, R + 1) float64; the last column holds the weights' sums.
        self.sums = np.zeros((len(lines), self.multipliers.shape[1], design.width))
        for tile in design.tiles:
            for i in np.flatnonzero(self.folds != tile.group).tolist():
                self.sums[i] += self._tile_sums(tile, i)

    def _tile_sums(self, tile: Tile, i: int) -> Array:
        n = len(tile.rows)
        weight = np.ones(n, self.design.dtype) if tile.weight is None else tile.weight
        if self.labels[i] < 0:
            member = np.zeros((self.rows, n), self.design.dtype)
            for k in range(self.rows):
                member[k, tile.bounds[k] : tile.bounds[k + 1]] = 1
        else:
            label = tile.labels[self.labels[i]]
            member = np.stack([1 - label, label])
        return np.asarray((member * weight) @ tile.values, np.float64) * self.multipliers[i][:, None]

    def row_weights(self, tile: Tile, lines: npt.NDArray[np.intp]) -> Array | None:
        """(A, n) weights of a tile's rows for the given lines, or None where all are one."""
        if not self.weighted:
            return None
        multiplier = self.multipliers[lines]
        if self.rows > 1:
            by_class = np.repeat(np.arange(self.rows), np.diff(tile.bounds))
            weight = multiplier[:, by_class]
        else:
            label = tile.labels[self.labels[lines]]
            weight = multiplier[:, :1] * (1 - label) + multiplier[:, 1:] * label
        return np.asarray(weight if tile.weight is None else weight * tile.weight)

    def bound(self, i: int, mu: float, u: Array, gradient: Array, value: float) -> float:
        """Upper bound of value - optimum: the Fenchel duality gap at a feasible dual point near the head's residuals.

        With residuals w(p - y) as dual point the gap is |g|^2 / (2 mu), but the free intercept makes that point
        feasible only where the intercept's gradient g_b is zero. So p is mixed with a constant q, p' = (1 - e) p + e q,
        e just large enough that the classes' masses are right and q >= 0; the entropy's concavity then gives, with n_k
        the mass of class k, G the loss's gradient, and d = -e (G + sum_i w_i (y_i - q) z_i):
            gap <= |g|^2/(2 mu) + b.g_b + e (loss - V.G - b.g_b) + (G.d + |d|^2/2) / mu.
        """
        line, design = self.lines[i], self.design
        u64, g64 = u.astype(np.float64), gradient.astype(np.float64)
        V, b, g_b = u64[:, :-1], u64[:, -1], g64[:, -1]
        pull = mu * design.penalised(V, line.fold)
        loss = value - 0.5 * float(np.vdot(V, pull))
        G = g64[:, :-1] - pull
        mass, class_sums = self.sums[i][:, -1], self.sums[i][:, :-1]
        total = mass.sum()
        excess = g_b if self.rows > 1 else np.array([-g_b[0], g_b[0]])
        ratio = float((excess / mass).max(initial=0.0))
        e = ratio / (1 + ratio)
        q = mass / total - (excess / (total * ratio) if ratio > 0 else 0.0)
        drift = class_sums - q[:, None] * class_sums.sum(axis=0)
        if self.rows == 1:
            drift = drift[1:]
        d = -e * (G + drift)
        gap = design.dual_norm(g64[:, :-1], line.fold) / (2 * mu) + float(b @ g_b)
        gap += e * (loss - float(np.vdot(V, G)) - float(b @ g_b))
        if e > 0:  # G.d + |d|^2/2 = (|G + d|^2 - |G|^2) / 2 in the dual norm
            gap += (design.dual_norm(G + d, line.fold) - design.dual_norm(G, line.fold)) / (2 * mu)
        return max(gap, 0.0)


class _Level:
    """The problems of one strength in scaled coordinates x = u * scale, where the identity majorises the Hessian.

    Böhning (1992): a softmax's Hessian is at most 1/2 (I - 11'/C) and a sigmoid's at most 1/4 per unit of weight.
    """

    def __init__(self, batch: _Batch, members: npt.NDArray[np.intp], mu: float) -> None:
        self.batch, self.members, self.mu = batch, members, mu
        design = batch.design
        steepest = 0.5 if batch.rows > 1 else 0.25
        mass = batch.sums[members][:, :, -1].sum(axis=1)
        curvature = np.empty((len(members), design.width))
        curvature[:, :-1] = steepest * mass[:, None] * design.curvature + mu
        curvature[:, -1] = steepest * mass
        self.scale = np.sqrt(np.maximum(curvature, np.finfo(np.float32).tiny)).astype(design.dtype)  # (A, R + 1)

    def scaled(self, u: Array) -> Array:
        """(A, C, R + 1) to (A, C * (R + 1))."""
        return np.asarray((u * self.scale[:, None]).reshape(len(u), -1))

    def unscaled(self, x: Array, *, inverse: bool = False) -> Array:
        """Inverse of `scaled`; for gradients, which scale the other way, `inverse`."""
        u = x.reshape(len(x), self.batch.rows, self.batch.design.width)
        return np.asarray(u * self.scale[:, None] if inverse else u / self.scale[:, None])

    def carry(self, memory: Memory, row: int, pairs: Array, scale: Array, mu: float) -> None:
        """Take over another strength's pairs: to u coordinates, y += (mu' - mu) P s, to these coordinates."""
        m, width = memory.size, self.batch.design.width
        steps = pairs[:m].reshape(m, -1, width) / scale
        changes = pairs[m:].reshape(m, -1, width) * scale
        changes[..., :-1] += (self.mu - mu) * self.batch.design.penalised(
            steps[..., :-1], self.batch.lines[self.members[row]].fold
        )
        memory.pairs[row, :m] = (steps * self.scale[row]).reshape(m, -1)
        memory.pairs[row, m:] = (changes / self.scale[row]).reshape(m, -1)

    def evaluate(self, which: npt.NDArray[np.intp], x: Array) -> tuple[Array, Array]:
        """Objectives (A,) float64 and gradients, in scaled coordinates, of the problems `which`."""
        batch, design = self.batch, self.batch.design
        lines = self.members[which]
        scale = self.scale[which]
        u = x.reshape(len(x), batch.rows, design.width) / scale[:, None]
        folds = batch.folds[lines]
        value = np.zeros(len(x))
        gradient = np.zeros_like(u)
        for fold in np.unique(folds):
            own = folds == fold
            pull = self.mu * design.penalised(u[own, :, :-1], int(fold))
            value[own] = 0.5 * np.einsum("acr,acr->a", u[own, :, :-1], pull, dtype=np.float64)
            gradient[own, :, :-1] = pull
        columns = max(batch.rows - 1, 1)
        by_class = np.ascontiguousarray(u[:, :columns].transpose(1, 0, 2))  # (C - 1, A, R + 1)
        for group in dict.fromkeys(tile.group for tile in design.tiles):
            sees = np.flatnonzero(folds != group)
            if not sees.size:
                continue
            weights = by_class[:, sees].reshape(columns * len(sees), -1)
            total = np.zeros_like(weights)
            for tile in design.tiles:
                if tile.group == group:
                    value[sees] += self._tile(tile, lines[sees], weights, total)
            part = total.reshape(columns, len(sees), -1).transpose(1, 0, 2)
            gradient[sees, :columns] += part
            if batch.rows > 1:
                gradient[sees, -1] -= part.sum(axis=1)
        return value, (gradient / scale[:, None]).reshape(len(x), -1)

    def _tile(self, tile: Tile, lines: npt.NDArray[np.intp], weights: Array, total: Array) -> Array:
        """Add a tile's part of the gradient to `total`; return its part of the losses."""
        batch, n, heads = self.batch, len(tile.rows), len(lines)
        decision = np.empty((batch.rows, heads, n), weights.dtype)
        columns = len(weights) // heads
        np.matmul(weights, tile.values.T, out=decision[:columns].reshape(len(weights), n))
        row_weights = batch.row_weights(tile, lines)
        if batch.rows > 1:
            loss = softmax_loss(decision, tile.bounds, row_weights)
        else:
            loss = sigmoid_loss(decision, tile.labels[batch.labels[lines]], row_weights)
        total += decision[:columns].reshape(len(weights), n) @ tile.values
        return np.asarray(loss)
