"""Training the small banks that evidence needs and no leaderboard shows."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from dask.distributed import Client
from rich.console import Console

from headrace.cache.errors import HeadraceError
from headrace.heads.bank import BankJob, train_bank
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import TaskOptions, run_tasks
from headrace.pipelines.cluster.task_leases import task_leases


class EvidenceIncomplete(HeadraceError):
    """A bank that evidence needs could not be trained; the others are kept."""


def train_banks(
    jobs: Sequence[BankJob],
    client: Client,
    console: Console,
    what: str,
    options: TaskOptions | None = None,
    shared: Path | None = None,
) -> None:
    """Train the banks on the client's workers; what each publishes stays.

    Raises EvidenceIncomplete when one fails.

    shared: the directory of the task leases by which several drivers share the banks.
    """
    options = options or TaskOptions()
    options.on_event("stage", stage=what, total=len(jobs), unit="banks", tasks=len(jobs))
    with ExitStack() as stack:
        if shared is not None:
            options = replace(options, leases=stack.enter_context(task_leases(shared)))
        advance = stack.enter_context(show_progress(console, what, len(jobs), "banks"))
        name = what.replace(" ", "-")
        named = (
            (f"{name}-{Path(job.result).parent.name}-{Path(job.result).stem}", job) for job in jobs
        )
        outcomes = stack.enter_context(
            closing(run_tasks(client, train_bank, named, options=options))
        )
        for done, outcome in enumerate(outcomes, 1):
            if outcome.error:
                raise EvidenceIncomplete(
                    f"a bank of the stage {what} failed: {outcome.error}. The others are kept; the "
                    "same command tries again"
                )
            advance(1)
            options.on_event("progress", done=done, failed=0)
