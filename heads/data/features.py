"""A bank's input: rows of several feature sets side by side, found by content hash.

N rows, V views, D features. Feature sets that differ only in the view are views of the same
columns; all others are concatenated in the order given.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.heads.data.checks import BadFeatures
from headrace.heads.data.streamed import Streamed, not_finite


def load_rows(
    features: Sequence[FeatureSet | Path | str],
    content: npt.NDArray[np.bytes_],
    *,
    spatial: bool = False,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Features of the rows that have them, and which those are.

    Returns X (n, D) float32, or (V, n, D) where there are several views, and kept (N,) bool with n
    true: a row whose image could not be decoded has no features in any set. spatial: keep the
    positions, (n, channels, h, w). Raises BadFeatures for a feature that is NaN or infinite, naming
    the feature set and the row; for parts with other views or positions; CacheError (from the
    cache) for a row that was never extracted.
    """
    groups, kept = _opened(features, content, spatial=spatial)
    parts = [_columns(views, content[kept], spatial=spatial) for views in groups]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    return (joined if len(joined) > 1 else joined[0]), kept


def stream_rows(
    features: Sequence[FeatureSet | Path | str],
    content: npt.NDArray[np.bytes_],
    *,
    spatial: bool = False,
) -> tuple[Streamed, npt.NDArray[np.bool_]]:
    """As `load_rows`, and nothing is loaded: the rows are read from the shards whenever a bank
    needs them.
    """
    groups, kept = _opened(features, content, spatial=spatial)
    rows = Streamed(groups, content[kept], spatial=spatial)
    rows.check_finite()
    return rows, kept


def loaded_bytes(features: Sequence[FeatureSet], rows: int) -> int:
    """What `load_rows` of so many rows would take in memory."""
    return sum(
        rows * math.prod(feature.spec.shape) * np.dtype(np.float32).itemsize for feature in features
    )


def _opened(
    features: Sequence[FeatureSet | Path | str], content: npt.NDArray[np.bytes_], *, spatial: bool
) -> tuple[list[list[FeatureSet]], npt.NDArray[np.bool_]]:
    """The feature sets, those that differ only in the view together; and which rows have features
    in all of them.
    """
    sets = [
        feature if isinstance(feature, FeatureSet) else open_feature_set(feature)
        for feature in features
    ]
    if not sets:
        raise BadFeatures("a bank needs at least one feature set")
    kept = rows_with_features(sets, content)
    for feature in sets:
        if spatial and len(feature.spec.shape) != 3:
            raise BadFeatures(
                f"{feature.spec.name} has rows of shape {feature.spec.shape}, a convolution head "
                "needs (channels, h, w): give a tap with the pooling map"
            )
    groups = _by_columns(sets)
    seen = {tuple(feature.spec.view for feature in views) for views in groups}
    if len(seen) > 1:
        depths = sorted({len(views) for views in seen})
        found = (
            f"{depths} views"
            if len(depths) > 1
            else f"{depths[0]} views each, but not the same ones"
        )
        raise BadFeatures(
            f"the parts of a head's input have {found}: extract the same views of each tap"
        )
    if spatial and len({views[0].spec.shape[1:] for views in groups}) > 1:
        maps = ", ".join("×".join(map(str, views[0].spec.shape[1:])) for views in groups)
        raise BadFeatures(
            f"maps of {maps} positions cannot be concatenated: give taps of one resolution"
        )
    return groups, kept


def rows_with_features(
    features: Sequence[FeatureSet | Path | str], content: npt.NDArray[np.bytes_]
) -> npt.NDArray[np.bool_]:
    """(N,) false for rows that some feature set has recorded as failed."""
    kept = np.ones(len(content), np.bool_)
    for feature in features:
        opened = feature if isinstance(feature, FeatureSet) else open_feature_set(feature)
        failed = np.array([failure.content_hash for failure in opened.failures()], "S32")
        kept &= ~np.isin(content, failed)
    return kept


def tap_widths(sets: Sequence[FeatureSet]) -> list[int]:
    """Features of each tap that stands side by side with the others, in order; views of a tap are
    one.
    """
    return [math.prod(views[0].spec.shape) for views in _by_columns(sets)]


def _by_columns(sets: Sequence[FeatureSet]) -> list[list[FeatureSet]]:
    """Feature sets grouped by everything but the view, each group in the order of its views."""
    groups: dict[str, list[FeatureSet]] = {}
    for feature in sets:
        key = dataclasses.replace(feature.spec, view="").to_json()
        groups.setdefault(key, []).append(feature)
    return list(groups.values())


def _columns(
    views: list[FeatureSet], content: npt.NDArray[np.bytes_], *, spatial: bool
) -> npt.NDArray[np.float32]:
    """(V, n, D) or (V, n, channels, h, w)."""
    stacked: list[npt.NDArray[Any]] = []
    for feature in views:
        rows = feature.load(content, np.float32)
        flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
        # A sum is finite only if every value is, or close to it: one pass without a temporary of
        # the whole matrix.
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(flat.sum(dtype=np.float64))
        if suspicious:
            bad = np.flatnonzero(~np.isfinite(flat).all(1))
            raise not_finite(feature, content[bad[0]], len(bad))
        stacked.append(rows if spatial else flat)
    return np.stack(stacked) if len(stacked) > 1 else stacked[0][None]
