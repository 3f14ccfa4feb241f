"""The run, top to bottom: survey, extract what is missing, train what is missing, rank, open the
test split once.
"""

import datetime
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import PARTIAL_SUFFIX, lease, sync_directory
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.integrity.garbage import STALE_S
from headrace.cache.integrity.repair import stale_temporaries
from headrace.extract.images.changes import write_listing
from headrace.extract.images.decoding import PixelRange
from headrace.heads.bank import BankJob
from headrace.heads.data.task import save_task
from headrace.pipelines.cluster.clients import Role, open_client
from headrace.pipelines.cluster.fork_server import imports_of
from headrace.pipelines.cluster.submit import RunIncomplete, TaskOptions
from headrace.pipelines.cluster.task_leases import remove_dead
from headrace.pipelines.cluster.task_log import TaskLog, task_log
from headrace.pipelines.console import make_console
from headrace.pipelines.environment import environment, note_environment
from headrace.pipelines.finetune.stage import Finetuned, FinetuneInputs, finetune, pending
from headrace.pipelines.paths import RunPaths, unit_claims
from headrace.pipelines.planning.accounting import Accounting
from headrace.pipelines.planning.leaderboard import collect_heads, rank_heads
from headrace.pipelines.planning.plan import Plan, check_space, fingerprints_of
from headrace.pipelines.planning.run_state import (
    Survey,
    find_device,
    find_heads_device,
    listing,
    run_paths,
    survey,
)
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.recipe.sections import EnsembleSection, InputHalvingSection
from headrace.pipelines.records import append_records, publish_table, write_record
from headrace.pipelines.selection.calibration import temperature_of
from headrace.pipelines.selection.cautions import grid_edges, hidden_classes, near_duplicates
from headrace.pipelines.selection.correction import Selection, assess_selection
from headrace.pipelines.selection.ensemble import Ensemble, build_ensemble
from headrace.pipelines.selection.ensemble_store import evaluate_ensemble, save_ensemble
from headrace.pipelines.selection.halving import InputHalving, halve_inputs, restrict_plan
from headrace.pipelines.selection.predictions import held_out, whole_heads
from headrace.pipelines.selection.small_banks import train_banks
from headrace.pipelines.selection.winner import (
    NoWinner,
    TestResult,
    choose_winner,
    evaluate_winner,
    refuse_old_record,
    repair_test_evaluations,
    save_winner,
)
from headrace.pipelines.stages.extract import extract_missing
from headrace.pipelines.stages.train import probe, train_missing
from headrace.pipelines.trackers import log_run, require_log


