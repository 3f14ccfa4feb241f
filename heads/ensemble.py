"""Averages of heads: which heads, how often, and a temperature. Nothing is trained; only stored predictions are read.

K heads, N rows, C outputs, E elements. Heads are picked greedily with replacement (Caruana, Niculescu-Mizil, Crew and
Ksikes 2004, "Ensemble selection from libraries of models"): each round adds the head that lowers the loss of the average
most. The loss is log loss (regression: squared error) whatever the metric: accuracy moves in steps of one row, and its
best average on the rows at hand is mostly luck.

The loss of an average needs one number per row and head, its element: the probability of the true class, or of the true
value of a label, or the residual. Elements average as predictions do, so K heads are tried as one (K, E) array.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.metrics import TaskKind

Array = npt.NDArray[Any]

_SMALLEST = float(np.finfo(np.float32).eps)  # probabilities are clipped there, as in the metric log_loss
_CALIBRATED = 200_000  # numbers of a head that its own temperature is fitted to
TEMPERATURES = np.geomspace(0.2, 5.0, 97)  # 1.0 is one of them; steps of 3.4 %


@dataclass(frozen=True)
class EnsembleLimits:
    """What an ensemble may cost."""

    members: int = 8  # different heads
    networks: int | None = None  # forward passes per image
    network_price: float = 0.01  # each network beyond the first must lower the loss by this share
    rounds: int = 30  # picks, the same head more than once being its weight


def loss_elements(kind: TaskKind, target: Array, predicted: Array) -> npt.NDArray[np.float32]:
    """(K, E) elements of predictions (K, N, C): E = N for one label per row, else N × C, row by row."""
    if kind == "single":
        chosen = np.take_along_axis(predicted, np.asarray(target, np.int64)[None, :, None], 2)[..., 0]
        return np.asarray(chosen / predicted.sum(2), np.float32)
    wanted = np.asarray(target, np.float64).reshape(len(target), -1)
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    if kind == "multi":
        return np.asarray(np.where(wanted >= 0.5, predicted, 1 - predicted), np.float32).reshape(len(predicted), -1)
    deviation = wanted.std(0)
    residual = (predicted - wanted) / np.where(deviation > 0, deviation, 1)
    return np.asarray(residual, np.float32).reshape(len(predicted), -1)


def element_loss(kind: TaskKind, elements: Array) -> Array:
    """The loss over the last axis: mean of -log of probabilities (nats), of squares of residuals for regression."""
    if kind == "regression":
        return np.asarray(np.square(elements).mean(-1, dtype=np.float64))
    return np.asarray(-np.log(np.clip(elements, _SMALLEST, 1)).mean(-1, dtype=np.float64))


def greedy_weights(
    kind: TaskKind, elements: Array, networks: Sequence[AbstractSet[str]], limits: EnsembleLimits
) -> npt.NDArray[np.float64]:
    """(K,) weights that sum to one, zero for most heads. networks: the forward passes that each head needs.

    Ties go to the first, so order the heads from cheap to dear. The best average of all rounds is taken.
    """
    heads = len(elements)
    total, counts = np.zeros(elements.shape[1], np.float32), np.zeros(heads)
    used: set[str] = set()
    best_loss, best_counts = np.inf, counts
    most = limits.networks or len(set().union(*networks))
    for done in range(limits.rounds):
        needed = np.array([len(used | own) for own in networks])
        allowed = needed <= max(most, len(used))
        if np.count_nonzero(counts) >= limits.members:
            allowed &= counts > 0
        if not allowed.any():
            break
        tried = np.flatnonzero(allowed)
        loss = element_loss(kind, (total + elements[tried]) / (done + 1))
        priced = loss * (1 + limits.network_price * np.maximum(needed[tried] - 1, 0))
        place = int(priced.argmin())
        pick = tried[place]
        total, counts = total + elements[pick], counts.copy()
        counts[pick] += 1
        used |= networks[pick]
        if priced[place] < best_loss * (1 - 1e-6):
            best_loss, best_counts = float(priced[place]), counts
    return np.asarray(best_counts / max(best_counts.sum(), 1))


def average(weights: Array, predicted: Array) -> npt.NDArray[np.float64]:
    """(N, C) the weighted mean of predictions (K, N, C)."""
    return np.asarray(np.tensordot(weights, predicted.astype(np.float64), 1))


def fit_temperature(kind: TaskKind, target: Array, predicted: Array) -> float:
    """The temperature that makes averaged predictions (N, C) most likely (Guo et al. 2017); 1 for regression.

    Above 1 the average was too sure, below 1 not sure enough. From a grid between 1/5 and 5, so that few rows cannot drive
    it to an extreme.
    """
    if kind == "regression" or len(predicted) == 0:
        return 1.0
    losses = [
        float(element_loss(kind, loss_elements(kind, target, with_temperature(kind, predicted, t)[None]))[0])
        for t in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(losses))])


def fit_temperatures(kind: TaskKind, target: Array, predicted: Array) -> npt.NDArray[np.float64]:
    """(K,) the temperature of each of the predictions (K, N, C) alone; ones for regression.

    Heads that tell a side and no probability (support vectors, ridge) are far too unsure or too sure; at their own
    temperature they can be averaged with others. The loss is convex in 1 / temperature, whose best value is found by
    Newton's method between the ends of TEMPERATURES. At most _CALIBRATED numbers of a head are looked at.
    """
    if kind == "regression" or predicted.shape[1] == 0:
        return np.ones(len(predicted))
    step = -(-predicted.shape[1] * predicted.shape[2] // _CALIBRATED)
    target = np.asarray(target)[::step]
    return np.array([1 / _sharpness(*_log_odds(kind, target, own[::step])) for own in predicted])


def _log_odds(kind: TaskKind, target: Array, predicted: Array) -> tuple[Array, Array]:
    """Logits (n, C) and the true column (n,) of one head's predictions (N, C); of several labels each is a row of two."""
    values = np.clip(np.asarray(predicted, np.float64), _SMALLEST, 1)
    if kind == "single":
        return np.log(values), np.asarray(target, np.int64)
    values = np.minimum(values, 1 - _SMALLEST).ravel()
    truth = (np.asarray(target, np.float64).reshape(len(predicted), -1) >= 0.5).ravel()
    return np.stack([np.zeros_like(values), np.log(values / (1 - values))], axis=1), truth.astype(np.int64)


