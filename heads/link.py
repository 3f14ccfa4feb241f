"""Probabilities of a head's decisions, and probabilities at a temperature.

n rows, C outputs.
"""

import numpy as np

from headrace.heads.arrays import Array, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import (
    FLOOR,
    MAX_LOG_ODDS,
    keep_decisions,
    with_temperature,
)

# Of a class without training rows: its probability becomes exactly 0. -inf could give NaN.
ABSENT_CLASS_DECISION = -1e30


def softmax(decision: Array) -> Floats:
    """Return the softmax over the last axis, float32. A decision of -inf has probability 0."""
    shifted = np.exp(decision - decision.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), np.float32)


def sigmoid(decision: Array) -> Floats:
    """Return the logistic function, float32, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * decision)), np.float32)


def link(decision: Array, task: TaskKind, scale: float = 1.0, temperature: float = 1.0) -> Floats:
    """Return probabilities (n, C) of decisions (n, C); for regression the decisions themselves.

    A single column of a single-label task is the log-odds of the second of two classes. Decisions
    are multiplied by `scale` and divided by `temperature`, which keeps the class they decide for.
    """
    if task == "regression":
        return np.asarray(decision, np.float32)
    if temperature != 1:
        plain = link(decision, task, scale)
        log_odds = within_floor(scale * decision, task) / temperature
        return keep_decisions(task, plain, link(log_odds, task))
    if task == "multi":
        return sigmoid(scale * decision)
    if decision.shape[1] == 1:
        second = sigmoid(scale * decision)
        return np.concatenate([1 - second, second], axis=1)
    return softmax(scale * decision)


def within_floor(decision: Array, task: TaskKind) -> Array:
    """Return log-odds (n, C) limited to those of probabilities of at least `FLOOR`.

    For several classes their distance to the largest one is limited.
    """
    if task == "multi" or decision.shape[1] == 1:
        return np.asarray(np.clip(decision, -MAX_LOG_ODDS, MAX_LOG_ODDS))
    return np.asarray(np.maximum(decision - decision.max(1, keepdims=True), -MAX_LOG_ODDS))


def tempered(
    probabilities: Array, task: TaskKind, temperature: float, floor: float = FLOOR
) -> Floats:
    """Return probabilities (n, C) float32 at a temperature, of heads that have no log-odds.

    The class that they decide for is kept.
    """
    if temperature == 1 or task == "regression":
        return np.asarray(probabilities, np.float32)
    return keep_decisions(
        task, probabilities, with_temperature(task, probabilities, temperature, floor)
    )
