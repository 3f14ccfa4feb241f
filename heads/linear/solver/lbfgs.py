"""L-BFGS for many independent smooth convex problems at once.

K problems, P parameters each, m remembered pairs (s, y). One call of `evaluate` serves every
problem that is still
running: that is where the work is, and where a bank turns K slivers into one wide matrix product.
What is left per problem is two matrix-vector products with its own (2m, P) memory, by the
"vector-free" form of the two-loop recursion (Chen, Wang & Zhou, NIPS 2014): the recursion only ever
needs inner products among the pairs and the gradient, so it runs on (2m+1)-vectors of coefficients
and touches the long vectors once to read their products and once to form the step.

The caller scales its coordinates so that the identity majorises the Hessian; a first step of length
one is then safe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# (slots of the running problems, their points (A, P)) -> (values (A,) float64, gradients (A, P))
Evaluate = Callable[[npt.NDArray[np.intp], Array], tuple[Array, Array]]

ARMIJO = 1e-4
SEEN = 8.0  # times what rounding may be: a decrease of that much is taken from the values
# Steps without such a decrease that do not halve the squared gradient either; its way down is not
# steady.
PATIENCE = 14
VALUES_AT_ONCE = (
    1 << 14
)  # of every pair: new ones are multiplied while they are in the nearer caches
FAR_BELOW = 3e-3  # of the gap: there a problem ends whatever else is asked of it


@dataclass(frozen=True)
class Stopped:
    """Where a problem's iterations ended."""

    point: Array  # (P,)
    value: float
    gradient: Array  # (P,), at `point`
    pairs: Array  # (2m, P), oldest first, zero where there is none
    iterations: int  # evaluations spent
    converged: bool  # its estimated gap is small enough
    ended: bool  # by that, and not for want of iterations or of progress


# slot -> the problem that now occupies it: its start (P,) and pairs (2m, P), oldest first, to begin
# with; None: no more
Load = Callable[[int], tuple[Array, Array | None] | None]
Done = Callable[[int, Stopped], None]
# (slot, its gradient (P,)) -> whether a problem whose gap is small enough may end
Settled = Callable[[int, Array], bool]


