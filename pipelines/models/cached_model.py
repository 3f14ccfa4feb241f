"""A model on the feature sets of a cache: predicts images that are cached, without a network.

Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.publish import feature_set_path, is_feature_set
from headrace.cache.spec import FeatureSpec
from headrace.pipelines.models.from_features import Floats, RowColumns, predict_from_features
from headrace.pipelines.models.head import HeadModel
from headrace.pipelines.models.model import Model


@dataclass(frozen=True)
class CachedModel:
    """A model whose feature sets are all in a cache."""

    model: Model
    feature_sets: dict[FeatureSpec, FeatureSet]

    @cached_property
    def heads(self) -> tuple[Callable[[Floats], Floats], ...]:
        """The heads of the model's members, as functions of features."""
        return tuple(member.head_function() for member in self.model.members)

    @cached_property
    def failures(self) -> dict[str, str]:
        """The reasons why some feature set cannot hold an image, by content hash."""
        return {
            failure.content_hash: failure.reason
            for feature_set in self.feature_sets.values()
            for failure in feature_set.failures()
        }

    def has_features(self, content_hashes: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """Return (n,) whether every feature set has a row of the image."""
        in_all = np.ones(len(content_hashes), np.bool_)
        for feature_set in self.feature_sets.values():
            in_all &= feature_set.locate(content_hashes) >= 0
        return in_all

    def predict(
        self, content_hashes: npt.NDArray[np.bytes_], row_columns: RowColumns
    ) -> tuple[Floats, Floats | None]:
        """Return (n, C) predictions of images that have features, and (n,) their weights in their
        units' predictions, None for a model without units. Raises CacheError for other images, and
        for damaged shards.

        row_columns: of these images. A model that predicts units together needs all images of each
        unit.
        """
        features = {
            spec: feature_set.load(content_hashes, np.float32)
            for spec, feature_set in self.feature_sets.items()
        }
        return predict_from_features(self.model, self.heads, features, row_columns)


def find_cached_model(model: Model, cache_root: Path) -> CachedModel | None:
    """Return the model on the feature sets of a cache; None if the cache lacks one of them, or a
    member is a fine-tuned network, which reads pixels.
    """
    feature_sets = {}
    for member in model.members:
        if not isinstance(member, HeadModel):
            return None
        for spec in member.features:
            # Found by its fingerprint, which covers weights, preprocessing and dtypes.
            directory = feature_set_path(cache_root, spec)
            if not is_feature_set(directory):
                return None
            feature_sets[spec] = open_feature_set(directory)
            if feature_sets[spec].spec != spec:
                return None
    return CachedModel(model, feature_sets)
