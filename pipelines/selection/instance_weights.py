"""Weights of images in the predictions of their units, by heads that have not seen the unit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headrace.heads.arrays import Floats
from headrace.heads.kind import INSTANCE_WEIGHT
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.results import BankResult, read_bank
from headrace.pipelines.models.from_features import average_weights


def takes_units(head: Mapping[str, Any] | pd.Series) -> bool:
    """Return whether a head of the leaderboard, or of an ensemble's record, predicts units as a
    whole.
    """
    kind = HEAD_KINDS.get(str(head["kind"]))
    return kind is not None and kind.takes_units


def weighted_heads(
    board: pd.DataFrame, ensemble: Sequence[tuple[float, pd.Series]]
) -> Sequence[tuple[float, pd.Series]]:
    """Return the heads, with their weights, of which a run shows the weights of images: the members
    of the ensemble if one of them predicts units as a whole, else the best head that does, if any.

    board: complete heads, best first. ensemble: of the selected model; empty if that is a head.
    """
    if any(takes_units(row) for _, row in ensemble):
        return ensemble
    return [(1.0, row) for _, row in board.iterrows() if takes_units(row)][:1]


def instance_weights(
    heads: Sequence[tuple[float, pd.Series]], units: Mapping[str, str]
) -> pd.DataFrame:
    """Return the images sorted by unit, then by falling weight: columns unit, id, weight, fold.

    With attention or mean pooling weights sum to 1 over a unit; with max pooling an image's weight
    is the share of hidden values of which it has the maximum. Those of several heads are averaged.

    heads: weights, and rows of the leaderboard. units: the unit of each image, by its id.
    """
    banks = [read_bank(Path(row["path"])) for _, row in heads]
    bank = next(bank for bank, (_, row) in zip(banks, heads, strict=True) if takes_units(row))
    held_out = np.flatnonzero(bank.fold >= 0)
    ids = bank.ids[held_out]
    unit_names = [units[image_id] for image_id in ids.tolist()]
    # By the fold head that has not seen the unit: those that have seen it know its label.
    weights_by_head = [
        _out_of_fold_weights(head_bank, str(row["spec"]))[held_out] if takes_units(row) else None
        for head_bank, (_, row) in zip(banks, heads, strict=True)
    ]
    head_weights = [head_weight for head_weight, _ in heads]
    weights = average_weights(head_weights, weights_by_head, np.array(unit_names))
    table = pd.DataFrame(
        {"unit": unit_names, "id": ids, "weight": weights, "fold": bank.fold[held_out]}
    )
    return table.sort_values(["unit", "weight"], ascending=[True, False], ignore_index=True)


def _out_of_fold_weights(bank: BankResult, spec: str) -> Floats:
    weights: Floats = np.full(len(bank.ids), np.nan, np.float32)
    for fold in np.unique(bank.fold[bank.fold >= 0]).tolist():
        weights[bank.rows(fold)] = bank.arrays(spec, fold)[INSTANCE_WEIGHT]
    return weights
