"""The run of a recipe: a plan, then stage by stage what is missing."""

import datetime
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.integrity.garbage import STALE_S
from headrace.cache.integrity.repair import stale_temporaries
from headrace.extract.images.content_hashes import content_hashes
from headrace.extract.taps.spec_cache import TapFeatures
from headrace.pipelines.cluster.clients import Role, open_client
from headrace.pipelines.cluster.fork_server import imports_of
from headrace.pipelines.cluster.submit import TaskOptions
from headrace.pipelines.cluster.task_leases import remove_dead
from headrace.pipelines.cluster.task_log import task_log
from headrace.pipelines.console import make_console
from headrace.pipelines.environment import environment, note_environment
from headrace.pipelines.models.model import Model
from headrace.pipelines.paths import RunPaths, content_index, unit_leases
from headrace.pipelines.planning.extraction import Extraction, plan_features, read_extraction
from headrace.pipelines.planning.plan import Plan, check_space
from headrace.pipelines.planning.run_state import RunState, read_run_state, write_inputs
from headrace.pipelines.recipe.load import Recipe, load_recipe
from headrace.pipelines.recipe.sections import Backbone, Compute
from headrace.pipelines.recipe.targets import DataError
from headrace.pipelines.records import append_records, write_record
from headrace.pipelines.result import RunResult, run_result
from headrace.pipelines.selection.evaluation_record import refuse_old_record
from headrace.pipelines.stages.evaluate import evaluate
from headrace.pipelines.stages.extract import (
    extract,
    extract_units,
    require_all_decoded,
    write_failed_images,
)
from headrace.pipelines.stages.finetune import finetune
from headrace.pipelines.stages.halve_inputs import halve_inputs
from headrace.pipelines.stages.predict import predict
from headrace.pipelines.stages.select import select
from headrace.pipelines.stages.services import Services, StageRecord, opener_of
from headrace.pipelines.stages.train import train
from headrace.pipelines.trackers import log_run, require_log


@dataclass(frozen=True)
class ExtractionResult:
    """The result of `extract_recipe`."""

    extraction: Extraction  # as the cache is now
    new: int  # images that went through a network in this call
    failed: int  # images without features, listed with their reasons in the run's failed-images.csv
    seconds: float


# The test split is scored in `evaluate` alone, after the selection.
STAGES = (extract, halve_inputs, train, finetune, select, evaluate, predict)


