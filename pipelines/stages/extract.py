"""The stage that extracts features: work units as tasks, published by the workers that ran them."""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.shard import FailedSample
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path
from headrace.extract.images.crops import EMPTY_TILE
from headrace.extract.run.plan import ExtractJob, WorkUnitReport, work_unit_name
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import Outcome, TaskOptions, run_tasks
from headrace.pipelines.cluster.task_leases import TaskLeases, task_leases
from headrace.pipelines.cluster.worker import decoding_cores
from headrace.pipelines.paths import unit_leases
from headrace.pipelines.planning.extraction import Extraction
from headrace.pipelines.planning.plan import Plan
from headrace.pipelines.planning.run_state import RunState, state_of, write_inputs
from headrace.pipelines.recipe.load import Recipe
from headrace.pipelines.records import publish_table
from headrace.pipelines.stages.services import Services

_ASK_S = 1.0  # seconds between attempts to lease a work unit that another driver has


def extract(state: RunState, services: Services) -> RunState:
    """Extract the missing features, and return the state after that.

    Raises HeadraceError if a work unit failed or an image went away, and in a strict run if an
    image cannot be decoded.
    """
    with services.timed("extract") as report_done:
        plan = state.plan
        if plan.units:
            extract_units(plan, state.recipe, services)
            assert state.inventory is not None
            # Only now it is known which images failed, and so which rows heads are compared on.
            replanned = state_of(state.inventory, retry_failed=services.retry_failed)
            state = replace(replanned, notes=state.notes)
            write_inputs(state)
        if state.recipe.compute.strict:
            with lease(state.paths.conclusion_lock):
                require_all_decoded(write_failed_images(state), state.paths.failed_images)
        images_text = f"{count_text(plan.images_new, 'image')} forward once"
        taps_text = f"{count_text(len(plan.features), 'tap')} kept"
        report_done(f"{images_text}, {taps_text}" if plan.units else "nothing missing")
        return state


def extract_units(plan: Plan, recipe: Recipe, services: Services) -> None:
    """Run the plan's work units where the recipe says. Raises as `extract_missing`."""
    device = plan.forward_device
    client: AbstractContextManager[Client | None]
    if device == "cpu":  # the same workers train heads afterwards
        client = nullcontext(services.client())
    elif recipe.cluster.where == "local":
        client = nullcontext()  # this process feeds a GPU itself
    else:
        client = services.open_client("extract", device)
    with client as extraction_client:
        extract_missing(plan.units, extraction_client, services.console, services.options)


def require_all_decoded(n_failed: int, failed_images: Path) -> None:
    """Raise HeadraceError for images that failed, in a strict run."""
    if n_failed:
        raise HeadraceError(
            f"{count_text(n_failed, 'image')} cannot be decoded, and this run is strict; each is "
            f"listed with its reason in {failed_images}. Mend or remove them, or leave out "
            "--strict (in a recipe, `strict` of `compute`)"
        )


def write_failed_images(state: RunState | Extraction) -> int:
    """List every image that has no features, with its reason; return how many there are."""
    failed_rows = [(image.id, image.path, image.reason) for image in state.unreadable]
    reasons = {
        failure.content_hash: failure.reason
        for view_paths in state.feature_paths.values()
        for directory in view_paths
        for failure in open_feature_set(directory).failures()
    }
    failed_samples = state.samples[state.samples["content"].isin(list(reasons))]
    failed_texts = failed_samples[["id", "path", "content"]].astype(str)
    failed_rows += [
        (image_id, image_path, reasons[content_hash])
        for image_id, image_path, content_hash in failed_texts.itertuples(index=False)
    ]
    failed_table = pd.DataFrame(sorted(failed_rows), columns=["id", "path", "reason"])
    publish_table(
        state.recipe.paths.failed_images,
        failed_table.to_csv(index=False).encode("utf-8", "backslashreplace"),
    )
    return len(failed_rows)


