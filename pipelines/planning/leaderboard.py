"""The leaderboard and its first row, the winner: a row per (inputs, spec), its metric averaged over
folds, from results files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.heads.data.side_columns import taps_of
from headrace.heads.data.task import REFIT
from headrace.heads.evaluate.metrics import METRICS
from headrace.heads.results import read_bank
from headrace.heads.spec import spec_to_json
from headrace.pipelines.planning.plan import Plan, SpecsByFile, bank_group
from headrace.pipelines.recipe.finetune_spec import model_spec
from headrace.pipelines.recipe.settings_text import settings_text


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


def collect_heads(banks_folder: Path, plan: Plan, task_digest: str) -> pd.DataFrame:
    """Return one row per head (spec × fold, and the refit on all rows) that the plan asks for and
    that has been trained.

    Columns: inputs (tuple of names), kind, spec (JSON), fold, the metrics, objective, gap,
    iterations, seconds, error, and path (its results file).
    """
    head_tables = []
    # Read once per group: scikit-learn estimators of different settings share one.
    tables_by_group: dict[str, pd.DataFrame] = {}
    for heads in plan.requested:
        group = bank_group(task_digest, heads, plan.fingerprints)
        spec_texts = {spec_to_json(spec) for spec in heads.specs}
        if group not in tables_by_group:
            tables_by_group[group] = _group_table(banks_folder, group)
        head_table = tables_by_group[group]
        if not len(head_table):
            continue
        head_table = head_table[head_table["spec"].isin(spec_texts)]
        # A spec that several files hold counts once: from the file where it failed least.
        is_failed = head_table["error"].notna()
        failures = is_failed.groupby([head_table["spec"], head_table["path"]]).sum().reset_index()
        best_files = failures.sort_values(["error", "path"]).drop_duplicates("spec")
        head_table = head_table.merge(best_files[["spec", "path"]], on=["spec", "path"])
        inputs = pd.Series([heads.inputs] * len(head_table), head_table.index, dtype=object)
        head_tables.append(head_table.assign(inputs=inputs))
    return pd.concat(head_tables, ignore_index=True) if head_tables else pd.DataFrame()


def _group_table(banks_folder: Path, group: str) -> pd.DataFrame:
    bank_tables = [
        read_bank(results_path).table.assign(path=str(results_path))
        for results_path in sorted(banks_folder.glob(f"{group}-*.h5"))
    ]
    filled_tables = [table for table in bank_tables if len(table)]
    return pd.concat(filled_tables, ignore_index=True) if filled_tables else pd.DataFrame()


def rank_heads(
    heads: pd.DataFrame, metric: str, input_widths: Mapping[str, int], n_folds: int
) -> pd.DataFrame:
    """Return the leaderboard, best first: by mean `metric` over validation folds; ties go to fewer
    features, then to the smaller log loss.

    Columns: rank, inputs, kind, settings, the metric's mean (named as the metric), standard_error
    (of that mean over folds), folds, features (how many numbers the head reads), train_seconds,
    failed (folds without a head, or where the metric is undefined), final (whether there is a refit
    on all rows: halving makes none of the settings that it stopped), spec, path.

    input_widths: numbers per image, by input.
    """
    fold_heads = heads[heads["fold"] != REFIT]
    # A regression has none, and no ties either.
    log_loss = "log_loss" if "log_loss" in heads else metric
    by_setting = fold_heads.assign(
        _complete=fold_heads["error"].isna() & fold_heads[metric].notna()
    ).groupby(["inputs", "spec"], sort=False)
    leaderboard = by_setting.agg(
        kind=("kind", "first"),
        **{metric: (metric, "mean")},
        standard_error=(metric, "sem"),
        folds=("fold", "size"),
        train_seconds=("seconds", "sum"),
        complete=("_complete", "sum"),
        path=("path", "first"),
        # On few images many strengths have the same accuracy, and the strongest regularization is
        # hardly surer than a guess.
        tie_break=(log_loss, "mean"),
    ).reset_index()
    leaderboard["failed"] = n_folds - leaderboard["complete"].astype(int)
    final_heads = heads[(heads["fold"] == REFIT) & heads["error"].isna()]
    final_keys = set(zip(final_heads["inputs"], final_heads["spec"], strict=True))
    leaderboard["final"] = [
        key in final_keys for key in zip(leaderboard["inputs"], leaderboard["spec"], strict=True)
    ]
    leaderboard["features"] = [
        sum(input_widths[name] for name in inputs) for inputs in leaderboard["inputs"]
    ]
    leaderboard["settings"] = [settings_text(model_spec(spec)) for spec in leaderboard["spec"]]
    # A spec that failed in any fold, or is not final, ranks after all others, because its mean is
    # over fewer folds or fewer epochs.
    leaderboard = leaderboard.sort_values(
        ["failed", "final", metric, "features", "tie_break", "spec"],
        ascending=[True, False, not METRICS[metric].higher_is_better, True, True, True],
        ignore_index=True,
    )
    leaderboard.insert(0, "rank", np.arange(1, len(leaderboard) + 1))
    columns = ["rank", "inputs", "kind", "settings", metric, "standard_error", "folds", "features"]
    return leaderboard[[*columns, "train_seconds", "failed", "final", "spec", "path"]]


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


def grouped_board(board: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the best head of each (inputs, kind), and how many settings it was chosen from."""
    by_kind = board.groupby(["inputs", "kind"], sort=False)
    best_rows = by_kind.head(1).copy()
    n_settings = by_kind.size()
    best_rows["tried"] = [
        int(n_settings[inputs, kind])
        for inputs, kind in zip(best_rows["inputs"], best_rows["kind"], strict=True)
    ]
    return best_rows[
        ["rank", "inputs", "kind", "settings", "tried", metric, "standard_error", "features"]
    ]


def inputs_text(inputs: Iterable[str], all_inputs: Sequence[str]) -> str:
    """Return a text such as "blocks.4.avg + blocks.6.max", or "all 6 taps"."""
    inputs, taps = tuple(inputs), taps_of(inputs)
    if len(taps) > 2 and set(taps) == set(taps_of(all_inputs)):
        return " + ".join([f"all {len(taps)} taps", *inputs[len(taps) :]])
    return " + ".join(inputs)
