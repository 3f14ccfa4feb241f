"""Features of a feature set as the first step of a scikit-learn pipeline: ids go in,
rows come out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.ids import content_hashes_by_id
from headrace.cache.text import as_text

_WHICH = (
    "Say which image is meant: give content hashes (headrace.extract.content_hashes(samples, "
    "index).hashes), or a DataFrame with columns id and content"
)


class FeatureLookup(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """From sample ids, or content hashes, to their features, side by side for several feature sets.

    features: a FeatureSet, its directory, or several of either. Ids are those under which the rows
    were extracted; of exact copies only the first has an id, and the content hash finds it for all.
    An id that stands for several images (two folders in one cache, an image before and after it was
    edited) is refused; a DataFrame with the columns `id` and `content` tells them apart. Nothing is
    learned in `fit`.

        make_pipeline(FeatureLookup(features["blocks.4.avg"]), StandardScaler(), SVC()).fit(ids,
        labels)
    """

    def __init__(
        self, features: FeatureSet | str | Path | Sequence[FeatureSet | str | Path]
    ) -> None:
        self.features = features

    def fit(self, X: Any, y: Any = None) -> Self:
        """Nothing is learned; the ids are looked up, so that a missing one is found at once."""
        self.n_features_in_ = 1
        self._positions(X)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, D) float32 features of X: n ids or content hashes, (n,) or (n, 1), or a DataFrame
        with `id` and `content`.

        Raises CacheError, naming the first ids that have no row, or one that
        stands for several images.
        """
        rows = [
            feature.read(positions).reshape(len(positions), int(np.prod(feature.spec.shape)))
            for feature, positions in zip(self._sets(), self._positions(X), strict=True)
        ]
        return np.asarray(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1), np.float32)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def _sets(self) -> list[FeatureSet]:
        given = self.features
        several = [given] if isinstance(given, FeatureSet | str | Path) else list(given)
        return [
            each if isinstance(each, FeatureSet) else open_feature_set(each) for each in several
        ]

    def _positions(self, X: Any) -> list[npt.NDArray[np.int64]]:
        names, content = _names_and_content(X)
        sets = self._sets()
        if content is None:
            content = _content_of_names(names, sets)
        return [_rows(feature, names, content) for feature in sets]


def _names_and_content(X: Any) -> tuple[list[str], list[str] | None]:
    """The ids of X as text; and the content hashes beside them, where X has such a column."""
    if isinstance(X, pd.DataFrame) and "content" in X.columns:
        content = as_text(X["content"])
        names = as_text(X["id"]) if "id" in X.columns else content
        return names.fillna("").tolist(), content.fillna("").tolist()
    values = np.asarray(X, dtype=object)
    if values.ndim > 2 or (values.ndim == 2 and values.shape[1] != 1):
        columns = (
            f" with the columns {', '.join(map(str, X.columns))}"
            if isinstance(X, pd.DataFrame)
            else ""
        )
        raise ValueError(
            f"ids have shape {values.shape}{columns}; expected (n,) or (n, 1), or a DataFrame with "
            "the columns id and content"
        )
    return as_text(pd.Series(values.reshape(-1), dtype=object)).fillna("").tolist(), None


def _content_of_names(names: list[str], sets: list[FeatureSet]) -> list[str]:
    """The content hash of each id, by any of the feature sets that knows it; a name that is no id,
    as it is.

    Raises CacheError.
    """
    content = list(names)
    for feature in sets:
        by_id = content_hashes_by_id(feature.ids(), feature.content_hashes())
        ambiguous = [name for name in dict.fromkeys(names) if len(by_id.get(name, ())) > 1]
        if ambiguous:
            raise CacheError(
                f"the id {ambiguous[0]!r} stands for {len(by_id[ambiguous[0]])} images in "
                f"{feature.spec.name} of {feature.spec.backbone} ({len(ambiguous):,} of "
                f"{len(names):,} ids stand for several): the cache holds several folders with such "
                f"names, or images before and after they were edited. {_WHICH}"
            )
        for row, name in enumerate(names):
            (found,) = by_id.get(name, (name,))
            if found != name and content[row] not in (name, found):
                raise CacheError(
                    f"the id {name!r} stands for one image in {feature.spec.name} and for another "
                    "in the feature sets before it: one of them was extracted before the image "
                    f"was edited. {_WHICH}"
                )
            content[row] = found if found != name else content[row]
    return content


def _rows(feature: FeatureSet, names: list[str], content: list[str]) -> npt.NDArray[np.int64]:
    """(n,) positions of content hashes. Raises CacheError, by their names."""
    hashes = np.array(
        [text if len(text) == 32 and text.isascii() else "" for text in content], "S32"
    )
    rows = (
        np.where(hashes == b"", -1, feature.locate(hashes))
        if len(hashes)
        else np.zeros(0, np.int64)
    )
    missing = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    if missing:
        raise CacheError(
            f"{feature.spec.name} of {feature.spec.backbone} has no row for "
            f"{', '.join(map(repr, missing[:3]))} ({len(missing):,} of {len(names):,}). Its ids "
            f"look like {next(iter(feature.ids()), None)!r}"
        )
    return rows.astype(np.int64)
