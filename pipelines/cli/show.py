"""Plans and extractions: as tables and sentences on the terminal, and as the fields of what
`run --dry-run --json` and `extract --json` print.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.number_format import bytes_text, work_text
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.cost_model import Estimate
from headrace.pipelines.planning.leaderboard import inputs_text
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.run import ExtractionResult


def show_features(console: Console, plan: Plan, cache: object) -> None:
    """Print what would be extracted and what is cached; also the time, if no heads are planned."""
    table = Table(title="Features", title_justify="left")
    table.add_column("tap")
    for column in ("shape", "images to extract", "there", "new bytes"):
        table.add_column(column, justify="right")
    for feature in plan.features:
        table.add_row(
            feature.name,
            " x ".join(map(str, feature.shape)),
            f"{feature.rows_total - feature.rows_cached:,}",
            f"{feature.rows_cached:,}",
            bytes_text(feature.bytes_new),
        )
    console.print(table)
    console.print(
        f"{plan.images_new:,} of {count_text(plan.images, 'image')} go through a network, in "
        f"{count_text(len(plan.units), 'work unit')}; "
        f"{bytes_text(sum(feature.bytes_new for feature in plan.features))} to write in {cache}",
        soft_wrap=True,
    )
    if not plan.requested:
        console.print(
            f"Tasks: {count_text(len(plan.units), 'work unit')}; about {_work(plan.estimate)}. "
            f"Done already: {count_text(plan.images - plan.images_new, 'image')}",
            soft_wrap=True,
        )


def show_extraction(console: Console, result: ExtractionResult) -> None:
    """Print what `headrace extract` has done, and the paths of the feature sets."""
    extraction = result.extraction
    notes = list(extraction.notes)
    if result.failed:
        notes.append(
            f"{count_text(result.failed, 'image could', 'images could')} not be used; each "
            f"is listed with its reason in {extraction.recipe.paths.failed_images}"
        )
    show_notes(console, notes)
    n_found = extraction.listing.found
    parts = (
        (len(extraction.samples) - result.failed, "with features"),
        (result.failed, "that cannot be used"),
        (n_found - len(extraction.samples), "left out"),
    )
    counts = " + ".join(f"{count:,} {use}" for count, use in parts if count)
    console.print(f"Images: {n_found:,} found = {counts}", soft_wrap=True)
    console.print(
        f"{result.new:,} of {count_text(extraction.plan.images, 'image')} went through a network, "
        f"in {result.seconds:,.1f} s",
        soft_wrap=True,
    )
    console.print("Features", style="italic")
    for name, view_paths in extraction.feature_paths.items():
        for view_path in view_paths:
            console.print(f"  {name:<32} {view_path}", soft_wrap=True)


def _work(estimate: Estimate) -> str:
    basis = (
        "measured in earlier calls of this run"
        if estimate.measured
        else "assumed until a first call has measured it"
    )
    gpu = f" and {work_text(estimate.gpu_s, 'GPU')}" if estimate.gpu_s else ""
    return f"{work_text(estimate.core_s, 'core')}{gpu} ({basis})"


def show_plan(console: Console, plan: Plan, cache: object, out: object) -> None:
    """Print what would be extracted and trained, and what is already there."""
    show_features(console, plan, cache)
    all_names = [feature.name for feature in plan.features]
    table = Table(title="Heads", title_justify="left")
    table.add_column("inputs")
    table.add_column("kind")
    for column in ("settings", "heads", "heads to train"):
        table.add_column(column, justify="right")
    # Banks are what is left to train; what is planned is in `requested`.
    missing = {(bank.inputs, spec) for bank in plan.banks for spec in bank.specs}
    settings: Counter[tuple[tuple[str, ...], str]] = Counter()
    to_train: Counter[tuple[tuple[str, ...], str]] = Counter()
    # Added up: one kind may be planned as several banks, such as with and without class weights.
    for inputs, specs, _ in plan.requested:
        settings[inputs, specs[0].kind] += len(specs)
        to_train[inputs, specs[0].kind] += sum((inputs, spec) in missing for spec in specs)
    for (inputs, kind), count in settings.items():
        table.add_row(
            inputs_text(inputs, all_names),
            kind,
            f"{count:,}",
            f"{count * plan.n_folds:,}",
            f"{to_train[inputs, kind] * plan.n_folds:,}",
        )
    console.print(table)
    console.print(
        f"{plan.heads_new:,} of {count_text(plan.heads_total, 'head')} to train "
        f"({count_text(plan.n_folds, 'fold')} each), in {count_text(len(plan.banks), 'bank')}; "
        f"results in {out}",
        soft_wrap=True,
    )
    console.print(
        f"Tasks: {count_text(len(plan.units), 'work unit')} and "
        f"{count_text(len(plan.banks), 'bank')}; about {_work(plan.estimate)}. Done already: "
        f"{count_text(plan.images - plan.images_new, 'image')}, "
        f"{count_text(plan.heads_total - plan.heads_new, 'head')}",
        soft_wrap=True,
    )


def show_images(console: Console, accounting: Accounting | None, notes: Sequence[str]) -> None:
    """Print the sentence that counts every entry of the source, and the notes."""
    if accounting is not None:
        console.print(accounting.sentence(), soft_wrap=True)
    show_notes(console, notes)


def show_notes(console: Console, notes: Sequence[str]) -> None:
    """Print notes: cautions about the data or the settings."""
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)


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
