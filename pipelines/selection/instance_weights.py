"""What each image weighs in the prediction of its unit, of the best head that predicts units."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.kind import INSTANCE_WEIGHT
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.results import read_bank


def instance_weights(board: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame | None:
    """Return the images by unit, the weightiest first: columns unit, id, weight, fold.

    A weight is that of the fold's head that has not seen the unit, as the head pools: of attention
    and mean they sum to 1 over a unit, of a maximum it is the share of hidden values that are the
    image's. None where no complete head on the board predicts units.

    board: complete heads, best first. units: the unit of each id.
    """
    takes_units = [
        name in HEAD_KINDS and HEAD_KINDS[name].takes_units for name in board["kind"].tolist()
    ]
    if not any(takes_units):
        return None
    best = board[takes_units].iloc[0]
    bank, spec = read_bank(Path(best["path"])), str(best["spec"])
    weights: npt.NDArray[np.float32] = np.full(len(bank.ids), np.nan, np.float32)
    for fold in np.unique(bank.fold[bank.fold >= 0]).tolist():
        weights[bank.rows(fold)] = bank.arrays(spec, fold)[INSTANCE_WEIGHT]
    table = pd.DataFrame({"id": bank.ids, "weight": weights, "fold": bank.fold})
    table = table[table["fold"] >= 0]
    table.insert(0, "unit", [units[image_id] for image_id in table["id"].tolist()])
    return table.sort_values(["unit", "weight"], ascending=[True, False], ignore_index=True)
