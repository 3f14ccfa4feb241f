"""Prediction from a head's stored arrays, with NumPy alone: no estimator object, no torch, except
for convolutions.

n rows, D features, C classes. Every kind's arrays are in raw feature coordinates: standardisation
is folded into them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import (
    FARTHEST,
    FLOOR,
    floor_of,
    keep_decisions,
    with_temperature,
)
from headrace.heads.spec import (
    CentroidSpec,
    ConvSpec,
    FineTuneSpec,
    HeadSpec,
    KNNSpec,
    LogisticSpec,
    MLPSpec,
    RidgeSpec,
)

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]

ROWS_AT_ONCE = 4096  # bounds the memory of hidden activations; larger blocks were no faster


class CannotPredict(HeadraceError, ValueError):
    """The head has no arrays to predict from, or the features are not the ones that it was trained
    on.
    """


def softmax(decision: npt.NDArray[Any]) -> Floats:
    """Softmax over the last axis, float32, of finite or infinite decisions."""
    shifted = np.exp(decision - decision.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), np.float32)


def sigmoid(decision: npt.NDArray[Any]) -> Floats:
    """Logistic function without overflow, float32."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * decision)), np.float32)


def link(
    decision: npt.NDArray[Any], task: TaskKind, scale: float = 1.0, temperature: float = 1.0
) -> Floats:
    """Probabilities (regression: the values themselves) of a decision (n, C); one column of a
    single-label task is the log-odds of the second class. scale: multiplies it, temperature:
    divides it, and keeps what it decides.
    """
    if task == "regression":
        return np.asarray(decision, np.float32)
    if temperature != 1:
        plain = link(decision, task, scale)
        odds = within_floor(scale * decision, task) / temperature
        return keep_decisions(task, plain, link(odds, task))
    if task == "multi":
        return sigmoid(scale * decision)
    if decision.shape[1] == 1:
        second = sigmoid(scale * decision)
        return np.concatenate([1 - second, second], axis=1)
    return softmax(scale * decision)


def within_floor(decision: npt.NDArray[Any], task: TaskKind) -> npt.NDArray[Any]:
    """Log-odds (n, C) no farther apart than the probabilities that a temperature is fitted to can
    say.
    """
    if task == "multi" or decision.shape[1] == 1:
        return np.asarray(np.clip(decision, -FARTHEST, FARTHEST))
    return np.asarray(np.maximum(decision - decision.max(1, keepdims=True), -FARTHEST))


def ridge_link(decision: npt.NDArray[Any], task: TaskKind, temperature: float = 1.0) -> Floats:
    """Ridge fits -1/+1, not log-odds: the softmax of twice the decision, so that a perfect fit is a
    sure prediction.
    """
    return link(decision, task, scale=2.0, temperature=temperature)


def predict_head(
    spec: HeadSpec,
    arrays: Arrays,
    X: npt.NDArray[Any],
    task: TaskKind = "single",
    temperature: float = 1.0,
) -> Floats:
    """(n, C) float32 probabilities, for regression values, of features X (n, D); convolution heads
    take (n, D, h, w).

    temperature: divides the log-odds, and changes no decision. Where there are log-odds it divides
    these: of a float32 probability near one they could not be told. Raises CannotPredict for a head
    without arrays (it failed, or it is a fold's neighbour search, which is only stored for the head
    trained on every row) and for features of another width.
    """
    if not arrays:
        raise CannotPredict(
            f"this {spec.kind} head has no stored arrays: predict with the head trained on all "
            "rows (fold -1)"
        )
    if isinstance(spec, ConvSpec):
        from headrace.heads.networks.conv import predict_conv

        return predict_conv(spec, arrays, X, task, temperature)
    rows = X.reshape(len(X), -1)
    expected = features_expected(arrays)
    if rows.shape[1] != expected:
        raise CannotPredict(
            f"the head was trained on {expected} features per row, found {rows.shape[1]}: "
            "concatenate the same taps"
        )
    if isinstance(spec, KNNSpec):
        from headrace.heads.neighbors.bank import predict_knn

        votes = predict_knn(spec, arrays, rows, task)
        return tempered(votes, task, temperature, floor_of(spec, task, votes.shape[1]))
    if isinstance(spec, CentroidSpec):
        from headrace.heads.neighbors.bank import predict_centroid

        return predict_centroid(spec, arrays, rows, temperature)
    if isinstance(spec, LogisticSpec | RidgeSpec | MLPSpec):
        blocks = [
            rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)
        ] or [rows]
        return np.concatenate([_dense(spec, arrays, block, task, temperature) for block in blocks])
    if isinstance(spec, FineTuneSpec):
        raise CannotPredict(
            "a fine-tuned network predicts from images, not from features: load its own directory"
        )
    from headrace.heads.sklearn.bank import predict_sklearn

    told = predict_sklearn(spec, arrays, rows, task)
    return tempered(told, task, temperature, floor_of(spec, task, told.shape[1]))


def tempered(
    probabilities: npt.NDArray[Any], task: TaskKind, temperature: float, floor: float = FLOOR
) -> Floats:
    """(n, C) float32 probabilities at a temperature, for what has no log-odds to divide; the
    decisions are kept.
    """
    if temperature == 1 or task == "regression":
        return np.asarray(probabilities, np.float32)
    return keep_decisions(
        task, probabilities, with_temperature(task, probabilities, temperature, floor)
    )


def features_expected(arrays: Arrays) -> int:
    """The number of features per row that a head's arrays were made for."""
    for name in ("weight", "weight0", "features", "means"):
        if name in arrays:
            return int(arrays[name].shape[1])
    raise CannotPredict(
        f"arrays {', '.join(sorted(arrays))} are not those of a head of this version of headrace"
    )


def _dense(
    spec: LogisticSpec | RidgeSpec | MLPSpec,
    arrays: Arrays,
    rows: npt.NDArray[Any],
    task: TaskKind,
    temperature: float,
) -> Floats:
    hidden = rows.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(spec, MLPSpec):
            last = len(spec.hidden)
            for layer in range(last):
                hidden = hidden @ arrays[f"weight{layer}"].T
                hidden += arrays[f"bias{layer}"]
                np.maximum(hidden, 0, out=hidden)
            return link(
                hidden @ arrays[f"weight{last}"].T + arrays[f"bias{last}"],
                task,
                temperature=temperature,
            )
        decision = hidden @ arrays["weight"].T + arrays["bias"]
        told = ridge_link if isinstance(spec, RidgeSpec) else link
        return told(decision, task, temperature=temperature)
