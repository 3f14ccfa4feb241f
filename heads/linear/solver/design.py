"""The features as a logistic bank multiplies them: centred, scaled, rotated, rows sorted, mostly
one copy for all heads.

N rows, D features, R rotated coordinates, C classes, F folds.

Coordinates. Let s be the scale of every feature over all rows and Q (D, R) an orthonormal basis of
eigenvectors of the Gram matrix of the scaled rows. A head's raw weights are  W = (Q u) / s,  its
decision  u . Q'((x - m)/s) + b. The fold's own standardisation changes neither the rows nor the
decision, only what is penalised: with the standard deviations s_f of the fold's training rows the
penalty is |W s_f|^2 = u' P u,  P = Q' diag(s_f/s)^2 Q (the intercept is free and absorbs every
mean). So all folds share one copy of the rows and differ in P, which is near the identity. Wide
heads do not gain by sharing: where it is worth it (`worth_own_rows`), each fold has a copy of its
rows in its own scales, rotated by the same Q, and P is the identity.

Rows that do not fit into memory are read from their shards on every pass instead, and centred
there; it is the weights that are scaled and rotated, and the gradients back, which costs as much as
a few rows do.

With fewer rows than features the coordinates are those of the rows' span instead, fewer and exact:
`few_rows.py`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.data.standardize import Features, Moments, chunks, scaled
from headrace.heads.data.streamed import Streamed
from headrace.heads.linear.solver.compiled_blocks import Compiled, aligned_rows, compiled
from headrace.heads.linear.solver.rotation import OwnScales, Rotation, Span
from headrace.heads.spec import FULL

Array = npt.NDArray[Any]
Group = tuple[tuple[int, ...], npt.NDArray[np.intp]]  # rows, and the folds that train on them
# Of a fold's scales over the common ones, either way: beyond, float32 rows in common units lose the
# fold's digits, and with few rows its square is the condition number of a factor.
WIDEST_SPREAD = 30.0
# a tile of 450 decisions by this many rows is 1.8 MB: it stays in the caches between two products
ROWS_PER_TILE = 1024
ROWS_PER_COMPILED_TILE = 8192  # which takes a few of them at a time by itself
ROWS_OF_A_BASIS = 1 << 15
ROWS_WORTH_A_METRIC = 48
COLUMNS_OF_A_WIDE_HEAD = 64  # a head of so many gains nothing from others that see the same rows
# of a head, as far as its penalty goes: some five, and two products more for its bound
EVALUATIONS = 7
MOST_BYTES_OF_OWN_ROWS = 1 << 28
OWN_SPREAD = 3.0  # of a fold's scales over the common ones, either way
BYTES_WORTH_A_SECOND_COPY = (
    1 << 29
)  # of rotated rows: beyond, memory is dearer than a faster layout


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows that the same folds train on, sorted by class."""

    folds: tuple[int, ...]
    rows: npt.NDArray[np.intp]  # (n,) which rows of the task
    values: Array  # (n, R + 1), the last column 1: the intercept's; empty where rows are streamed
    # (R + 1, n), the same: BLAS multiplies 36 columns by it at 80 GF/s, by values.T at 48
    across: Array
    bounds: npt.NDArray[np.intp]  # (C + 1,) single label: class k is rows bounds[k]:bounds[k+1]
    labels: Array  # (L, n) 0/1: binary and multi-label
    weight: Array | None  # (n,) sample weights; None: all one

    @functools.cached_property
    def classes(self) -> npt.NDArray[np.int32]:
        """(n,) single label: the class of each row."""
        return np.repeat(np.arange(len(self.bounds) - 1, dtype=np.int32), np.diff(self.bounds))