def extract_missing(
    units: Sequence[ExtractJob],
    client: Client | None,
    console: Console,
    options: TaskOptions | None = None,
) -> None:
    """Run work units; what each has published stays. Raises HeadraceError if a unit failed or an
    image went away.

    client: None for a GPU of this machine, which this process feeds without a pause.
    """
    options = options or TaskOptions()
    unit_failures: list[str] = []
    # Single images whose decoding kills its worker, or never ends: found by halving work units.
    fatal_units: list[tuple[ExtractJob, str]] = []
    unit_reports: list[WorkUnitReport] = []
    n_images = sum(len(job.samples) for job in units)
    options.on_event("stage", stage="extract", total=n_images, unit="images", tasks=len(units))
    with (
        task_leases(unit_leases(Path(units[0].cache_root))) as leases,
        show_progress(console, "extract", n_images, "images") as advance,
        closing(_outcomes(units, client, replace(options, leases=leases))) as outcomes,
    ):
        n_done = 0
        for outcome in outcomes:
            n_done += len(outcome.job.samples)
            details = None
            if outcome.fatal and not outcome.job.strict:
                fatal_units.append((outcome.job, outcome.error or ""))
            elif outcome.result is None:
                error = outcome.error or ""
                unit_failures.append(
                    _image_failure_text(outcome.job, error) if outcome.fatal else error
                )
            else:
                unit_reports.append(outcome.result)
                details = progress_details(unit_reports)
            advance(len(outcome.job.samples), details)
            if outcome.result is None and outcome.job.strict:
                break
            options.on_event(
                "progress",
                done=n_done,
                failed=len(fatal_units) + sum(len(report.failed) for report in unit_reports),
            )
        unit_failures += _record_failed_images(
            fatal_units, sum(report.rows for report in unit_reports)
        )
    _print_crop_counts(unit_reports, console)
    unread_images = [image for report in unit_reports for image in report.unread]
    if unit_failures:
        raise HeadraceError(
            f"{len(unit_failures):,} of {count_text(len(units), 'work unit')} failed; the others "
            "are kept, and the same command tries these again. The first reason: "
            f"{unit_failures[0]}"
        )
    if unread_images:
        image_name, reason = unread_images[0]
        raise HeadraceError(
            f"{count_text(len(unread_images), 'image')} went away or changed while they were read, "
            f"first {image_name} ({reason}); the features of the others are kept. Call again when "
            "the images stand still"
        )


def progress_details(reports: Sequence[WorkUnitReport]) -> dict[str, float]:
    """Return what the display of an extraction's progress shows: the count of failed images, and
    how the threads that feed networks spend their time, in shares that add up to 1.
    """
    seconds = {
        # Waiting for pixels: more decoding threads or smaller files would help.
        "decode_share": sum(report.decode_s for report in reports),
        "network_share": sum(report.forward_s for report in reports),
        "disk_share": sum(report.publish_s for report in reports),
    }
    all_seconds = sum(seconds.values()) or 1.0
    shares = {name: spent / all_seconds for name, spent in seconds.items()}
    return {**shares, "failed": sum(len(report.failed) + len(report.unread) for report in reports)}


def _print_crop_counts(unit_reports: Sequence[WorkUnitReport], console: Console) -> None:
    n_clipped = sum(report.clipped for report in unit_reports)
    if n_clipped:
        console.print(f"{n_clipped:,} boxes reach beyond their image, and are clipped to it")
    failures = [failure for report in unit_reports for failure in report.failed]
    n_empty = sum(failure.reason.startswith(EMPTY_TILE) for failure in failures)
    if n_empty:
        console.print(f"{n_empty:,} tiles are empty, and left out (failed-images.csv)")


