"""The features as a logistic bank multiplies them: centred, scaled, rotated, rows sorted, one copy for many heads.

N rows, D features, R rotated coordinates, C classes, F folds.

Coordinates. Let s be the scale of every feature over all rows and Q (D, R) an orthonormal basis of eigenvectors of the
Gram matrix of the scaled rows. A head's raw weights are  W = (Q u) / s,  its decision  u . Q'((x - m)/s) + b.
The fold's own standardisation changes neither the rows nor the decision, only what is penalised: with the standard
deviations s_f of the fold's training rows the penalty is |W s_f|^2 = u' P u,  P = Q' diag(s_f/s)^2 Q (the intercept is
free and absorbs every mean). So all folds share one copy of the rows and differ in P, which is near the identity.

Rows that do not fit into memory are read from their shards on every pass instead, centred and scaled but not rotated: it
is the weights that are rotated there and the gradients back, which costs as much as a few rows do.

With fewer training rows than features each fold has its own, smaller design instead: by the representer theorem its
weights lie in the span of its own standardised training rows, so D shrinks to the rank of those rows, exactly.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from headrace.heads.compiled_tiles import compiled
from headrace.heads.spec import FULL
from headrace.heads.standardize import Features, Moments, chunks
from headrace.heads.streamed import Streamed

Array = npt.NDArray[Any]
ROWS_PER_TILE = 1024  # a tile of 450 decisions by this many rows is 1.8 MB: it stays in the caches between two products


ROWS_OF_A_BASIS = 1 << 15
ROWS_WORTH_A_METRIC = 48
BYTES_WORTH_A_SECOND_COPY = 1 << 29  # of rotated rows: beyond, memory is dearer than a faster layout


@dataclass(frozen=True)
class Tile:
    """Some rows of one group (one fold's held-out rows, or those that always train), sorted by class."""

    group: int
    rows: npt.NDArray[np.intp]  # (n,) which rows of the task
    values: Array  # (n, R + 1), the last column 1: the intercept's; empty where rows are streamed
    across: Array  # (R + 1, n), the same: BLAS multiplies 36 columns by it at 80 GF/s, by values.T at 48
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
    folds: tuple[int, ...]  # whose heads it serves
    basis: Array  # (D, R), raw weight = basis @ u: the scale is divided out already
    centre: Array  # (D,) float64
    factor: Array  # (D,) float64, 1 / scale, 0 for constant features
    ratio: dict[int, Array]  # fold -> (D,) s_f / s; empty where the design was made for one fold
    rotation: Array  # (D, R) orthonormal Q
    metrics: dict[int, Array]  # fold -> P (R, R), filled in when first needed
    unit: float  # unstandardised features are divided by this one number; 1 for standardised ones
    source: Streamed | None = None  # where tiles read their rows on every pass
    buffer: dict[int, Array] = field(default_factory=dict)  # rows of a tile -> room for its values

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.basis.dtype

    @property
    def width(self) -> int:
        """R + 1: rotated coordinates and the intercept."""
        return int(self.basis.shape[1]) + 1

    def read(self, tile: Tile) -> tuple[Array, Array]:
        """A tile's values (n, W) and the same across (W, n), the intercept's 1 last. W is R + 1; of a streamed tile it is
        D + 1, before the rotation, and the arrays are overwritten by the next call."""
        if self.source is None:
            return tile.values, tile.across
        n, dim = len(tile.rows), self.source.shape[1]
        if n not in self.buffer:
            self.buffer[n] = np.ones((n, dim + 1), self.dtype)
            self.buffer[-n] = np.empty((n, dim), np.float32)
        values, raw = self.buffer[n], self.source.read(tile.rows, self.buffer[-n])
        np.subtract(raw, self.centre.astype(self.dtype), out=values[:, :-1])
        values[:, :-1] *= self.factor.astype(self.dtype)
        return values, values.T

    def to_tiles(self, weights: Array) -> Array:
        """Weights (k, R + 1) as tiles multiply them, (k, W)."""
        if self.source is None:
            return weights
        return np.concatenate([weights[:, :-1] @ self.rotation.T, weights[:, -1:]], axis=1)

    def from_tiles(self, gradients: Array) -> Array:
        """Gradients (k, W), or rows, with respect to the R + 1 coordinates."""
        if self.source is None:
            return gradients
        return np.concatenate([gradients[:, :-1] @ self.rotation, gradients[:, -1:]], axis=1)

    def penalised(self, u: Array, folds: Array) -> Array:
        """u P (A, C, R) for heads u (A, C, R) of the given folds (A,).

        Heads of few rows apply P through features, Q' (s_f/s)^2 Q: twice the flops of a stored P, but one product for
        the heads of all folds, as wide as there are heads. At 1,280 features, five folds and ten classes that is twice
        as fast; with a hundred classes a stored P is.
        """
        if not self.ratio:
            return u
        if u.shape[1] >= ROWS_WORTH_A_METRIC:
            out = u.copy()
            for fold, ratio in self.ratio.items():
                if (folds == fold).any():
                    if fold not in self.metrics:
                        scaled = self.rotation * ratio[:, None]
                        self.metrics[fold] = scaled.T @ scaled
                    own = u[folds == fold]
                    out[folds == fold] = (own.reshape(-1, own.shape[-1]) @ self.metrics[fold]).reshape(own.shape)
            return out
        own_pass = compiled() if self.dtype == np.float32 else None
        if own_pass is not None:
            squares = np.ones((len(folds), self.rotation.shape[0]), np.float32)
            for fold, ratio in self.ratio.items():
                squares[folds == fold] = ratio**2
            scale = np.repeat(squares.T, u.shape[1], axis=1)
            return own_pass.scaled(self.rotation, u.reshape(-1, u.shape[-1]), scale).reshape(u.shape)
        back = (u.reshape(-1, u.shape[-1]) @ self.rotation.T).reshape(*u.shape[:2], -1)
        for fold, ratio in self.ratio.items():
            back[folds == fold] *= ratio**2
        return np.asarray((back.reshape(-1, back.shape[-1]) @ self.rotation).reshape(u.shape))

    def dual_products(self, g: Array, folds: Array) -> Array:
        """(A, k, k) float64 sums of g_i P^-1 g_j' over the rows of g (A, k, C, R): the products that bound the gap."""
        flat = g.reshape(*g.shape[:2], -1)
        if self.ratio:
            back = (g.reshape(-1, g.shape[-1]).astype(self.dtype) @ self.rotation.T).reshape(*flat.shape[:2], -1)
            width = self.rotation.shape[0]
            for fold, ratio in self.ratio.items():
                own = back[folds == fold]
                back[folds == fold] = (own.reshape(-1, width) / ratio).reshape(own.shape)
            flat = back.astype(np.float64)
        return np.asarray(flat @ flat.transpose(0, 2, 1))

    def to_raw(self, u: Array) -> tuple[Array, Array]:
        """Weights (C, D) and biases (C,) in raw feature coordinates, float64, of u (C, R + 1)."""
        weight = (u[:, :-1] @ self.basis.T).astype(np.float64)
        return weight, u[:, -1].astype(np.float64) - weight @ self.centre

    def from_raw(self, weight: Array, bias: Array) -> Array:
        """Inverse of `to_raw`, as far as the weights lie in the design's span."""
        inside = (weight / np.where(self.factor > 0, self.factor, 1.0)) @ self.rotation
        return np.concatenate([inside, (bias + weight @ self.centre)[:, None]], axis=1).astype(self.dtype)


def make_design(
    X: Features,
    groups: list[tuple[int, npt.NDArray[np.intp]]],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
) -> Design:
    """Design of the given groups of rows of X (N, D), for the folds in `scaling` (fold: moments of its training rows).

    The tiles come without labels, which the caller adds. For one fold P is the identity, and the groups are its
    training rows.
    """
    folds = tuple(scaling)
    shared = len(folds) > 1
    whole, factor, ratio, unit = _coordinates(scaling, standardize=standardize, dtype=dtype)
    parts = [_scaled(X, rows, whole.mean, factor, dtype) for _, rows in groups]
    dim = X.shape[1]
    train = [part for (group, _), part in zip(groups, parts, strict=True) if shared or group != folds[0]]
    total = sum(len(part) for part in train)
    if total >= dim:
        gram = sum((part.T @ part for part in train), np.zeros((dim, dim), dtype))
        _, rotation = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    else:
        # The rows' own span: eigenvectors of the small matrix of their products, carried over to features. In float64:
        # a direction is divided by the root of its eigenvalue, and all but those lost in rounding are kept.
        stacked = np.concatenate(train).astype(np.float64)
        eigenvalues, left = scipy.linalg.eigh(stacked @ stacked.T, driver="evd", overwrite_a=True, check_finite=False)
        keep = eigenvalues > eigenvalues.max(initial=0.0) * max(total, 1) * np.finfo(np.float64).eps
        eigenvalues = eigenvalues[keep]
        rotation = (stacked.T @ (left[:, keep] / np.sqrt(eigenvalues))).astype(dtype)
    rotation = np.ascontiguousarray(rotation[:, ::-1])  # the largest first
    del train
    tiles = []
    # The compiled pass reads rows as they are.
    plain = compiled() is None or np.dtype(dtype) != np.float32
    rotated_bytes = sum(len(rows) for _, rows in groups) * rotation.shape[1] * rotation.itemsize
    twice = plain and rotated_bytes < BYTES_WORTH_A_SECOND_COPY
    for index, (group, rows) in enumerate(groups):
        part, parts[index] = parts[index], np.empty((0, 0), dtype)  # scaled rows go as the rotated ones come
        for where in chunks(np.arange(len(rows)), ROWS_PER_TILE):
            values = np.ones((len(where), rotation.shape[1] + 1), dtype)
            values[:, :-1] = part[where[0] : where[-1] + 1] @ rotation
            across = np.ascontiguousarray(values.T) if twice else values.T
            tiles.append(
                Tile(group, rows[where], values, across, np.zeros(0, np.intp), np.zeros((0, len(where))), None)
            )
    basis = rotation * factor.astype(dtype)[:, None]
    return Design(tiles, folds, basis, whole.mean, factor, ratio, rotation, {}, unit)


def stream_design(
    X: Streamed,
    runs: list[tuple[int, npt.NDArray[np.intp]]],
    scaling: dict[int, Moments],
    *,
    standardize: bool,
    dtype: Any,
) -> Design:
    """As `make_design`, for rows (N, D) that are read again on every pass; `runs` are its tiles in the order of reading."""
    whole, factor, ratio, unit = _coordinates(scaling, standardize=standardize, dtype=dtype)
    # As the tiles subtract it: the intercepts then stand for the very numbers that were subtracted.
    centre = whole.mean.astype(np.float32).astype(np.float64)
    none = np.empty((0, 0), dtype)
    tiles = [
        Tile(group, rows, none, none, np.zeros(0, np.intp), np.zeros((0, len(rows))), None) for group, rows in runs
    ]
    dim = X.shape[1]
    identity = np.eye(dim, dtype=dtype)
    plain = Design(tiles, tuple(scaling), identity, centre, factor, ratio, identity, {}, unit, X)
    # The basis is only a preconditioner here, and a sample of the rows shows it as well as all of them do.
    total = sum(len(rows) for _, rows in runs)
    every = max(total // max(ROWS_OF_A_BASIS, 16 * dim), 1)
    gram = np.zeros((dim, dim), dtype)
    for tile in tiles[::every]:
        rows = plain.read(tile)[0][:, :-1]
        gram += rows.T @ rows
    _, rotation = scipy.linalg.eigh(gram, driver="evd", overwrite_a=True, check_finite=False)
    rotation = np.ascontiguousarray(rotation[:, ::-1])
    basis = rotation * factor.astype(dtype)[:, None]
    return Design(tiles, tuple(scaling), basis, centre, factor, ratio, rotation, {}, unit, X, plain.buffer)


def _coordinates(
    scaling: dict[int, Moments], *, standardize: bool, dtype: Any
) -> tuple[Moments, Array, dict[int, Array], float]:
    """Moments that the rows are centred with, the factor that scales them, each fold's ratio, and the unit."""
    shared = len(scaling) > 1
    whole = scaling[FULL] if shared else next(iter(scaling.values()))
    constant = whole.constant
    # Unstandardised features still need a unit: one number for all of them keeps squares inside float32's range.
    unit = 1.0 if standardize else float(whole.scale[~constant].max(initial=0.0)) or 1.0
    scale = whole.scale if standardize else np.full(len(whole.mean), unit)
    ratio = {}
    if shared and standardize:
        for fold, own in scaling.items():
            if fold != FULL:
                ratio[fold] = np.where(own.constant | constant, 1.0, own.scale / scale).astype(dtype)
    return whole, np.where(constant, 0.0, 1.0 / scale), ratio, unit


def _scaled(X: Features, rows: npt.NDArray[np.intp], mean: Array, factor: Array, dtype: Any) -> Array:
    """Rows of X, centred and scaled in float64 a few at a time, stored as `dtype`."""
    out = np.empty((len(rows), X.shape[1]), dtype)
    for where in chunks(np.arange(len(rows))):
        wide = X[rows[where]].astype(np.float64)
        wide -= mean
        wide *= factor
        out[where[0] : where[-1] + 1] = wide
    return out
