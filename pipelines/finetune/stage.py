"""Fine-tuning of a run's candidates: pilots, training in the order of gain per second within a
budget, rollback.

A network that is not better than its head on the same validation rows is rolled back. Decisions are
written to `finetune/candidates.json`, and nothing that is decided there is done again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from dask.distributed import Client
from rich.console import Console

from headrace.cache.atomic_io import lease
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import is_sealed_file
from headrace.heads.data.task import REFIT, Task
from headrace.heads.evaluate.metrics import score, sign
from headrace.heads.evaluate.units import scored_rows
from headrace.heads.results import read_bank, remove_damaged
from headrace.heads.spec import HeadSpec
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import Outcome, TaskOptions, run_tasks
from headrace.pipelines.cluster.task_leases import task_leases
from headrace.pipelines.feature_input import FeatureInput
from headrace.pipelines.finetune.candidates import (
    Candidate,
    PilotResult,
    headroom,
    list_candidates,
    predicted_gain,
    training_seconds,
)
from headrace.pipelines.models.network import WEIGHTS
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.sections import FinetuneSection
from headrace.pipelines.recipe.settings_text import settings_text
from headrace.pipelines.records import RunDamaged, read_record, write_record

RESAMPLES = 1000  # of the rows, for the interval of a gain
# A fold counts as hung if it takes this many times as long as its pilot predicted, and longer than
# the task timeout.
HUNG_FACTOR = 4


@dataclass(frozen=True)
class FinetuneInputs:
    """The parts of a run that fine-tuning needs."""

    paths: RunPaths
    task: Task  # of the training rows
    metric: str
    feature_inputs: Mapping[str, FeatureInput]  # by name
    # content and path of every image, also of test images, which a selected network predicts
    images: pd.DataFrame
    device: str


@dataclass(frozen=True)
class FinetuneOutcome:
    """The networks that were fine-tuned, and the decision on each candidate."""

    rows: pd.DataFrame  # one row per network and fold, columns as by select.collect_heads
    # one row per candidate, after one for the best head; columns of `_comparison_row`
    compared: pd.DataFrame
    notes: tuple[str, ...]
    trained: int  # candidates that this call trained


def finetune_candidates(
    inputs: FinetuneInputs,
    board: pd.DataFrame,
    section: FinetuneSection,
    open_client: Callable[[], Client],
    console: Console,
    options: TaskOptions,
    *,
    retry_failed: bool = False,
) -> FinetuneOutcome:
    """Train the candidates that promise most per second within the budget, and compare them with
    their heads.

    A candidate that failed stays a failed row until a call with `retry_failed`.

    open_client: called if a candidate is undecided. options: of tasks; folds that another driver on
    this run has leased are left to it.
    """
    decisions = _read_record(inputs.paths.finetune_decisions)
    candidates, notes = list_candidates(board, section, inputs.feature_inputs)
    undecided = [
        candidate
        for candidate in candidates
        if not _is_settled(inputs.paths, candidate.key, decisions, section, retry_failed)
    ]
    inputs.paths.finetune.mkdir(parents=True, exist_ok=True)
    readable_images = (
        inputs.images[["content", "path"]].dropna().drop_duplicates("content").astype(str)
    )
    image_listing = {
        "paths": dict(zip(readable_images["content"], readable_images["path"], strict=True))
    }
    # Networks of earlier calls find their images by this listing too.
    if undecided or _read_record(inputs.paths.finetune_images) != image_listing:
        write_record(inputs.paths.finetune_images, image_listing)
    n_trained = 0
    if undecided:
        with task_leases(inputs.paths.leases) as leases:
            lease_options = replace(options, leases=leases)
            n_trained = _train_within_budget(
                inputs, undecided, decisions, section, open_client(), console, lease_options
            )
    return FinetuneOutcome(
        rows=_result_rows(inputs, candidates),
        compared=_comparison_table(inputs, board, candidates, decisions),
        notes=(*notes, *_decision_notes(candidates, decisions)),
        trained=n_trained,
    )


def _is_settled(
    paths: RunPaths,
    key: str,
    decisions: dict[str, Any],
    section: FinetuneSection,
    retry_failed: bool,
) -> bool:
    """Return whether the decision on a candidate stands; remove it from `decisions` if its files
    are gone or damaged.
    """
    decision = decisions.get(key)
    if decision is None:
        return False
    if not _has_its_files(paths, key, decision["decision"]):
        # Parts of the training that are left are used, the others trained again.
        del decisions[key]
        return False
    if decision["decision"] in ("failed", "refused") and retry_failed:
        return False
    # A candidate that did not fit another budget may fit this one.
    return bool(
        decision["decision"] != "over budget"
        or decision.get("budget_minutes") == section.budget_minutes
    )


def _has_its_files(paths: RunPaths, key: str, decision: str) -> bool:
    """Return whether the files of a decision are complete; remove damaged ones."""
    if decision not in ("kept", "rolled back"):
        # A failed candidate has a results file of failed rows, others have none.
        return not remove_damaged(paths.finetune_result(key))
    for part_path in sorted(paths.finetune_parts(key).glob("fold*.h5")):
        remove_damaged(part_path)
    remove_damaged(paths.finetune_result(key))
    weights_path = paths.finetune_model(key) / WEIGHTS
    if weights_path.exists() and not is_sealed_file(weights_path):
        weights_path.unlink(missing_ok=True)  # another driver may have removed it
        return False
    has_weights = weights_path.exists() or decision == "rolled back"
    return has_weights and paths.finetune_result(key).exists()


def _train_within_budget(
    inputs: FinetuneInputs,
    undecided: Sequence[Candidate],
    decisions: dict[str, Any],
    section: FinetuneSection,
    client: Client,
    console: Console,
    options: TaskOptions,
) -> int:
    """Run the pilots, then train the candidates in the order of expected gain per second until the
    budget is spent.

    Updates `decisions`; returns the number of candidates that were trained.
    """
    pilot_results = _run_pilots(inputs, undecided, decisions, client, console, options)
    n_folds, metric = inputs.task.n_folds, inputs.metric
    n_workers = 1 if inputs.device != "cpu" else max(1, sum(client.nthreads().values()))
    # Trainings run side by side on the workers, and their seconds are added up.
    budget_seconds = 60 * (section.budget_minutes or math.inf) * n_workers
    measured_shares: dict[str, list[float]] = {}
    remaining = {
        candidate.key: candidate for candidate in undecided if candidate.key in pilot_results
    }
    n_total, n_trained, n_failed = len(remaining), 0, 0
    n_tasks, title = n_total * (n_folds + 1), "finetune: train"
    options.on_event("stage", stage=title, total=n_total, unit="networks", tasks=n_tasks)
    with show_progress(console, title, n_total, "networks") as advance:
        while remaining:
            # Computed anew, because each finished candidate changes what the others promise.
            gains = {
                key: predicted_gain(candidate, metric, measured_shares)
                for key, candidate in remaining.items()
            }
            seconds = {
                key: training_seconds(candidate, pilot_results[key], n_folds)
                for key, candidate in remaining.items()
            }
            best_key = max(remaining, key=lambda key: (gains[key] / seconds[key], key))
            candidate = remaining.pop(best_key)
            record: dict[str, Any] = {
                "label": candidate.label,
                "inputs": list(candidate.inputs),
                "settings": settings_text(candidate.spec),
                "pilot": asdict(pilot_results[best_key]),
                "predicted_gain": gains[best_key],
                "predicted_seconds": seconds[best_key],
            }
            seconds_left = budget_seconds - _spent_seconds(inputs.paths)
            if seconds[best_key] > seconds_left:
                record |= {"decision": "over budget", "budget_minutes": section.budget_minutes}
            else:
                n_trained += 1
                record |= _train_folds(
                    inputs, candidate, client, seconds[best_key], seconds_left, options
                )
                if "gain" in record:
                    # The floor is for a head without a single error.
                    measured_share = record["gain"] / max(headroom(candidate, metric), 1e-9)
                    measured_shares.setdefault(candidate.start, []).append(measured_share)
            decisions.update(_record_decision(inputs.paths, best_key, record))
            advance(1)
            n_failed += record["decision"] == "failed"
            options.on_event("progress", done=n_total - len(remaining), failed=n_failed)
    return n_trained


def _spent_seconds(paths: RunPaths) -> float:
    # From disk, because other drivers on this run spend the same budget.
    decisions = _read_record(paths.finetune_decisions).values()
    return float(sum(decision.get("seconds", 0.0) for decision in decisions))


def _run_pilots(
    inputs: FinetuneInputs,
    candidates: Sequence[Candidate],
    decisions: dict[str, Any],
    client: Client,
    console: Console,
    options: TaskOptions,
) -> dict[str, PilotResult]:
    """Return the results of successful pilots, by key; record the other candidates as refused."""
    from headrace.pipelines.finetune.task import pilot  # imports torch

    pilot_results: dict[str, PilotResult] = {}
    jobs = [_finetune_job(inputs, candidate) for candidate in candidates]
    keyed_jobs = ((f"pilot-{job.key}", job) for job in jobs)
    n_total, title = len(candidates), "finetune: pilots"
    options.on_event("stage", stage=title, total=n_total, unit="networks", tasks=n_total)
    with (
        show_progress(console, title, n_total, "networks") as advance,
        closing(run_tasks(client, pilot, keyed_jobs, options=options)) as outcomes,
    ):
        for n_done, outcome in enumerate(outcomes, 1):
            advance(1)
            _require_machine(outcome)
            if outcome.result is None:
                refusal = {"decision": "refused", "reason": outcome.error}
                decisions.update(_record_decision(inputs.paths, outcome.job.key, refusal))
            else:
                pilot_results[outcome.job.key] = outcome.result
            options.on_event("progress", done=n_done, failed=n_done - len(pilot_results))
    return pilot_results


def _record_decision(paths: RunPaths, key: str, record: dict[str, Any]) -> dict[str, Any]:
    """Record a decision and return all, with those of other drivers."""
    with lease(paths.finetune / "decisions.lock"):
        decisions = _read_record(paths.finetune_decisions)
        # By another driver, since this one has read the decisions.
        already_trained = decisions.get(key, {}).get("decision") in ("kept", "rolled back")
        if not (already_trained and record["decision"] in ("over budget", "refused")):
            decisions[key] = record
            write_record(paths.finetune_decisions, decisions)
    return decisions


def _require_machine(outcome: Outcome[Any, Any]) -> None:
    """Raise HeadraceError if the machine's fault (a full disk) ended a task."""
    # It says nothing about the candidate, whose decision would outlast the fault.
    if outcome.machine_fault:
        raise HeadraceError(
            f"a network could not be trained here: {outcome.error}. Nothing was decided about it; "
            "what is finished is kept, and the same command goes on from there"
        )


