"""The heads in flight: what one evaluation of all of them costs is one pass over the rows.

A heads in flight, C classes (rows of a head: C for a softmax, 1 for a sigmoid), R + 1 coordinates
(the intercept last), n rows of a tile.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.linear.solver.compiled_blocks import compiled
from headrace.heads.linear.solver.design import Design, Tile
from headrace.heads.linear.solver.passes import (
    CompiledPass,
    Elsewhere,
    PlainPass,
    Seen,
    Weighting,
    blas_threads,
)
from headrace.heads.linear.solver.preconditioner import (
    SAMPLED_ROWS,
    SAMPLED_ROWS_PER_CLASS,
    Frame,
    dense_coordinates,
    frame,
    row_products,
)
from headrace.heads.linear.solver.regularization_path import Line, Solved

Array = npt.NDArray[Any]
ITERATIONS_PER_FRAME = 20
# Of a head's mean loss with ten classes, root mean square over its weights of standardised
# features; with others it goes with the root of their number, as gradients do. scikit-learn's
# default is 1e-4 for the largest, some 1e-5 by this measure: at strong regularisation that is a gap
# below 1e-6, two more iterations.
GRADIENT, AT_CLASSES = 8e-6, 10
MOST_THREADS = 8  # share a tile: fewer rows each than a hundred or so are not worth waking a thread
VALUES_OF_BOUNDS = (
    1 << 22
)  # of heads whose bounds are computed together: 32 MB for each of a few arrays
PARAMETERS_OF_WIDE_HEADS = 1 << 16  # beyond, what is done to pairs of steps shows beside the passes
NEAR_STRENGTHS = 300.0  # one over the other: between anchors of a usual path lies a factor of four
MOST_RATIO = 1e6  # of curvatures that pairs are corrected by
TILES_AHEAD = 8  # of streamed rows, asked for while as many are multiplied


@dataclass(frozen=True)
class Sample:
    """Some rows, from which frames are made."""

    parts: list[tuple[Tile, slice]]  # where they come from
    values: Array  # (n, R + 1)
    squares: Array  # of the values
    products: Array  # `precondition.row_products`


class Batch:
    """What is the same at every strength: rows, class weights, and the sums that the
    bounds need.
    """

    def __init__(self, design: Design, lines: list[Line], rows: int, device: str) -> None:
        self.design, self.lines, self.rows = design, lines, rows
        self.elsewhere: Elsewhere | None = None
        self.compiled = compiled() if device == "cpu" and design.dtype == np.float32 else None
        self.parts = 1 if self.compiled is None else min(blas_threads(), MOST_THREADS)
        self.alone = self.compiled if self.parts == 1 else None
        self.threads = ThreadPoolExecutor(self.parts) if self.parts > 1 else None
        if device != "cpu":
            from headrace.heads.linear.solver.torch_blocks import (
                TorchTiles,
            )  # a bank on the CPU does not import torch

            self.elsewhere = TorchTiles(design.tiles, rows, device, keep=design.source is None)
        self.folds = np.array([line.fold for line in lines])
        multipliers = np.stack([line.multiplier for line in lines]).astype(design.dtype)
        weighted = bool((multipliers != 1).any()) or any(
            tile.weight is not None for tile in design.tiles
        )
        self.weighting = Weighting(
            rows, multipliers, np.array([line.label for line in lines]), weighted
        )
        # Which lines (lines,) bool train on the rows of a tile, by its folds.
        self.trained = {
            own: np.isin(self.folds, own)
            for own in dict.fromkeys(tile.folds for tile in design.tiles)
        }
        wanted = max(SAMPLED_ROWS, SAMPLED_ROWS_PER_CLASS * rows)
        sums: list[Array | float] = [0.0] * len(lines)
        # What frames are made from: some of all rows or, where folds are apart, of each fold's.
        # There rows are nearly orthogonal, and a fold's frame knows nothing of the directions of
        # those that another trains on.
        self.samples: dict[int | None, Sample] = {}
        for fold in np.unique(self.folds).tolist() if design.apart else [None]:
            tiles = [tile for tile in design.tiles if fold is None or fold in tile.folds]
            # Of rows that several folds have copies of, the last is sampled: where heads train on
            # all rows, theirs.
            sampled = {int(tile.rows[0]): tile for tile in tiles}
            every = max(sum(len(tile.rows) for tile in sampled.values()) // wanted, 1)
            parts, taken = [], []
            passed = 0
            for tile in tiles:
                values, _ = design.read(tile)
                if sampled[int(tile.rows[0])] is tile:
                    # Every so many-th row of all, wherever tiles begin: a tile may hold fewer than
                    # that.
                    some = slice(-passed % every, None, every)
                    passed += len(tile.rows)
                    parts.append((tile, some))
                    taken.append(values[some].copy())
                for i in np.flatnonzero(self.trained[tile.folds]).tolist():
                    sums[i] = sums[i] + self._tile_sums(tile, values, i)
            values = design.from_tiles(np.concatenate(taken))
            self.samples[fold] = Sample(
                parts,
                values,
                values**2,
                row_products(values, dense_coordinates(rows, design.width)),
            )
        # Weighted class sums of the rows, (lines, C or 2, R + 1) float64; the last column holds the
        # weights' sums.
        self.sums = np.stack([design.from_tiles(np.asarray(one)) for one in sums])

    def _tile_sums(self, tile: Tile, values: Array, i: int) -> Array:
        n = len(tile.rows)
        weight = np.ones(n, self.design.dtype) if tile.weight is None else tile.weight
        if self.weighting.labels[i] < 0:
            member = np.zeros((self.rows, n), self.design.dtype)
            for k in range(self.rows):
                member[k, tile.bounds[k] : tile.bounds[k + 1]] = 1
        else:
            label = tile.labels[self.weighting.labels[i]]
            member = np.stack([1 - label, label])
        return np.asarray(
            ((member * weight) @ values).astype(np.float64) * self.weighting.multipliers[i][:, None]
        )

    def frame_kind(self, i: int) -> tuple[int, str, int | None]:
        """Lines of a kind share their frames."""
        line = self.lines[i]
        return line.label, line.kind, line.fold if self.design.apart else None

    def frame(self, u: Array, i: int, mu: float) -> Frame:
        """Frame at u for line i and those of its kind."""
        sample = self.samples[self.frame_kind(i)[-1]]
        parts = []
        for tile, rows in sample.parts:
            weight = self.weighting.of_rows(tile, np.array([i]))
            parts.append(
                np.ones(len(tile.rows), self.design.dtype)[rows]
                if weight is None
                else weight[0, rows]
            )
        weight = np.concatenate(parts)
        if not weight.any():  # the sample met none of the rows that weigh something
            weight += 1
        weight *= self.sums[i][:, -1].sum() / weight.sum()
        return frame(u, sample.values, sample.squares, sample.products, weight, mu)

    def begin(self, lines: npt.NDArray[np.intp], u: Array, seen: Seen) -> PlainPass | CompiledPass:
        """A pass of heads u (A, c, W) of the given lines (A,), which see tiles as `seen` says."""
        if self.compiled is None:
            return PlainPass(self.design, self.weighting, lines, u, seen, self.elsewhere)
        return CompiledPass(
            self.design, self.weighting, lines, u, seen, self.compiled, self.threads, self.parts
        )

    def bounds(self, heads: list[tuple[int, Solved]]) -> list[float]:
        """Upper bounds of value - optimum: Fenchel duality gaps at feasible dual points near the
        heads' residuals.

        With residuals w(p - y) as dual point the gap is |g|^2 / (2 mu), but the free intercept
        makes that point feasible only where the intercept's gradient g_b is zero. So p is mixed
        with a constant q, p' = (1 - e) p + e q, e just large enough that the classes' masses are
        right and q >= 0; the entropy's concavity then gives, with G the loss's gradient and d = -e
        (G + sum_i w_i (y_i - q) z_i):
            gap <= |g|^2/(2 mu) + b.g_b + e (loss - V.G - b.g_b) + (G.d + |d|^2/2) / mu,
        norms and products over features being those of P^-1.
        """
        at_once = max(VALUES_OF_BOUNDS // (self.rows * self.design.width), 1)
        lines = np.array([i for i, _ in heads])
        kinds, place = np.unique(lines, return_inverse=True)
        sums = self.design.dual(self.sums[kinds][..., :-1], self.folds[kinds])
        found = []
        for first in range(0, len(heads), at_once):
            some = slice(first, first + at_once)
            folds = self.folds[lines[some]]
            pulls = self.design.primal(np.stack([one.u[:, :-1] for _, one in heads[some]]), folds)
            gradients = self.design.dual(
                np.stack([one.gradient[:, :-1] for _, one in heads[some]]), folds
            )
            for (i, one), own, pull, g in zip(
                heads[some], place[some].tolist(), pulls, gradients, strict=True
            ):
                found.append(self._bound(one, self.sums[i][:, -1], sums[own], pull, g))
        return found

    def _bound(self, one: Solved, mass: Array, class_sums: Array, pull: Array, g: Array) -> float:
        """A head's bound, of `Design.primal` of its weights and `Design.dual` of its gradient and
        its line's class sums.
        """
        b, g_b = one.u[:, -1].astype(np.float64), one.gradient[:, -1].astype(np.float64)
        G = g - one.mu * pull
        excess = g_b if self.rows > 1 else np.array([-g_b[0], g_b[0]])
        ratio = float((excess / mass).max(initial=0.0))
        terms = [float(np.vdot(g, g)) / (2 * one.mu), *(b * g_b).tolist()]
        if ratio > 0:
            e = ratio / (1 + ratio)
            q = mass / mass.sum() - excess / (mass.sum() * ratio)
            drift = class_sums - q[:, None] * class_sums.sum(axis=0)
            d = -e * (G + (drift[1:] if self.rows == 1 else drift))
            loss = one.value - 0.5 * one.mu * float(np.vdot(pull, pull))
            terms += [e * loss, -e * float(np.vdot(pull, G)), *(-e * b * g_b).tolist()]
            terms += [float(np.vdot(G, d)) / one.mu, float(np.vdot(d, d)) / (2 * one.mu)]
        # What cancels between terms is known to their rounding only, which may be more than is
        # left.
        bound = sum(terms) + float(np.finfo(self.design.dtype).eps) * sum(map(abs, terms))
        return max(bound, 0.0) if math.isfinite(bound) else math.inf


class Flight:
    """The heads in flight: in each slot a line, a strength and the frame whose scaled coordinates
    it is solved in.
    """

    def __init__(self, batch: Batch, slots: int) -> None:
        self.batch = batch
        self.lines = np.zeros(slots, np.intp)
        self.mu = np.zeros(slots)
        self.frames: dict[int, Frame] = {}
        self.made: dict[tuple[int, str, int | None, float, int], Frame] = {}
        self.shape = (max(batch.rows - 1, 1), batch.design.width)

    def load(
        self,
        slot: int,
        i: int,
        mu: float,
        start: Array,
        iterations: int,
        given: Frame | None = None,
    ) -> None:
        """Put line i's head at strength mu, so many iterations old, into the slot.

        The frame of the first of its kind to be as old serves all, unless one is given.
        """
        if given is None:
            key = (*self.batch.frame_kind(i), mu, iterations // ITERATIONS_PER_FRAME)
            if key not in self.made:
                self.made[key] = self.batch.frame(start, i, mu)
            given = self.made[key]
        self.lines[slot], self.mu[slot], self.frames[slot] = i, mu, given

    def carried(self, slot: int, other: Solved) -> Array | None:
        """Another head's pairs for this slot, or None where they are of no use.

        A head that goes on in a new frame has the same Hessian: its pairs are taken to u and back.
        Along a line the Hessian's two parts change each by a factor: the penalty's by the
        strengths, the loss's, towards weak regularisation, by nearly as much. In u, pairs become s
        and y' = r (y - mu s) + mu' s, r the ratio of the frames' loss curvatures. Wide heads'
        pairs, of a strength that is not far off, stay as they are in scaled coordinates, where all
        Hessians are near the identity, but for the eigenvectors of classes, which are turned: that
        is cheaper, and with 100 classes takes 3 % fewer iterations; with ten 4 % more. P is taken
        for the identity: with 100 classes the product would cost a pass.
        """
        m, own, frame = len(other.pairs) // 2, self.frames[slot], other.frame
        before, now = other.mu, float(self.mu[slot])
        if own is frame and now == before:
            return other.pairs
        if own is not frame and now != before and math.prod(self.shape) >= PARAMETERS_OF_WIDE_HEADS:
            if abs(math.log(now / before)) > math.log(NEAR_STRENGTHS):
                return None
            return own.turned(other.pairs.reshape(2 * m, *self.shape), frame).reshape(2 * m, -1)
        steps = frame.unscaled(other.pairs[:m].reshape(m, *self.shape))
        if own is frame:
            steps[..., -1] = 0
            more = own.scaled_gradient(steps).reshape(m, -1)
            return np.concatenate(
                [other.pairs[:m], other.pairs[m:] + more.dtype.type(now - before) * more]
            )
        changes = frame.unscaled_gradient(other.pairs[m:].reshape(m, *self.shape))
        if now != before:
            ratio = float(
                np.clip(own.curvature / max(frame.curvature, 1e-30), 1 / MOST_RATIO, MOST_RATIO)
            )
            number = changes.dtype.type
            changes *= number(ratio)
            changes[..., :-1] += number(now - ratio * before) * steps[..., :-1]
        both = np.concatenate([own.scaled(steps), own.scaled_gradient(changes)])
        return both.reshape(2 * m, -1)

    def settled(self, slot: int, gradient: Array) -> bool:
        """Whether a head's gradient, in scaled coordinates, is as small as those that scikit-learn
        ends with.
        """
        own = self.frames[slot].unscaled_gradient(gradient.reshape(self.shape))
        classes = self.batch.rows
        limit = GRADIENT * math.sqrt(AT_CLASSES / max(classes, AT_CLASSES))
        entries = classes * len(self.batch.design.centre)
        mass = self.batch.sums[self.lines[slot]][:, -1].sum()
        return float(np.linalg.norm(own)) <= limit * float(mass) * math.sqrt(entries)

    def evaluate(self, which: npt.NDArray[np.intp], x: Array) -> tuple[Array, Array]:
        """Objectives (A,) float64 and gradients, in scaled coordinates, of the problems `which`."""
        batch, design = self.batch, self.batch.design
        lines = self.lines[which]
        mu = self.mu[which].astype(design.dtype)
        shared: dict[int, list[int]] = {}  # heads of a frame go through it together
        for row, slot in enumerate(which.tolist()):
            shared.setdefault(id(self.frames[slot]), []).append(row)
        frames = [
            (
                self.frames[int(which[rows[0]])],
                rows if len(rows) > 1 else slice(rows[0], rows[0] + 1),
            )
            for rows in shared.values()
        ]
        # In all that follows the last class's row is left out: it is minus the sum of the others'.
        u = np.empty((len(which), *self.shape), design.dtype)
        for own, rows in frames:
            u[rows] = own.free(x[rows].reshape(-1, *self.shape))
        inner = u[..., :-1]
        if design.ratio:
            inner = np.ascontiguousarray(inner)
            pull = design.penalised(inner, batch.folds[lines], batch.alone)
            pull *= mu[:, None, None]
        else:
            pull = inner * mu[:, None, None]
        value = 0.5 * np.einsum("acr,acr->a", inner, pull).astype(np.float64)
        if batch.rows > 1:
            value += 0.5 * np.einsum("ar,ar->a", inner.sum(axis=1), pull.sum(axis=1))
        # By a tile's folds: which heads train on it.
        seen = {
            key: sees
            for key, trains in batch.trained.items()
            if (sees := np.flatnonzero(trains[lines])).size
        }
        weights = design.to_tiles(u.reshape(-1, design.width)).reshape(*u.shape[:2], -1)
        run = batch.begin(lines, weights, seen)
        for place, tile in enumerate(design.tiles):
            if design.source is not None and place % TILES_AHEAD == 0:
                ahead = design.tiles[place + TILES_AHEAD : place + 2 * TILES_AHEAD]
                if ahead:
                    design.source.prefetch(np.concatenate([one.rows for one in ahead]))
            if tile.folds in seen:
                value[seen[tile.folds]] += run.add(tile)
        total = run.gradient()
        gradient = design.from_tiles(total.reshape(-1, total.shape[-1])).reshape(u.shape)
        gradient[..., :-1] += pull
        scaled = np.empty_like(x)
        for own, rows in frames:
            scaled[rows] = own.scaled_gradient(gradient[rows]).reshape(-1, x.shape[1])
        return value, scaled
