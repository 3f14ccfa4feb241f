"""The result of a run in memory, for the terminal and for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.pipelines.finetune.stage import FinetuneOutcome
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.leaderboard import Winner, inputs_text
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.correction import CorrectedScore
from headrace.pipelines.selection.ensemble import Ensemble
from headrace.pipelines.selection.evaluation_record import TestResult
from headrace.pipelines.stages.services import StageRecord


@dataclass(frozen=True)
class RunResult:
    """The result of a run. All of it is also in the run's files."""

    paths: RunPaths
    metric: str
    # feature sets by their names in the leaderboard, one for each view
    feature_paths: Mapping[str, tuple[Path, ...]]
    heads: pd.DataFrame  # one row per head (spec x fold); see select.collect_heads
    board: pd.DataFrame  # one row per (inputs, spec), best first; see select.rank_heads
    winner: Winner  # the first row of the board
    test: TestResult | None  # of the selected model; None without a test split
    # None if the recipe asks for none; if it is `chosen`, it is the selected model
    ensemble: Ensemble | None
    # the winner's expected score, and the settings that are statistically tied with it
    selection: CorrectedScore | None
    finetuned: FinetuneOutcome | None  # None if the recipe asks for none
    notes: tuple[str, ...]  # cautions about the data or the settings
    # counts of the source's entries by what became of them; None if a program gave the samples
    accounting: Accounting | None
    failed_images: int
    failed_heads: int
    scored: str  # what is scored, in words: "images" or "units (patient)"
    group_column: str | None
    stages: tuple[StageRecord, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the feature sets, in the recipe's order."""
        return tuple(self.feature_paths)

    def inputs_text(self, inputs: Iterable[str]) -> str:
        """Return the inputs of a head in words, such as "blocks.4.avg" or "all 6 taps"."""
        return inputs_text(inputs, self.names)

    def features(self, input_name: str, view_index: int = 0) -> FeatureSet:
        """Open a feature set: NumPy slices, `to_dask_array()`, `to_torch_dataset()`."""
        return open_feature_set(self.feature_paths[input_name][view_index])


def run_result(state: RunState, stages: Sequence[StageRecord] = ()) -> RunResult:
    """Return the result of a run, after its last stage."""
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
