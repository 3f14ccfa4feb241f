"""A bank's input: rows of several feature sets side by side, found by content hash.

N rows, V views, D features. Feature sets that differ only in the view are views of the same columns; all others are
concatenated in the order given.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.heads.checks import BadFeatures


def load_rows(
    features: Sequence[FeatureSet | Path | str], content: npt.NDArray[np.bytes_], *, spatial: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Features of the rows that have them, and which those are.

    Returns X (n, D) float32, or (V, n, D) where there are several views, and kept (N,) bool with n true: a row whose
    image could not be decoded has no features in any set. spatial: keep the positions, (n, channels, h, w).
    Raises BadFeatures for a feature that is NaN or infinite, naming the feature set and the row; for parts with other
    views or positions; RowsMissing (from the cache) for a row that was never extracted.
    """
    sets = [feature if isinstance(feature, FeatureSet) else open_feature_set(feature) for feature in features]
    if not sets:
        raise BadFeatures("a bank needs at least one feature set")
    kept = np.ones(len(content), np.bool_)
    for feature in sets:
        failed = np.array([failure.content for failure in feature.failures()], "S32")
        kept &= ~np.isin(content, failed)
    parts = [_columns(views, content[kept], spatial=spatial) for views in _by_columns(sets)]
    depths = {part.shape[0] for part in parts}
    if len(depths) > 1:
        raise BadFeatures(
            f"the parts of a head's input have {sorted(depths)} views: extract the same views of each tap"
        )
    if spatial and len({part.shape[3:] for part in parts}) > 1:
        maps = ", ".join("×".join(map(str, part.shape[3:])) for part in parts)
        raise BadFeatures(f"maps of {maps} positions cannot be concatenated: give taps of one resolution")
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    return (joined if len(joined) > 1 else joined[0]), kept


def _by_columns(sets: Sequence[FeatureSet]) -> list[list[FeatureSet]]:
    """Feature sets grouped by everything but the view, each group in the order of its views."""
    groups: dict[str, list[FeatureSet]] = {}
    for feature in sets:
        key = dataclasses.replace(feature.spec, view="").to_json()
        groups.setdefault(key, []).append(feature)
    return list(groups.values())


def _columns(views: list[FeatureSet], content: npt.NDArray[np.bytes_], *, spatial: bool) -> npt.NDArray[np.float32]:
    """(V, n, D) or (V, n, channels, h, w)."""
    stacked: list[npt.NDArray[Any]] = []
    for feature in views:
        rows = feature.load(content, np.float32)
        if spatial and rows.ndim != 4:
            raise BadFeatures(
                f"{feature.spec.name} has rows of shape {rows.shape[1:]}, a convolution head needs (channels, h, w): "
                "give a tap with the reduction map"
            )
        flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
        # A sum is finite only if every value is, or close to it: one pass without a temporary of the whole matrix.
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(flat.sum(dtype=np.float64))
        if suspicious:
            bad = np.flatnonzero(~np.isfinite(flat).all(1))
            raise BadFeatures(
                f"{feature.path} ({feature.spec.name}): the row of image {content[bad[0]].decode()} and {len(bad) - 1} "
                "more hold NaN or infinite features: extract them again"
            )
        stacked.append(rows if spatial else flat)
    return np.stack(stacked) if len(stacked) > 1 else stacked[0][None]
