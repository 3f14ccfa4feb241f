"""The result of a run, in memory; everything in it is on disk too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.pipelines.finetune.stage import FinetuneOutcome
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.correction import Selection
from headrace.pipelines.selection.ensemble import Ensemble
from headrace.pipelines.selection.evaluation_record import TestResult
from headrace.pipelines.stages.services import StageRecord


@dataclass(frozen=True)
class RunResult:
    """The result of a run: leaderboard, selected model, its score on the test split."""

    paths: RunPaths
    metric: str
    # of the feature sets, view by view, by the names that the leaderboard gives them
    feature_paths: Mapping[str, tuple[Path, ...]]
    heads: pd.DataFrame  # one row per head (spec x fold); see leaderboard.collect_heads
    board: pd.DataFrame  # one row per (inputs, spec), best first; see leaderboard.rank_heads
    winner: pd.Series  # the first row of the board
    test: TestResult | None  # of the selected model; None without a test split
    # where the recipe asks for one; the selected model, and what was tested, if it is `chosen`
    ensemble: Ensemble | None
    # the winner's expected score, and the settings that are statistically tied with it
    selection: Selection | None
    # networks trained by gradients, beside their heads; where the recipe asks for them
    finetuned: FinetuneOutcome | None
    notes: tuple[str, ...]  # for a careful person
    # where every entry of the source went; None for samples that a program gave
    accounting: Accounting | None
    failed_images: int
    failed_heads: int
    scored: str  # what scores are of: "images", or "units (patient)"
    group_column: str | None  # whose images are not independent of each other
    stages: tuple[StageRecord, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the feature sets, in the recipe's order."""
        return tuple(self.feature_paths)

    def features(self, input_name: str, view_index: int = 0) -> FeatureSet:
        """Open a feature set: NumPy slices, `to_dask_array()`, `to_torch_dataset()`."""
        return open_feature_set(self.feature_paths[input_name][view_index])


def run_result(state: RunState, stages: Sequence[StageRecord] = ()) -> RunResult:
    """Return the result of a run whose stages are through."""
    selected = state.selected
    assert selected is not None
    return RunResult(
        paths=state.paths,
        metric=state.metric,
        feature_paths=state.feature_paths,
        heads=selected.heads,
        board=selected.board,
        winner=selected.winner,
        test=state.test,
        ensemble=selected.ensemble,
        selection=selected.selection,
        finetuned=state.finetuned,
        notes=state.notes,
        accounting=state.accounting,
        failed_images=state.failed_images,
        group_column=state.recipe.task.group,
        scored="images" if (unit := state.recipe.task.unit) is None else f"units ({unit})",
        failed_heads=int((selected.heads["error"].fillna("") != "").sum()),
        stages=tuple(stages),
    )
