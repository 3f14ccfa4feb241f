"""One form for heads that consist of layers: linear heads, perceptrons and convolution heads.

n rows, D features, C outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.link import link

Layer = tuple[Array, Array]

ROWS_AT_ONCE = 4096  # bounds the memory of hidden activations; larger blocks were no faster


@dataclass(frozen=True)
class Layers:
    """Layers of a head: for maps, standardization, convolutions and a mean over positions; then
    dense layers with ReLU between them.
    """

    dense: tuple[Layer, ...]  # weight (outputs, inputs) and bias (outputs,)
    convolutions: tuple[Layer, ...] = ()  # kernel (outputs, inputs, 3, 3) and shift (outputs,)
    mean: Array | None = None  # (channels,) of the maps
    inverse_scale: Array | None = None  # (channels,) of the maps
    decision_scale: float = 1.0  # factor from decisions to log-odds; not for a regression
    dropout: float = 0.0  # before each dense layer, in training


def linear_layers(arrays: Arrays, decision_scale: float = 1.0) -> Layers:
    """Return the layer of a linear head, weight (C, D) and bias (C,)."""
    return Layers(((arrays["weight"], arrays["bias"]),), decision_scale=decision_scale)


def dense_layers(arrays: Arrays, n_hidden: int) -> tuple[Layer, ...]:
    """Return the `n_hidden` hidden layers and the last one: weight0, bias0, weight1, …"""
    return tuple((arrays[f"weight{i}"], arrays[f"bias{i}"]) for i in range(n_hidden + 1))


def predict_dense(layers: Layers, X: Array, task_kind: TaskKind, temperature: float) -> Floats:
    """Return the predictions (n, C) of the dense layers for rows X (n, D)."""
    blocks = [X[start : start + ROWS_AT_ONCE] for start in range(0, len(X), ROWS_AT_ONCE)] or [X]
    return np.concatenate([_predict_block(layers, rows, task_kind, temperature) for rows in blocks])


def predict_by_layers(layers_of: Callable[[Any, Arrays], Layers]) -> Callable[..., Floats]:
    """Return the `predict` of a kind of head that consists of dense layers."""

    def predict(
        spec: Any, arrays: Arrays, X: Floats, task_kind: TaskKind, temperature: float
    ) -> Floats:
        return predict_dense(layers_of(spec, arrays), X, task_kind, temperature)

    return predict


def _predict_block(layers: Layers, rows: Array, task_kind: TaskKind, temperature: float) -> Floats:
    values = rows.astype(np.float32, copy=False)
    *hidden, (weight, bias) = layers.dense
    # Large features may overflow to infinity, and products of that with 0 are NaN: predictions are
    # what the arithmetic gives, and no warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        for hidden_weight, hidden_bias in hidden:
            values = values @ hidden_weight.T
            values += hidden_bias
            np.maximum(values, 0, out=values)
        decision = values @ weight.T + bias
        return link(decision, task_kind, layers.decision_scale, temperature)
