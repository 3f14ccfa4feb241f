"""One pass of logistic heads over the rows of their tiles: losses and gradients.

A heads, C classes (rows of a head: C for a softmax, 1 for a sigmoid), c = C - 1 columns of a head (1 for a sigmoid), n rows
of a tile, W coordinates of a row as tiles have them.

A pass has a head's weights for all its tiles and adds up the gradient over them: `add(tile)` returns the tile's losses (A,)
float64, `gradient()` the sum (A, c, W). One pass per group of tiles is open at a time, because a group is seen by the heads of
some folds only. Which class of pass it is is a matter of speed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from headrace.heads.compiled_tiles import Compiled
from headrace.heads.design import Design, Tile
from headrace.heads.loss import sigmoid_loss, softmax_loss

Array = npt.NDArray[Any]
NEAR_BYTES = 1 << 20  # of the second cache, for weights and gradients
# (tile, its values, weights, labels, row weights) -> losses and gradient, somewhere else than in NumPy
Elsewhere = Callable[[Tile, Array, Array, Array | None, Array | None], tuple[Array, Array]]


@dataclass(frozen=True)
class Weighting:
    """How lines of heads weigh the rows of a tile, and which labels they learn."""

    rows: int  # C, or 1 for sigmoids
    multipliers: Array  # (lines, C), or (lines, 2) for sigmoids: of classes
    labels: npt.NDArray[np.intp]  # (lines,) which of a tile's labels; -1: its classes
    weighted: bool  # some multiplier or sample weight is not one

    def of_rows(self, tile: Tile, lines: npt.NDArray[np.intp]) -> Array | None:
        """(A, n) weights of a tile's rows for the given lines, or None where all are one."""
        if not self.weighted:
            return None
        multiplier = self.multipliers[lines]
        if self.rows > 1:
            weight = multiplier[:, tile.classes]
        else:
            label = tile.labels[self.labels[lines]]
            weight = multiplier[:, :1] * (1 - label) + multiplier[:, 1:] * label
        return np.asarray(weight if tile.weight is None else weight * tile.weight)


class PlainPass:
    """The pass in NumPy, any float type; the products, the losses and the products back one after the other."""

    def __init__(
        self, design: Design, weighting: Weighting, lines: npt.NDArray[np.intp], u: Array, elsewhere: Elsewhere | None
    ) -> None:
        self.design, self.weighting, self.lines, self.elsewhere = design, weighting, lines, elsewhere
        self.shape = u.shape
        # Class first: a reduction over classes is then a sum of contiguous runs.
        self.weights = np.ascontiguousarray(u.transpose(1, 0, 2)).reshape(-1, u.shape[-1])
        self.total = np.zeros_like(self.weights)

    def add(self, tile: Tile) -> Array:
        """Losses (A,) float64 on a tile, whose part of the gradient is kept."""
        heads, columns, _ = self.shape
        rows, n = self.weighting.rows, len(tile.rows)
        values, across = self.design.read(tile)
        own = None if rows > 1 else tile.labels[self.weighting.labels[self.lines]]
        weight = self.weighting.of_rows(tile, self.lines)
        if self.elsewhere is not None:
            loss, gradient = self.elsewhere(tile, values, self.weights, own, weight)
            self.total += gradient
            return loss
        decision = np.empty((rows, heads, n), self.weights.dtype)
        np.matmul(self.weights, across, out=decision[:columns].reshape(-1, n))
        loss = softmax_loss(decision, tile.bounds, weight) if own is None else sigmoid_loss(decision, own, weight)
        self.total += decision[:columns].reshape(-1, n) @ values
        return loss

    def gradient(self) -> Array:
        """(A, c, W) over the tiles so far."""
        heads, columns, width = self.shape
        return self.total.reshape(columns, heads, width).transpose(1, 0, 2)


class CompiledPass:
    """The same in float32, compiled: a row is read once, and decisions never leave the nearer caches.

    Threads share a tile by rows; each has its own sums, which are added in order.
    """

    def __init__(
        self,
        design: Design,
        weighting: Weighting,
        lines: npt.NDArray[np.intp],
        u: Array,
        compiled: Compiled,
        threads: ThreadPoolExecutor | None = None,
        parts: int = 1,
    ) -> None:
        self.design, self.weighting, self.lines = design, weighting, lines
        self.compiled, self.threads, self.shape = compiled, threads, u.shape
        heads, columns, width = u.shape
        # Heads that pass over a tile together: their weights and gradients stay in the second cache from block to block.
        most = max(NEAR_BYTES // (8 * columns * width), 1)
        count = -(-heads // most)
        self.groups = [slice(heads * i // count, heads * (i + 1) // count) for i in range(count)]
        self.weights = [compiled.packed(u[group].reshape(-1, width)) for group in self.groups]
        self.totals = [[compiled.room(len(u[group]) * columns, width) for group in self.groups] for _ in range(parts)]
        plain = bool((weighting.multipliers[lines] == 1).all())
        self.multiplier = None if plain else np.ascontiguousarray(weighting.multipliers[lines], np.float32)

    def add(self, tile: Tile) -> Array:
        """Losses (A,) float64 on a tile, whose part of the gradient is kept."""
        values = self.design.read(tile)[0]
        if self.weighting.rows > 1:
            labels = tile.classes
        else:
            labels = tile.labels[self.weighting.labels[self.lines]].astype(np.int32)
        weight = None if tile.weight is None else np.ascontiguousarray(tile.weight, np.float32)
        losses = np.zeros((len(self.totals), self.shape[0]))

        def part(number: int) -> None:
            first, last = (len(values) * i // len(self.totals) for i in (number, number + 1))
            for group, weights, total in zip(self.groups, self.weights, self.totals[number], strict=True):
                self.compiled.run(
                    values[first:last],
                    group.stop - group.start,
                    self.weighting.rows,
                    weights,
                    (labels if labels.ndim == 1 else labels[group])[..., first:last],
                    None if weight is None else weight[first:last],
                    None if self.multiplier is None else self.multiplier[group],
                    losses[number, group],
                    total,
                )

        if self.threads is None:
            part(0)
        else:
            list(self.threads.map(part, range(len(self.totals))))
        return np.asarray(losses.sum(axis=0))

    def gradient(self) -> Array:
        """(A, c, W) over the tiles so far."""
        out = np.empty(self.shape, np.float32)
        for place, group in enumerate(self.groups):
            total = self.totals[0][place]
            for other in self.totals[1:]:
                total = total + other[place]
            own = out[group]
            self.compiled.unpack(total, own.reshape(-1, self.shape[2]))
        return out


def blas_threads() -> int:
    """How many threads BLAS may use here: a worker of a run is given one, a notebook has all cores."""
    return max((int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
