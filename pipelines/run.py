"""The run, top to bottom: survey, extract what is missing, train what is missing, rank, open the test split once."""

import datetime
import io
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache import FeatureSet, HeadraceError, feature_set_path, open_feature_set, publish_replace
from headrace.extract import run_unit
from headrace.heads import BankJob, save_task, train_bank
from headrace.pipelines.cluster import local_client
from headrace.pipelines.leaderboard import collect_heads, rank_heads
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.plan import Plan
from headrace.pipelines.progress import stage
from headrace.pipelines.recipe import Recipe
from headrace.pipelines.submit import run_tasks
from headrace.pipelines.survey import Survey, survey
from headrace.pipelines.winner import TestResult, choose_winner, open_test, save_winner


class RunIncomplete(HeadraceError):
    """Part of the work could not be done; what is finished is kept."""


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
    cache: Path
    metric: str
    names: tuple[str, ...]  # of the feature sets
    heads: pd.DataFrame  # one row per head (spec x fold); see leaderboard.collect_heads
    board: pd.DataFrame  # one row per (inputs, spec), best first; see leaderboard.rank_heads
    winner: pd.Series
    test: TestResult | None
    notes: tuple[str, ...]
    failed_images: int
    failed_heads: int
    stages: tuple[StageRecord, ...]


def run_recipe(recipe: Recipe, *, console: Console | None = None, workers: int | None = None) -> RunResult:
    """Do what the recipe asks and is not done yet.

    Interrupted at any moment, the next call goes on where it was: finished units and banks are on disk.
    Raises HeadraceError for what the user can mend; finished work stays.
    """
    console = console or Console()
    stages: list[StageRecord] = []
    with ExitStack() as stack:
        with _timed(stages, "survey") as done:
            found = survey(recipe, console)
            plan = found.plan
            done(f"{plan.images:,} images, {len(plan.features)} feature sets, {plan.heads_total:,} heads wanted")
        write_inputs(recipe, found)
        client = None
        if plan.units or plan.banks:
            with _timed(stages, "start workers") as done:
                client = stack.enter_context(local_client(workers or recipe.compute.workers))
                done(f"{len(client.nthreads())} processes")
        with _timed(stages, "extract") as done:
            done(extract_missing(plan, client, console))
        with _timed(stages, "train heads") as done:
            done(train_missing(recipe, found, client, console))
    with _timed(stages, "rank and test") as done:
        result = conclude(recipe, found)
        done(f"{len(result.board):,} settings ranked")
    _record_stages(found.paths.stages, stages)
    return RunResult(**{**result.__dict__, "stages": tuple(stages)})


def write_inputs(recipe: Recipe, found: Survey) -> None:
    """The task that banks read (it holds no test row), and a copy of the recipe."""
    paths, task = found.paths, found.dataset.train
    paths.task(task.digest).parent.mkdir(parents=True, exist_ok=True)
    paths.banks.mkdir(parents=True, exist_ok=True)
    stored = io.BytesIO()
    save_task(task, stored)
    publish_replace(paths.task(task.digest), stored.getvalue())
    publish_replace(paths.recipe, recipe.model_dump_json(indent=2).encode())


def extract_missing(plan: Plan, client: Client | None, console: Console) -> str:
    """Run the units that are missing; returns what was done, in words. Raises RunIncomplete when a unit failed."""
    if not plan.units or client is None:
        return "nothing missing"
    failures: list[str] = []
    unread: list[tuple[str, str]] = []
    with stage(console, "extract", sum(len(job.samples) for job in plan.units), "images") as advance:
        for outcome in run_tasks(client, run_unit, ((f"extract-{job.unit}", job) for job in plan.units)):
            advance(len(outcome.job.samples))
            if outcome.result is None:
                failures.append(outcome.error or "")
            else:
                unread += outcome.result.unread
    if failures:
        raise RunIncomplete(
            f"{len(failures):,} of {len(plan.units):,} units of images failed; the others are kept, and the same command "
            f"tries these again. The first reason: {failures[0]}"
        )
    if unread:
        name, reason = unread[0]
        raise RunIncomplete(
            f"{len(unread):,} images went away or changed while they were read, first {name} ({reason}); the features of "
            "the others are kept. Call again when the images stand still"
        )
    return f"{plan.images_new:,} images forward once, {len(plan.features)} taps kept"


