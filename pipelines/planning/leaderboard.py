"""From results files to a ranking: one row per (inputs, spec), its metric averaged over validation
folds.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.heads.data.task import REFIT
from headrace.heads.evaluate.metrics import METRICS
from headrace.heads.results import read_bank
from headrace.heads.spec import spec_from_json, spec_to_json
from headrace.pipelines.planning.plan import Trained, bank_group
from headrace.pipelines.recipe.grid import Wanted
from headrace.pipelines.recipe.settings_text import settings_text


def trained_in(banks: Path, group: str, *, retry_failed: bool = False) -> Trained:
    """The specs in each published results file of a group; with `retry_failed`, only those without
    a failed head.
    """
    found = {}
    for path in sorted(banks.glob(f"{group}-*.h5")):
        table = read_bank(path).table
        failed = set(table.loc[table["error"].notna(), "spec"]) if retry_failed else set()
        found[str(path)] = frozenset(spec_from_json(text) for text in set(table["spec"]) - failed)
    return found


def collect_heads(
    banks: Path,
    wanted: Sequence[Wanted],
    fingerprints: Mapping[str, Sequence[str]],
    task_digest: str,
) -> pd.DataFrame:
    """One row per head (spec × fold) that the recipe asks for and that has been trained, the REFIT
    ones included.

    Columns: inputs (tuple of names), kind, spec (JSON), fold, the metrics, objective, gap,
    iterations, seconds, error, and path (its results file).
    """
    frames = []
    # by group: estimators of scikit-learn's share one, setting by setting
    read: dict[str, pd.DataFrame] = {}
    for each in wanted:
        group = bank_group(task_digest, each, fingerprints)
        asked = {spec_to_json(spec) for spec in each.specs}
        if group not in read:
            read[group] = _group_table(banks, group)
        table = read[group]
        if not len(table):
            continue
        table = table[table["spec"].isin(asked)]
        # A spec that several files hold counts once: from the file where it failed least.
        failures = (
            table["error"].notna().groupby([table["spec"], table["path"]]).sum().reset_index()
        )
        chosen = failures.sort_values(["error", "path"]).drop_duplicates("spec")
        table = table.merge(chosen[["spec", "path"]], on=["spec", "path"])
        frames.append(
            table.assign(
                inputs=pd.Series([each.inputs] * len(table), index=table.index, dtype=object)
            )
        )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _group_table(banks: Path, group: str) -> pd.DataFrame:
    """The heads of all results files of a group."""
    tables = [
        read_bank(path).table.assign(path=str(path)) for path in sorted(banks.glob(f"{group}-*.h5"))
    ]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def rank_heads(
    heads: pd.DataFrame, metric: str, widths: Mapping[str, int], n_folds: int
) -> pd.DataFrame:
    """The leaderboard, best first: by the mean of `metric` over validation folds, ties by fewer
    features.

    Columns: rank, inputs, kind, settings, the metric's mean (its name), standard_error (of that
    mean over folds), folds, features (how many numbers the head reads), train_seconds, failed
    (folds without a head, or where the metric is undefined), final (whether the head that is
    trained on every row is there: halving trains none for the settings that it stopped), spec,
    path. A spec that failed in any fold, or is not final, ranks after all others: a mean over fewer
    folds, or fewer epochs, is no mean to compare.
    """
    folds = heads[heads["fold"] != REFIT]
    grouped = folds.assign(_whole=folds["error"].isna() & folds[metric].notna()).groupby(
        ["inputs", "spec"], sort=False
    )
    board = grouped.agg(
        kind=("kind", "first"),
        **{metric: (metric, "mean")},
        standard_error=(metric, "sem"),
        folds=("fold", "size"),
        train_seconds=("seconds", "sum"),
        failed=("_whole", "sum"),
        path=("path", "first"),
    ).reset_index()
    board["failed"] = n_folds - board["failed"].astype(int)
    whole = heads[(heads["fold"] == REFIT) & heads["error"].isna()]
    final = set(zip(whole["inputs"], whole["spec"], strict=True))
    board["final"] = [key in final for key in zip(board["inputs"], board["spec"], strict=True)]
    board["features"] = [sum(widths[name] for name in inputs) for inputs in board["inputs"]]
    board["settings"] = [settings_text(spec_from_json(spec)) for spec in board["spec"]]
    board = board.sort_values(
        ["failed", "final", metric, "features", "spec"],
        ascending=[True, False, not METRICS[metric].higher_is_better, True, True],
        ignore_index=True,
    )
    board.insert(0, "rank", np.arange(1, len(board) + 1))
    order = [
        "rank",
        "inputs",
        "kind",
        "settings",
        metric,
        "standard_error",
        "folds",
        "features",
        "train_seconds",
    ]
    return board[[*order, "failed", "final", "spec", "path"]]


def grouped_board(board: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best head of each (inputs, kind), best first, with the number of settings that it was
    chosen from.
    """
    best = board.groupby(["inputs", "kind"], sort=False)
    first = best.head(1).copy()
    counts = best.size()
    first["tried"] = [
        int(counts[inputs, kind])
        for inputs, kind in zip(first["inputs"], first["kind"], strict=True)
    ]
    return first[
        ["rank", "inputs", "kind", "settings", "tried", metric, "standard_error", "features"]
    ]


def inputs_text(inputs: Iterable[str], everything: Sequence[str]) -> str:
    """ "blocks.4.avg", "blocks.4.avg + blocks.6.max", or "all 6 taps"."""
    inputs = tuple(inputs)
    if len(inputs) > 2 and set(inputs) == set(everything):
        return f"all {len(inputs)} taps"
    return " + ".join(inputs)
