"""The stage that extracts: units of images as tasks, each published by the worker that
computed it.
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import lease
from headrace.cache.feature_set import open_feature_set
from headrace.cache.format.shard import FailedSample
from headrace.cache.publish import create_feature_set, feature_set_path, publish_shard, shard_path
from headrace.extract.run.plan import ExtractJob, unit_name
from headrace.extract.run.throughput import UnitReport, figures
from headrace.pipelines.cluster.progress import stage
from headrace.pipelines.cluster.submit import (
    Outcome,
    RunIncomplete,
    TaskOptions,
    announced,
    run_tasks,
)
from headrace.pipelines.cluster.task_leases import TaskLeases, task_leases
from headrace.pipelines.paths import unit_leases
from headrace.pipelines.planning.run_state import RunState, after_extraction, write_inputs
from headrace.pipelines.records import publish_table
from headrace.pipelines.stages.services import Services

_ASK_S = 1.0


def extract(state: RunState, services: Services) -> RunState:
    """Return the state once the missing features are extracted.

    Raises RunIncomplete when a unit failed or an image went away, and in a strict run where an
    image cannot be decoded.
    """
    with services.timed("extract") as did:
        plan, strict = state.plan, state.recipe.compute.strict
        if plan.units:
            with _extraction_client(state, services) as client:
                extract_missing(plan.units, client, services.console, services.options)
            state = after_extraction(state, retry_failed=services.retry_failed)
            write_inputs(state)
        if strict:
            with lease(state.paths.conclusion_lock):
                n_failed = write_failed_images(state)
            if n_failed:
                raise RunIncomplete(
                    f"{n_failed:,} images cannot be decoded, and this run is strict; each is "
                    f"listed with its reason in {state.paths.failed_images}. Mend or remove them, "
                    "or run without --strict"
                )
        did(
            f"{plan.images_new:,} images forward once, {len(plan.features)} taps kept"
            if plan.units
            else "nothing missing"
        )
        return state


def _extraction_client(
    state: RunState, services: Services
) -> AbstractContextManager[Client | None]:
    """Return the client whose workers extract; None where this process feeds a GPU itself."""
    device = state.plan.forward_device
    if device == "cpu":  # the same workers train heads afterwards
        return nullcontext(services.client())
    if state.recipe.cluster.where == "local":
        return nullcontext()
    return services.open_client("extract", device)


def write_failed_images(state: RunState) -> int:
    """List every image of this run that has no features, with its reason; return how many there
    are.
    """
    rows = [(image.id, image.path, image.reason) for image in state.unreadable]
    reasons = {
        failure.content_hash: failure.reason
        for views in state.directories.values()
        for directory in views
        for failure in open_feature_set(directory).failures()
    }
    failed = state.samples[state.samples["content"].isin(list(reasons))]
    columns = (failed[name].astype(str) for name in ("id", "path", "content"))
    rows += [
        (image_id, path, reasons[content]) for image_id, path, content in zip(*columns, strict=True)
    ]
    table = pd.DataFrame(sorted(rows), columns=["id", "path", "reason"])
    publish_table(
        state.paths.failed_images, table.to_csv(index=False).encode("utf-8", "backslashreplace")
    )
    return len(rows)


def extract_missing(
    units: Sequence[ExtractJob],
    client: Client | None,
    console: Console,
    options: TaskOptions | None = None,
) -> None:
    """Run units of work; what each publishes stays.

    Raises RunIncomplete when a unit failed or an image went away.

    An image that takes its worker down, or never ends, is found by dividing its unit, and recorded
    as a failed image.

    client: None for a device of this process's own (a GPU), which is then fed without a pause
    between units.
    """
    options = announced(options or TaskOptions(), console)
    failures: list[str] = []
    fatal: list[tuple[ExtractJob, str]] = []  # single images that end whoever decodes them
    reports: list[UnitReport] = []
    images = sum(len(job.samples) for job in units)
    started = time.monotonic()
    options.on_event("stage", stage="extract", total=images, unit="images", tasks=len(units))
    with ExitStack() as stack:
        leases = stack.enter_context(task_leases(unit_leases(Path(units[0].cache_root))))
        advance = stack.enter_context(stage(console, "extract", images, "images"))
        watched = replace(options, leases=leases)
        outcomes = stack.enter_context(
            closing(_here(units, leases) if client is None else _on_workers(units, client, watched))
        )
        done = 0
        for outcome in outcomes:
            done += len(outcome.job.samples)
            if outcome.fatal and not outcome.job.strict:
                fatal.append((outcome.job, outcome.error or ""))
                advance(len(outcome.job.samples))
            elif outcome.result is None:
                failures.append(_blamed(outcome))
                advance(len(outcome.job.samples))
                if outcome.job.strict:
                    break
            else:
                reports.append(outcome.result)
                now = figures(reports, time.monotonic() - started, images)
                details = {
                    "decode_share": now.decode_share,
                    "network_share": now.device_share,
                    "disk_share": now.disk_share,
                    "failed": now.failed,
                }
                advance(len(outcome.job.samples), details)
            options.on_event(
                "progress",
                done=done,
                failed=len(fatal) + sum(len(report.failed) for report in reports),
            )
        failures += _record(fatal, sum(report.rows for report in reports))
    unread = [image for report in reports for image in report.unread]
    if failures:
        raise RunIncomplete(
            f"{len(failures):,} of {len(units):,} units of images failed; the others are kept, and "
            f"the same command tries these again. The first reason: {failures[0]}"
        )
    if unread:
        name, reason = unread[0]
        raise RunIncomplete(
            f"{len(unread):,} images went away or changed while they were read, first {name} "
            f"({reason}); the features of the others are kept. Call again when the images stand "
            "still"
        )


def _record(fatal: Sequence[tuple[ExtractJob, str]], went_well: int) -> list[str]:
    """List images that end their workers as failed, each with its reason; returns why that was not
    done, if so.

    Where most images do, it is the network or the machine, and a record in the cache would outlast
    what is wrong with them.
    """
    if len(fatal) > went_well:
        return [_blamed_image(job, error) for job, error in fatal]
    for job, error in fatal:
        failures = [FailedSample(sample.id, sample.content, error) for sample in job.samples]
        for spec in (spec for _, specs in job.networks for spec in specs):
            publish_shard(
                create_feature_set(Path(job.cache_root), spec),
                job.unit,
                features=np.empty((0, *spec.shape), np.float32),
                ids=[],
                content_hashes=[],
                failures=failures,
                compression=job.compression,
            )
    return []


def extract_unit(job: ExtractJob) -> UnitReport:
    """What a worker runs: the unit, unless another driver has published it since the
    plan was made.
    """
    from headrace.extract.run.work_unit import run_unit  # imports torch

    if is_published(job):
        return UnitReport(job.unit, len(job.samples), (), (), 0.0, 0.0, 0.0)
    return run_unit(job)


def is_published(job: ExtractJob) -> bool:
    """Whether every feature set of the unit has all its images, as rows or as recorded failures."""
    directories = [
        feature_set_path(Path(job.cache_root), spec) for _, specs in job.networks for spec in specs
    ]
    # The shards' names are looked for first: reading what feature sets hold takes longer, and is
    # seldom needed.
    if not all(shard_path(directory, job.unit).exists() for directory in directories):
        return False
    return all(
        open_feature_set(directory).cached_hashes().issuperset(job.contents)
        for directory in directories
    )


def unit_key(job: ExtractJob) -> str:
    """Names the unit's work: its images, and the feature sets that they are extracted to."""
    prints = [spec.fingerprint for _, specs in job.networks for spec in specs]
    return f"extract-{job.unit}-{hashlib.sha256(''.join(prints).encode()).hexdigest()[:8]}"


