"""What each feature set says of the task: transfer scores, nearest neighbours, bounds on the Bayes
error, the best head on it.

Transfer scores are of at most ROWS images, drawn alike for all feature sets; they are kept on disk.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import publish_replace
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.sealed import read_sealed_json, sealed_json
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

ROWS = 1000
NEIGHBOURS = (1, 5, 20)
_VERSION = 1
_FOLDS = 5


@dataclass(frozen=True)
class TransferabilityScores:
    """Evidence about one feature set.

    None where a number does not exist for the kind of task, or cannot be computed.
    """

    name: str
    width: int
    images: int  # that the scores were measured on
    logme: float | None  # log evidence per image of a linear model; higher is better
    h_score: float | None  # higher is better, at most classes - 1
    # from the class that the pretrained network sees, where its logits are among the taps; 0 is
    # best
    nce: float | None
    neighbours: (
        float | None
    )  # the best of 1, 5 and 20 nearest neighbours: accuracy, or R² of a regression
    neighbour_error: float | None  # of one nearest neighbour
    bayes_low: (
        float | None
    )  # bounds on the error that any head on these features must make (Cover and Hart 1967)
    bayes_high: float | None


def transferability_scores(
    task: Task, feature_paths: Mapping[str, Sequence[Path]], folder: Path
) -> list[TransferabilityScores]:
    """One per feature set, in the order given; each is computed once and kept in `folder`."""
    rows = _drawn(task)
    found = []
    for name, views in feature_paths.items():
        key = hashlib.sha256(
            repr([_VERSION, task.digest, ROWS, views[0].name, name]).encode()
        ).hexdigest()[:16]
        path = folder / f"transferability-{key}.json"
        scores = _read(path)
        if scores is None:
            scores = _measure(name, task, rows, views[0])
            with suppress(OSError):  # it only saves time
                folder.mkdir(parents=True, exist_ok=True)
                publish_replace(path, sealed_json(asdict(scores)))
        found.append(scores)
    return found


def _measure(
    name: str, task: Task, rows: npt.NDArray[np.int64], directory: Path
) -> TransferabilityScores:
    X, kept = load_rows([directory], task.content[rows])
    target = task.target[rows][kept]
    columns = (
        np.eye(len(task.classes))[target]
        if task.kind == "single"
        else np.asarray(target, np.float64)
    )
    columns = columns.reshape(len(target), -1)[
        :, np.ptp(columns.reshape(len(target), -1), axis=0) > 0
    ]
    single = task.kind == "single"
    logits = open_feature_set(directory).spec.tap == "logits"
    fold = make_folds(target, n_folds=min(_FOLDS, len(target)), seed=0)
    specs = [KNNSpec(k=k, metric=metric) for k in NEIGHBOURS for metric in ("cosine", "euclidean")]
    fits = fit_knn_bank(
        TrainingData(X, target, fold, len(task.classes), task_kind=task.kind), specs, refit=False
    )
    metric = {"single": "accuracy", "multi": "hamming_accuracy", "regression": "r2"}[task.kind]
    by_spec: dict[KNNSpec, list[float]] = {}
    for fit in fits:
        if fit.validation is not None and isinstance(fit.spec, KNNSpec):
            by_spec.setdefault(fit.spec, []).append(
                score(task.kind, target[fold == fit.fold], fit.validation, metric)
            )
    means = {spec: float(np.mean(values)) for spec, values in by_spec.items()}
    one = max((value for spec, value in means.items() if spec.k == 1), default=None)
    error = 1 - one if single and one is not None else None
    low, high = (None, None) if error is None else bayes_bounds(error, len(task.classes))
    return TransferabilityScores(
        name=name,
        width=X.shape[1],
        images=len(target),
        logme=log_me(X, columns) if columns.shape[1] else None,
        h_score=h_score(X, target) if single else None,
        nce=negative_conditional_entropy(X.argmax(1), target) if single and logits else None,
        neighbours=max(means.values(), default=None),
        neighbour_error=error,
        bayes_low=low,
        bayes_high=high,
    )


def _drawn(task: Task) -> npt.NDArray[np.int64]:
    """Positions of at most ROWS rows, the same for every feature set."""
    if len(task.ids) <= ROWS:
        return np.arange(len(task.ids))
    return np.sort(np.random.default_rng(0).choice(len(task.ids), ROWS, replace=False))


def _read(path: Path) -> TransferabilityScores | None:
    """What was kept; None where there is nothing, or nothing readable: it only saves time."""
    try:
        return TransferabilityScores(**read_sealed_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
