"""A feature set as the first step of a scikit-learn pipeline: ids in, features out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin

from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.ids import content_hashes_by_id
from headrace.cache.text import as_text
from headrace.heads.arrays import Floats, Index

_WHICH = (
    "Say which image is meant: give content hashes "
    "(headrace.extract.images.content_hashes.content_hashes(samples, index).hashes), or a "
    "DataFrame with columns id and content"
)


class FeatureLookup(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Transformer from sample ids, or content hashes, to features.

    features: a FeatureSet, its directory, or several of either, whose features are concatenated.

    Ids are those under which the rows were extracted. Of exact copies of an image only the first
    has an id; its content hash finds the row for all of them. An id that stands for several images
    (two folders in one cache, an image before and after it was edited) is refused; a DataFrame with
    the columns `id` and `content` tells them apart. `fit` learns nothing.

        lookup = FeatureLookup(features["blocks.4.avg"])
        make_pipeline(lookup, StandardScaler(), SVC()).fit(ids, labels)
    """

    def __init__(
        self, features: FeatureSet | str | Path | Sequence[FeatureSet | str | Path]
    ) -> None:
        self.features = features

    def fit(self, X: Any, y: Any = None) -> Self:
        """Look the ids up as `transform` does, so that it fails before the pipeline trains."""
        self.n_features_in_ = 1
        self._positions(X)
        return self

    def transform(self, X: Any) -> Floats:
        """Return the features of X, (n, D) float32.

        X: n ids or content hashes, (n,) or (n, 1), or a DataFrame with `id` and `content`.

        Raises CacheError naming the first ids without a row, or one that stands for several images,
        and ValueError for another shape.
        """
        feature_rows = [
            feature_set.read(positions).reshape(len(positions), math.prod(feature_set.spec.shape))
            for feature_set, positions in zip(self._sets(), self._positions(X), strict=True)
        ]
        # Of a single feature set this would be a copy of all its rows.
        joined = feature_rows[0] if len(feature_rows) == 1 else np.concatenate(feature_rows, axis=1)
        return np.asarray(joined, np.float32)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def _sets(self) -> list[FeatureSet]:
        features = self.features
        feature_sets = [features] if isinstance(features, FeatureSet | str | Path) else features
        return [
            given if isinstance(given, FeatureSet) else open_feature_set(given)
            for given in feature_sets
        ]

    def _positions(self, X: Any) -> list[Index]:
        sample_ids, content_hashes = _names_and_content(X)
        feature_sets = self._sets()
        if content_hashes is None:
            content_hashes = _content_of_names(sample_ids, feature_sets)
        return [_rows(feature_set, sample_ids, content_hashes) for feature_set in feature_sets]


def _names_and_content(X: Any) -> tuple[list[str], list[str] | None]:
    """Return the ids of X as text, and its content hashes if it has such a column."""
    if isinstance(X, pd.DataFrame) and "content" in X.columns:
        content_hashes = as_text(X["content"])
        sample_ids = as_text(X["id"]) if "id" in X.columns else content_hashes
        return sample_ids.fillna("").tolist(), content_hashes.fillna("").tolist()
    id_values = np.asarray(X, dtype=object)
    if id_values.ndim > 2 or (id_values.ndim == 2 and id_values.shape[1] != 1):
        column_text = ""
        if isinstance(X, pd.DataFrame):
            column_text = f" with the columns {', '.join(map(str, X.columns))}"
        raise ValueError(
            f"ids have shape {id_values.shape}{column_text}; expected (n,) or (n, 1), or a "
            "DataFrame with the columns id and content"
        )
    return as_text(pd.Series(id_values.reshape(-1), dtype=object)).fillna("").tolist(), None


def _content_of_names(sample_ids: list[str], feature_sets: list[FeatureSet]) -> list[str]:
    """Return the content hash of each id, from any of the feature sets; unknown texts stay.

    Raises CacheError for an id that stands for several images.
    """
    content_hashes = list(sample_ids)
    for feature_set in feature_sets:
        hashes_by_id = content_hashes_by_id(feature_set.ids(), feature_set.content_hashes())
        ambiguous_ids = [
            name for name in dict.fromkeys(sample_ids) if len(hashes_by_id.get(name, ())) > 1
        ]
        if ambiguous_ids:
            raise CacheError(
                f"the id {ambiguous_ids[0]!r} stands for {len(hashes_by_id[ambiguous_ids[0]])} "
                f"images in {feature_set.spec.name} of {feature_set.spec.backbone} (ambiguous: "
                f"{len(ambiguous_ids):,} of {count_text(len(sample_ids), 'id')}): the cache holds "
                "several folders with such names, or images before and after they were edited. "
                f"{_WHICH}"
            )
        for row, sample_id in enumerate(sample_ids):
            (content_hash,) = hashes_by_id.get(sample_id, (sample_id,))
            if content_hash != sample_id and content_hashes[row] not in (sample_id, content_hash):
                raise CacheError(
                    f"the id {sample_id!r} stands for one image in {feature_set.spec.name} and for "
                    "another in the feature sets before it: one of them was extracted before the "
                    f"image was edited. {_WHICH}"
                )
            if content_hash != sample_id:
                content_hashes[row] = content_hash
    return content_hashes


def _rows(feature_set: FeatureSet, sample_ids: list[str], content_hashes: list[str]) -> Index:
    """Return the positions of n content hashes. Raises CacheError naming ids without a row."""
    # Texts that are no content hash become "", which no row has.
    hashes = [text if len(text) == 32 and text.isascii() else "" for text in content_hashes]
    hash_array = np.array(hashes, "S32")
    row_positions = np.zeros(0, np.int64)
    if len(hash_array):
        row_positions = np.where(hash_array == b"", -1, feature_set.locate(hash_array))
    missing_ids = [sample_ids[i] for i in np.flatnonzero(row_positions < 0)]
    if missing_ids:
        raise CacheError(
            f"{feature_set.spec.name} of {feature_set.spec.backbone} has no row for "
            f"{', '.join(map(repr, missing_ids[:3]))} ({len(missing_ids):,} of "
            f"{len(sample_ids):,}). Its ids look like {next(iter(feature_set.ids()), None)!r}: "
            "those of the images' first extraction. headrace.feature_matrix(features, paths) finds "
            "rows by the bytes of images"
        )
    return row_positions.astype(np.int64)
