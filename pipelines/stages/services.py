"""Services that stages share: console, log, task options, a Dask client opened at first use."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

from dask.distributed import Client
from rich.console import Console

from headrace.pipelines.cluster.clients import Role
from headrace.pipelines.cluster.submit import TaskOptions, announced
from headrace.pipelines.errors import InvalidInput

# From (role, device of the forward pass) to a context manager of a client.
ClientOpener = Callable[[Role, str], AbstractContextManager[Client]]


@dataclass(frozen=True)
class StageRecord:
    """One stage of one call."""

    name: str
    did: str
    seconds: float


@dataclass
class Services:
    """What every stage gets beside the run state; as a context, its workers end with the block."""

    console: Console
    options: TaskOptions  # its `on_event` is the run's task log
    # Called when a stage first has work for workers, so that a run in which nothing is missing
    # starts none.
    open_client: ClientOpener
    workers: int | None = None
    retry_failed: bool = False
    stages: list[StageRecord] = field(default_factory=list)
    _client: Client | None = field(default=None, init=False)
    _client_stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        self.options = announced(self.options, self.console)

    def client(self) -> Client:
        """Return the client whose workers extract on CPUs and train heads, opened at first use."""
        if self._client is None:
            self._client = self._client_stack.enter_context(self.open_client("train", "cpu"))
        return self._client

    def __enter__(self) -> "Services":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release_client()

    def release_client(self) -> None:
        """End the workers that `client` started, so that a cluster's jobs do not wait idle."""
        self._client = None
        self._client_stack.close()

    @contextmanager
    def timed(self, stage_name: str) -> Iterator[Callable[[str], None]]:
        """Record how long a stage takes. The stage calls the function that it gets with a summary
        of what it did.
        """
        started_at = time.perf_counter()
        summaries: list[str] = []
        yield summaries.append
        stage_summary = summaries[-1] if summaries else ""
        self.stages.append(StageRecord(stage_name, stage_summary, time.perf_counter() - started_at))


def opener_of(client: Client) -> ClientOpener:
    """Return an opener for a client that the caller has opened, and that stays open.

    Raises InvalidInput for one that cannot be used.
    """
    if client.asynchronous or client.status != "running":
        state = "asynchronous" if client.asynchronous else client.status
        raise InvalidInput(
            f"the Dask client is {state}. Give one that is open, dask.distributed.Client(), or "
            "leave `client` out"
        )
    return lambda role, device: nullcontext(client)