@dataclass(frozen=True)
class Design:
    """Rotated rows and the way back to raw coordinates."""

    tiles: list[Tile]
    dtype: np.dtype[Any]
    rotation: Rotation | OwnScales | Span  # Q, or what is in its place
    centre: Array  # (D,) float64
    factor: Array  # (D,) float64, 1 / scale, 0 for constant features
    # fold -> (D,) s_f / s; empty where P is the identity: own rows, unstandardised, one fold
    ratio: dict[int, Array]
    metrics: dict[int, Array]  # fold -> P (R, R), filled in when first needed
    unit: float  # unstandardised features are divided by this one number; 1 for standardised ones
    source: Streamed | None = None  # where tiles read their rows on every pass
    buffer: dict[int, Array] = field(
        default_factory=dict
    )  # how many rows a tile has -> room for their values

    @property
    def width(self) -> int:
        """R + 1: rotated coordinates and the intercept."""
        return self.rotation.rank + 1

    @property
    def apart(self) -> bool:
        """Whether folds have coordinates that have nothing to do with one another."""
        return isinstance(self.rotation, Span)

    def read(self, tile: Tile) -> tuple[Array, Array]:
        """A tile's values (n, W) and the same across (W, n), the intercept's 1 last.

        W is R + 1; of a streamed tile it is D + 1, centred and no more, and the arrays are
        overwritten by the next call.
        """
        if self.source is None:
            return tile.values, tile.across
        n, dim = len(tile.rows), self.source.shape[1]
        if n not in self.buffer:
            self.buffer[n] = aligned_rows(n, dim + 1, self.dtype)
            self.buffer[n][:, -1] = 1
        values, raw = self.buffer[n], self.source.stored(tile.rows)
        quick, centre = compiled_for(self.dtype), self.centre.astype(self.dtype)
        if quick is not None and raw.dtype == np.float16:
            quick.centred(raw, centre, values[:, :-1])
        else:
            np.subtract(raw, centre, out=values[:, :-1])
        return values, values.T

    def to_tiles(self, weights: Array) -> Array:
        """Weights (k, R + 1) as tiles multiply them, (k, W)."""
        if self.source is None:
            return weights
        assert isinstance(self.rotation, Rotation)
        scaled = self.rotation.out(weights[:, :-1]) * self.factor.astype(self.dtype)
        return np.concatenate([scaled, weights[:, -1:]], axis=1)

    def from_tiles(self, gradients: Array) -> Array:
        """Gradients (k, W), or rows, with respect to the R + 1 coordinates."""
        if self.source is None:
            return gradients
        assert isinstance(self.rotation, Rotation)
        inside = self.rotation.back(gradients[:, :-1] * self.factor.astype(self.dtype))
        return np.concatenate([inside, gradients[:, -1:]], axis=1)

    def penalised(self, u: Array, folds: Array, quick: Compiled | None = None) -> Array:
        """u P (A, C, R) for heads u (A, C, R) of the given folds (A,). quick: the compiled
        products, where one thread is all that there is; BLAS shares them out among more.

        Heads of few rows apply P through features, Q' (s_f/s)^2 Q: twice the flops of a stored P,
        but one product for the heads of all folds, as wide as there are heads. At 1,280 features,
        five folds and ten classes that is twice as fast; with a hundred classes a stored P is.
        """
        if not self.ratio:
            return u
        assert isinstance(self.rotation, Rotation)
        matrix = self.rotation.matrix
        if u.shape[1] >= ROWS_WORTH_A_METRIC:
            out = np.empty_like(u)
            for one, to, fold in zip(u, out, folds.tolist(), strict=True):
                metric = self._metric(fold)
                to[:] = (
                    one
                    if metric is None
                    else one @ metric
                    if quick is None
                    else quick.multiplied(one, metric)
                )
            return out
        if quick is not None:
            squares = np.ones((len(folds), len(matrix)), np.float32)
            for fold, ratio in self.ratio.items():
                squares[folds == fold] = ratio**2
            scale = np.repeat(squares.T, u.shape[1], axis=1)
            return quick.scaled(matrix, u.reshape(-1, u.shape[-1]), scale).reshape(u.shape)
        back = (u.reshape(-1, u.shape[-1]) @ matrix.T).reshape(*u.shape[:2], -1)
        for fold, ratio in self.ratio.items():
            back[folds == fold] *= ratio**2
        return np.asarray((back.reshape(-1, back.shape[-1]) @ matrix).reshape(u.shape))

    def _metric(self, fold: int) -> Array | None:
        """P (R, R) of a fold, or None where it is the identity."""
        if fold in self.ratio and fold not in self.metrics:
            assert isinstance(self.rotation, Rotation)
            stretched = self.rotation.matrix * self.ratio[fold][:, None]
            self.metrics[fold] = aligned_rows(stretched.shape[1], stretched.shape[1], self.dtype)
            np.matmul(stretched.T, stretched, out=self.metrics[fold])
        return self.metrics.get(fold)

    def primal(self, u: Array, folds: Array) -> Array:
        """(A, C, D or R) float64 r Q u of heads u (A, C, R), with P = (r Q)' r Q; R where P is the
        identity.
        """
        return self._through(u, folds, np.multiply)

    def dual(self, g: Array, folds: Array) -> Array:
        """(A, C, D or R) float64 Q g / r of gradients g (A, C, R): their inner products are those
        of P^-1.
        """
        return self._through(g, folds, np.divide)

    def _through(self, u: Array, folds: Array, scaled: np.ufunc) -> Array:
        if not self.ratio:
            return u.astype(np.float64)
        assert isinstance(self.rotation, Rotation)
        flat = u.reshape(-1, u.shape[-1]).astype(self.dtype, copy=False)
        out = self.rotation.out(flat).astype(np.float64).reshape(*u.shape[:2], -1)
        for fold, ratio in self.ratio.items():
            own = folds == fold
            out[own] = scaled(out[own], ratio)
        return out

    def to_raw(self, u: Array, folds: Array) -> tuple[Array, Array]:
        """Weights (k, D) and biases (k,) in raw feature coordinates, float64, of u (k, R + 1) of
        heads of folds (k,).
        """
        weight = self.rotation.out(u[:, :-1], folds).astype(np.float64, copy=False)
        bias = u[:, -1] - self.rotation.shift(weight, folds)
        weight *= self.factor
        return weight, bias - weight @ self.centre

    def from_raw(self, weight: Array, bias: Array, folds: Array) -> Array:
        """Inverse of `to_raw`, as far as the weights lie in the design's span."""
        scaled = weight / np.where(self.factor > 0, self.factor, 1.0)
        intercept = bias + weight @ self.centre + self.rotation.shift(scaled, folds)
        return np.concatenate(
            [self.rotation.back(scaled, folds), intercept[:, None]], axis=1
        ).astype(self.dtype)


