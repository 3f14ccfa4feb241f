"""Training the small banks that evidence needs and no leaderboard shows."""

from collections.abc import Sequence
from pathlib import Path

from dask.distributed import Client
from rich.console import Console

from headrace.cache import HeadraceError
from headrace.heads import BankJob, train_bank
from headrace.pipelines.progress import stage
from headrace.pipelines.submit import run_tasks


class EvidenceIncomplete(HeadraceError):
    """A bank that evidence needs could not be trained; the others are kept."""


def train_banks(jobs: Sequence[BankJob], client: Client, console: Console, what: str) -> None:
    """Train the banks on the client's workers; what each publishes stays. Raises EvidenceIncomplete when one fails."""
    with stage(console, what, len(jobs), "banks") as advance:
        named = ((f"{what}-{Path(job.result).parent.name}-{Path(job.result).stem}", job) for job in jobs)
        for outcome in run_tasks(client, train_bank, named):
            if outcome.error:
                raise EvidenceIncomplete(
                    f"a bank of the stage {what} failed: {outcome.error}. The others are kept; the same command tries again"
                )
            advance(1)
