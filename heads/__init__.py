"""Features to trained heads: banks, their results, and what they are worth.

Importing this imports no torch.
"""

from typing import TYPE_CHECKING, Any

from headrace.heads.bank import BadBank, BankJob, fit_bank, publish_failure, train_bank
from headrace.heads.checks import BadFeatures
from headrace.heads.ensemble import (
    EnsembleLimits,
    average,
    element_loss,
    greedy_weights,
    loss_elements,
)
from headrace.heads.features import load_rows
from headrace.heads.folds import BadSplit, make_folds, split_test, strata
from headrace.heads.intervals import exact_interval, metric_interval, proportion_interval
from headrace.heads.metrics import (
    DEFAULT_METRIC,
    METRICS,
    Metric,
    TaskKind,
    UnknownMetric,
    all_metrics,
    row_hits,
    row_losses,
    score,
)
from headrace.heads.neighbours import fit_centroid_bank, fit_knn_bank
from headrace.heads.persist import BadHeadFile, CodeNotTrusted, TrainedHead, load_head, save_head
from headrace.heads.predict import CannotPredict, predict_head
from headrace.heads.results import BadResults, BankResult, read_bank, results_bytes
from headrace.heads.spec import (
    FULL,
    KINDS,
    CentroidSpec,
    ClassWeight,
    ConvSpec,
    FineTuneSpec,
    Halving,
    HeadFit,
    HeadSpec,
    KNNSpec,
    LogisticSpec,
    MLPSpec,
    RidgeSpec,
    SklearnSpec,
    spec_from_json,
    spec_to_json,
)
from headrace.heads.task import TEST, TRAIN_ONLY, Task, load_task, read_task, save_task
from headrace.heads.temperature import (
    cross_fitted,
    fit_temperature,
    fit_temperatures,
    floor_of,
    with_temperature,
)
from headrace.heads.transfer import bayes_bounds, h_score, log_me, negative_conditional_entropy
from headrace.heads.weighted import weighted_scores

if TYPE_CHECKING:
    from headrace.heads.conv import fit_conv_bank
    from headrace.heads.estimators import (
        CentroidHead,
        KNNHead,
        LogisticHead,
        MLPHead,
        MLPRegressionHead,
        RidgeHead,
        RidgeRegressionHead,
    )
    from headrace.heads.lookup import FeatureLookup
    from headrace.heads.mlp import fit_mlp_bank
    from headrace.heads.sklearn_bank import fit_sklearn_bank

# Names whose modules import torch or scikit-learn, which takes seconds: imported when first asked
# for.
_LAZY = {
    "CentroidHead": "estimators",
    "FeatureLookup": "lookup",
    "KNNHead": "estimators",
    "LogisticHead": "estimators",
    "MLPHead": "estimators",
    "MLPRegressionHead": "estimators",
    "RidgeHead": "estimators",
    "RidgeRegressionHead": "estimators",
    "fit_conv_bank": "conv",
    "fit_mlp_bank": "mlp",
    "fit_sklearn_bank": "sklearn_bank",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"headrace.heads.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'headrace.heads' has no attribute {name!r}")


def __dir__() -> list[str]:
    """For tab completion: the names that are imported when first used too."""
    return __all__


__all__ = [
    "DEFAULT_METRIC",
    "FULL",
    "KINDS",
    "METRICS",
    "TEST",
    "TRAIN_ONLY",
    "BadBank",
    "BadFeatures",
    "BadHeadFile",
    "BadResults",
    "BadSplit",
    "BankJob",
    "BankResult",
    "CannotPredict",
    "CentroidHead",
    "CentroidSpec",
    "ClassWeight",
    "CodeNotTrusted",
    "ConvSpec",
    "EnsembleLimits",
    "FeatureLookup",
    "FineTuneSpec",
    "Halving",
    "HeadFit",
    "HeadSpec",
    "KNNHead",
    "KNNSpec",
    "LogisticHead",
    "LogisticSpec",
    "MLPHead",
    "MLPRegressionHead",
    "MLPSpec",
    "Metric",
    "RidgeHead",
    "RidgeRegressionHead",
    "RidgeSpec",
    "SklearnSpec",
    "Task",
    "TaskKind",
    "TrainedHead",
    "UnknownMetric",
    "all_metrics",
    "average",
    "bayes_bounds",
    "cross_fitted",
    "element_loss",
    "exact_interval",
    "fit_bank",
    "fit_centroid_bank",
    "fit_conv_bank",
    "fit_knn_bank",
    "fit_mlp_bank",
    "fit_sklearn_bank",
    "fit_temperature",
    "fit_temperatures",
    "floor_of",
    "greedy_weights",
    "h_score",
    "load_head",
    "load_rows",
    "load_task",
    "log_me",
    "loss_elements",
    "make_folds",
    "metric_interval",
    "negative_conditional_entropy",
    "predict_head",
    "proportion_interval",
    "publish_failure",
    "read_bank",
    "read_task",
    "results_bytes",
    "row_hits",
    "row_losses",
    "save_head",
    "save_task",
    "score",
    "spec_from_json",
    "spec_to_json",
    "split_test",
    "strata",
    "train_bank",
    "weighted_scores",
    "with_temperature",
]
