"""The stage that trains: banks of heads as tasks, each published by the worker that trained it."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from math import prod
from pathlib import Path

import pandas as pd

from headrace.heads.bank import GPU_KINDS, BankJob, publish_failure, train_bank
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cluster.progress import stage
from headrace.pipelines.cluster.submit import RunIncomplete, announced, run_tasks
from headrace.pipelines.cluster.task_leases import task_leases
from headrace.pipelines.planning.cost_model import PROBE_S, PROBE_SPECS
from headrace.pipelines.planning.devices import find_heads_device
from headrace.pipelines.planning.leaderboard import collect_heads
from headrace.pipelines.planning.plan import fingerprints_of
from headrace.pipelines.planning.run_state import RunState, replan_heads
from headrace.pipelines.stages.services import Services


def train(state: RunState, services: Services) -> RunState:
    """Return the state once the missing heads are trained.

    Raises RunIncomplete when a bank failed. A head that fails is a row with its error, also one
    that takes its worker down or never ends.
    """
    with services.timed("train") as did:
        if not state.plan.banks:
            did("nothing missing")
            return state
        device = find_heads_device(state.recipe, services.workers)
        # A large run begins with a little of everything, to know how to cut the rest into banks.
        if (probe := probe_of(state)) is not None:
            _train_banks(probe, services, device)
            state = replan_heads(state, retry_failed=services.retry_failed)
        _train_banks(state, services, device)
        did(
            f"{state.plan.heads_new:,} heads in {len(state.plan.banks):,} banks, and each setting "
            "once on all training rows"
        )
        return state


def trained_heads(state: RunState) -> tuple[pd.DataFrame, str, dict[str, int], int]:
    """Return the heads that are trained, the metric, each input's width, and the number of folds,
    as `rank_heads` takes them.
    """
    plan, task = state.plan, state.dataset.train
    fingerprints = fingerprints_of(plan.features)
    heads = collect_heads(state.paths.banks, plan.requested, fingerprints, task.digest)
    widths = {feature.name: prod(feature.shape) for feature in plan.features}
    return heads, state.metric, widths, task.n_folds


def _train_banks(state: RunState, services: Services, device: str) -> None:
    """Train the plan's banks on workers. Raises RunIncomplete when one failed."""
    plan, client, console = state.plan, services.client(), services.console
    options = announced(services.options, console)
    jobs = bank_jobs(state, device)
    assumed = {
        job.result: (bank.kind, bank.assumed_s) for job, bank in zip(jobs, plan.banks, strict=True)
    }
    failures: list[str] = []
    done = failed = 0
    options.on_event("stage", stage="train", total=plan.heads_new, unit="heads", tasks=len(jobs))
    with ExitStack() as stack:
        leases = stack.enter_context(task_leases(state.paths.leases))
        advance = stack.enter_context(stage(console, "train", plan.heads_new, "heads"))
        keyed = ((bank_key(job), job) for job in jobs)
        watched = replace(options, leases=leases)
        outcomes = stack.enter_context(
            closing(run_tasks(client, train_bank, keyed, options=watched, split=halves))
        )
        for outcome in outcomes:
            if outcome.fatal:
                publish_failure(outcome.job, outcome.error or "")
                failed += len(outcome.job.specs) * plan.n_folds
            elif outcome.result is None:
                failures.append(outcome.error or "")
            else:
                failed += outcome.result["failed"]
                if outcome.job.result in assumed and not outcome.result["skipped"]:
                    kind, seconds = assumed[outcome.job.result]
                    options.on_event(
                        "cost", kind=kind, assumed_s=seconds, seconds=outcome.result["seconds"]
                    )
            heads = len(outcome.job.specs) * plan.n_folds
            done += heads
            advance(heads, {"failed": failed})
            options.on_event("progress", done=done, failed=failed)
    if failures:
        raise RunIncomplete(
            f"{len(failures):,} of {len(jobs):,} banks failed; the others are kept, and the same "
            f"command tries these again. The first reason: {failures[0]}"
        )


def probe_of(state: RunState) -> RunState | None:
    """Return the state with a small bank of each kind whose cost nobody has measured; None where
    the run is too small to care.
    """
    plan = state.plan
    unknown = [bank for bank in plan.banks if bank.kind in plan.unmeasured and not bank.halving]
    if sum(bank.assumed_s for bank in unknown) < PROBE_S:
        return None
    small = tuple(
        replace(
            bank,
            specs=bank.specs[:PROBE_SPECS],
            assumed_s=bank.assumed_s * PROBE_SPECS / len(bank.specs),
        )
        for bank in {bank.kind: bank for bank in reversed(unknown)}.values()
        if len(bank.specs) > PROBE_SPECS
    )
    heads = plan.n_folds * sum(len(bank.specs) for bank in small)
    if not small:
        return None
    return replace(state, plan=replace(plan, banks=small, heads_new=heads))


def bank_jobs(state: RunState, device: str = "cpu") -> list[BankJob]:
    """Return a job for each bank of the plan. device: of the kinds that can make use of a GPU."""
    task = str(state.paths.task(state.dataset.train.digest))
    return [
        BankJob(
            task=task,
            features=tuple(str(path) for name in bank.inputs for path in state.directories[name]),
            halving=bank.halving,
            specs=bank.specs,
            device=device if bank.kind in GPU_KINDS else "cpu",
            result=str(state.paths.bank(bank.group, bank.key)),
        )
        for bank in state.plan.banks
    ]


def bank_key(job: BankJob) -> str:
    """Names the bank's work: its results file."""
    return f"bank-{Path(job.result).stem}"


def halves(job: BankJob) -> Sequence[tuple[str, BankJob]]:
    """A bank's two halves, with their names; nothing for a bank of one spec."""
    middle = len(job.specs) // 2
    parts = [part for part in (job.specs[:middle], job.specs[middle:]) if middle]
    made = [replace(job, specs=part, result=_part_of(job.result, part)) for part in parts]
    return [(bank_key(half), half) for half in made]


def _part_of(result: str, specs: Sequence[object]) -> str:
    """The results file of a part: of the same group, so that it is found, under a name that says
    what it is part of.
    """
    path = Path(result)
    group, _, key = path.stem.rpartition("-")
    text = "\0".join([key, *(spec_to_json(spec) for spec in specs)])  # type: ignore[arg-type]
    return str(path.with_name(f"{group}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.h5"))