def _sharpness(logits: Array, truth: Array) -> float:
    """What logits (n, C) have to be multiplied by to be most likely."""
    low, high = 1 / TEMPERATURES[-1], 1 / TEMPERATURES[0]
    value = 1.0
    told = logits[np.arange(len(truth)), truth].mean()
    for _ in range(30):
        odds = np.exp(value * (logits - logits.max(1, keepdims=True)))
        odds /= odds.sum(1, keepdims=True)
        mean = (odds * logits).sum(1)
        slope = mean.mean() - told
        low, high = (low, value) if slope > 0 else (value, high)
        curvature = ((odds * logits**2).sum(1) - mean**2).mean()
        new = value - slope / curvature if curvature > 0 else value
        if not low < new < high:
            new = (low + high) / 2
        if abs(new - value) < 1e-4 * value:
            return float(new)
        value = new
    return float(value)


def with_temperature(kind: TaskKind, predicted: Array, temperature: float) -> npt.NDArray[np.float64]:
    """(N, C) predictions with their log-odds divided by the temperature; decisions stay what they were."""
    values = np.asarray(predicted, np.float64)
    if kind == "regression" or temperature == 1:
        return values
    if kind == "multi":
        inside = np.clip(values, 1e-12, 1 - 1e-12)
        return np.asarray(1 / (1 + ((1 - inside) / inside) ** (1 / temperature)))
    powers = np.clip(values, 1e-30, None) ** (1 / temperature)
    return np.asarray(powers / powers.sum(1, keepdims=True))