def _train_folds(
    inputs: FinetuneInputs,
    candidate: Candidate,
    client: Client,
    predicted_seconds: float,
    seconds_left: float,
    options: TaskOptions,
) -> dict[str, Any]:
    """Train all folds and, if they are better than the head, the network on all rows. Return the
    decision with its figures.

    predicted_seconds, seconds_left: of all trainings; by the pilot, and by the budget.
    """
    from headrace.pipelines.finetune.task import FoldJob, publish_result, train_fold

    job, n_trainings = _finetune_job(inputs, candidate), inputs.task.n_folds + 1
    # Folds may take what is left of the budget, each an equal share of it, so that a candidate
    # slower than its pilot cannot exceed the budget.
    fold_jobs = [
        FoldJob(job, fold, seconds_left / n_trainings) for fold in range(inputs.task.n_folds)
    ]
    timeout_s = max(options.task_timeout_s, HUNG_FACTOR * predicted_seconds / n_trainings)
    options = replace(options, task_timeout_s=timeout_s)
    results_by_fold: dict[int, dict[str, Any]] = {}
    failure_reasons: dict[int, str] = {}

    def run(fold_jobs: Sequence[FoldJob]) -> None:
        keyed_jobs = (
            (f"finetune-{candidate.key}-{fold_job.fold}", fold_job) for fold_job in fold_jobs
        )
        with closing(run_tasks(client, train_fold, keyed_jobs, options=options)) as outcomes:
            for outcome in outcomes:
                _require_machine(outcome)
                if outcome.result is None:
                    failure_reasons[outcome.job.fold] = outcome.error or "its worker died"
                else:
                    results_by_fold[outcome.job.fold] = outcome.result

    run(fold_jobs)
    record: dict[str, Any] = {
        "seconds": sum(result["seconds"] for result in results_by_fold.values())
    }
    if failure_reasons:
        refit_reason = "not trained on all rows, because a fold failed"
        publish_result(job, failure_reasons | {REFIT: refit_reason})
        return record | {"decision": "failed", "reason": next(iter(failure_reasons.values()))}
    publish_result(job, {})
    record |= compare_with_head(inputs, candidate)
    # The network on all rows comes after the comparison, so that a rollback costs only the folds.
    if record["gain"] <= 0:
        return record | {"decision": "rolled back"}
    best_epochs = [result["best_epoch"] for result in results_by_fold.values()]
    run([FoldJob(job, REFIT, epochs=max(1, round(float(np.mean(best_epochs)))))])
    record["seconds"] += results_by_fold.get(REFIT, {}).get("seconds", 0.0)
    publish_result(job, failure_reasons)
    if failure_reasons:
        return record | {"decision": "failed", "reason": failure_reasons[REFIT]}
    return record | {"decision": "kept"}


