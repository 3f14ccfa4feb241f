"""Prediction from a head's stored arrays; most kinds need NumPy alone for it.

n rows, D features, C classes. Every kind's arrays are in raw feature coordinates: standardization
is folded into them.
"""

import json

from headrace.heads.arrays import Array, Arrays, Floats
from headrace.heads.data.task import TaskKind
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.temperature import FLOOR, vote_floor
from headrace.heads.kinds import HEAD_KINDS, spec_from_json
from headrace.heads.spec import HeadSpec


def predict_head(
    spec: HeadSpec,
    arrays: Arrays,
    X: Array,
    task: TaskKind = "single",
    temperature: float = 1.0,
    unit: Array | None = None,
) -> Floats:
    """Return probabilities (n, C) float32, or values of regression, of features X (n, D).

    Convolution heads take maps (n, D, h, w). temperature: divides the log-odds, and changes no
    decision. unit: (n,) unit of each row, for kinds that predict the rows of a unit together.

    Raises HeadError for a head without arrays (it failed, or it is a neighbour search of a
    fold: only that on all rows is stored) and for features of another width.
    """
    if not arrays:
        raise HeadError(
            f"this {spec.kind} head has no stored arrays: predict with the head trained on all "
            "rows (fold REFIT)"
        )
    kind = HEAD_KINDS.get(spec.kind)
    if kind is None:
        raise HeadError(
            "a fine-tuned network predicts from images, not from features: load its own directory"
        )
    if kind.spatial:
        n_channels = _features_expected(spec, arrays)
        if X.ndim != 4 or X.shape[1] != n_channels:
            raise HeadError(
                f"the head was trained on maps of {n_channels} channels, found {X.shape[1:]}: give "
                "the same taps"
            )
        return kind.predict(spec, arrays, X, task, temperature)
    rows = flat_rows(spec, arrays, X)
    # The kinds themselves divide the log-odds that they compute by the temperature: those of a
    # float32 probability near one are lost.
    if kind.predict_units is not None and unit is not None:
        return kind.predict_units(spec, arrays, rows, unit, task, temperature)[0]
    return kind.predict(spec, arrays, rows, task, temperature)


def flat_rows(spec: HeadSpec, arrays: Arrays, X: Array) -> Array:
    """Return X as (n, D). Raises HeadError where the head was trained on another D."""
    rows = X.reshape(len(X), -1)
    expected = _features_expected(spec, arrays)
    if rows.shape[1] != expected:
        raise HeadError(
            f"the head was trained on {expected} features per row, found {rows.shape[1]}: "
            "concatenate the same taps"
        )
    return rows


def _features_expected(spec: HeadSpec, arrays: Arrays) -> int:
    """Return the number of features per row, or channels of a map, that a head reads.

    Raises HeadError for arrays without the one that tells it.
    """
    input_array = HEAD_KINDS[spec.kind].input_array
    if input_array not in arrays:
        raise HeadError(
            f"arrays {', '.join(sorted(arrays))} are not those of a {spec.kind} head, which has "
            f"one called {input_array}: train it again, or fetch the model again"
        )
    return int(arrays[input_array].shape[1])


def probability_floor(spec: HeadSpec | str, task_kind: TaskKind, n_outputs: int) -> float:
    """Return the probability as which a temperature counts smaller ones, for a spec or its JSON."""
    if isinstance(spec, str):
        if json.loads(spec)["kind"] not in HEAD_KINDS:
            return FLOOR  # a network trained by gradients counts no votes
        spec = spec_from_json(spec)
    kind = HEAD_KINDS.get(spec.kind)
    if kind is not None and kind.counts_votes(spec):
        return vote_floor(task_kind, n_outputs)
    return FLOOR