def _record_failed_images(
    fatal_units: Sequence[tuple[ExtractJob, str]], n_extracted: int
) -> list[str]:
    """Record images that kill their workers as failed, with the reason; or, if most images do,
    return a text for each.
    """
    # The cause is then the network or the machine, and a record in the cache would outlast it.
    if len(fatal_units) > n_extracted:
        return [_image_failure_text(job, error) for job, error in fatal_units]
    for job, error in fatal_units:
        failures = [FailedSample(sample.id, sample.content, error) for sample in job.samples]
        for spec in (spec for _, specs in job.networks for spec in specs):
            publish_shard(
                create_feature_set(Path(job.cache_root), spec),
                job.work_unit,
                features=np.empty((0, *spec.shape), np.float32),
                ids=[],
                content_hashes=[],
                failures=failures,
                compression=job.compression,
            )
    return []


def extract_unit(job: ExtractJob) -> WorkUnitReport:
    """Run a work unit, unless another driver has published it since it was planned."""
    from headrace.extract.run.work_unit import run_work_unit  # imports torch

    if is_published(job):
        return WorkUnitReport(job.work_unit, len(job.samples), (), (), 0.0, 0.0, 0.0)
    return run_work_unit(job if job.device == "cpu" else replace(job, threads=decoding_cores()))


def is_published(job: ExtractJob) -> bool:
    """Return whether all feature sets of the job have all its images, as rows or failures."""
    feature_directories = [
        feature_set_path(Path(job.cache_root), spec) for _, specs in job.networks for spec in specs
    ]
    # Names of shards first, because to read the contents of feature sets takes longer and is seldom
    # needed.
    if not all(shard_path(directory, job.work_unit).exists() for directory in feature_directories):
        return False
    return all(
        open_feature_set(directory).cached_hashes().issuperset(job.contents)
        for directory in feature_directories
    )


def unit_key(job: ExtractJob) -> str:
    """Return the work unit's name, made of its images and of its feature sets."""
    fingerprints = [spec.fingerprint for _, specs in job.networks for spec in specs]
    fingerprints_hash = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:8]
    return f"extract-{job.work_unit}-{fingerprints_hash}"


def split_unit(job: ExtractJob) -> list[tuple[str, ExtractJob]]:
    """Return the two halves of a work unit with their names; [] for one of a single image."""
    n_first = len(job.samples) // 2
    if not n_first:
        return []
    half_jobs = [
        replace(job, samples=half, work_unit=work_unit_name([sample.content for sample in half]))
        for half in (job.samples[:n_first], job.samples[n_first:])
    ]
    return [(unit_key(half_job), half_job) for half_job in half_jobs]


def _outcomes(
    units: Sequence[ExtractJob], client: Client | None, options: TaskOptions
) -> Generator[Outcome[ExtractJob, WorkUnitReport], None, None]:
    if client is None:
        assert options.leases is not None
        return _in_this_process(units, options.leases)
    jobs = ((unit_key(job), job) for job in units)
    return run_tasks(client, extract_unit, jobs, options=options, split=split_unit)


def _in_this_process(
    units: Sequence[ExtractJob], leases: TaskLeases
) -> Generator[Outcome[ExtractJob, WorkUnitReport], None, None]:
    """Run work units in this process and yield their outcomes: first, in one stream, units that no
    other driver has leased, then the others one by one as their leases end.
    """
    from headrace.extract.run.work_unit import run_work_units

    own_jobs: list[ExtractJob] = []
    leased_elsewhere: list[ExtractJob] = []

    def leased_jobs() -> Iterator[ExtractJob]:
        for job in units:
            if leases.acquire(unit_key(job)) and not is_published(job):
                own_jobs.append(job)
                yield job
            else:
                # Or published already, of which `extract_unit` makes an empty report.
                leased_elsewhere.append(job)

    for job_index, report in enumerate(run_work_units(leased_jobs())):
        yield Outcome(own_jobs[job_index], report, None)
        leases.release(unit_key(own_jobs[job_index]))
    for job in leased_elsewhere:
        while not leases.acquire(unit_key(job)):
            time.sleep(_ASK_S)
        yield Outcome(job, extract_unit(job), None)
        leases.release(unit_key(job))


def _image_failure_text(job: ExtractJob, error: str) -> str:
    return f"{job.samples[0].path}: {error}. Remove this image, or look at what is wrong with it"
