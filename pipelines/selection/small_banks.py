"""Training of the small banks that selection and advice measure with; no leaderboard shows them."""

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


def train_banks(
    jobs: Sequence[BankJob],
    client: Client,
    console: Console,
    stage_name: str,
    leases_folder: Path,
    options: TaskOptions | None = None,
) -> None:
    """Train the banks on the client's workers; each publishes its results file.

    leases_folder: of task leases, by which several drivers share the work. Raises HeadraceError if
    a bank fails; the results of the others stay.
    """
    options = options or TaskOptions()
    options.on_event("stage", stage=stage_name, total=len(jobs), unit="banks", tasks=len(jobs))
    with ExitStack() as stack:
        options = replace(options, leases=stack.enter_context(task_leases(leases_folder)))
        advance = stack.enter_context(show_progress(console, stage_name, len(jobs), "banks"))
        task_prefix = stage_name.replace(" ", "-")
        named_jobs = (
            (f"{task_prefix}-{Path(job.result).parent.name}-{Path(job.result).stem}", job)
            for job in jobs
        )
        outcomes = stack.enter_context(
            closing(run_tasks(client, train_bank, named_jobs, options=options))
        )
        for n_done, outcome in enumerate(outcomes, 1):
            if outcome.error:
                raise HeadraceError(
                    f"a bank of the stage {stage_name} failed: {outcome.error}. The others are "
                    "kept; the same command tries again"
                )
            advance(1)
            options.on_event("progress", done=n_done, failed=0)
