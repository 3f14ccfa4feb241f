"""L-BFGS for many independent smooth convex problems at once.

K problems, P parameters each, m remembered pairs (s, y). One call of `evaluate` serves every problem that is still
running: that is where the work is, and where a bank turns K slivers into one wide matrix product. What is left per
problem is two matrix-vector products with its own (2m, P) memory, by the "vector-free" form of the two-loop recursion
(Chen, Wang & Zhou, NIPS 2014): the recursion only ever needs inner products among the pairs and the gradient, so it
runs on (2m+1)-vectors of coefficients and touches the long vectors once to read their products and once to form the
step.

The caller scales its coordinates so that the identity majorises the Hessian; a first step of length one is then safe.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# (positions of the running problems, their points (A, P)) -> (values (A,) float64, gradients (A, P))
Evaluate = Callable[[npt.NDArray[np.intp], Array], tuple[Array, Array]]

ARMIJO = 1e-4


@dataclass
class Memory:
    """Curvature pairs of K problems: `pairs[k, :m]` the steps s, `pairs[k, m:]` the gradient differences y."""

    pairs: Array  # (K, 2m, P)
    gram: Array  # (K, 2m, 2m) float64, the inner products of the rows of `pairs`
    newest: int = -1  # slot of the newest pair, the same for every problem

    @classmethod
    def empty(cls, problems: int, size: int, parameters: int, dtype: Any) -> "Memory":
        return cls(np.zeros((problems, 2 * size, parameters), dtype), np.zeros((problems, 2 * size, 2 * size)))

    @property
    def size(self) -> int:
        return int(self.pairs.shape[1]) // 2

    def refresh(self) -> None:
        """Recompute the inner products after `pairs` was changed from outside."""
        for k in range(len(self.pairs)):
            self.gram[k] = self.pairs[k] @ self.pairs[k].T

    def add(self, k: int, slot: int, step: Array, change: Array) -> Array:
        """Store one pair of problem `k`; return the products of all 2m rows with (step, change)."""
        m, rows = self.size, self.pairs[k]
        rows[slot], rows[m + slot] = step, change
        products: Array = rows @ np.stack([step, change], axis=1)
        self.gram[k][:, slot] = self.gram[k][slot] = products[:, 0]
        self.gram[k][:, m + slot] = self.gram[k][m + slot] = products[:, 1]
        return products


def _direction_coefficients(gram: Array, against_gradient: Array, newest: int) -> Array:
    """The two-loop recursion on coefficients: (A, 2m+1) such that the step is their combination of [pairs, gradient].

    gram (A, 2m, 2m) and against_gradient (A, 2m) are inner products; a slot without a usable pair has s.y <= 0.
    """
    a, rows = against_gradient.shape
    m = rows // 2
    order = [(newest - i) % m for i in range(m)]  # newest first
    curvature = gram[:, range(m), range(m, 2 * m)]  # s.y
    usable = curvature > 0
    inverse = np.where(usable, 1.0 / np.where(usable, curvature, 1.0), 0.0)
    coefficients = np.zeros((a, rows + 1))
    coefficients[:, -1] = 1.0
    alpha = np.zeros((a, m))
    for j in order:
        product = np.einsum("ar,ar->a", coefficients[:, :-1], gram[:, j]) + coefficients[:, -1] * against_gradient[:, j]
        alpha[:, j] = product * inverse[:, j]
        coefficients[:, m + j] -= alpha[:, j]
    latest = np.zeros(a)
    found = np.zeros(a, bool)
    for j in order:  # H0 = (s.y / y.y) I of the newest usable pair (Nocedal & Wright, eq. 7.20)
        take = usable[:, j] & ~found
        latest[take] = curvature[take, j] / np.maximum(gram[take, m + j, m + j], np.finfo(np.float64).tiny)
        found |= take
    coefficients *= np.where(found, latest, 1.0)[:, None]
    for j in reversed(order):
        beta = (
            np.einsum("ar,ar->a", coefficients[:, :-1], gram[:, m + j])
            + coefficients[:, -1] * against_gradient_of(against_gradient, m + j)
        ) * inverse[:, j]
        coefficients[:, j] += alpha[:, j] - beta
    return -coefficients


def against_gradient_of(products: Array, row: int) -> Array:
    """Column `row` of the products with the gradient; named because the recursion reads better with it."""
    return products[:, row]


@dataclass
class Minimum:
    """Where `minimise` stopped. K problems, P parameters."""

    point: Array  # (K, P)
    value: Array  # (K,) float64
    gradient: Array  # (K, P), at `point`
    iterations: Array  # (K,) evaluations spent
    converged: Array  # (K,) bool
    memory: Memory = field(repr=False)


def minimise(
    evaluate: Evaluate,
    start: Array,
    memory: Memory,
    *,
    gap: float,
    floor: Array | None = None,
    max_iterations: int = 500,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Minimum:
    """Minimise K problems from `start` (K, P) until each one's estimated relative gap is below `gap`.

    The estimate is half the Newton decrement in the metric of the L-BFGS matrix, or the last decrease if that is
    larger. It steers the effort only: the caller reports a proven bound. A problem whose value no longer moves by more
    than rounding is stopped as not converged; the caller repeats it in a wider type.
    """
    k_all, _ = start.shape
    point, m = start.copy(), memory.size
    eps = float(np.finfo(start.dtype).eps)
    running = np.arange(k_all)
    value, gradient = evaluate(running, point)
    gradient = gradient.copy()
    iterations = np.ones(k_all, np.int64)
    converged = np.zeros(k_all, bool)
    stalled = np.zeros(k_all, np.int64)
    decrease = np.full(k_all, np.inf)
    products = np.zeros((k_all, 2 * m))
    squared = np.zeros(k_all)
    for k in range(k_all):
        products[k], squared[k] = memory.pairs[k] @ gradient[k], gradient[k] @ gradient[k]
    direction = np.zeros_like(point)
    slope = np.zeros(k_all)
    length = np.ones(k_all)
    fresh = np.ones(k_all, bool)  # the direction at the current point is still to be computed

    while running.size:
        new = running[fresh[running]]
        if new.size:
            coefficients = _direction_coefficients(memory.gram[new], products[new], memory.newest)
            slope[new] = np.einsum("ar,ar->a", coefficients[:, :-1], products[new]) + coefficients[:, -1] * squared[new]
            for k, row in zip(new, coefficients.astype(point.dtype), strict=True):
                direction[k] = row[:-1] @ memory.pairs[k] + row[-1] * gradient[k]
            uphill = new[~(slope[new] < 0)]
            direction[uphill], slope[uphill] = -gradient[uphill], -squared[uphill]
            length[new], fresh[new] = 1.0, False
            scale = np.maximum(np.abs(value[new]), np.finfo(np.float64).tiny)
            remaining = np.maximum(-0.5 * slope[new], np.where(np.isinf(decrease[new]), 0.0, decrease[new]))
            converged[new] = remaining <= gap * scale
            running = running[~converged[running]]
        running = running[(stalled[running] < 3) & (iterations[running] < max_iterations)]
        if not running.size or out_of_time():
            break
        trial = point[running] + length[running, None].astype(point.dtype) * direction[running]
        trial_value, trial_gradient = evaluate(running, trial)
        iterations[running] += 1
        # Rounding of a sum of N terms in the narrow type: below it, "no decrease" says nothing.
        slack = 4 * eps * np.maximum(np.abs(value[running]), np.abs(trial_value))
        good = trial_value <= value[running] + ARMIJO * length[running] * slope[running] + slack
        memory.newest = (memory.newest + 1) % m
        for row, k in enumerate(running.tolist()):
            if not good[row]:
                # Minimiser of the cubic through both values and slopes (Nocedal & Wright, eq. 3.59), kept inside.
                length[k] = _shorten(
                    length[k], value[k], slope[k], trial_value[row], trial_gradient[row] @ direction[k]
                )
                memory.gram[k][memory.newest, m + memory.newest] = -1.0  # no pair from a refused step
                stalled[k] += int(length[k] < 1e-10)
                continue
            step, change = trial[row] - point[k], trial_gradient[row] - gradient[k]
            with_pair = memory.add(k, memory.newest, step, change)
            if not with_pair[memory.newest, 1] > eps * with_pair[m + memory.newest, 1]:
                memory.gram[k][memory.newest, m + memory.newest] = -1.0
            decrease[k] = value[k] - trial_value[row]
            stalled[k] = stalled[k] + 1 if decrease[k] <= slack[row] else 0
            point[k], value[k], gradient[k] = trial[row], trial_value[row], trial_gradient[row]
            products[k], squared[k] = memory.pairs[k] @ gradient[k], gradient[k] @ gradient[k]
            fresh[k] = True
    return Minimum(point, value, gradient, iterations, converged, memory)


def _shorten(length: float, f0: float, slope0: float, f1: float, slope1: float) -> float:
    """A step shorter than the refused one: the minimiser of the cubic through both ends, kept away from both."""
    if not np.isfinite(f1) or not np.isfinite(slope1):
        return 0.1 * length
    d1 = slope0 + slope1 - 3 * (f0 - f1) / (0 - length)
    inside = d1 * d1 - slope0 * slope1
    if inside < 0:
        return 0.5 * length
    d2 = np.sqrt(inside)
    best = length - length * (slope1 + d2 - d1) / (slope1 - slope0 + 2 * d2)
    return float(np.clip(best, 0.1 * length, 0.8 * length)) if np.isfinite(best) else 0.5 * length
