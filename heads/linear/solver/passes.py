"""One pass of logistic heads over the rows of their tiles: losses and gradients.

A heads, C classes (rows of a head: C for a softmax, 1 for a sigmoid), c = C - 1 columns of a head
(1 for a sigmoid), n rows of a tile, W coordinates of a row as tiles have them.

A pass has the heads' weights for all tiles and adds up their gradients: `add(tile)` returns the
losses (A',) float64 of the heads that see the tile, `gradient()` the sums (A, c, W). A tile is seen
by the heads of some folds only: `seen` says of which heads (A',), by a tile's folds. Which class of
pass it is is a matter of speed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from headrace.heads.linear.solver.compiled_blocks import Compiled
from headrace.heads.linear.solver.design import COLUMNS_OF_A_WIDE_HEAD, Design, Tile
from headrace.heads.linear.solver.loss import sigmoid_loss, softmax_loss

Array = npt.NDArray[Any]
NEAR_BYTES = 1 << 20  # of the second cache, for weights and gradients
Seen = dict[tuple[int, ...], npt.NDArray[np.intp]]
# (tile, its values, weights, labels, row weights) -> losses and gradient, somewhere else than in
# NumPy
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
    """The pass in NumPy, any float type; the products, the losses and the products back one after
    the other.
    """

    def __init__(
        self,
        design: Design,
        weighting: Weighting,
        lines: npt.NDArray[np.intp],
        u: Array,
        seen: Seen,
        elsewhere: Elsewhere | None,
    ) -> None:
        self.design, self.weighting, self.lines, self.elsewhere = (
            design,
            weighting,
            lines,
            elsewhere,
        )
        self.shape, self.dtype, self.seen = u.shape, u.dtype, seen
        # Class first: a reduction over classes is then a sum of contiguous runs.
        self.weights = {
            folds: np.ascontiguousarray(u[heads].transpose(1, 0, 2)).reshape(-1, u.shape[-1])
            for folds, heads in seen.items()
        }
        self.totals = {folds: np.zeros_like(weights) for folds, weights in self.weights.items()}

    def add(self, tile: Tile) -> Array:
        """Losses (A',) float64 on a tile, whose part of the gradients is kept."""
        rows, n, columns = self.weighting.rows, len(tile.rows), self.shape[1]
        weights, lines = self.weights[tile.folds], self.lines[self.seen[tile.folds]]
        values, across = self.design.read(tile)
        own = None if rows > 1 else tile.labels[self.weighting.labels[lines]]
        weight = self.weighting.of_rows(tile, lines)
        if self.elsewhere is not None:
            loss, gradient = self.elsewhere(tile, values, weights, own, weight)
            self.totals[tile.folds] += gradient
            return loss
        decision = np.empty((rows, len(lines), n), weights.dtype)
        np.matmul(weights, across, out=decision[:columns].reshape(-1, n))
        loss = (
            softmax_loss(decision, tile.bounds, weight)
            if own is None
            else sigmoid_loss(decision, own, weight)
        )
        self.totals[tile.folds] += decision[:columns].reshape(-1, n) @ values
        return loss

    def gradient(self) -> Array:
        """(A, c, W) over the tiles so far."""
        _, columns, width = self.shape
        out = np.zeros(self.shape, self.dtype)
        for folds, heads in self.seen.items():
            out[heads] += self.totals[folds].reshape(columns, len(heads), width).transpose(1, 0, 2)
        return out


@dataclass(frozen=True)
class Group:
    """Heads that pass over a tile together, in the compiled pass's own layout."""

    heads: npt.NDArray[np.intp]  # (a,) of all
    weights: Array
    totals: list[Array]  # gradients, of each thread's rows


class CompiledPass:
    """The same in float32, compiled: a row is read once, and decisions never leave the nearer
    caches.

    Threads share a tile by rows; each has its own sums, which are added in order.
    """

    def __init__(
        self,
        design: Design,
        weighting: Weighting,
        lines: npt.NDArray[np.intp],
        u: Array,
        seen: Seen,
        compiled: Compiled,
        threads: ThreadPoolExecutor | None = None,
        parts: int = 1,
    ) -> None:
        self.design, self.weighting, self.lines, self.seen = design, weighting, lines, seen
        self.compiled, self.threads, self.parts, self.shape = compiled, threads, parts, u.shape
        heads, columns, width = u.shape

        def group(some: npt.NDArray[np.intp]) -> Group:
            packed = compiled.packed(u[some].reshape(-1, width))
            return Group(
                some, packed, [compiled.room(len(some) * columns, width) for _ in range(parts)]
            )

        # Heads that pass over a tile together: their weights and gradients stay in the second cache
        # from block to block.
        most = max(NEAR_BYTES // (8 * columns * width), 1)
        self.groups: dict[tuple[int, ...], list[Group]]
        if most == 1 or columns >= COLUMNS_OF_A_WIDE_HEAD:
            # A head that is wide by itself is laid out once for all tiles.
            alone = [group(np.array([head])) for head in range(heads)]
            self.groups = {
                folds: [alone[head] for head in own.tolist()] for folds, own in seen.items()
            }
        else:
            self.groups = {
                folds: [group(some) for some in np.array_split(own, -(-len(own) // most))]
                for folds, own in seen.items()
            }
        plain = bool((weighting.multipliers[lines] == 1).all())
        self.multiplier = (
            None if plain else np.ascontiguousarray(weighting.multipliers[lines], np.float32)
        )

    def add(self, tile: Tile) -> Array:
        """Losses (A',) float64 on a tile, whose part of the gradients is kept."""
        values = self.design.read(tile)[0]
        weight = None if tile.weight is None else np.ascontiguousarray(tile.weight, np.float32)
        losses = np.zeros((self.parts, self.shape[0]))
        groups = [(group, self._labels(tile, group)) for group in self.groups[tile.folds]]

        def part(number: int) -> None:
            rows = slice(*(len(values) * i // self.parts for i in (number, number + 1)))
            for group, labels in groups:
                own = np.zeros(len(group.heads))
                self.compiled.run(
                    values[rows],
                    len(group.heads),
                    self.weighting.rows,
                    group.weights,
                    labels[..., rows],
                    None if weight is None else weight[rows],
                    None if self.multiplier is None else self.multiplier[group.heads],
                    own,
                    group.totals[number],
                )
                losses[number, group.heads] = own

        if self.threads is None:
            part(0)
        else:
            list(self.threads.map(part, range(self.parts)))
        return np.asarray(losses[:, self.seen[tile.folds]].sum(axis=0))

    def _labels(self, tile: Tile, group: Group) -> npt.NDArray[np.int32]:
        """What a group's heads learn of a tile's rows:

        (n,) classes, or (a, n) 0 and 1 for sigmoids.
        """
        if self.weighting.rows > 1:
            return tile.classes
        return tile.labels[self.weighting.labels[self.lines[group.heads]]].astype(np.int32)

    def gradient(self) -> Array:
        """(A, c, W) over the tiles so far."""
        _, columns, width = self.shape
        out = np.zeros(self.shape, np.float32)
        groups = {id(group): group for own in self.groups.values() for group in own}
        for group in groups.values():
            total = group.totals[0]
            for other in group.totals[1:]:
                total = total + other
            gradients = np.empty((len(group.heads), columns, width), np.float32)
            self.compiled.unpack(total, gradients.reshape(-1, width))
            out[group.heads] += gradients
        return out


def blas_threads() -> int:
    """How many threads BLAS may use here: a worker of a run is given one, a notebook
    has all cores.
    """
    return max(
        (int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"),
        default=1,
    )