def compare_with_head(inputs: FinetuneInputs, candidate: Candidate) -> dict[str, Any]:
    """Return the gain of the network over its head on the same out-of-fold rows, with a paired 95 %
    interval: gain, gain_low, gain_high.

    Scores are means over folds, as on the leaderboard. The interval is a bootstrap over rows, or
    units if the task has them, drawn within folds.
    """
    task, metric = inputs.task, inputs.metric
    results_path, head = inputs.paths.finetune_result(candidate.key), candidate.head
    network_folds = _scored_folds(task, results_path, candidate.spec)
    head_folds = _scored_folds(task, head["path"], head["spec"])

    def gain(rows_by_fold: Sequence[npt.NDArray[np.int64]]) -> float:
        scores = [
            [
                score(task.kind, target[rows], predicted[rows], metric)
                for rows, (target, predicted) in zip(rows_by_fold, folds, strict=True)
            ]
            for folds in (network_folds, head_folds)
        ]
        return sign(metric) * float(np.mean(scores[0]) - np.mean(scores[1]))

    rows_of_folds = [np.arange(len(target)) for target, _ in network_folds]
    generator = np.random.default_rng(0)
    resampled_gains = [
        gain([generator.choice(fold_rows, len(fold_rows)) for fold_rows in rows_of_folds])
        # The spread over many rows is known well by fewer draws, each of which takes longer.
        for _ in range(RESAMPLES if len(task.fold) < 20000 else 100)
    ]
    low, high = np.nanquantile(resampled_gains, [0.025, 0.975])
    return {"gain": gain(rows_of_folds), "gain_low": float(low), "gain_high": float(high)}