@dataclass
class Memory:
    """Curvature pairs of K slots: `pairs[k, :m]` the steps s, `pairs[k, m:]` the gradient
    differences y.

    All slots write their next pair at the same position; one that has none to write leaves a gap
    there.
    """

    pairs: Array  # (K, 2m, P)
    gram: Array  # (K, 2m, 2m) float64, the inner products of the rows of `pairs`
    newest: int = -1

    @property
    def size(self) -> int:
        return int(self.pairs.shape[1]) // 2

    def _order(self) -> npt.NDArray[np.intp]:
        m = self.size
        old_to_new = (self.newest + 1 + np.arange(m)) % m
        return np.concatenate([old_to_new, m + old_to_new])

    def load(self, k: int, pairs: Array | None) -> None:
        """Begin slot k with pairs that are oldest first, or with none."""
        if pairs is None:
            self.gram[k] = 0.0
            return
        self.pairs[k, self._order()] = pairs
        self.gram[k] = self.pairs[k] @ self.pairs[k].T

    def unload(self, k: int) -> Array:
        """The pairs of slot k, oldest first, those that are not usable zero."""
        m, order = self.size, self._order()
        useless = ~(self.gram[k, range(m), range(m, 2 * m)] > 0)
        out: Array = self.pairs[k, order]
        out[np.concatenate([useless, useless])[order]] = 0
        return out

    def skip(self, k: int) -> None:
        """Slot k has no pair at the newest position."""
        self.gram[k, self.newest, self.size + self.newest] = -1.0

    def add(self, k: int, points: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
        """Slot k's newest pair, of points and gradients before and after a step; returns the inner
        products (2m,) of its pairs with the gradient after it, from the same look at them.
        """
        m, slot, rows = self.size, self.newest, self.pairs[k]
        products = np.zeros((2 * m, 3))
        for first in range(0, rows.shape[1], VALUES_AT_ONCE):
            some = slice(first, first + VALUES_AT_ONCE)
            part = rows[:, some]
            np.subtract(points[1][some], points[0][some], out=part[slot])
            np.subtract(gradients[1][some], gradients[0][some], out=part[m + slot])
            products += part @ np.stack([part[slot], part[m + slot], gradients[1][some]]).T
        self.gram[k][:, slot] = self.gram[k][slot] = products[:, 0]
        self.gram[k][:, m + slot] = self.gram[k][m + slot] = products[:, 1]
        if not products[slot, 1] > np.finfo(rows.dtype).eps * products[m + slot, 1]:
            self.skip(k)
        return products[:, 2]


def _direction_coefficients(gram: Array, against_gradient: Array, newest: int) -> Array:
    """(A, 2m + 1) such that the quasi-Newton step is their combination of [steps, changes,
    gradient].

    The compact form of the inverse (Byrd, Nocedal & Schnabel 1994, eq. 2.6) with H0 = h I: with R
    the upper triangle of S'Y (pairs from old to new), D its diagonal and p = R^-1 S'g,
        H g = h g + S R^-T ((D + h Y'Y) p - h Y'g) - h Y p. gram (A, 2m, 2m) and against_gradient
    (A, 2m) are inner products. A slot without a usable pair has s.y <= 0.
    """
    a, rows = against_gradient.shape
    m = rows // 2
    order = np.array([(newest + 1 + i) % m for i in range(m)])  # oldest first
    sy, yy = gram[:, order][:, :, m + order], gram[:, m + order][:, :, m + order]
    sg, yg = against_gradient[:, order], against_gradient[:, m + order]
    curvature = np.einsum("amm->am", sy)
    usable = curvature > 0
    both = usable[:, :, None] & usable[:, None, :]
    diagonal = np.where(usable, curvature, 1.0)
    upper = np.triu(np.where(both, sy, 0.0), 1)
    upper[:, range(m), range(m)] = diagonal
    inverse = np.linalg.inv(upper)
    latest = (
        m - 1 - np.argmax(usable[:, ::-1], axis=1)
    )  # H0 from the newest usable pair (Nocedal & Wright, eq. 7.20)
    every = np.arange(a)
    h = diagonal[every, latest] / np.maximum(yy[every, latest, latest], np.finfo(np.float64).tiny)
    h = np.where(usable.any(axis=1), h, 1.0)[:, None]
    p = np.einsum("aij,aj->ai", inverse, np.where(usable, sg, 0.0))
    inner = diagonal * p + h * (
        np.einsum("aij,aj->ai", np.where(both, yy, 0.0), p) - np.where(usable, yg, 0.0)
    )
    coefficients = np.empty((a, rows + 1))
    coefficients[:, order] = np.einsum("aji,aj->ai", inverse, np.where(usable, inner, 0.0))
    coefficients[:, m + order] = -h * p
    coefficients[:, -1] = h[:, 0]
    return -coefficients


def minimise(
    evaluate: Evaluate,
    load: Load,
    done: Done,
    *,
    slots: int,
    parameters: int,
    memory: int,
    dtype: Any,
    gap: float,
    max_iterations: int,
    out_of_time: Callable[[], bool] = lambda: False,
    settled: Settled = lambda slot, gradient: True,
) -> None:
    """Minimise every problem that `load` gives, at most `slots` at a time; a slot that falls free
    is loaded again at once, so that the products in `evaluate` stay wide.

    A problem is done when its estimated relative gap is below `gap` and `settled` agrees, or the
    gap is far below. The estimate steers the effort only: the caller reports a proven bound. Where
    a decrease drowns in the value's rounding the slopes at both ends of the step tell it (as in
    Hager & Zhang's approximate Wolfe conditions, SIAM J. Optim. 2005): float32 goes on to gaps far
    below its rounding. A problem whose gradients no longer shrink there is stopped, as not
    converged unless its gap was small enough.
    """
    eps = float(np.finfo(dtype).eps)
    point, gradient, direction = (np.zeros((slots, parameters), dtype) for _ in range(3))
    remembered = Memory(
        np.zeros((slots, 2 * memory, parameters), dtype),
        np.zeros((slots, 2 * memory, 2 * memory)),
    )
    value, slope, length, squared = (np.zeros(slots) for _ in range(4))
    products = np.zeros((slots, 2 * memory))
    decrease = np.zeros((slots, 4))  # of the last accepted steps, newest first
    lowest = np.zeros(slots)  # squared gradient of a problem since it last made progress
    iterations, stalled = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    occupied, starting, fresh, close = (np.zeros(slots, bool) for _ in range(4))

    while True:
        for k in np.flatnonzero(~occupied).tolist():
            problem = load(k)
            if problem is None:
                break
            point[k] = problem[0]
            remembered.load(k, problem[1])
            occupied[k] = starting[k] = True
            close[k] = False
            direction[k], length[k], iterations[k], stalled[k], decrease[k] = 0, 0.0, 0, 0, np.nan
        running = np.flatnonzero(occupied)
        if not running.size:
            return
        trial = np.empty((len(running), parameters), dtype)
        for row, (k, far) in enumerate(
            zip(running.tolist(), length[running].astype(dtype), strict=True)
        ):
            np.multiply(direction[k], far, out=trial[row])
            trial[row] += point[k]
        trial_value, trial_gradient = evaluate(running, trial)
        iterations[running] += 1
        # Rounding of a sum of N terms in the narrow type: below it, "no decrease" says nothing.
        slack = 4 * eps * np.maximum(np.abs(value[running]), np.abs(trial_value))
        good = trial_value <= value[running] + ARMIJO * length[running] * slope[running] + slack
        remembered.newest = (remembered.newest + 1) % memory
        for row, k in enumerate(running.tolist()):
            if starting[k]:
                remembered.skip(k)
            elif not good[row]:
                remembered.skip(k)
                length[k] = _shorten(
                    length[k],
                    value[k],
                    slope[k],
                    trial_value[row],
                    trial_gradient[row] @ direction[k],
                )
                stalled[k] += int(length[k] < 1e-10)
                continue
            else:
                products[k] = remembered.add(
                    k, (point[k], trial[row]), (gradient[k], trial_gradient[row])
                )
                less = value[k] - trial_value[row]
                visible = less > SEEN * slack[row]
                if not visible:  # but gradients still tell, by the trapezoid rule
                    less = -0.5 * length[k] * (slope[k] + float(trial_gradient[row] @ direction[k]))
                decrease[k] = less, *decrease[k, :-1]
            point[k], value[k], gradient[k] = trial[row], trial_value[row], trial_gradient[row]
            squared[k] = gradient[k] @ gradient[k]
            if starting[k]:
                products[k] = remembered.pairs[k] @ gradient[k]
            if starting[k] or visible or squared[k] < 0.5 * lowest[k]:
                lowest[k], stalled[k] = squared[k], 0
            else:
                stalled[k] += 1
            starting[k], fresh[k] = False, True
        done_with = np.zeros(slots, bool)
        new = np.flatnonzero(fresh)
        if new.size:
            coefficients = _direction_coefficients(
                remembered.gram[new], products[new], remembered.newest
            )
            slope[new] = (
                np.einsum("ar,ar->a", coefficients[:, :-1], products[new])
                + coefficients[:, -1] * squared[new]
            )
            for k, own in zip(new.tolist(), coefficients.astype(dtype), strict=True):
                np.dot(own[:-1], remembered.pairs[k], out=direction[k])
                direction[k] += own[-1] * gradient[k]
            uphill = new[~(slope[new] < 0)]
            direction[uphill], slope[uphill] = -gradient[uphill], -squared[uphill]
            length[new], fresh[new] = 1.0, False
            scale = np.maximum(np.abs(value[new]), np.finfo(np.float64).tiny)
            remaining = _remaining(-0.5 * slope[new], decrease[new]) / scale
            close[new] = remaining <= gap
            for k, left in zip(
                new[close[new]].tolist(), remaining[close[new]].tolist(), strict=True
            ):
                done_with[k] = left <= FAR_BELOW * gap or settled(k, gradient[k])
        late = out_of_time()
        stop = (
            done_with[running]
            | (stalled[running] >= PATIENCE)
            | (iterations[running] >= max_iterations)
            | late
        )
        for k in running[stop].tolist():
            pairs = remembered.unload(k)
            stopped = Stopped(
                point[k].copy(),
                float(value[k]),
                gradient[k].copy(),
                pairs,
                int(iterations[k]),
                bool(close[k]),
                bool(done_with[k]),
            )
            occupied[k] = False
            done(k, stopped)


def _remaining(model: Array, decrease: Array) -> Array:
    """Estimated distance to the optimum (A,): the model's, or what a geometric series of the last
    decreases (A, 4) adds up to.

    The model alone is optimistic where it has not yet seen the flat directions: up to 20 x in the
    tests' hardest cases.
    """
    newest = np.maximum(np.nan_to_num(decrease[:, 0], nan=0.0), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.cbrt(newest / np.maximum(decrease[:, 3], np.finfo(np.float64).tiny))
    rate = np.clip(np.nan_to_num(rate, nan=0.7), 0.3, 0.95)
    return np.asarray(np.maximum(model, newest * rate / (1 - rate)))


def _shorten(length: float, f0: float, slope0: float, f1: float, slope1: float) -> float:
    """A step shorter than the refused one: the minimiser of the cubic through both ends, kept away
    from both.
    """
    if not np.isfinite(f1) or not np.isfinite(slope1):
        return 0.1 * length
    d1 = slope0 + slope1 - 3 * (f0 - f1) / (0 - length)
    inside = d1 * d1 - slope0 * slope1
    if inside < 0:
        return 0.5 * length
    d2 = np.sqrt(inside)
    best = length - length * (slope1 + d2 - d1) / (slope1 - slope0 + 2 * d2)
    return float(np.clip(best, 0.1 * length, 0.8 * length)) if np.isfinite(best) else 0.5 * length
