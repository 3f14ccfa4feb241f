"""Prediction of units from a head's stored arrays, with NumPy alone.

N rows, U units, D features, H hidden values, A attention width, C outputs. Rows of a unit may be
anywhere. Units differ in size, and nothing is padded: rows are sorted by unit, and sums and maxima
are taken over runs of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.heads.arrays import Array, Arrays, Floats, Index
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.data.task import TaskKind
from headrace.heads.layers import dense_layers
from headrace.heads.link import link, sigmoid

ROWS_AT_ONCE = 1 << 15  # of whole units, whose hidden values are in memory together


# As of dense heads (heads/layers.py): predictions of features that overflow are what the arithmetic
# gives, and no warnings; BLAS may also report an invalid value where there is none.
@np.errstate(over="ignore", invalid="ignore")
def predict_units(
    spec: BagsSpec,
    arrays: Arrays,
    X: Any,
    unit: Array,
    task_kind: TaskKind,
    temperature: float = 1.0,
) -> tuple[Floats, Floats]:
    """Return predictions (N, C), of each row that of its unit, and the rows' weights (N,) in them.

    Weights sum to 1 over a unit; with pooling max, that of a row is the share of hidden values that
    are its own. X: (N, D), an array or an object that is indexed by row numbers. unit: (N,) any
    labels. Empty X gives empty arrays.
    """
    n_outputs = len(arrays[f"bias{len(spec.hidden)}"])
    predicted = np.empty((len(X), n_outputs), np.float32)
    weights = np.empty(len(X), np.float32)
    for rows, starts in _blocks(unit):
        hidden = _hidden(spec, arrays, np.asarray(X[rows], np.float32))
        sizes = np.diff([*starts, len(rows)])
        pooled, row_weights = _pooled(spec, arrays, hidden, starts, sizes)
        weight, bias = dense_layers(arrays, len(spec.hidden))[-1]
        unit_predictions = link(pooled @ weight.T + bias, task_kind, 1.0, temperature)
        predicted[rows] = np.repeat(unit_predictions, sizes, axis=0)
        weights[rows] = row_weights
    return predicted, weights


def _blocks(unit: Array) -> Iterator[tuple[Index, Index]]:
    """Yield row numbers of whole units, sorted by unit, and the place where each unit starts."""
    codes = np.unique(np.asarray(unit), return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    first_unit = 0
    while first_unit < len(offsets) - 1:
        # At most ROWS_AT_ONCE rows, but one unit at least.
        end_row = offsets[first_unit] + ROWS_AT_ONCE
        end_unit = int(np.searchsorted(offsets, end_row, side="right")) - 1
        end_unit = max(end_unit, first_unit + 1)
        starts = offsets[first_unit:end_unit] - offsets[first_unit]
        yield order[offsets[first_unit] : offsets[end_unit]], starts
        first_unit = end_unit


def _hidden(spec: BagsSpec, arrays: Arrays, rows: Floats) -> Floats:
    values = rows
    for weight, bias in dense_layers(arrays, len(spec.hidden))[:-1]:
        values = np.maximum(values @ weight.T + bias, 0)
    return values


def _pooled(
    spec: BagsSpec, arrays: Arrays, hidden: Floats, starts: Array, sizes: Array
) -> tuple[Floats, Floats]:
    """Return pooled hidden values (U, H) of `hidden` (n, H), and the weights (n,) of rows."""
    if spec.pooling == "max":
        pooled = np.maximum.reduceat(hidden, starts, axis=0)
        is_largest = hidden == np.repeat(pooled, sizes, axis=0)
        # Rows that share a maximum share its weight.
        shares = is_largest / np.repeat(np.add.reduceat(is_largest, starts, axis=0), sizes, axis=0)
        return pooled, shares.mean(1).astype(np.float32)
    if spec.pooling == "mean":
        weights = np.repeat(1 / sizes, sizes).astype(np.float32)
    else:
        gate = np.tanh(hidden @ arrays["tanh_weight"].T + arrays["tanh_bias"])
        gate *= sigmoid(hidden @ arrays["sigmoid_weight"].T + arrays["sigmoid_bias"])
        logits = gate @ arrays["attention"]
        weights = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts), sizes))
        weights /= np.repeat(np.add.reduceat(weights, starts), sizes)
    return np.add.reduceat(hidden * weights[:, None], starts, axis=0), weights