def worth_own_rows(
    scaling: dict[int, Moments], folds: Sequence[int], columns: int, heads: int
) -> bool:
    """Whether folds are better off with float32 copies of their rows, each in its own scales, for
    so many heads of so many columns.

    P is the identity then, which spares every evaluation a product of D x D, a sixth of what 4,000
    rows of 1,280 features cost, and the bounds two; and no frame has to pretend that it is: at a
    gap of 1e-7 heads of 100 classes take 1,479 iterations instead of 2,188. But every fold's rows
    are rotated, no two folds' heads share a pass, which wide heads do not miss, and frames see rows
    in one fold's scales: with one row 400 times as far out as the others heads took twice the
    iterations.
    """
    if len(folds) < 2 or columns < COLUMNS_OF_A_WIDE_HEAD or compiled_for(np.float32) is None:
        return False
    whole = scaling[FULL]
    copied = sum(scaling[fold].count for fold in folds)
    alike = all(
        same_scales(scaling[fold], whole, standardize=True, spread=OWN_SPREAD) for fold in folds
    )
    fits = copied * len(whole.mean) * 4 <= MOST_BYTES_OF_OWN_ROWS
    return alike and fits and copied <= EVALUATIONS * heads * columns


def make_design(
    X: Features,
    groups: Sequence[Group],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
    own_rows: bool = False,
) -> Design:
    """Design of the given groups of rows of X (N, D), for the folds in `scaling` (fold: moments of
    its training rows).

    The tiles come without labels, which the caller adds. For one fold P is the identity, and the
    groups are its training rows; so it is with `own_rows`, where each fold has a copy of its rows
    in its own scales.
    """
    whole, factor, ratio, unit = coordinates(scaling, standardize=standardize, dtype=dtype)
    parts = [scaled_rows(X, rows, whole.mean, factor, dtype) for _, rows in groups]
    dim = X.shape[1]
    gram = sum((part.T @ part for part in parts), np.zeros((dim, dim), dtype))
    _, vectors = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    rotation = _rotation(vectors)
    tiles = []
    twice = worth_copies(sum(len(rows) for _, rows in groups) * dim, dtype)
    for index, (folds, rows) in enumerate(groups):
        part, parts[index] = (
            parts[index],
            np.empty((0, 0), dtype),
        )  # scaled rows go as the rotated ones come
        if not own_rows:
            tiles += make_tiles(
                folds,
                rows,
                functools.partial(_rotated, rotation, part, None),
                dim,
                dtype,
                twice=twice,
            )
            continue
        for fold in folds:
            rotated = functools.partial(_rotated, rotation, part, ratio.get(fold))
            tiles += make_tiles((fold,), rows, rotated, dim, dtype, twice=twice)
    if own_rows:
        return Design(
            tiles, np.dtype(dtype), OwnScales(rotation, ratio), whole.mean, factor, {}, {}, unit
        )
    return Design(tiles, np.dtype(dtype), rotation, whole.mean, factor, ratio, {}, unit)


