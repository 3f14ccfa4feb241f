"""Plans and results as the objects that `run --json` and `extract --json` print."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.pipelines.cli.json_output import (
    EnsembleOutput,
    ExpectedScore,
    ExtractOutput,
    FinetunedRow,
    ImageCounts,
    PlannedFeatures,
    PlannedHeads,
    PlanOutput,
    RunOutput,
    Setting,
    StageOutput,
    TestScore,
)
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.result import RunResult
from headrace.pipelines.run import ExtractionResult
from headrace.pipelines.selection.ensemble import Ensemble
from headrace.pipelines.selection.evaluation_record import TestResult


def counts_output(accounting: Accounting | None) -> ImageCounts | None:
    """Return the counts of a run's images; None if they came from a program, not from a source."""
    return None if accounting is None else ImageCounts.model_validate(accounting)


def plan_output(
    plan: Plan, accounting: Accounting | None, notes: Iterable[str], *, cache: Path, out: Path
) -> PlanOutput:
    """Return the object that `run --dry-run --json` and `extract --dry-run --json` print."""
    return PlanOutput(
        cache=str(cache),
        out=str(out),
        counts=counts_output(accounting),
        notes=tuple(notes),
        features=tuple(
            PlannedFeatures(
                name=feature.name,
                shape=feature.shape,
                images=feature.rows_total,
                images_cached=feature.rows_cached,
                bytes_new=feature.bytes_new,
            )
            for feature in plan.features
        ),
        heads=tuple(
            PlannedHeads(inputs=heads.inputs, kind=heads.specs[0].kind, settings=len(heads.specs))
            for heads in plan.requested
        ),
        images=plan.images,
        images_new=plan.images_new,
        heads_total=plan.heads_total,
        heads_new=plan.heads_new,
        folds=plan.n_folds,
        core_s=plan.estimate.core_s,
        gpu_s=plan.estimate.gpu_s,
        is_measured=plan.estimate.measured,
        device=plan.forward_device,
    )


def extract_output(result: ExtractionResult) -> ExtractOutput:
    """Return the object that `extract --json` prints."""
    extraction = result.extraction
    return ExtractOutput(
        cache=str(extraction.recipe.cache),
        features={
            name: tuple(str(path) for path in view_paths)
            for name, view_paths in extraction.feature_paths.items()
        },
        found=extraction.listing.found,
        images=extraction.plan.images,
        images_new=result.new,
        failed=result.failed,
        failed_images=str(extraction.recipe.paths.failed_images),
        notes=extraction.notes,
        seconds=result.seconds,
    )


# leaderboard.csv has all; of ten thousand settings the object would be larger than the table.
_N_LEADERBOARD_ROWS = 100  # in the object
# of RunPaths
_FILES = ("leaderboard", "heads", "comparisons", "winner", "predictions", "banks", "failed_images")


def _setting(row: "pd.Series[Any]", result: RunResult) -> Setting:
    return Setting(
        rank=int(row["rank"]),
        inputs=inputs_text(row["inputs"], result.names),
        kind=row["kind"],
        settings=row["settings"],
        score=float(row[result.metric]),
        standard_error=float(row["standard_error"]),
        features=int(row["features"]),
    )


def _ensemble_output(ensemble: Ensemble | None) -> EnsembleOutput | None:
    if ensemble is None:
        return None
    return EnsembleOutput(
        value=ensemble.value,
        low=ensemble.low,
        high=ensemble.high,
        members=len(ensemble.members),
        gain=ensemble.gain,
        gain_low=ensemble.gain_low,
        gain_high=ensemble.gain_high,
        level=ensemble.level,
        is_selected=ensemble.chosen,
    )


def _test_output(test: TestResult | None) -> TestScore | None:
    if test is None:
        return None
    return TestScore(
        value=test.value,
        low=test.low,
        high=test.high,
        images=test.images,
        units=test.units,
        evaluations=test.n_evaluations,
        metrics=test.metrics,
    )


def _finetuned_rows(result: RunResult) -> tuple[FinetunedRow, ...]:
    if result.finetuned is None:
        return ()
    # Columns of the comparison have the fields' names, except these two.
    own_names = FinetunedRow.model_fields.keys() - {"value", "inputs"}
    return tuple(
        FinetunedRow(
            value=row[result.metric],
            inputs=inputs_text(row["inputs"], result.names),
            **{name: row[name] for name in own_names},
        )
        for _, row in result.finetuned.compared.iterrows()
    )


def run_output(result: RunResult) -> RunOutput:
    """Return the object that `run --json` prints."""
    selection = result.selection
    return RunOutput(
        out=str(result.paths.root),
        metric=result.metric,
        counts=counts_output(result.accounting),
        notes=result.notes,
        failed_images=result.failed_images,
        failed_heads=result.failed_heads,
        winner=_setting(result.board.iloc[0], result),
        expected=None
        if selection is None
        else ExpectedScore(
            value=selection.expected,
            low=selection.low,
            high=selection.high,
            tried=selection.tried,
            statistically_tied=selection.statistically_tied,
        ),
        ensemble=_ensemble_output(result.ensemble),
        test=_test_output(result.test),
        finetuned=_finetuned_rows(result),
        leaderboard=tuple(
            _setting(row, result) for _, row in result.board.head(_N_LEADERBOARD_ROWS).iterrows()
        ),
        settings=len(result.board),
        stages=tuple(map(StageOutput.model_validate, result.stages)),
        files={name: str(getattr(result.paths, name)) for name in _FILES},
    )