@dataclass(frozen=True)
class StageRecord:
    """One stage of one call."""

    name: str
    did: str
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """What a run ends with. Everything in it is on disk too."""

    paths: RunPaths
    metric: str
    directories: Mapping[str, tuple[Path, ...]]  # of the feature sets, view by view, by name
    heads: pd.DataFrame  # one row per head (spec x fold); see leaderboard.collect_heads
    board: pd.DataFrame  # one row per (inputs, spec), best first; see leaderboard.rank_heads
    winner: pd.Series
    test: TestResult | None  # of the selected model
    ensemble: (
        Ensemble | None
    )  # where the recipe asks for one; the selected model, and what was tested, if it is `chosen`
    selection: (
        Selection | None
    )  # what the winner is expected to score, and who cannot be told apart from it
    finetuned: (
        Finetuned | None
    )  # networks trained by gradients, beside the head; where the recipe asks for them
    notes: tuple[str, ...]
    accounting: (
        Accounting | None
    )  # where every entry of the source went; None for samples that a program gave
    failed_images: int
    failed_heads: int
    stages: tuple[StageRecord, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the feature sets, in the recipe's order."""
        return tuple(self.directories)

    def features(self, name: str, view: int = 0) -> FeatureSet:
        """A feature set by its name: NumPy slices, `to_dask_array()`, `to_torch_dataset()`."""
        return open_feature_set(self.directories[name][view])


def run_recipe(
    recipe: Recipe,
    *,
    console: Console | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
) -> RunResult:
    """Do what the recipe asks and is not done yet; with `retry_failed`, train the heads that failed
    once more.

    Interrupted at any moment, the next call goes on where it was: finished units and banks are on
    disk. Raises HeadraceError for what the user can mend; finished work stays.
    """
    if recipe.log is not None:
        require_log(recipe.log)
    console = console or make_console()
    stages: list[StageRecord] = []
    paths = run_paths(recipe)
    refuse_old_record(paths.test_evaluations)  # before hours of work, not after them
    with ExitStack() as stack:
        with _timed(stages, "survey") as done:
            on = find_heads_device(recipe, workers)
            found = survey(recipe, retry_failed=retry_failed)
            plan, notes = found.plan, found.notes
            done(
                f"{plan.images:,} images, {len(plan.features)} feature sets, {plan.heads_total:,} "
                "heads wanted"
            )
        check_space(plan, recipe.cache, recipe.storage.budget_gb)
        log = stack.enter_context(
            task_log(paths)
        )  # what is refused until here leaves no folder behind
        opened = partial(_opened, recipe, paths, log, workers, _imports(recipe, plan))
        write_inputs(found)
        write_record(found.paths.recipe, recipe.model_dump(mode="json"))
        options = TaskOptions(recipe.cluster.task_timeout_s, tell=log)
        client = None
        with _timed(stages, "extract") as done:
            if plan.units:
                device = plan.units[0].device
                if device == "cpu":  # the same workers train heads afterwards
                    client = stack.enter_context(opened("train"))
                    extract_missing(plan.units, client, console, options)
                elif recipe.cluster.where == "local":
                    extract_missing(plan.units, None, console, options)
                else:
                    with opened("extract", device) as on_gpus:
                        extract_missing(plan.units, on_gpus, console, options)
                # Which images failed is known now, and with it the rows that heads are compared on.
                found = replace(survey(recipe, retry_failed=retry_failed), notes=notes)
                write_inputs(found)
            if recipe.compute.strict:
                with lease(_conclusion(paths)):
                    bad = write_failed_images(found)
            if recipe.compute.strict and bad:
                raise RunIncomplete(
                    f"{bad:,} images cannot be decoded, and this run is strict; each is listed "
                    f"with its reason in {found.paths.failed_images}. Mend or remove them, or run "
                    "without --strict"
                )
            done(_extracted(plan))
        halving = None
        if recipe.input_halving is not None:
            with _timed(stages, "halve inputs") as done:

                def train_all(jobs: Sequence[BankJob]) -> None:
                    nonlocal client
                    if jobs:
                        client = client or stack.enter_context(opened("train"))
                        train_banks(jobs, client, console, "halve inputs", options, paths.claims)

                found, said, halving = halve_run_inputs(found, recipe.input_halving, train_all)
                done(said)
        with _timed(stages, "train heads") as done:
            if found.plan.banks:
                client = client or stack.enter_context(opened("train"))
                if first := probe(
                    found
                ):  # a large run begins with a little of everything, to know how to cut the rest
                    train_missing(first, client, console, options, on)
                    kept = [each.inputs for each in found.plan.wanted]
                    found = replace(survey(recipe, retry_failed=retry_failed), notes=notes)
                    found = replace(found, plan=restrict_plan(found.plan, kept))
                train_missing(found, client, console, options, on)
            done(_trained(found.plan))
        finetuned = None
        if recipe.finetune is not None:
            with _timed(stages, "finetune") as done:
                inputs, board = finetune_inputs(found, recipe), rank_heads(*_trained_heads(found))
                if pending(inputs, board, recipe.finetune, retry_failed=retry_failed):
                    client = client or stack.enter_context(opened("train"))
                finetuned = finetune(
                    inputs,
                    board,
                    recipe.finetune,
                    client,
                    console,
                    options,
                    retry_failed=retry_failed,
                )
                done(
                    f"{finetuned.trained:,} networks trained"
                    if finetuned.trained
                    else "nothing missing"
                )
    with _timed(stages, "rank and test") as done, lease(_conclusion(paths)):
        result = conclude(found, recipe.ensemble, finetuned, recipe.images.pixel_range, halving)
        done(f"{len(result.board):,} settings ranked")
    if recipe.log is not None:
        with _timed(stages, "log") as done:
            # mypy reads this file as `pipelines.…` and the import as `headrace.pipelines.…`
            done(log_run(recipe.log, result))  # type: ignore[arg-type]
    remove_leftovers(paths, recipe.cache)
    _record_stages(found.paths.stages, stages)
    device = plan.units[0].device if plan.units else "cpu"
    note_environment(found.paths.environments, environment(workers, device))
    return replace(result, stages=tuple(stages))


def _imports(recipe: Recipe, plan: Plan) -> list[str]:
    """What workers should find imported: what networks need, where one is run."""
    return imports_of(backbone.name for backbone in recipe.backbones) if plan.units else []


@contextmanager
def _opened(
    recipe: Recipe,
    paths: RunPaths,
    log: TaskLog,
    workers: int | None,
    imports: Sequence[str],
    role: Role,
    device: str = "cpu",
) -> Iterator[Client]:
    workers = workers or recipe.compute.workers
    with open_client(
        recipe.cluster, role, workers=workers, device=device, run=paths.root, imports=imports
    ) as client:
        log("cluster", where=recipe.cluster.where, role=role, dashboard=client.dashboard_link)
        yield client


def write_inputs(found: Survey) -> None:
    """The task that banks read, which holds no test row, and the list of images for the next call
    to compare with.
    """
    paths, task = found.paths, found.dataset.train
    paths.task(task.digest).parent.mkdir(parents=True, exist_ok=True)
    paths.banks.mkdir(parents=True, exist_ok=True)
    save_task(task, paths.task(task.digest), groups=found.dataset.groups)
    write_listing(paths.listing, listing(found.samples))
    if found.accounting is not None:
        write_record(paths.accounting, found.accounting.to_json())


def finetune_inputs(found: Survey, recipe: Recipe) -> FinetuneInputs:
    """What the stage that trains networks is given."""
    return FinetuneInputs(
        paths=found.paths,
        task=found.dataset.train,
        metric=found.metric,
        directories=found.directories,
        backbones=found.backbones,
        images=found.samples,
        device=find_device(recipe.compute.device),
    )


def _trained_heads(found: Survey) -> tuple[pd.DataFrame, str, dict[str, int], int]:
    """As `rank_heads` takes them."""
    plan, task = found.plan, found.dataset.train
    heads = collect_heads(
        found.paths.banks, plan.wanted, fingerprints_of(plan.features), task.digest
    )
    return (
        heads,
        found.metric,
        {feature.name: prod(feature.shape) for feature in plan.features},
        task.n_folds,
    )


def halve_run_inputs(
    found: Survey, section: InputHalvingSection, train_all: Callable[[Sequence[BankJob]], None]
) -> tuple[Survey, str, InputHalving]:
    """The survey with the heads on promising inputs only, which those are, and what the halving
    measured.
    """
    wanted = list(dict.fromkeys(each.inputs for each in found.plan.wanted))
    folder = found.paths.input_halving
    dataset = found.dataset
    halving = halve_inputs(
        wanted, dataset.train, found.directories, section, folder, train_all, dataset.groups
    )
    kept = halving.selected_inputs
    said = (
        f"{len(kept):,} of {len(wanted):,} inputs go on: "
        f"{'; '.join(' + '.join(inputs) for inputs in kept)}"
    )
    return replace(found, plan=restrict_plan(found.plan, kept)), said, halving


def conclude(
    found: Survey,
    ensemble_section: EnsembleSection | None = None,
    finetuned: Finetuned | None = None,
    pixel_range: PixelRange | None = None,
    halving: InputHalving | None = None,
) -> RunResult:
    """Rank, choose the winner on validation folds, show the selected model the test split, and
    write the tables.

    pixel_range: as in the recipe, for the images that are compared. halving: of the inputs, on the
    same rows. The selected model is the winner, or an ensemble where one is asked for and is better
    at the level of its interval.
    """
    paths, task = found.paths, found.dataset.train
    heads, metric, widths, folds = _trained_heads(found)
    if finetuned is not None and len(finetuned.rows):
        heads = pd.concat([heads, finetuned.rows], ignore_index=True)
    board = rank_heads(heads, metric, widths, folds)
    failed_images = write_failed_images(found)
    publish_table(paths.leaderboard, _flat(board).to_csv(index=False).encode())
    publish_table(paths.heads, _flat(heads).to_parquet(index=False))
    try:
        winner = choose_winner(board, heads)
    except NoWinner:
        withdraw(
            paths.winner, paths.ensemble
        )  # of an earlier call, of which this leaderboard knows nothing
        raise
    selection = weigh_selection(found, board, halving)
    told = cautions(found, board, pixel_range)
    features = [
        open_feature_set(path) for name in winner["inputs"] for path in found.directories[name]
    ]
    backbones = [
        found.backbones[name] for name in winner["inputs"] for _ in found.directories[name]
    ]
    temperature = temperature_of(winner, task)
    save_winner(paths.winner, winner, features, backbones, task, found.metric, temperature)
    ensemble = None if ensemble_section is None else combine_heads(found, board, ensemble_section)
    if ensemble is None:
        withdraw(paths.ensemble)
    notes = repair_test_evaluations(paths.test_evaluations)
    test = found.dataset.test
    if not len(test.ids):
        tested = None
    elif ensemble is not None and ensemble.chosen:
        tested = evaluate_ensemble(
            paths.test_evaluations,
            ensemble,
            found.directories,
            test,
            task.digest,
            found.dataset.test_groups,
        )
    else:
        groups = found.dataset.test_groups
        tested = evaluate_winner(
            paths.test_evaluations,
            winner,
            features,
            test,
            task.digest,
            found.metric,
            groups,
            temperature,
        )
    return RunResult(
        paths=paths,
        metric=found.metric,
        directories=found.directories,
        heads=heads,
        board=board,
        winner=winner,
        test=tested,
        selection=selection,
        ensemble=ensemble,
        finetuned=finetuned,
        notes=(*found.notes, *told, *(finetuned.notes if finetuned is not None else ()), *notes),
        accounting=found.accounting,
        failed_images=failed_images,
        failed_heads=int((heads["error"].fillna("") != "").sum()),
        stages=(),
    )


def cautions(found: Survey, board: pd.DataFrame, pixel_range: PixelRange | None) -> list[str]:
    """What a careful person would want to be told of this result, from stored predictions, features
    and a few images.
    """
    held, whole = held_out(found.dataset.train, found.dataset.groups), whole_heads(board)
    hidden = hidden_classes(whole, held, found.metric)
    there = found.samples.dropna(subset=["content"])
    paths = dict(zip(there["content"].astype(str), there["path"].astype(str), strict=True))
    alike = near_duplicates(
        found.dataset.train, found.dataset.test, found.directories, paths, pixel_range
    )
    return [
        *grid_edges(whole, found.metric),
        *(text for text in (hidden, alike) if text is not None),
    ]


def weigh_selection(
    found: Survey, board: pd.DataFrame, halving: InputHalving | None = None
) -> Selection | None:
    """What the choice of the best is worth, from stored predictions; written beside the
    leaderboard.
    """
    held = held_out(found.dataset.train, found.dataset.groups)
    halving_luck = None
    if (
        halving is not None
        and (wrong := halving.row_errors.get(board.iloc[0]["inputs"])) is not None
    ):
        halving_luck = halving.selection_luck, wrong[held.rows]
    selection = assess_selection(whole_heads(board), held, found.metric, halving_luck=halving_luck)
    if selection is None:
        withdraw(found.paths.selection, found.paths.comparisons)
    else:
        columns = ["rank", "inputs", "kind", "settings", found.metric]
        table = _flat(board)[columns].merge(selection.table, on="rank", how="left")
        write_record(found.paths.selection, selection.summary())
        publish_table(found.paths.comparisons, table.to_csv(index=False).encode())
    return selection


def remove_leftovers(paths: RunPaths, cache: Path) -> None:
    """Remove what calls that were killed left behind: claims and locks of dead drivers, temporaries
    that nobody writes to.
    """
    for folder in (paths.claims, unit_claims(cache)):
        remove_dead(folder)
    for path in stale_temporaries(paths.root, STALE_S, time.time()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def withdraw(*results: Path) -> None:
    """Remove results of an earlier call that are true no more; a directory disappears at once, by a
    rename.

    What a process that dies on the way leaves has no name that anyone reads, and goes with the next
    withdrawal.
    """
    for path in results:
        if path.is_dir():
            path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"))
            sync_directory(path.parent)
        else:
            path.unlink(missing_ok=True)
        for left in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)


def combine_heads(found: Survey, board: pd.DataFrame, section: EnsembleSection) -> Ensemble | None:
    """The ensemble, from stored predictions, as a model directory."""
    held = held_out(found.dataset.train, found.dataset.groups)
    ensemble = build_ensemble(whole_heads(board), held, found.metric, section)
    if ensemble is not None:
        save_ensemble(
            found.paths.ensemble, ensemble, found.directories, found.backbones, found.dataset.train
        )
    return ensemble


def write_failed_images(found: Survey) -> int:
    """List every image of this run that has no features, with its reason; returns how many there
    are.
    """
    rows = [(item.id, item.path, item.reason) for item in found.unreadable]
    reasons = {
        failure.content_hash: failure.reason
        for views in found.directories.values()
        for directory in views
        for failure in open_feature_set(directory).failures()
    }
    bad = found.samples[found.samples["content"].isin(list(reasons))]
    columns = (bad[name].astype(str) for name in ("id", "path", "content"))
    rows += [(name, path, reasons[content]) for name, path, content in zip(*columns, strict=True)]
    table = pd.DataFrame(sorted(rows), columns=["id", "path", "reason"])
    publish_table(
        found.paths.failed_images, table.to_csv(index=False).encode("utf-8", "backslashreplace")
    )
    return len(rows)


def _extracted(plan: Plan) -> str:
    if not plan.units:
        return "nothing missing"
    return f"{plan.images_new:,} images forward once, {len(plan.features)} taps kept"


def _trained(plan: Plan) -> str:
    if not plan.banks:
        return "nothing missing"
    return (
        f"{plan.heads_new:,} heads in {len(plan.banks):,} banks, and each setting once on all "
        "training rows"
    )


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(inputs=[" + ".join(inputs) for inputs in table["inputs"]])


@contextmanager
def _timed(stages: list[StageRecord], name: str) -> Iterator:  # type: ignore[type-arg]
    start = time.perf_counter()
    did: list[str] = []
    yield did.append
    stages.append(StageRecord(name, did[-1] if did else "", time.perf_counter() - start))


def _conclusion(paths: RunPaths) -> Path:
    return paths.root / "conclude.lock"  # of several drivers, one at a time writes tables


def _record_stages(path: Path, stages: list[StageRecord]) -> None:
    ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    append_records(path, [{"ended": ended, **asdict(record)} for record in stages])