def _rotation(vectors: Array) -> Rotation:
    """The rotation into eigenvectors (D, R) that come in the order of growing eigenvalues: the
    largest first.
    """
    matrix = aligned_rows(len(vectors), vectors.shape[1], vectors.dtype)
    matrix[:] = vectors[:, ::-1]
    return Rotation(matrix)


def compiled_for(dtype: Any) -> Compiled | None:
    """The compiled pass, if it is there and takes numbers of this type."""
    return compiled() if np.dtype(dtype) == np.float32 else None


def worth_copies(values: int, dtype: Any) -> bool:
    """Whether so many values of tiles are kept across, too.

    The compiled pass reads rows as they are.
    """
    return bool(
        compiled_for(dtype) is None
        and values * np.dtype(dtype).itemsize < BYTES_WORTH_A_SECOND_COPY
    )


def _rotated(rotation: Rotation, part: Array, ratio: Array | None, some: slice) -> Array:
    return rotation.back(part[some] if ratio is None else part[some] / ratio)


def make_tiles(
    folds: tuple[int, ...],
    rows: npt.NDArray[np.intp],
    rotated: Callable[[slice], Array],
    rank: int,
    dtype: Any,
    *,
    twice: bool,
) -> list[Tile]:
    """Tiles of a group of rows, whose rotated values (n, R) `rotated` gives for a slice of them;
    `twice`: across, too.
    """
    tiles = []
    at_once = ROWS_PER_TILE if compiled_for(dtype) is None else ROWS_PER_COMPILED_TILE
    for where in chunks(np.arange(len(rows)), at_once):
        values = aligned_rows(len(where), rank + 1, dtype)
        values[:, -1] = 1
        values[:, :-1] = rotated(slice(int(where[0]), int(where[-1]) + 1))
        across = np.ascontiguousarray(values.T) if twice else values.T
        tiles.append(
            Tile(
                folds,
                rows[where],
                values,
                across,
                np.zeros(0, np.intp),
                np.zeros((0, len(where))),
                None,
            )
        )
    return tiles


