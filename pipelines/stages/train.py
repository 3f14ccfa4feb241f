"""The stage that trains heads: banks as tasks, each published by the worker that trained it."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.heads.bank import BankJob, publish_failure, train_bank
from headrace.heads.data.side_columns import SIDE_COLUMNS, taps_of
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.spec import HeadSpec, spec_to_json
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import run_tasks
from headrace.pipelines.cluster.task_leases import task_leases
from headrace.pipelines.planning.cost_model import PROBE_S, PROBE_SPECS
from headrace.pipelines.planning.devices import find_heads_device
from headrace.pipelines.planning.run_state import RunState, replan_heads
from headrace.pipelines.stages.services import Services


def train(state: RunState, services: Services) -> RunState:
    """Train the missing heads, and return the state after that. Raises HeadraceError if a bank
    failed; a head that fails is a row with its error.
    """
    with services.timed("train") as report_done:
        if not state.plan.banks:
            report_done("nothing missing")
            return state
        heads_device = find_heads_device(state.recipe, services.workers)
        # A large run begins with a small bank of each kind, whose times say how to cut the rest.
        if (probe_state := probe_of(state)) is not None:
            _train_banks(probe_state, services, heads_device)
            state = replan_heads(state, retry_failed=services.retry_failed)
        _train_banks(state, services, heads_device)
        report_done(
            f"{count_text(state.plan.heads_new, 'head')} in "
            f"{count_text(len(state.plan.banks), 'bank')}, and each setting once on all training "
            "rows"
        )
        return state


def _train_banks(state: RunState, services: Services, device: str) -> None:
    plan, client, console = state.plan, services.client(), services.console
    options = services.options
    jobs = bank_jobs(state, device)
    assumed_costs = {
        job.result: (bank.kind, bank.assumed_s) for job, bank in zip(jobs, plan.banks, strict=True)
    }
    bank_failures: list[str] = []
    n_done = n_failed = 0
    options.on_event("stage", stage="train", total=plan.heads_new, unit="heads", tasks=len(jobs))
    with (
        task_leases(state.paths.leases) as leases,
        show_progress(console, "train", plan.heads_new, "heads") as advance,
        closing(
            run_tasks(
                client,
                train_bank,
                ((bank_key(job), job) for job in jobs),
                options=replace(options, leases=leases),
                split=split_bank,
            )
        ) as outcomes,
    ):
        for outcome in outcomes:
            n_heads = len(outcome.job.specs) * plan.n_folds
            if outcome.fatal:
                # A head that kills its worker, or never ends, is a row with its error too.
                publish_failure(outcome.job, outcome.error or "")
                n_failed += n_heads
            elif outcome.result is None:
                bank_failures.append(outcome.error or "")
            else:
                n_failed += outcome.result.failed
                if outcome.job.result in assumed_costs and not outcome.result.skipped:
                    kind, assumed_s = assumed_costs[outcome.job.result]
                    seconds = outcome.result.seconds
                    options.on_event("cost", kind=kind, assumed_s=assumed_s, seconds=seconds)
            n_done += n_heads
            advance(n_heads, {"failed": n_failed})
            options.on_event("progress", done=n_done, failed=n_failed)
    if bank_failures:
        raise HeadraceError(
            f"{len(bank_failures):,} of {count_text(len(jobs), 'bank')} failed; the others are "
            f"kept, and the same command tries these again. The first reason: {bank_failures[0]}"
        )


def probe_of(state: RunState) -> RunState | None:
    """Return the state with a small bank of each kind whose cost was never measured; None if the
    run is too small for that.
    """
    plan = state.plan
    unmeasured_banks = [
        bank for bank in plan.banks if bank.kind in plan.unmeasured and not bank.halving
    ]
    if sum(bank.assumed_s for bank in unmeasured_banks) < PROBE_S:
        return None
    probe_banks = tuple(
        replace(
            bank,
            specs=bank.specs[:PROBE_SPECS],
            assumed_s=bank.assumed_s * PROBE_SPECS / len(bank.specs),
        )
        # One bank of each kind: the first, so that each call takes the same.
        for bank in {bank.kind: bank for bank in reversed(unmeasured_banks)}.values()
        if len(bank.specs) > PROBE_SPECS
    )
    return replace(state, plan=replace(plan, banks=probe_banks)) if probe_banks else None


def bank_jobs(state: RunState, device: str) -> list[BankJob]:
    """Return a job for each bank of the plan. device: for kinds of head that can use a GPU."""
    task = state.dataset.train
    task_path = str(state.paths.task(task.digest))
    side_path = None if task.side is None else str(state.paths.side_columns(task.side.fingerprint))
    return [
        BankJob(
            task=task_path,
            features=tuple(
                str(feature_path)
                for input_name in taps_of(bank.inputs)
                for feature_path in state.feature_paths[input_name]
            ),
            halving=bank.halving,
            specs=bank.specs,
            device=device if HEAD_KINDS[bank.kind].uses_gpu else "cpu",
            result=str(state.paths.bank(bank.group, bank.key)),
            side_columns=side_path if SIDE_COLUMNS in bank.inputs else None,
        )
        for bank in state.plan.banks
    ]


def bank_key(job: BankJob) -> str:
    """Return the name of a bank's task, from its results file."""
    return f"bank-{Path(job.result).stem}"


def split_bank(job: BankJob) -> Sequence[tuple[str, BankJob]]:
    """Return the two halves of a bank with their names; [] for a bank of one spec."""
    n_first = len(job.specs) // 2
    if not n_first:
        return []
    half_jobs = [
        replace(job, specs=half, result=_part_results_path(job.result, half))
        for half in (job.specs[:n_first], job.specs[n_first:])
    ]
    return [(bank_key(half_job), half_job) for half_job in half_jobs]


def _part_results_path(results_path: str, specs: Sequence[HeadSpec]) -> str:
    """Return the results file of a part of a bank: in the same group, so that it is found, under a
    hash of the whole and the part.
    """
    whole_path = Path(results_path)
    group, _, specs_key = whole_path.stem.rpartition("-")
    hashed_text = "\0".join([specs_key, *map(spec_to_json, specs)])
    part_key = hashlib.sha256(hashed_text.encode()).hexdigest()[:16]
    return str(whole_path.with_name(f"{group}-{part_key}.h5"))