def halves(job: ExtractJob) -> list[tuple[str, ExtractJob]]:
    """A unit's two halves, with their names; nothing for a unit of one image."""
    middle = len(job.samples) // 2
    parts = [part for part in (job.samples[:middle], job.samples[middle:]) if middle]
    made = [
        replace(job, samples=part, unit=unit_name([sample.content for sample in part]))
        for part in parts
    ]
    return [(unit_key(half), half) for half in made]


def _on_workers(
    units: Sequence[ExtractJob], client: Client, options: TaskOptions
) -> Generator[Outcome[ExtractJob, UnitReport], None, None]:
    jobs = ((unit_key(job), job) for job in units)
    return run_tasks(client, extract_unit, jobs, options=options, split=halves)


def _here(
    units: Sequence[ExtractJob], leases: TaskLeases
) -> Generator[Outcome[ExtractJob, UnitReport], None, None]:
    """The units that no other driver has, in one stream; then, one by one, those that it gives
    back.
    """
    from headrace.extract.run.work_unit import run_units

    mine: list[ExtractJob] = []
    others: list[ExtractJob] = []

    def leased_jobs() -> Iterator[ExtractJob]:
        for job in units:
            if leases.acquire(unit_key(job)) and not is_published(job):
                mine.append(job)
                yield job
            else:
                others.append(job)

    for number, report in enumerate(run_units(leased_jobs())):
        yield Outcome(mine[number], report, None)
        leases.release(unit_key(mine[number]))
    for job in others:
        while not leases.acquire(unit_key(job)):
            time.sleep(_ASK_S)
        yield Outcome(job, extract_unit(job), None)
        leases.release(unit_key(job))


def _blamed(outcome: Outcome[ExtractJob, UnitReport]) -> str:
    return _blamed_image(outcome.job, outcome.error or "") if outcome.fatal else outcome.error or ""


def _blamed_image(job: ExtractJob, error: str) -> str:
    return f"{job.samples[0].path}: {error}. Remove this image, or look at what is wrong with it"