def train_missing(recipe: Recipe, found: Survey, client: Client | None, console: Console) -> str:
    """Train the banks that are missing; returns what was done, in words."""
    plan, paths = found.plan, found.paths
    if not plan.banks or client is None:
        return "nothing missing"
    directories = {feature.name: str(feature_set_path(recipe.cache, feature.spec)) for feature in plan.features}
    task = str(paths.task(found.dataset.train.digest))
    jobs = [
        BankJob(
            task=task,
            features=tuple(directories[name] for name in bank.inputs),
            specs=bank.specs,
            result=str(paths.bank(bank.group, bank.key)),
        )
        for bank in plan.banks
    ]
    failures: list[str] = []
    with stage(console, "train", plan.heads_new, "heads") as advance:
        for outcome in run_tasks(client, train_bank, ((f"bank-{Path(job.result).stem}", job) for job in jobs)):
            advance(len(outcome.job.specs) * plan.folds)
            if outcome.error:
                failures.append(outcome.error)
    if failures:
        raise RunIncomplete(
            f"{len(failures):,} of {len(jobs):,} banks failed; the others are kept, and the same command tries these again. "
            f"The first reason: {failures[0]}"
        )
    return f"{plan.heads_new:,} heads in {len(jobs):,} banks, and each setting once on all training rows"


def conclude(recipe: Recipe, found: Survey) -> RunResult:
    """Rank, choose the winner on validation folds, show it the test split, and write the tables."""
    plan, paths, task = found.plan, found.paths, found.dataset.train
    fingerprints = {feature.name: feature.spec.fingerprint for feature in plan.features}
    widths = {feature.name: _width(feature.spec.shape) for feature in plan.features}
    heads = collect_heads(paths.banks, plan.wanted, fingerprints, task.digest)
    board = rank_heads(heads, found.metric, widths)
    failed_images = write_failed_images(recipe, found)
    names = tuple(feature.name for feature in plan.features)
    publish_replace(paths.leaderboard, _flat(board).to_csv(index=False).encode())
    publish_replace(paths.heads, _flat(heads).to_parquet(index=False))
    winner = choose_winner(board)
    features = [open_features(recipe, plan, name) for name in winner["inputs"]]
    save_winner(paths.winner, winner, features, task, found.metric)
    test = found.dataset.test
    return RunResult(
        paths=paths,
        cache=recipe.cache,
        metric=found.metric,
        names=names,
        heads=heads,
        board=board,
        winner=winner,
        test=open_test(paths.openings, winner, features, test, task.digest, found.metric) if len(test.ids) else None,
        notes=found.dataset.notes,
        failed_images=failed_images,
        failed_heads=int((heads["error"].fillna("") != "").sum()),
        stages=(),
    )


def open_features(recipe: Recipe, plan: Plan, name: str) -> FeatureSet:
    """The feature set that the leaderboard calls `name`."""
    spec = next(feature.spec for feature in plan.features if feature.name == name)
    return open_feature_set(feature_set_path(recipe.cache, spec))


def write_failed_images(recipe: Recipe, found: Survey) -> int:
    """List every image of this run that has no features, with its reason; returns how many there are."""
    rows = [(item.id, item.path, item.reason) for item in found.unreadable]
    reasons = {
        failure.content: failure.reason
        for feature in found.plan.features
        for failure in open_features(recipe, found.plan, feature.name).failures()
    }
    bad = found.samples[found.samples["content"].isin(list(reasons))]
    columns = (bad[name].astype(str) for name in ("id", "path", "content"))
    rows += [(name, path, reasons[content]) for name, path, content in zip(*columns, strict=True)]
    table = pd.DataFrame(sorted(rows), columns=["id", "path", "reason"])
    publish_replace(found.paths.failed_images, table.to_csv(index=False).encode())
    return len(rows)


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for length in shape:
        width *= length
    return width


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(inputs=[" + ".join(inputs) for inputs in table["inputs"]])


@contextmanager
def _timed(stages: list[StageRecord], name: str) -> Iterator:  # type: ignore[type-arg]
    start = time.perf_counter()
    did: list[str] = []
    yield did.append
    stages.append(StageRecord(name, did[-1] if did else "", time.perf_counter() - start))


def _record_stages(path: Path, stages: list[StageRecord]) -> None:
    ended = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = path.read_text() if path.exists() else ""
    new = "".join(json.dumps({"ended": ended, **asdict(record)}) + "\n" for record in stages)
    publish_replace(path, (lines + new).encode())
