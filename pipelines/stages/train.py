"""The stage that trains: banks of heads as tasks, each published by the worker that trained it."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from dask.distributed import Client
from rich.console import Console

from headrace.heads.bank import GPU_KINDS, BankJob, publish_failure, train_bank
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cluster.progress import stage
from headrace.pipelines.cluster.submit import RunIncomplete, TaskOptions, announced, run_tasks
from headrace.pipelines.cluster.task_leases import claims
from headrace.pipelines.planning.cost_model import PROBE_S, PROBE_SPECS
from headrace.pipelines.planning.run_state import Survey


def train_missing(
    found: Survey,
    client: Client,
    console: Console,
    options: TaskOptions | None = None,
    device: str = "cpu",
) -> None:
    """Train the banks that are missing. Raises RunIncomplete when a bank failed.

    A head that fails is a row with its error, also one that takes its worker down or never ends.
    """
    plan, options = found.plan, announced(options or TaskOptions(), console)
    jobs = bank_jobs(found, device)
    assumed = {
        job.result: (bank.kind, bank.assumed_s) for job, bank in zip(jobs, plan.banks, strict=True)
    }
    failures: list[str] = []
    done = failed = 0
    options.tell("stage", stage="train", total=plan.heads_new, unit="heads", tasks=len(jobs))
    with ExitStack() as stack:
        ours = stack.enter_context(claims(found.paths.claims))
        advance = stack.enter_context(stage(console, "train", plan.heads_new, "heads"))
        keyed = ((bank_key(job), job) for job in jobs)
        watched = replace(options, claims=ours)
        outcomes = stack.enter_context(
            closing(run_tasks(client, train_bank, keyed, options=watched, split=halves))
        )
        for outcome in outcomes:
            if outcome.fatal:
                publish_failure(outcome.job, outcome.error or "")
                failed += len(outcome.job.specs) * plan.folds
            elif outcome.result is None:
                failures.append(outcome.error or "")
            else:
                failed += outcome.result["failed"]
                if outcome.job.result in assumed and not outcome.result["skipped"]:
                    kind, seconds = assumed[outcome.job.result]
                    options.tell(
                        "cost", kind=kind, assumed_s=seconds, seconds=outcome.result["seconds"]
                    )
            heads = len(outcome.job.specs) * plan.folds
            done += heads
            advance(heads, {"failed": failed})
            options.tell("progress", done=done, failed=failed)
    if failures:
        raise RunIncomplete(
            f"{len(failures):,} of {len(jobs):,} banks failed; the others are kept, and the same "
            f"command tries these again. The first reason: {failures[0]}"
        )


def probe(found: Survey) -> Survey | None:
    """A survey with a small bank of each kind whose cost nobody has measured; None where the run is
    too small to care.
    """
    plan = found.plan
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
    heads = plan.folds * sum(len(bank.specs) for bank in small)
    return replace(found, plan=replace(plan, banks=small, heads_new=heads)) if small else None


def bank_jobs(found: Survey, device: str = "cpu") -> list[BankJob]:
    """What workers are given for the banks of the plan. device: of the kinds that can make use of a
    GPU.
    """
    task = str(found.paths.task(found.dataset.train.digest))
    return [
        BankJob(
            task=task,
            features=tuple(str(path) for name in bank.inputs for path in found.directories[name]),
            halving=bank.halving,
            specs=bank.specs,
            device=device if bank.kind in GPU_KINDS else "cpu",
            result=str(found.paths.bank(bank.group, bank.key)),
        )
        for bank in found.plan.banks
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
