"""The names that most people need, each imported when it is first used.

Everything else is imported from the module that defines it, e.g. `headrace.cache.integrity.verify`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

# For type checkers and editors. At run time nothing is imported before it is used: a worker that
# trains a logistic head must not import torch.
if TYPE_CHECKING:
    from headrace.cache.feature_set import (
        FeatureSet as FeatureSet,
        list_feature_sets as list_feature_sets,
        open_feature_set as open_feature_set,
    )
    from headrace.extract.backbones.backbone import load_backbone as load_backbone
    from headrace.extract.images.preprocessing import Preprocessing as Preprocessing
    from headrace.extract.sources.read import (
        detect_source as detect_source,
        read_source as read_source,
    )
    from headrace.extract.sources.source import ImageSource as ImageSource
    from headrace.extract.spec import BackboneSpec as BackboneSpec
    from headrace.heads.data.lookup import FeatureLookup as FeatureLookup
    from headrace.heads.estimators import (
        CentroidHead as CentroidHead,
        KNNHead as KNNHead,
        LogisticHead as LogisticHead,
        MLPHead as MLPHead,
        MLPRegressionHead as MLPRegressionHead,
        RidgeHead as RidgeHead,
        RidgeRegressionHead as RidgeRegressionHead,
    )
    from headrace.heads.persist import load_head as load_head
    from headrace.pipelines.advice.advise_run import advise_run as advise_run
    from headrace.pipelines.api import (
        extract_features as extract_features,
        feature_matrix as feature_matrix,
        train_heads as train_heads,
    )
    from headrace.pipelines.models.model import Model as Model, load_model as load_model
    from headrace.pipelines.recipe.load import load_recipe as load_recipe
    from headrace.pipelines.report.build import write_report as write_report
    from headrace.pipelines.run import run_recipe as run_recipe

# The same names, by the module that defines them.
_MODULES = {
    "cache.feature_set": "FeatureSet list_feature_sets open_feature_set",
    "extract.backbones.backbone": "load_backbone",
    "extract.images.preprocessing": "Preprocessing",
    "extract.sources.read": "detect_source read_source",
    "extract.sources.source": "ImageSource",
    "extract.spec": "BackboneSpec",
    "heads.data.lookup": "FeatureLookup",
    "heads.persist": "load_head",
    "heads.estimators": (
        "CentroidHead KNNHead LogisticHead MLPHead MLPRegressionHead RidgeHead RidgeRegressionHead"
    ),
    "pipelines.advice.advise_run": "advise_run",
    "pipelines.api": "extract_features feature_matrix train_heads",
    "pipelines.models.model": "Model load_model",
    "pipelines.recipe.load": "load_recipe",
    "pipelines.report.build": "write_report",
    "pipelines.run": "run_recipe",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("headrace")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headrace.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    # For tab completion, which would only see the names that have been imported.
    return __all__
