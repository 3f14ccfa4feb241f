"""Transferability of feature sets: scores that need no trained head, nearest neighbours, bounds on
the Bayes error.

Scores are measured on at most ROWS images, the same for all feature sets, and kept on disk.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from headrace.cache.atomic_io import publish_replace
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.sealed import read_sealed_json, sealed_json
from headrace.heads.arrays import Index
from headrace.heads.data.features import load_rows
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import Task
from headrace.heads.data.training_data import TrainingData
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.transferability import (
    bayes_bounds,
    h_score,
    log_me,
    negative_conditional_entropy,
)
from headrace.heads.neighbors.bank import fit_knn_bank
from headrace.heads.neighbors.kind import KNNSpec

ROWS = 1000  # drawn at random
NEIGHBOURS = (1, 5, 20)  # numbers of neighbours; the best one counts
_VERSION = 1  # of the stored scores
_FOLDS = 5


@dataclass(frozen=True)
class TransferabilityScores:
    """Scores of one feature set.

    None for a number that does not exist for the kind of task, or cannot be computed.
    """

    name: str
    width: int
    images: int  # that the scores were measured on
    logme: float | None  # log evidence per image of a linear model; higher is better
    h_score: float | None  # higher is better, at most classes - 1
    # negative conditional entropy of the label, given the class that the pretrained network
    # predicts; at most 0; None unless the tap is the network's logits
    nce: float | None
    neighbours: float | None  # accuracy or R² of the best number of nearest neighbours
    neighbour_error: float | None  # of one nearest neighbour
    # bounds on the error that any head on these features must make (Cover and Hart 1967)
    bayes_low: float | None
    bayes_high: float | None


def transferability_scores(
    task: Task, feature_paths: Mapping[str, Sequence[Path]], results_folder: Path
) -> list[TransferabilityScores]:
    """Return the scores of each feature set, in the order given.

    feature_paths: views by name; the first view is measured. results_folder: keeps the scores, so
    that each is computed once.
    """
    sampled_rows = np.arange(len(task.ids))
    if len(sampled_rows) > ROWS:
        # Sorted, because rows of a feature set are read fastest in the order of the file.
        sampled_rows = np.sort(np.random.default_rng(0).choice(len(task.ids), ROWS, replace=False))
    all_scores = []
    for name, view_paths in feature_paths.items():
        cache_key = hashlib.sha256(
            repr([_VERSION, task.digest, ROWS, view_paths[0].name, name]).encode()
        ).hexdigest()[:16]
        scores_path = results_folder / f"transferability-{cache_key}.json"
        # The file only saves time: a damaged one is measured again, and a folder may be read-only.
        try:
            scores = TransferabilityScores(**read_sealed_json(scores_path.read_bytes()))
        except (OSError, ValueError, TypeError):
            scores = _measure_scores(name, task, sampled_rows, view_paths[0])
            with suppress(OSError):
                results_folder.mkdir(parents=True, exist_ok=True)
                publish_replace(scores_path, sealed_json(asdict(scores)))
        all_scores.append(scores)
    return all_scores


def _measure_scores(
    name: str, task: Task, sampled_rows: Index, feature_path: Path
) -> TransferabilityScores:
    X, has_features = load_rows([feature_path], task.content[sampled_rows])
    target = task.target[sampled_rows][has_features]
    is_single_label = task.kind == "single"
    one_hot = np.eye(len(task.classes))[target] if is_single_label else np.asarray(target, float)
    target_columns = one_hot.reshape(len(target), -1)
    target_columns = target_columns[:, np.ptp(target_columns, axis=0) > 0]  # not constant
    are_logits = open_feature_set(feature_path).spec.tap == "logits"
    fold_of_row = make_folds(target, n_folds=min(_FOLDS, len(target)), seed=0)
    specs = [KNNSpec(k=k, metric=metric) for k in NEIGHBOURS for metric in ("cosine", "euclidean")]
    data = TrainingData(X, target, fold_of_row, len(task.classes), task_kind=task.kind)
    knn_fits = fit_knn_bank(data, specs, refit=False)
    metric_name = {"single": "accuracy", "multi": "hamming_accuracy", "regression": "r2"}[task.kind]
    scores_by_spec: dict[KNNSpec, list[float]] = {}
    for fit in knn_fits:
        if fit.validation is not None and isinstance(fit.spec, KNNSpec):
            scores_by_spec.setdefault(fit.spec, []).append(
                score(task.kind, target[fold_of_row == fit.fold], fit.validation, metric_name)
            )
    mean_scores = {spec: float(np.mean(values)) for spec, values in scores_by_spec.items()}
    nearest_score = max((value for spec, value in mean_scores.items() if spec.k == 1), default=None)
    nearest_error = 1 - nearest_score if is_single_label and nearest_score is not None else None
    bayes_low, bayes_high = (
        (None, None) if nearest_error is None else bayes_bounds(nearest_error, len(task.classes))
    )
    nce = None
    if is_single_label and are_logits:
        # The features are the logits: the largest is the class that the network predicts.
        nce = negative_conditional_entropy(X.argmax(1), target)
    return TransferabilityScores(
        name=name,
        width=X.shape[1],
        images=len(target),
        logme=log_me(X, target_columns) if target_columns.shape[1] else None,
        h_score=h_score(X, target) if is_single_label else None,
        nce=nce,
        neighbours=max(mean_scores.values(), default=None),
        neighbour_error=nearest_error,
        bayes_low=bayes_low,
        bayes_high=bayes_high,
    )
