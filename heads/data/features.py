"""A bank's input: rows of several feature sets side by side, found by content hash.

N rows, V views, D features. Feature sets that differ only in the view are views of the same
columns; all others are concatenated in the order given.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.heads.arrays import Array, Floats, Mask
from headrace.heads.data.side_columns import SideColumns
from headrace.heads.data.streamed import StreamedRows, not_finite
from headrace.heads.errors import HeadError


def load_rows(
    features: Sequence[FeatureSet | Path | str],
    content_hashes: npt.NDArray[np.bytes_],
    *,
    spatial: bool = False,
    side: SideColumns | None = None,
) -> tuple[Floats, Mask]:
    """Load the features of N rows; return X, and which rows have features, (N,) bool with n true.

    X is float32 (n, D), or (V, n, D) with several views. Rows whose images could not be decoded
    have no features.

    spatial: keep the positions: (n, channels, h, w).
    side: side columns of the N rows, appended to the features.

    Raises HeadError for NaN and infinity, naming the feature set and the row, and for feature
    sets with different views or positions; CacheError for a row that was never extracted.
    """
    view_groups, is_kept = _open_views(features, content_hashes, spatial=spatial)
    parts = [
        _load_columns(views, content_hashes[is_kept], spatial=spatial) for views in view_groups
    ]
    if side is not None:
        side_inputs = side.take(is_kept).as_inputs()
        parts.append(np.repeat(side_inputs[None], len(parts[0]), axis=0))
    # Of a single part this would be a copy of all features.
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    return (joined if len(joined) > 1 else joined[0]), is_kept


def stream_rows(
    features: Sequence[FeatureSet | Path | str],
    content_hashes: npt.NDArray[np.bytes_],
    *,
    spatial: bool = False,
    side: SideColumns | None = None,
) -> tuple[StreamedRows, Mask]:
    """Do as `load_rows` without loading: banks read rows from the shards when they need them."""
    view_groups, is_kept = _open_views(features, content_hashes, spatial=spatial)
    streamed_rows = StreamedRows(view_groups, content_hashes[is_kept], spatial=spatial)
    streamed_rows.check_finite()
    if side is not None:
        streamed_rows = streamed_rows.with_side(side.take(is_kept).as_inputs())
    return streamed_rows, is_kept


def loaded_bytes(features: Sequence[FeatureSet], n_rows: int) -> int:
    """Return the bytes of memory that `load_rows` needs for so many rows."""
    return sum(4 * n_rows * math.prod(feature.spec.shape) for feature in features)  # float32


def _open_views(
    features: Sequence[FeatureSet | Path | str],
    content_hashes: npt.NDArray[np.bytes_],
    *,
    spatial: bool,
) -> tuple[list[list[FeatureSet]], Mask]:
    """Return the feature sets, grouped by tap, and which rows have features in all of them."""
    feature_sets = [
        feature if isinstance(feature, FeatureSet) else open_feature_set(feature)
        for feature in features
    ]
    if not feature_sets:
        raise HeadError("a bank needs at least one feature set")
    is_kept = rows_with_features(feature_sets, content_hashes)
    for feature in feature_sets:
        if spatial and len(feature.spec.shape) != 3:
            raise HeadError(
                f"{feature.spec.name} has rows of shape {feature.spec.shape}, a convolution head "
                "needs (channels, h, w): give a tap with the pooling map"
            )
    view_groups = _by_columns(feature_sets)
    view_tuples = {tuple(feature.spec.view for feature in views) for views in view_groups}
    if len(view_tuples) > 1:
        view_counts = sorted({len(views) for views in view_tuples})
        found_text = f"{view_counts} views"
        if len(view_counts) == 1:
            found_text = f"{view_counts[0]} views each, but not the same ones"
        raise HeadError(
            f"the parts of a head's input have {found_text}: extract the same views of each tap"
        )
    if spatial and len({views[0].spec.shape[1:] for views in view_groups}) > 1:
        map_sizes = ", ".join("×".join(map(str, views[0].spec.shape[1:])) for views in view_groups)
        raise HeadError(
            f"maps of {map_sizes} positions cannot be concatenated: give taps of one resolution"
        )
    return view_groups, is_kept


def rows_with_features(
    features: Sequence[FeatureSet | Path | str], content_hashes: npt.NDArray[np.bytes_]
) -> Mask:
    """Return (N,) bool, False for rows that some feature set has recorded as failed."""
    has_features = np.ones(len(content_hashes), np.bool_)
    for feature in features:
        feature_set = feature if isinstance(feature, FeatureSet) else open_feature_set(feature)
        failed = [failure.content_hash for failure in feature_set.failures()]
        has_features &= ~np.isin(content_hashes, np.array(failed, "S32"))
    return has_features


def tap_widths(feature_sets: Sequence[FeatureSet]) -> list[int]:
    """Return the number of features of each tap, in the order of the columns."""
    return [math.prod(views[0].spec.shape) for views in _by_columns(feature_sets)]


def _by_columns(feature_sets: Sequence[FeatureSet]) -> list[list[FeatureSet]]:
    """Return the feature sets grouped by everything but the view, each group a tap's views."""
    view_groups: dict[str, list[FeatureSet]] = {}
    for feature in feature_sets:
        column_key = dataclasses.replace(feature.spec, view="").to_json()
        view_groups.setdefault(column_key, []).append(feature)
    return list(view_groups.values())


def _load_columns(
    views: list[FeatureSet], content_hashes: npt.NDArray[np.bytes_], *, spatial: bool
) -> Floats:
    """Return the rows of one tap, (V, n, D) or (V, n, channels, h, w)."""
    view_rows: list[Array] = []
    for feature in views:
        feature_rows = feature.load(content_hashes, np.float32)
        flat_rows = feature_rows.reshape(len(feature_rows), math.prod(feature_rows.shape[1:]))
        # If the sum is finite, every value is: one pass, without a temporary array as large as the
        # matrix.
        with np.errstate(over="ignore", invalid="ignore"):
            is_suspicious = not np.isfinite(flat_rows.sum(dtype=np.float64))
        if is_suspicious:
            bad_rows = np.flatnonzero(~np.isfinite(flat_rows).all(1))
            raise not_finite(feature, content_hashes[bad_rows[0]], len(bad_rows))
        view_rows.append(feature_rows if spatial else flat_rows)
    return np.stack(view_rows) if len(view_rows) > 1 else view_rows[0][None]