def stream_design(
    X: Streamed,
    runs: Sequence[Group],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
) -> Design:
    """As `make_design`, for rows (N, D) that are read again on every pass; `runs` are its tiles in
    the order of reading.
    """
    whole, factor, ratio, unit = coordinates(scaling, standardize=standardize, dtype=dtype)
    # As the tiles subtract it: the intercepts then stand for the very numbers that were subtracted.
    centre = whole.mean.astype(np.float32).astype(np.float64)
    none = np.empty((0, 0), dtype)
    tiles = [
        Tile(folds, rows, none, none, np.zeros(0, np.intp), np.zeros((0, len(rows))), None)
        for folds, rows in runs
    ]
    dim = X.shape[1]
    identity = np.eye(dim, dtype=dtype)
    plain = Design(tiles, np.dtype(dtype), Rotation(identity), centre, factor, ratio, {}, unit, X)
    # The basis is only a preconditioner here, and a sample of the rows shows it as well as all of
    # them do.
    total = sum(len(rows) for _, rows in runs)
    every = max(total // max(ROWS_OF_A_BASIS, 16 * dim), 1)
    gram = np.zeros((dim, dim), dtype)
    for tile in tiles[::every]:
        rows = plain.read(tile)[0][:, :-1] * factor.astype(dtype)
        gram += rows.T @ rows
    _, vectors = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    rotation = _rotation(vectors)
    return Design(
        tiles, np.dtype(dtype), rotation, centre, factor, ratio, {}, unit, X, plain.buffer
    )


def coordinates(
    scaling: dict[int, Moments], *, standardize: bool, dtype: Any
) -> tuple[Moments, Array, dict[int, Array], float]:
    """Moments that the rows are centred with, the factor that scales them, each fold's ratio, and
    the unit.
    """
    shared = len(scaling) > 1
    whole = scaling[FULL] if shared else next(iter(scaling.values()))
    constant = whole.constant
    # Unstandardised features still need a unit: one number for all of them keeps squares inside
    # float32's range.
    unit = 1.0 if standardize else largest_scale(whole)
    scale = whole.scale if standardize else np.full(len(whole.mean), unit)
    ratio = {}
    if shared and standardize:
        for fold, own in scaling.items():
            if fold != FULL:
                ratio[fold] = scale_ratio(own, whole).astype(dtype)
    return whole, np.where(constant, 0.0, 1.0 / scale), ratio, unit


def largest_scale(some: Moments) -> float:
    """Of the features that vary; 1 where none does."""
    return float(some.scale[~some.constant].max(initial=0.0)) or 1.0


def scale_ratio(own: Moments, whole: Moments) -> Array:
    """(D,) a fold's scales over the common ones, 1 where a feature is constant in either."""
    return np.where(own.constant | whole.constant, 1.0, own.scale / whole.scale)


def same_scales(
    own: Moments, whole: Moments, *, standardize: bool, spread: float = WIDEST_SPREAD
) -> bool:
    """Whether a fold's training rows, whose moments are `own`, are at home in the units of all
    rows. One row may forbid it, so far out that the fold which holds it out sees next to nothing
    beside it.
    """
    ratio = (
        scale_ratio(own, whole)
        if standardize
        else np.array([largest_scale(own) / largest_scale(whole)])
    )
    return bool(spread * ratio.min() >= 1 and ratio.max() <= spread)


def scaled_rows(
    X: Features, rows: npt.NDArray[np.intp], mean: Array, factor: Array, dtype: Any
) -> Array:
    """Rows of X, centred and scaled in float64 a few at a time, stored as `dtype`."""
    out = np.empty((len(rows), X.shape[1]), dtype)
    for where in chunks(np.arange(len(rows))):
        out[where[0] : where[-1] + 1] = scaled(X[rows[where]], mean, factor)
    return out