def _finetune_job(inputs: FinetuneInputs, candidate: Candidate) -> Any:
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


def _result_rows(inputs: FinetuneInputs, candidates: Sequence[Candidate]) -> pd.DataFrame:
    head_tables = []
    for candidate in candidates:
        results_path = inputs.paths.finetune_result(candidate.key)
        if results_path.exists():
            head_table = read_bank(results_path).table
            inputs_column = pd.Series([candidate.inputs] * len(head_table), dtype=object)
            head_tables.append(head_table.assign(path=str(results_path), inputs=inputs_column))
    return pd.concat(head_tables, ignore_index=True) if head_tables else pd.DataFrame()


def _comparison_table(
    inputs: FinetuneInputs,
    board: pd.DataFrame,
    candidates: Sequence[Candidate],
    decisions: Mapping[str, Any],
) -> pd.DataFrame:
    """Return one row for the best head and one for each candidate, scored on the same images."""
    best_head = board.iloc[0]
    head_settings = f"{best_head['kind']} {best_head['settings']}"
    head_files = best_head["path"], best_head["spec"]
    rows = [_comparison_row(inputs, "head", best_head["inputs"], head_settings, *head_files, {})]
    for candidate in candidates:
        record, label = decisions.get(candidate.key, {}), candidate.label
        path, spec = inputs.paths.finetune_result(candidate.key), candidate.spec
        is_complete = path.exists() and record.get("decision") in ("kept", "rolled back")
        scored_path, settings = path if is_complete else None, settings_text(spec)
        rows.append(
            _comparison_row(inputs, label, candidate.inputs, settings, scored_path, spec, record)
        )
    return pd.DataFrame(rows)


