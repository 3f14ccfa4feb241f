"""From decisions of a head to probabilities, and to probabilities at a temperature.

n rows, C outputs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import FARTHEST, FLOOR, keep_decisions, with_temperature

Floats = npt.NDArray[np.float32]


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
    """Log-odds (n, C), as far apart as probabilities above a temperature's floor can be."""
    if task == "multi" or decision.shape[1] == 1:
        return np.asarray(np.clip(decision, -FARTHEST, FARTHEST))
    return np.asarray(np.maximum(decision - decision.max(1, keepdims=True), -FARTHEST))


def ridge_link(decision: npt.NDArray[Any], task: TaskKind, temperature: float = 1.0) -> Floats:
    """Softmax of twice the decision: ridge fits -1/+1, and a perfect fit should be sure."""
    return link(decision, task, scale=2.0, temperature=temperature)


def tempered(
    probabilities: npt.NDArray[Any], task: TaskKind, temperature: float, floor: float = FLOOR
) -> Floats:
    """(n, C) float32 at a temperature, where there are no log-odds; decisions are kept."""
    if temperature == 1 or task == "regression":
        return np.asarray(probabilities, np.float32)
    return keep_decisions(
        task, probabilities, with_temperature(task, probabilities, temperature, floor)
    )