def run_recipe(
    recipe: Recipe | str | Path,
    *,
    console: Console | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    client: Client | None = None,
) -> RunResult:
    """Do everything that the recipe, or the file of one, asks for and that earlier calls have not
    done.

    workers: processes, instead of the recipe's number. retry_failed: whether to train the heads
    that failed in earlier calls again. client: a Dask client to work on, which stays open; default:
    a cluster by the recipe's section `cluster`, started when there is work.

    If it is interrupted, the next call goes on from there: what is finished is on disk.
    Raises HeadraceError for errors that the user can mend.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.log is not None:
        require_log(recipe.log)
    refuse_old_record(recipe.paths.test_evaluations)  # before hours of work, not after them
    started_at = time.perf_counter()
    state = read_run_state(recipe, retry_failed=retry_failed, console=console)
    check_space(state.plan, recipe.cache, recipe.storage.budget_gb)
    paths, forward_device = state.paths, state.plan.forward_device
    with _run_services(recipe, state.plan, console, workers, client, retry_failed) as services:
        services.stages.append(_planning_record(state, started_at))
        write_inputs(state)
        write_record(paths.recipe, recipe.model_dump(mode="json"))
        for stage in STAGES:
            state = stage(state, services)
        if recipe.log is not None:
            with services.timed("log") as report_done:
                report_done(log_run(recipe.log, run_result(state)))
    remove_leftovers(paths, recipe.cache)
    ended_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    stage_records = [{"ended": ended_at, **asdict(record)} for record in services.stages]
    append_records(paths.stages, stage_records)
    note_environment(paths.environments, environment(workers, forward_device))
    return run_result(state, services.stages)


def extract_recipe(
    recipe: Recipe,
    *,
    console: Console | None = None,
    workers: int | None = None,
    client: Client | None = None,
) -> ExtractionResult:
    """Extract the features of the recipe's images, labelled or not, that the cache lacks.

    Arguments and interruptions as in `run_recipe`. Raises HeadraceError.
    """
    started_at = time.perf_counter()
    extraction = read_extraction(recipe, console=console)
    check_space(extraction.plan, recipe.cache, recipe.storage.budget_gb)
    paths, plan = recipe.paths, extraction.plan
    with _run_services(recipe, plan, console, workers, client, retry_failed=False) as services:
        if plan.units:
            extract_units(plan, recipe, services)
    remove_leftovers(paths, recipe.cache)
    with lease(paths.conclusion_lock):  # held while tables of the run are written
        n_failed = write_failed_images(extraction)
    # Planned again from the cache, which raises if every image failed.
    plan_now = plan_features(recipe, extraction.samples, extraction.networks)
    if recipe.compute.strict:
        require_all_decoded(n_failed, paths.failed_images)
    seconds = time.perf_counter() - started_at
    extraction = replace(extraction, plan=plan_now)
    return ExtractionResult(extraction, plan.images_new, n_failed, seconds)


def cache_images(
    model: Model,
    images: pd.DataFrame,
    cache_root: Path,
    *,
    workers: int | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> int:
    """Extract the features of images (columns `file`, `path`) that a model needs and a cache lacks.

    Returns how many images went through a network. A fine-tuned network needs no features, for it
    predicts from pixels. Raises HeadraceError.
    """
    networks = tuple(
        (backbone, TapFeatures(tuple(specs), weights_note=""))
        for backbone, specs in model.features_by_backbone.items()
    )
    recipe = Recipe.model_construct(
        backbones=tuple(
            # Aliases, for one network with two preprocessings would have one name twice.
            Backbone(name=backbone.name, alias=str(index))
            for index, (backbone, _) in enumerate(networks)
        ),
        cache=cache_root,
        out=cache_root / "extraction",
        compute=Compute.model_validate({"device": device}),
    )
    samples = images.rename(columns={"file": "id"})[["id", "path"]]
    is_writable = not cache_root.exists() or os.access(cache_root, os.W_OK)
    contents = content_hashes(samples, content_index(cache_root), keep=is_writable).hashes
    samples = samples.assign(content=pd.Series(contents, index=samples.index, dtype=object))
    try:
        plan = plan_features(recipe, samples, networks)
    except DataError:  # every image failed in earlier calls; its row of the predictions says why
        return 0
    if plan.units:
        if not is_writable:
            raise CacheError(
                f"{cache_root} cannot be written to. Leave out --update-cache, or name another "
                "cache: --cache FOLDER"
            )
        check_space(plan, cache_root, None)
        with _run_services(
            recipe, plan, console, workers, client=None, retry_failed=False
        ) as services:
            extract_units(plan, recipe, services)
    if is_writable and recipe.paths.root.exists():
        remove_leftovers(recipe.paths, cache_root)
    return plan.images_new


@contextmanager
def _run_services(
    recipe: Recipe,
    plan: Plan,
    console: Console | None,
    workers: int | None,
    client: Client | None,
    retry_failed: bool,
) -> Iterator[Services]:
    """Open the services of one call: log, console and, when there is work, a cluster."""
    console = console or make_console()
    module_names = imports_of(backbone.name for backbone in recipe.backbones) if plan.units else []
    # task_log makes the run's folder, so that callers come here after all checks that may refuse
    # the recipe.
    with task_log(recipe.paths) as log:

        @contextmanager
        def open_logged(role: Role, device: str) -> Iterator[Client]:
            where = recipe.cluster.where
            with open_client(
                recipe.cluster,
                role,
                workers=workers or recipe.compute.workers,
                device=device,
                run_folder=recipe.paths.root,
                module_names=module_names,
            ) as opened_client:
                log("cluster", where=where, role=role, dashboard=opened_client.dashboard_link)
                yield opened_client

        options = TaskOptions(recipe.cluster.task_timeout_s, on_event=log)
        client_opener = open_logged if client is None else opener_of(client)
        with Services(console, options, client_opener, workers, retry_failed) as services:
            yield services


def remove_leftovers(paths: RunPaths, cache_root: Path) -> None:
    """Remove what killed calls left: task leases of dead drivers, and old temporary files."""
    for folder in (paths.leases, unit_leases(cache_root)):
        remove_dead(folder)
    for temporary in stale_temporaries(paths.root, STALE_S, time.time()):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _planning_record(state: RunState, started_at: float) -> StageRecord:
    plan = state.plan
    summary = (
        f"{count_text(plan.images, 'image')}, {count_text(len(plan.features), 'feature set')}, "
        f"{count_text(plan.heads_total, 'head')} requested"
    )
    return StageRecord("plan", summary, time.perf_counter() - started_at)