def _scored_folds(
    task: Task, results_path: str | Path, spec: HeadSpec | str
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Return the targets and predictions of each fold's rows, or units if the task has them."""
    predicted = read_bank(results_path).out_of_fold_predictions(spec)
    rows_of_folds = (np.flatnonzero(task.fold == fold) for fold in range(task.n_folds))
    return [scored_rows(task, rows, predicted[rows]) for rows in rows_of_folds]


def _comparison_row(
    inputs: FinetuneInputs,
    label: str,
    input_names: Sequence[str],
    settings: str,
    results_path: str | Path | None,
    spec: HeadSpec | str,
    decision: Mapping[str, Any],
) -> dict[str, Any]:
    task, metric, nan = inputs.task, inputs.metric, float("nan")
    value = low = high = nan
    if results_path is not None:
        folds = _scored_folds(task, results_path, spec)
        value = float(
            np.mean([score(task.kind, target, predicted, metric) for target, predicted in folds])
        )
        target, predicted = (np.concatenate(parts) for parts in zip(*folds, strict=True))
        fold_ends = np.cumsum([len(fold_target) for fold_target, _ in folds])
        rows_of_folds = np.split(np.arange(fold_ends[-1]), fold_ends[:-1])
        generator = np.random.default_rng(0)
        scores = []
        # Each draw scores all rows once more, which takes seconds with a large validation set.
        for _ in range(200):
            draws = [generator.choice(fold_rows, len(fold_rows)) for fold_rows in rows_of_folds]
            drawn = np.concatenate(draws)
            scores.append(score(task.kind, target[drawn], predicted[drawn], metric))
        low, high = map(float, np.nanquantile(scores, [0.025, 0.975]))
    return {
        "approach": label,
        "inputs": tuple(input_names),
        "settings": settings,
        metric: value,
        "low": low,
        "high": high,
        **{name: decision.get(name, nan) for name in ("gain", "gain_low", "gain_high")},
        "minutes": decision.get("seconds", nan) / 60,
        "decision": decision.get("decision", "" if label == "head" else "not trained"),
        "reason": decision.get("reason", ""),
    }


def _decision_notes(candidates: Sequence[Candidate], decisions: Mapping[str, Any]) -> list[str]:
    notes = []
    for candidate in candidates:
        decision = decisions.get(candidate.key, {})
        name = f"{candidate.label}, {settings_text(candidate.spec)}"
        if no_split_reason := decision.get("pilot", {}).get("no_split_reason"):
            notes.append(
                f"{name}: runs from the images, not from the cached map: {no_split_reason}"
            )
        if decision.get("decision") in ("refused", "failed"):
            notes.append(f"{name}: {decision['decision']}: {decision.get('reason')}")
    return notes


def _read_record(record_path: Path) -> dict[str, Any]:
    try:
        return read_record(record_path)
    # A damaged record counts as empty: decisions are made again from the results of training, at
    # the cost of pilots, which take seconds.
    except (OSError, RunDamaged):
        return {}
