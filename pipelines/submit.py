"""Runs many small tasks on a Dask client: a window in flight, each outcome handed back as it comes, nothing held.

Futures that are held after they finish are executed again when their worker dies; with a window that releases each at
once, a finished task runs exactly once. The window is as wide as there are threads, no wider: Dask blames every task
that a dead worker had been given, the waiting ones too, and tasks of seconds do not notice the few milliseconds
between them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dask.distributed import Client, as_completed

Job = TypeVar("Job")
Result = TypeVar("Result")

MAX_ATTEMPTS = 3  # a task whose worker died is given to another this often before it counts as failed


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a task: a result, or the reason why there is none."""

    job: Job
    result: Result | None
    error: str | None


def run_tasks(
    client: Client,
    function: Callable[[Job], Result],
    jobs: Iterable[tuple[str, Job]],
) -> Iterator[Outcome[Job, Result]]:
    """Yield the outcome of `function(job)` for every (key, job), in the order in which they finish.

    The function is a module-level one, takes paths and specs, publishes what it makes, and returns something small.
    A task whose worker dies is tried again; one that raises is not, for it would raise again.
    """
    waiting = deque(jobs)
    attempts: dict[str, int] = {}
    flying: dict[Any, tuple[str, Job]] = {}
    finished = as_completed([])

    def launch(key: str, job: Job) -> None:
        attempts[key] = attempts.get(key, 0) + 1
        future = client.submit(function, job, key=f"{key}-{attempts[key]}", pure=False, retries=0)
        flying[future] = (key, job)
        finished.add(future)

    try:
        while waiting or flying:
            while waiting and len(flying) < max(1, sum(client.nthreads().values())):
                launch(*waiting.popleft())
            future = next(finished)
            key, job = flying.pop(future)
            error = future.exception() if future.status == "error" else None
            if future.status == "finished":
                result = future.result()
                future.release()
                yield Outcome(job, result, None)
            elif _worker_died(future, error) and attempts[key] < MAX_ATTEMPTS:
                future.release()
                launch(key, job)
            else:
                reason = f"{type(error).__name__}: {error}" if error is not None else f"the task was {future.status}"
                future.release()
                yield Outcome(job, None, reason)
    finally:
        client.cancel(list(flying), force=True)


def _worker_died(future: Any, error: BaseException | None) -> bool:
    return future.status in ("cancelled", "lost") or type(error).__name__ == "KilledWorker"
