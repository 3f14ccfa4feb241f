"""Features of a feature set as the first step of a scikit-learn pipeline: ids go in, rows come out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from headrace.cache.errors import RowsMissing
from headrace.cache.feature_set import FeatureSet, open_feature_set


class FeatureLookup(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """From sample ids, or content hashes, to their features, side by side for several feature sets.

    features: a FeatureSet, its directory, or several of either. Ids are those under which the rows were extracted; of
    exact copies only the first has an id, and the content hash finds it for all. Nothing is learned in `fit`.

        make_pipeline(FeatureLookup(features["blocks.4.avg"]), StandardScaler(), SVC()).fit(ids, labels)
    """

    def __init__(self, features: FeatureSet | str | Path | Sequence[FeatureSet | str | Path]) -> None:
        self.features = features

    def fit(self, X: Any, y: Any = None) -> Self:
        """Nothing is learned; the ids are looked up, so that a missing one is found at once."""
        self.n_features_in_ = 1
        self._positions(X)
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:
        """(n, D) float32 features of ids X (n,) or (n, 1). Raises RowsMissing, naming the first ids that have none."""
        rows = [
            feature.read(positions).reshape(len(positions), -1)
            for feature, positions in zip(self._sets(), self._positions(X), strict=True)
        ]
        return np.asarray(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1), np.float32)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def _sets(self) -> list[FeatureSet]:
        given = self.features
        several = [given] if isinstance(given, FeatureSet | str | Path) else list(given)
        return [each if isinstance(each, FeatureSet) else open_feature_set(each) for each in several]

    def _positions(self, X: Any) -> list[npt.NDArray[np.int64]]:
        names = np.asarray(X).reshape(-1).astype(str).tolist()
        found = []
        for feature in self._sets():
            place = {name: row for row, name in enumerate(feature.ids())}
            place |= {name: row for row, name in enumerate(feature.content().astype(str).tolist()) if name not in place}
            missing = [name for name in names if name not in place]
            if missing:
                raise RowsMissing(
                    f"{feature.spec.name} of {feature.spec.backbone} has no row for {', '.join(map(repr, missing[:3]))}"
                    f" ({len(missing):,} of {len(names):,}). Its ids look like {next(iter(place), None)!r}"
                )
            found.append(np.array([place[name] for name in names], np.int64))
        return found
