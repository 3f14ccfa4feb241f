"""Plans and results as the fields of what `run --json` and `extract --json` print."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from headrace.pipelines.cli.json_output import FinetunedRow, JsonOutput, Setting
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.result import RunResult
from headrace.pipelines.run import ExtractionResult


def plan_fields(
    recipe: Recipe, plan: Plan, accounting: Accounting | None, notes: Iterable[str]
) -> dict[str, Any]:
    """Return the fields of what `run --dry-run --json` and `extract --dry-run --json` print.

    accounting: None if the images came from a program, not from a source.
    """
    # From headrace's own objects, whose fields the classes of `json_output` take by name.
    return {
        "cache": recipe.cache,
        "out": recipe.paths.root,
        "counts": accounting,
        "notes": tuple(notes),
        "features": plan.features,
        "heads": plan.requested,
        "images": plan.images,
        "images_new": plan.images_new,
        "heads_total": plan.heads_total,
        "heads_new": plan.heads_new,
        "folds": plan.n_folds,
        "core_s": plan.estimate.core_s,
        "gpu_s": plan.estimate.gpu_s,
        "is_measured": plan.estimate.measured,
        "device": plan.forward_device,
    }


def extract_fields(result: ExtractionResult) -> dict[str, Any]:
    """Return the fields of what `extract --json` prints."""
    extraction = result.extraction
    return {
        "cache": extraction.recipe.cache,
        "features": extraction.feature_paths,
        "found": extraction.listing.found,
        "images": extraction.plan.images,
        "images_new": result.new,
        "failed": result.failed,
        "failed_images": extraction.recipe.paths.failed_images,
        "notes": extraction.notes,
        "seconds": result.seconds,
    }


# leaderboard.csv has all; of ten thousand settings the object would be larger than the table.
_N_LEADERBOARD_ROWS = 100  # in the object
# of RunPaths
_FILES = ("leaderboard", "heads", "comparisons", "winner", "predictions", "banks", "failed_images")


def _row_fields(
    output: type[JsonOutput], score_name: str, row: "pd.Series[Any]", result: RunResult
) -> dict[str, Any]:
    # Columns have the names of the object's fields, except these two.
    own_names = output.model_fields.keys() - {score_name, "inputs"}
    inputs = inputs_text(row["inputs"], result.names)
    own_fields = {name: row[name] for name in own_names}
    return {score_name: row[result.metric], "inputs": inputs, **own_fields}


def run_fields(result: RunResult) -> dict[str, Any]:
    """Return the fields of what `run --json` prints."""
    first_rows = result.board.head(_N_LEADERBOARD_ROWS).iterrows()
    leaderboard = [_row_fields(Setting, "score", row, result) for _, row in first_rows]
    networks = () if result.finetuned is None else result.finetuned.compared.iterrows()
    return {
        "out": result.paths.root,
        "metric": result.metric,
        "counts": result.accounting,
        "notes": result.notes,
        "failed_images": result.failed_images,
        "failed_heads": result.failed_heads,
        "winner": leaderboard[0],
        "expected": result.selection,
        "ensemble": result.ensemble,
        "test": result.test,
        "finetuned": [_row_fields(FinetunedRow, "value", row, result) for _, row in networks],
        "leaderboard": leaderboard,
        "settings": len(result.board),
        "stages": result.stages,
        "files": {name: getattr(result.paths, name) for name in _FILES},
    }
