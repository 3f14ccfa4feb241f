"""L-BFGS for many independent smooth convex problems at once.

K slots for problems, P parameters each, m curvature pairs (step s, gradient change y) each.

The caller evaluates all running problems at once, between `Slots.trial_points` and `Slots.advance`:
nearly all work is there, in matrix products that are wide because of the many problems. Each
problem adds two matrix-vector products with its own (2m, P) pairs, by the "vector-free" form of the
two-loop recursion (Chen, Wang & Zhou, NIPS 2014): the recursion needs only inner products among the
pairs and the gradient, so it works on 2m + 1 coefficients, and reads the long vectors once for
their products and once to form the step.

The caller scales its coordinates so that the Hessian is near the identity: a problem without pairs
then begins with a step of length one down its gradient, and shortens it where it goes too far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Array, Index

# (slot, gradient (P,)) -> whether a problem whose gap is small enough may end.
GradientCheck = Callable[[int, Array], bool]

ARMIJO = 1e-4  # least share of the predicted decrease for an accepted step (Nocedal and Wright)
# A decrease is visible in the values if it is this many times their possible rounding error.
VISIBLE_DECREASE = 8.0
# A problem is stopped after so many steps that neither decrease the value visibly nor halve the
# squared gradient. Gradients do not fall steadily: with fewer steps 20,000 x 1,280 rows at a gap of
# 3e-7 took 21 CPU seconds instead of 11, because many heads went on in float64.
MAX_STALLED_STEPS = 14
# A problem ends at this fraction of the gap, whatever its gradient is (1.01 of the CPU time
# without).
FAR_BELOW_GAP = 3e-3
# Columns of pairs that are multiplied together, so that a new pair is still in the nearer caches.
PAIR_COLUMNS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class StoppedProblem:
    """The state of a problem at the end of its iterations."""

    point: Array  # (P,)
    value: float
    gradient: Array  # (P,), at `point`
    curvature_pairs: Array  # (2m, P), oldest first, zero for missing pairs
    n_iterations: int  # one evaluation each
    gap_reached: bool  # whether the estimated gap is small enough
    # whether gap and gradient ended it, not a limit of iterations or lack of progress
    finished: bool


@dataclass
class PairMemory:
    """Curvature pairs of K slots: `pairs[k, :m]` are the steps s, `pairs[k, m:]` the changes y.

    All slots write their next pair at the same position. A slot without a new pair marks it as
    unusable, by s.y <= 0 in `gram`.
    """

    pairs: Array  # (K, 2m, P)
    gram: Array  # (K, 2m, 2m) float64, inner products of the rows of `pairs`
    newest: int = -1  # position of the newest pair

    @property
    def n_pairs(self) -> int:
        return int(self.pairs.shape[1]) // 2

    def _oldest_first(self) -> Index:
        m = self.n_pairs
        positions = (self.newest + 1 + np.arange(m)) % m
        return np.concatenate([positions, m + positions])

    def load(self, slot: int, pairs: Array | None) -> None:
        """Start a slot with pairs (2m, P), oldest first, or without any."""
        if pairs is None:
            self.gram[slot] = 0.0
            return
        self.pairs[slot, self._oldest_first()] = pairs
        self.gram[slot] = self.pairs[slot] @ self.pairs[slot].T

    def unload(self, slot: int) -> Array:
        """Return the pairs (2m, P) of a slot, oldest first, unusable ones as zeros."""
        m, order = self.n_pairs, self._oldest_first()
        unusable = ~(self.gram[slot, range(m), range(m, 2 * m)] > 0)
        pairs: Array = self.pairs[slot, order]
        pairs[np.concatenate([unusable, unusable])[order]] = 0
        return pairs

    def skip(self, slot: int) -> None:
        """Mark the newest position of a slot as unusable."""
        self.gram[slot, self.newest, self.n_pairs + self.newest] = -1.0

    def add(self, slot: int, points: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
        """Store the pair of a step, from points and gradients (before, after).

        Returns the inner products (2m,) of the slot's pairs with the gradient after the step.
        """
        m, position, slot_pairs = self.n_pairs, self.newest, self.pairs[slot]
        products = np.zeros((2 * m, 3))
        for start in range(0, slot_pairs.shape[1], PAIR_COLUMNS_PER_CHUNK):
            columns = slice(start, start + PAIR_COLUMNS_PER_CHUNK)
            chunk = slot_pairs[:, columns]
            np.subtract(points[1][columns], points[0][columns], out=chunk[position])
            np.subtract(gradients[1][columns], gradients[0][columns], out=chunk[m + position])
            products += (
                chunk @ np.stack([chunk[position], chunk[m + position], gradients[1][columns]]).T
            )
        self.gram[slot][:, position] = self.gram[slot][position] = products[:, 0]
        self.gram[slot][:, m + position] = self.gram[slot][m + position] = products[:, 1]
        curvature_floor = np.finfo(slot_pairs.dtype).eps * products[m + position, 1]
        if not products[position, 1] > curvature_floor:
            self.skip(slot)
        return products[:, 2]


def _direction_coefficients(gram: Array, gradient_products: Array, newest: int) -> Array:
    """Return the quasi-Newton step as coefficients (A, 2m + 1) of [steps, changes, gradient].

    gram: (A, 2m, 2m), inner products of the pairs; gradient_products: (A, 2m), with the gradient.

    It is the compact form of the inverse Hessian (Byrd, Nocedal & Schnabel 1994, eq. 2.6) with
    H0 = h I: with R the upper triangle of S'Y (pairs from old to new), D its diagonal and
    p = R^-1 S'g,
        H g = h g + S R^-T ((D + h Y'Y) p - h Y'g) - h Y p.
    """
    n_problems, n_vectors = gradient_products.shape
    m = n_vectors // 2
    order = np.array([(newest + 1 + i) % m for i in range(m)])  # oldest first
    sy, yy = gram[:, order][:, :, m + order], gram[:, m + order][:, :, m + order]
    sg, yg = gradient_products[:, order], gradient_products[:, m + order]
    curvature = np.einsum("amm->am", sy)
    usable = curvature > 0
    usable_pair = usable[:, :, None] & usable[:, None, :]
    diagonal = np.where(usable, curvature, 1.0)
    upper = np.triu(np.where(usable_pair, sy, 0.0), 1)
    upper[:, range(m), range(m)] = diagonal
    inverse = np.linalg.inv(upper)
    # H0 from the newest usable pair (Nocedal & Wright, eq. 7.20).
    newest_usable = m - 1 - np.argmax(usable[:, ::-1], axis=1)
    problem = np.arange(n_problems)
    h = diagonal[problem, newest_usable] / np.maximum(
        yy[problem, newest_usable, newest_usable], np.finfo(np.float64).tiny
    )
    h = np.where(usable.any(axis=1), h, 1.0)[:, None]
    p = np.einsum("aij,aj->ai", inverse, np.where(usable, sg, 0.0))
    inner = diagonal * p + h * (
        np.einsum("aij,aj->ai", np.where(usable_pair, yy, 0.0), p) - np.where(usable, yg, 0.0)
    )
    coefficients = np.empty((n_problems, n_vectors + 1))
    coefficients[:, order] = np.einsum("aji,aj->ai", inverse, np.where(usable, inner, 0.0))
    coefficients[:, m + order] = -h * p
    coefficients[:, -1] = h[:, 0]
    return -coefficients


class Slots:
    """The problems in K slots: points, quasi-Newton steps and progress of each.

    A problem has finished when its estimated relative gap is below `gap` and its gradient is small
    enough, or when the gap is far below. The estimate decides only when to stop: the caller reports
    a proven bound. If a decrease is smaller than the rounding errors of the values, it is computed
    from the slopes at both ends of the step (as in Hager & Zhang's approximate Wolfe conditions,
    SIAM J. Optim. 2005), so float32 reaches gaps far below its rounding errors. A problem whose
    gradients no longer shrink there is stopped, as not converged unless its gap was small enough.
    """

    def __init__(
        self,
        n_slots: int,
        n_parameters: int,
        n_pairs: int,
        dtype: Any,
        *,
        gap: float,
        max_iterations: int,
    ) -> None:
        self.gap, self.max_iterations = gap, max_iterations
        self.dtype = dtype
        self.point, self.gradient, self.direction = (
            np.zeros((n_slots, n_parameters), dtype) for _ in range(3)
        )
        self.memory = PairMemory(
            np.zeros((n_slots, 2 * n_pairs, n_parameters), dtype),
            np.zeros((n_slots, 2 * n_pairs, 2 * n_pairs)),
        )
        self.value, self.slope, self.step_length, self.squared_gradient = (
            np.zeros(n_slots) for _ in range(4)
        )
        self.gradient_products = np.zeros((n_slots, 2 * n_pairs))
        self.decreases = np.zeros((n_slots, 4))  # of the latest accepted steps, newest first
        # squared gradient when the problem last made progress
        self.progress_mark = np.zeros(n_slots)
        self.n_iterations, self.n_stalled = (np.zeros(n_slots, np.int64) for _ in range(2))
        self.occupied, self.at_start, self.gap_reached, self.finished = (
            np.zeros(n_slots, bool) for _ in range(4)
        )

    def load(self, k: int, start: Array, pairs: Array | None) -> None:
        """Put a problem into a slot: its start (P,), and curvature pairs (2m, P), oldest first."""
        self.point[k] = start
        self.memory.load(k, pairs)
        self.occupied[k] = self.at_start[k] = True
        self.gap_reached[k] = self.finished[k] = False
        self.direction[k], self.step_length[k] = 0, 0.0
        self.n_iterations[k] = self.n_stalled[k] = 0
        self.decreases[k] = np.nan

    def unload(self, k: int) -> StoppedProblem:
        """Return the state of a problem, and free its slot."""
        self.occupied[k] = False
        # Copies, because the slot's arrays are used for the next problem.
        return StoppedProblem(
            self.point[k].copy(),
            float(self.value[k]),
            self.gradient[k].copy(),
            self.memory.unload(k),
            int(self.n_iterations[k]),
            bool(self.gap_reached[k]),
            bool(self.finished[k]),
        )

    def trial_points(self, running: Index) -> Array:
        """Return the points (A, P) at the ends of the steps of some slots."""
        trial = np.empty((len(running), self.point.shape[1]), self.dtype)
        lengths = self.step_length[running].astype(self.dtype)
        for row, (k, length) in enumerate(zip(running.tolist(), lengths, strict=True)):
            np.multiply(self.direction[k], length, out=trial[row])
            trial[row] += self.point[k]
        return trial

    def advance(
        self,
        running: Index,
        trial: Array,
        trial_value: Array,
        trial_gradient: Array,
        gradient_is_small: GradientCheck,
    ) -> Index:
        """Take the steps of running problems (A,), or shorten them; return the slots of those that
        end.

        trial: (A, P), their `trial_points`, with the values (A,) and gradients (A, P) there.
        """
        self.n_iterations[running] += 1
        # Rounding error of a sum of N terms in `dtype`; smaller differences of values say nothing.
        eps = float(np.finfo(self.dtype).eps)
        rounding = 4 * eps * np.maximum(np.abs(self.value[running]), np.abs(trial_value))
        armijo_bound = (
            self.value[running] + ARMIJO * self.step_length[running] * self.slope[running]
        )
        accepted = (trial_value <= armijo_bound + rounding) | self.at_start[running]
        self.memory.newest = (self.memory.newest + 1) % self.memory.n_pairs
        for row, k in enumerate(running.tolist()):
            if accepted[row]:
                self._move(k, trial[row], trial_value[row], trial_gradient[row], rounding[row])
            else:
                self._shorten(k, trial_value[row], trial_gradient[row])
        moved = running[accepted]
        if moved.size:
            relative_gap = self._choose_directions(moved)
            self.gap_reached[moved] = relative_gap <= self.gap
            for k, slot_gap in zip(moved.tolist(), relative_gap.tolist(), strict=True):
                if self.gap_reached[k]:
                    is_far_below = slot_gap <= FAR_BELOW_GAP * self.gap
                    self.finished[k] = is_far_below or gradient_is_small(k, self.gradient[k])
        ends = (
            self.finished[running]
            | (self.n_stalled[running] >= MAX_STALLED_STEPS)
            | (self.n_iterations[running] >= self.max_iterations)
        )
        return np.asarray(running[ends])

    def _shorten(self, k: int, value: float, gradient: Array) -> None:
        """Shorten the step of a slot, whose end has a value that is too large."""
        self.memory.skip(k)
        self.step_length[k] = _shorten_step(
            self.step_length[k], self.value[k], self.slope[k], value, gradient @ self.direction[k]
        )
        # Shortened that far, a step shows no decrease beyond rounding errors.
        self.n_stalled[k] += int(self.step_length[k] < 1e-10)

    def _move(self, k: int, point: Array, value: float, gradient: Array, rounding: float) -> None:
        """Move a slot to the end of an accepted step, or take the values at its start."""
        visible = True
        if self.at_start[k]:
            self.memory.skip(k)
        else:
            self.gradient_products[k] = self.memory.add(
                k, (self.point[k], point), (self.gradient[k], gradient)
            )
            decrease = self.value[k] - value
            visible = decrease > VISIBLE_DECREASE * rounding
            if not visible:  # computed from the slopes, by the trapezoidal rule
                slope = float(gradient @ self.direction[k])
                decrease = -0.5 * self.step_length[k] * (self.slope[k] + slope)
            self.decreases[k] = decrease, *self.decreases[k, :-1]
        self.point[k], self.value[k], self.gradient[k] = point, value, gradient
        self.squared_gradient[k] = self.gradient[k] @ self.gradient[k]
        if self.at_start[k]:
            self.gradient_products[k] = self.memory.pairs[k] @ self.gradient[k]
            self.at_start[k] = False
        if visible or self.squared_gradient[k] < 0.5 * self.progress_mark[k]:
            self.progress_mark[k], self.n_stalled[k] = self.squared_gradient[k], 0
        else:
            self.n_stalled[k] += 1

    def _choose_directions(self, moved: Index) -> Array:
        """Choose the next steps of slots that have moved; return their estimated relative gaps."""
        coefficients = _direction_coefficients(
            self.memory.gram[moved], self.gradient_products[moved], self.memory.newest
        )
        self.slope[moved] = (
            np.einsum("ar,ar->a", coefficients[:, :-1], self.gradient_products[moved])
            + coefficients[:, -1] * self.squared_gradient[moved]
        )
        for k, combination in zip(moved.tolist(), coefficients.astype(self.dtype), strict=True):
            np.dot(combination[:-1], self.memory.pairs[k], out=self.direction[k])
            self.direction[k] += combination[-1] * self.gradient[k]
        # Rounding errors of old pairs can turn a step uphill: the gradient never is.
        uphill = moved[~(self.slope[moved] < 0)]
        self.direction[uphill] = -self.gradient[uphill]
        self.slope[uphill] = -self.squared_gradient[uphill]
        self.step_length[moved] = 1.0
        scale = np.maximum(np.abs(self.value[moved]), np.finfo(np.float64).tiny)
        return _estimate_gap(-0.5 * self.slope[moved], self.decreases[moved]) / scale


def _estimate_gap(model_decrease: Array, decreases: Array) -> Array:
    """Return the estimated distance to the optimum, (A,).

    model_decrease: (A,), predicted by the quadratic model. decreases: (A, 4), the latest ones.
    """
    # The larger of two estimates: the model's, and the sum of a geometric series that continues the
    # latest decreases. The model alone is too small, up to 20 times in the tests' hardest cases,
    # before its pairs include the flat directions.
    newest = np.maximum(np.nan_to_num(decreases[:, 0], nan=0.0), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.cbrt(newest / np.maximum(decreases[:, 3], np.finfo(np.float64).tiny))
    rate = np.clip(np.nan_to_num(rate, nan=0.7), 0.3, 0.95)
    return np.asarray(np.maximum(model_decrease, newest * rate / (1 - rate)))


def _shorten_step(length: float, f0: float, slope0: float, f1: float, slope1: float) -> float:
    """Return a shorter step than the refused one of this length.

    It is the minimizer of the cubic through the values f and the slopes at both ends (Nocedal &
    Wright, eq. 3.59), limited to 0.1 to 0.8 of the length.
    """
    if not np.isfinite(f1) or not np.isfinite(slope1):
        return 0.1 * length
    d1 = slope0 + slope1 - 3 * (f0 - f1) / (0 - length)
    discriminant = d1 * d1 - slope0 * slope1
    if discriminant < 0:
        return 0.5 * length
    d2 = np.sqrt(discriminant)
    minimizer = length - length * (slope1 + d2 - d1) / (slope1 - slope0 + 2 * d2)
    if not np.isfinite(minimizer):
        return 0.5 * length
    return float(np.clip(minimizer, 0.1 * length, 0.8 * length))
