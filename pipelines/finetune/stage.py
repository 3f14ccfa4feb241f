"""The stage that turns promising heads into networks: pilots, the order by gain per hour, the
budget, rollback.

The head stays the selected model unless a network is better on the same validation rows. Everything
that is decided is written to `finetune/candidates.json`, and nothing that is decided there is done
again.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import lease
from headrace.cache.format.sealed import is_sealed_file
from headrace.heads.data.task import REFIT, Task
from headrace.heads.evaluate.metrics import METRICS, score
from headrace.heads.results import read_bank, remove_damaged
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import Outcome, RunIncomplete, TaskOptions, run_tasks
from headrace.pipelines.cluster.task_leases import task_leases
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.finetune.candidates import (
    Candidate,
    list_candidates,
    predicted_gain,
    training_seconds,
)
from headrace.pipelines.models.network import WEIGHTS
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.sections import FinetuneSection
from headrace.pipelines.recipe.settings_text import settings_text
from headrace.pipelines.records import RunDamaged, read_record, write_record

RESAMPLES = 1000
# A fold that takes so many times as long as its pilot predicted, and longer than any task may, is
# taken for hung.
HUNG = 4


@dataclass(frozen=True)
class FinetuneInputs:
    """What the stage is given of a run."""

    paths: RunPaths
    task: Task  # without test rows
    metric: str
    feature_inputs: Mapping[str, FeatureInput]  # by name
    # content and path of every image, test images too: for those the selected model is asked at the
    # end
    images: pd.DataFrame
    device: str


@dataclass(frozen=True)
class Finetuned:
    """What came of it.

    `rows` are heads of the leaderboard like others, `compared` the side-by-side table.
    """

    rows: pd.DataFrame  # as leaderboard.collect_heads
    # approach, inputs, settings, the metric, low, high, gain, gain_low, gain_high, minutes,
    # decision
    compared: pd.DataFrame
    notes: tuple[str, ...]
    trained: int  # candidates that this call trained


def pending(
    inputs: FinetuneInputs,
    board: pd.DataFrame,
    section: FinetuneSection,
    *,
    retry_failed: bool = False,
) -> list[Candidate]:
    """The candidates about which nothing has been decided yet; with `retry_failed`, those that
    failed too.
    """
    decided = _read(inputs.paths.finetune_decisions)
    candidates, _ = list_candidates(board, section, inputs.feature_inputs)
    return [
        one
        for one in candidates
        if not _settled(inputs.paths, one.key, decided, section, retry_failed)
    ]


def finetune_candidates(
    inputs: FinetuneInputs,
    board: pd.DataFrame,
    section: FinetuneSection,
    client: Client | None,
    console: Console,
    options: TaskOptions | None = None,
    *,
    retry_failed: bool = False,
) -> Finetuned:
    """Train what promises most per hour while the budget lasts, and compare. client: None where
    nothing is pending.

    options: how tasks are watched over; folds that other drivers on this run have are left to them.
    A candidate that failed stays a failed row, as a head does, until a call with `retry_failed`.
    """
    decided = _read(inputs.paths.finetune_decisions)
    candidates, notes = list_candidates(board, section, inputs.feature_inputs)
    waiting = [
        one
        for one in candidates
        if not _settled(inputs.paths, one.key, decided, section, retry_failed)
    ]
    inputs.paths.finetune.mkdir(parents=True, exist_ok=True)
    there = inputs.images[["content", "path"]].dropna().drop_duplicates("content").astype(str)
    listing = {"paths": dict(zip(there["content"], there["path"], strict=True))}
    if (
        waiting or _read(inputs.paths.finetune_images) != listing
    ):  # networks that are there predict by it too
        write_record(inputs.paths.finetune_images, listing)
    trained = 0
    if waiting:
        assert client is not None
        with task_leases(inputs.paths.leases) as leases:
            watched = replace(options or TaskOptions(), leases=leases)
            trained = _work(inputs, waiting, decided, section, client, console, watched)
    return Finetuned(
        rows=_rows(inputs, candidates),
        compared=_compared(inputs, board, candidates, decided),
        notes=(*notes, *_notes(candidates, decided)),
        trained=trained,
    )


def _settled(
    paths: RunPaths, key: str, decided: dict[str, Any], section: FinetuneSection, retry_failed: bool
) -> bool:
    """Whether a candidate is not to be looked at again: done, failed or refused; what did not fit
    may fit a larger budget.

    A decision whose network or results are gone or damaged is about nothing any more, and leaves
    `decided`: what is left of the training is used, the rest is trained again.
    """
    record = decided.get(key)
    if record is None:
        return False
    if not _has_its_files(paths, key, record["decision"]):
        del decided[key]
        return False
    if record["decision"] in ("failed", "refused") and retry_failed:
        return False
    return bool(
        record["decision"] != "over budget"
        or record.get("budget_minutes") == section.budget_minutes
    )


def _has_its_files(paths: RunPaths, key: str, decision: str) -> bool:
    """Whether what a decision is about is whole; what is damaged is removed, so that nobody takes
    it for trained.
    """
    if decision not in ("kept", "rolled back"):
        return not remove_damaged(paths.finetune_result(key))  # of one that failed: its failed rows
    for part in sorted(paths.finetune_parts(key).glob("fold*.h5")):
        remove_damaged(part)
    remove_damaged(paths.finetune_result(key))
    network = paths.finetune_model(key) / WEIGHTS
    if not network.exists() or is_sealed_file(network):
        there = network.exists() or decision == "rolled back"
    else:
        there = False
        network.unlink(missing_ok=True)
    return there and paths.finetune_result(key).exists()


def _work(
    inputs: FinetuneInputs,
    waiting: Sequence[Candidate],
    decided: dict[str, Any],
    section: FinetuneSection,
    client: Client,
    console: Console,
    options: TaskOptions,
) -> int:
    from headrace.pipelines.finetune.task import pilot  # imports torch

    workers = 1 if inputs.device != "cpu" else max(1, sum(client.nthreads().values()))
    folds = inputs.task.n_folds
    pilots: dict[str, Any] = {}
    jobs = {one.key: _job(inputs, one) for one in waiting}
    options.on_event(
        "stage", stage="finetune: pilots", total=len(waiting), unit="networks", tasks=len(waiting)
    )
    with ExitStack() as stack:
        advance = stack.enter_context(
            show_progress(console, "finetune: pilots", len(waiting), "networks")
        )
        named = ((f"pilot-{key}", job) for key, job in jobs.items())
        outcomes = stack.enter_context(closing(run_tasks(client, pilot, named, options=options)))
        for done, outcome in enumerate(outcomes, 1):
            advance(1)
            _require_machine(outcome)
            key = next(key for key, job in jobs.items() if job == outcome.job)
            if outcome.result is None:
                # Not finetuned: the head stays as it is, and the reason is on record.
                decided.update(
                    _decide(inputs.paths, key, {"decision": "refused", "reason": outcome.error})
                )
            else:
                pilots[key] = outcome.result
            options.on_event("progress", done=done, failed=done - len(pilots))
    allowed = None if section.budget_minutes is None else 60 * section.budget_minutes * workers
    measured: dict[str, list[float]] = {}
    left = {one.key: one for one in waiting if one.key in pilots}
    total = len(left)
    options.on_event(
        "stage", stage="finetune: train", total=total, unit="networks", tasks=total * (folds + 1)
    )
    with show_progress(console, "finetune: train", total, "networks") as advance:
        while left:
            costs = {key: training_seconds(one, pilots[key], folds) for key, one in left.items()}
            worth = {
                key: predicted_gain(one, inputs.metric, measured) / costs[key]
                for key, one in left.items()
            }
            key = max(left, key=lambda one: (worth[one], one))
            candidate = left.pop(key)
            # Other drivers on this run decide too, and what they spent is spent.
            spent = sum(
                one.get("seconds", 0.0) for one in _read(inputs.paths.finetune_decisions).values()
            )
            record: dict[str, Any] = {
                "label": candidate.label,
                "inputs": list(candidate.inputs),
                "settings": settings_text(candidate.spec),
                "pilot": pilots[key],
                "predicted_gain": predicted_gain(candidate, inputs.metric, measured),
                "predicted_seconds": costs[key],
            }
            if allowed is not None and spent + costs[key] > allowed:
                record |= {"decision": "over budget", "budget_minutes": section.budget_minutes}
            else:
                # Its own share of what is left, so that a candidate that is slower than its pilot
                # cannot take all.
                limit = None if allowed is None else (allowed - spent) / (folds + 1)
                patience = max(options.task_timeout_s, HUNG * costs[key] / (folds + 1))
                record |= _train(
                    inputs, candidate, client, limit, replace(options, task_timeout_s=patience)
                )
                if "gain" in record:
                    headroom = abs(
                        (1.0 if METRICS[inputs.metric].higher_is_better else 0.0)
                        - float(candidate.head[inputs.metric])
                    )
                    measured.setdefault(candidate.start, []).append(
                        record["gain"] / max(headroom, 1e-9)
                    )
            decided.update(_decide(inputs.paths, key, record))
            advance(1)
            failed = sum(
                decided[one]["decision"] in ("failed", "refused")
                for one in pilots
                if one not in left
            )
            options.on_event("progress", done=total - len(left), failed=failed)
    return len(pilots)


def _decide(paths: RunPaths, key: str, record: dict[str, Any]) -> dict[str, Any]:
    """Put a decision on record, beside those of other drivers; returns all.

    What was trained elsewhere meanwhile is not over budget here.
    """
    with lease(paths.finetune / "decisions.lock"):
        known = _read(paths.finetune_decisions)
        trained = known.get(key, {}).get("decision") in ("kept", "rolled back")
        if not (trained and record["decision"] in ("over budget", "refused")):
            known[key] = record
            write_record(paths.finetune_decisions, known)
    return known


def _require_machine(outcome: Outcome[Any, Any]) -> None:
    """Raise RunIncomplete where a full disk or the like ended a task: that decides nothing about
    the network.
    """
    if outcome.machine_fault:
        raise RunIncomplete(
            f"a network could not be trained here: {outcome.error}. Nothing was decided about it; "
            "what is finished is kept, and the same command goes on from there"
        )


def _train(
    inputs: FinetuneInputs,
    candidate: Candidate,
    client: Client,
    limit: float | None,
    options: TaskOptions,
) -> dict[str, Any]:
    """All folds; then, if the folds are better than the head, the network on all rows."""
    from headrace.pipelines.finetune.task import FoldJob, publish_result, train_fold

    job = _job(inputs, candidate)
    jobs = [FoldJob(job, fold, limit) for fold in range(inputs.task.n_folds)]
    done: dict[int, dict[str, Any]] = {}
    failures: dict[int, str] = {}

    def run(fold_jobs: Sequence[FoldJob]) -> None:
        named = ((f"finetune-{candidate.key}-{one.fold}", one) for one in fold_jobs)
        with closing(run_tasks(client, train_fold, named, options=options)) as outcomes:
            for outcome in outcomes:
                _require_machine(outcome)
                if outcome.result is None:
                    failures[outcome.job.fold] = outcome.error or "its worker died"
                else:
                    done[outcome.job.fold] = outcome.result

    run(jobs)
    record: dict[str, Any] = {"seconds": sum(one["seconds"] for one in done.values())}
    if failures:
        publish_result(job, failures | {REFIT: "not trained on all rows, because a fold failed"})
        return record | {"decision": "failed", "reason": next(iter(failures.values()))}
    publish_result(job, {})
    record |= compare(inputs, candidate)
    if record["gain"] <= 0:
        return record | {"decision": "rolled back"}
    best = [one["best_epoch"] for one in done.values()]
    run([FoldJob(job, REFIT, None, max(1, round(float(np.mean(best)))))])
    record["seconds"] += done.get(REFIT, {}).get("seconds", 0.0)
    publish_result(job, failures)
    if failures:
        return record | {"decision": "failed", "reason": failures[REFIT]}
    return record | {"decision": "kept"}


def compare(inputs: FinetuneInputs, candidate: Candidate) -> dict[str, Any]:
    """The network against its head on the same out-of-fold rows: both scores, and the gain with a
    paired 95 % interval.

    Scores are means over folds, as on the leaderboard; the interval is a bootstrap over rows, drawn
    within folds.
    """
    task, metric = inputs.task, inputs.metric
    network = read_bank(inputs.paths.finetune_result(candidate.key)).out_of_fold(candidate.spec)
    head = read_bank(candidate.head["path"]).out_of_fold(candidate.head["spec"])
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    folds = [np.flatnonzero(task.fold == number) for number in range(task.n_folds)]

    def gain(rows: Sequence[npt.NDArray[np.int64]]) -> float:
        scores = [
            [score(task.kind, task.target[own], predicted[own], metric) for own in rows]
            for predicted in (network, head)
        ]
        return sign * float(np.mean(scores[0]) - np.mean(scores[1]))

    draw = np.random.default_rng(0)
    resampled = [
        gain([draw.choice(own, len(own)) for own in folds])
        for _ in range(RESAMPLES if len(task.fold) < 20000 else 100)
    ]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return {"gain": gain(folds), "gain_low": float(low), "gain_high": float(high)}


def _job(inputs: FinetuneInputs, candidate: Candidate) -> Any:
    from headrace.pipelines.finetune.task import FinetuneJob

    return FinetuneJob(
        key=candidate.key,
        task=str(inputs.paths.task(inputs.task.digest)),
        images=str(inputs.paths.finetune_images),
        backbone=candidate.backbone,
        features=tuple(map(str, candidate.features)),
        split_maps=tuple(map(str, candidate.split_maps)),
        head_result=str(candidate.head["path"]) if candidate.spec.start == "head" else "",
        spec=candidate.spec,
        folder=str(inputs.paths.finetune_parts(candidate.key)),
        result=str(inputs.paths.finetune_result(candidate.key)),
        model=str(inputs.paths.finetune_model(candidate.key)),
        device=inputs.device,
    )


def _rows(inputs: FinetuneInputs, candidates: Sequence[Candidate]) -> pd.DataFrame:
    tables = []
    for one in candidates:
        path = inputs.paths.finetune_result(one.key)
        if path.exists():
            table = read_bank(path).table
            tables.append(
                table.assign(
                    path=str(path), inputs=pd.Series([one.inputs] * len(table), dtype=object)
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _compared(
    inputs: FinetuneInputs,
    board: pd.DataFrame,
    candidates: Sequence[Candidate],
    decided: Mapping[str, Any],
) -> pd.DataFrame:
    """The best head and every candidate, on the same rows."""
    best = board.iloc[0]
    found = [
        _line(
            inputs,
            "head",
            best["inputs"],
            f"{best['kind']} {best['settings']}",
            best["path"],
            best["spec"],
            {},
        )
    ]
    for one in candidates:
        record, path = decided.get(one.key, {}), inputs.paths.finetune_result(one.key)
        whole = path.exists() and record.get("decision") in ("kept", "rolled back")
        found.append(
            _line(
                inputs,
                one.label,
                one.inputs,
                settings_text(one.spec),
                str(path) if whole else None,
                spec_to_json(one.spec),
                record,
            )
        )
    return pd.DataFrame(found)


def _line(
    inputs: FinetuneInputs,
    label: str,
    names: Sequence[str],
    settings: str,
    path: str | None,
    spec: str,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    task, metric, nan = inputs.task, inputs.metric, float("nan")
    value = low = high = nan
    if path is not None:
        predicted = read_bank(path).out_of_fold(spec)
        folds = [np.flatnonzero(task.fold == number) for number in range(task.n_folds)]
        value = float(
            np.mean([score(task.kind, task.target[own], predicted[own], metric) for own in folds])
        )
        draw = np.random.default_rng(0)
        drawn = [np.concatenate([draw.choice(own, len(own)) for own in folds]) for _ in range(200)]
        scores = [score(task.kind, task.target[rows], predicted[rows], metric) for rows in drawn]
        low, high = (float(end) for end in np.nanquantile(scores, [0.025, 0.975]))
    return {
        "approach": label,
        "inputs": tuple(names),
        "settings": settings,
        metric: value,
        "low": low,
        "high": high,
        **{name: record.get(name, nan) for name in ("gain", "gain_low", "gain_high")},
        "minutes": record.get("seconds", nan) / 60,
        "decision": record.get("decision", "" if label == "head" else "not trained"),
        "reason": record.get("reason", ""),
    }


def _notes(candidates: Sequence[Candidate], decided: Mapping[str, Any]) -> list[str]:
    notes = []
    for one in candidates:
        record = decided.get(one.key, {})
        if reason := record.get("pilot", {}).get("no_split_reason"):
            notes.append(
                f"{one.label}, {settings_text(one.spec)}: runs from the images, not from the "
                f"cached map: {reason}"
            )
        if record.get("decision") in ("refused", "failed"):
            notes.append(
                f"{one.label}, {settings_text(one.spec)}: {record['decision']}: "
                f"{record.get('reason')}"
            )
    return notes


def _read(path: Path) -> dict[str, Any]:
    """A record of this stage; of a damaged one nothing is believed.

    Decisions are found again from the results, after pilots of seconds.
    """
    try:
        return read_record(path)
    except (OSError, RunDamaged):
        return {}
