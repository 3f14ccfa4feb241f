"""What results files and the leaderboard say: the specs that are trained, and the winner.

A leaderboard has a row per (inputs, spec), best first; `rank_heads` of the stage `select` makes it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.side_columns import taps_of
from headrace.heads.results import read_bank
from headrace.pipelines.planning.plan import SpecsByFile
from headrace.pipelines.recipe.finetune_spec import model_spec


class NoWinner(HeadraceError):
    """No head was trained in every fold."""


@dataclass(frozen=True)
class Winner:
    """The setting with the best mean score over validation folds: the leaderboard's first row."""

    kind: str  # of head, as in the recipe; "finetune": a fine-tuned network
    inputs: tuple[str, ...]  # names of the feature sets that it reads, side by side
    settings: str  # in words, as the leaderboard has them
    metric: str
    score: float  # mean of `metric` over the validation folds; too good, as it was chosen by it
    standard_error: float  # of that mean
    folds: int
    features: int  # numbers that it reads of each image
    spec: str  # kind and settings as canonical JSON
    results_path: Path  # the file with its arrays and predictions, in the run's banks/


def trained_specs(banks_folder: Path, group: str, *, retry_failed: bool = False) -> SpecsByFile:
    """Return the specs in each results file of a group (`bank_group`); with retry_failed, only
    specs without a failed head.
    """
    specs_of_file = {}
    for results_path in sorted(banks_folder.glob(f"{group}-*.h5")):
        table = read_bank(results_path).table
        failed_specs = set(table.loc[table["error"].notna(), "spec"]) if retry_failed else set()
        specs_of_file[str(results_path)] = frozenset(
            model_spec(text) for text in set(table["spec"]) - failed_specs
        )
    return specs_of_file


def choose_winner(board: pd.DataFrame, heads: pd.DataFrame, metric: str) -> Winner:
    """Return the first setting of the leaderboard.

    heads: one row per head and fold, with column `error`. Raises NoWinner, with the commonest
    error, if no head was trained and scored in every fold.
    """
    if board.empty or board.iloc[0]["failed"] or not board.iloc[0]["final"]:
        reasons = heads["error"].dropna().value_counts()
        reason = (
            f"The commonest reason: {reasons.index[0].rstrip('.')}"
            if len(reasons)
            else "The metric is undefined in some fold"
        )
        raise NoWinner(
            f"no head was trained and scored in every fold. {reason}. Every head is in "
            "heads.parquet and leaderboard.csv"
        )
    best = board.iloc[0]
    return Winner(
        kind=str(best["kind"]),
        inputs=tuple(best["inputs"]),
        settings=str(best["settings"]),
        metric=metric,
        score=float(best[metric]),
        standard_error=float(best["standard_error"]),
        folds=int(best["folds"]),
        features=int(best["features"]),
        spec=str(best["spec"]),
        results_path=Path(best["path"]),
    )


def inputs_text(inputs: Iterable[str], all_inputs: Sequence[str]) -> str:
    """Return a text such as "blocks.4.avg + blocks.6.max", or "all 6 taps"."""
    inputs, taps = tuple(inputs), taps_of(inputs)
    if len(taps) > 2 and set(taps) == set(taps_of(all_inputs)):
        return " + ".join([f"all {len(taps)} taps", *inputs[len(taps) :]])
    return " + ".join(inputs)
