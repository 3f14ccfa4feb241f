"""Runs many small tasks on a Dask client: one in flight per worker thread, each outcome handed back
as it comes.

Every task is pinned to one worker, and a worker is given its next task when the outcome of the last
one is here. So a worker that dies takes down only what it was running, and the blame for its death
is exact. (Futures that are held after they finish are executed again when their worker dies, and
Dask blames every task that a dead worker had been given, the waiting ones too.) Tasks of seconds do
not notice the few milliseconds between them.
"""

import contextlib
import dataclasses
import errno
import math
import queue
import threading
import time
import traceback
import urllib.parse
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from dask.distributed import Client
from rich.console import Console

from headrace.cache.errors import HeadraceError
from headrace.pipelines.cluster.clients import ClusterError, top_up
from headrace.pipelines.cluster.task_leases import Claims
from headrace.pipelines.cluster.worker import versions

Job = TypeVar("Job")
Result = TypeVar("Result")

# a task whose worker died is given to another this often before it is found guilty
MAX_ATTEMPTS = 3
# A host whose new workers die under so many tasks in a row, before one of them has ended any, is
# broken, not the tasks: it gets no more of them for a while. A driver, a mount or a package that is
# missing looks like this.
_STRIKES = 3
_PAUSE_S = 300.0
_LOOK_S = 0.5  # how often the workers are looked at while nothing is heard from them
_ASK_S = 1.0  # how often a task that another driver has is asked for again
# A result is a few hundred bytes. If fetching it takes longer, its worker died between finishing
# and handing it over.
_FETCH_S = 10.0
# Not EIO: a file that cannot be read is its own fault for ever.
_OF_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class RunIncomplete(HeadraceError):
    """Part of the work could not be done; what is finished is kept."""


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """What became of a task: a result, or the reason why there is none."""

    job: Job
    result: Result | None
    error: str | None
    fatal: bool = False  # it took its workers down, or never ended, whenever it was tried
    # a full disk or the like was the reason, which says nothing about the job
    of_machine: bool = False


@dataclass(eq=False)
class _Task(Generic[Job]):
    key: str
    job: Job
    launched: int = 0
    deaths: int = 0  # workers that died while they ran it; one that had to be ended counts twice
    died_on: set[str] = field(default_factory=set)  # the hosts of these workers


@dataclass
class _Host:
    """What is known against a host since a task last ended there."""

    strikes: set[str] = field(
        default_factory=set
    )  # tasks under which workers died that had not ended any before
    charged: list[_Task[Any]] = field(default_factory=list)  # tasks that were blamed for it
    paused_until: float = -math.inf


class OnEvent(Protocol):
    """What is told of every event of a task; see `task_log`."""

    def __call__(self, event: str, **details: Any) -> None: ...


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are watched over."""

    task_timeout_s: float = math.inf  # a task that has not ended by then never will
    claims: Claims | None = None  # shared with other drivers, which may be doing the same tasks
    on_event: OnEvent = lambda event, **details: None


@dataclass(frozen=True)
class _Flight(Generic[Job]):
    """A task that a worker has been given."""

    task: _Task[Job]
    worker: str
    future: Any
    since: float  # on this process's monotonic clock


@dataclass
class _Window(Generic[Job, Result]):
    """What is in flight, and what has been learnt from it."""

    client: Client
    function: Callable[[Job], Result]
    options: TaskOptions
    waiting: deque[_Task[Job]]
    elsewhere: deque[_Task[Job]] = field(default_factory=deque)  # tasks that another driver has
    asked: float = 0.0  # when they were last asked for
    flying: dict[str, _Flight[Job]] = field(
        default_factory=dict
    )  # by Dask's key: the task's, and which attempt it is
    landed: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    ended: dict[str, str] = field(
        default_factory=dict
    )  # workers that are being ended, by the reason
    here: dict[str, str] = field(default_factory=versions)  # which workers have to have too
    greetings: dict[str, Any] = field(
        default_factory=dict
    )  # futures of what workers say they have, by worker
    accepted: set[str] = field(default_factory=set)  # workers that have what we have
    refused: dict[str, str] = field(
        default_factory=dict
    )  # workers that have not, by how they differ
    proven: set[str] = field(default_factory=set)  # workers that have ended a task
    hosts: dict[str, _Host] = field(default_factory=dict)
    healthy: set[str] = field(default_factory=set)  # hosts that are given tasks
    innocent: int = 0  # deaths of workers under tasks that ended well afterwards

    @property
    def limit(self) -> int:
        """Attempts that a task has: one more for each doubling of the deaths that were no task's
        fault.

        Where workers come and go (preemption, wall times, someone's `kill`), three deaths are soon
        a coincidence.
        """
        return MAX_ATTEMPTS + int(math.log2(1 + self.innocent))


_DEFAULT = TaskOptions()


def announced(options: TaskOptions, console: Console) -> TaskOptions:
    """The options, with what the user should know of the cluster said on the console too."""

    def announce(event: str, **details: Any) -> None:
        options.on_event(event, **details)
        if event == "refused":
            console.print(
                f"Worker {details['worker']} is given no task, for its features and heads would "
                f"differ: it has {details['error']}.",
                soft_wrap=True,
                markup=False,
            )
        elif event == "paused":
            console.print(
                f"Host {details['host']} is given no task for {details['seconds']:.0f} s: its "
                "workers die as soon as they have one.",
                soft_wrap=True,
                markup=False,
            )

    return dataclasses.replace(options, on_event=announce)


def run_tasks(
    client: Client,
    function: Callable[[Job], Result],
    jobs: Iterable[tuple[str, Job]],
    *,
    options: TaskOptions = _DEFAULT,
    split: Callable[[Job], Sequence[tuple[str, Job]]] = lambda job: (),
) -> Generator[Outcome[Job, Result], None, None]:
    """Yield the outcome of `function(job)` for every (key, job), in the order in which they finish.

    The function is a module-level one, takes paths and specs, publishes what it makes, and returns
    something small. A task that raises is not tried again, for it would raise again. One whose
    worker dies is, and so is one that has not ended by its deadline, whose worker is then ended.
    Where that happens MAX_ATTEMPTS times, the parts that `split` makes of its job take its place,
    so that the guilty part is found; a job without parts has failed. A task that another driver has
    claimed is left to it, and done here once it is given back, so that whatever the other has
    published is there when this ends.
    """
    window = _Window(client, function, options, deque(_Task(key, job) for key, job in jobs))
    try:
        while window.waiting or window.flying or window.elsewhere:
            workers = client.nthreads()
            _launch(window, workers)
            for name in _next(window):
                flight = window.flying.pop(name, None)
                if (
                    flight is None
                ):  # its worker was found gone, and letting go of its future told us so once more
                    continue
                outcome = _land(window, flight)
                flight.future.release()
                if outcome is None:
                    continue
                if not (outcome.fatal and _divide(window, flight.task, split)):
                    yield outcome
                if options.claims:  # after the caller has published what it makes of the outcome
                    options.claims.drop(flight.task.key)
    finally:
        flying = [flight.future for flight in window.flying.values()]
        client.cancel([*flying, *window.greetings.values()], force=True)


def _launch(window: _Window[Job, Result], workers: Mapping[str, int]) -> None:
    """Give every free thread of a worker like us a task."""
    workers = _accepted(window, workers)
    now = time.monotonic()
    hosts = {_host(worker) for worker in workers if worker not in window.ended}
    window.healthy = {
        host for host in hosts if window.hosts.setdefault(host, _Host()).paused_until < now
    }
    given: dict[str, list[_Task[Job]]] = {worker: [] for worker in workers}
    for flight in window.flying.values():
        given.setdefault(flight.worker, []).append(flight.task)
    for worker, threads in workers.items():
        running = given[worker]
        host = _host(worker)
        if worker in window.ended or (window.healthy and host not in window.healthy):
            continue
        while len(running) < threads and (task := _claimed(window, host)):
            # Of several tasks on one worker nobody knows which killed it: from then on each of them
            # runs alone.
            if running and (task.deaths or any(other.deaths for other in running)):
                window.waiting.appendleft(task)
                break
            running.append(task)
            _submit(window, task, worker)


def _accepted(window: _Window[Job, Result], workers: Mapping[str, int]) -> dict[str, int]:
    """The workers that have our versions.

    Each is asked once, when it joins, and the others are given nothing.

    Raises ClusterError where there are workers, and none of them has.
    """
    for worker in workers.keys() - window.greetings.keys():
        name = f"versions-{uuid.uuid4().hex}"
        future = window.client.submit(
            versions, key=name, pure=False, retries=0, workers=[worker], allow_other_workers=False
        )
        window.greetings[worker] = future
        future.add_done_callback(
            lambda _: window.landed.put("")
        )  # no flight, but something to look at
    for worker in window.greetings.keys() - workers.keys():
        del window.greetings[worker]
    for worker in workers.keys() - window.accepted - window.refused.keys():
        if (difference := _difference(window, window.greetings[worker])) == "":
            window.accepted.add(worker)
        elif difference is None:
            if window.greetings[worker].status in ("error", "cancelled", "lost"):
                del window.greetings[worker]  # if it is there still, it is asked once more
        else:
            window.refused[worker] = f"{worker} has {difference}"
            window.options.on_event("refused", worker=worker, error=difference)
    if workers and not window.flying and workers.keys() <= window.refused.keys():
        raise ClusterError(
            "no worker of the cluster has the versions of this process, so they would not make "
            f"the same features and heads: {window.refused[next(iter(workers))]}. Install the same "
            "here and there"
        )
    return {worker: threads for worker, threads in workers.items() if worker in window.accepted}


def _difference(window: _Window[Job, Result], greeting: Any) -> str | None:
    """How a worker differs from this process: "" where it does not, None where it has
    not said yet.
    """
    try:
        if greeting.status == "finished":
            there = greeting.result(timeout=_FETCH_S)
            return ", ".join(
                f"{name} {there.get(name, 'unknown')} (here: {version})"
                for name, version in window.here.items()
                if there.get(name) != version
            )
        if (
            greeting.status == "error"
            and type(error := greeting.exception(timeout=_FETCH_S)).__name__ != "KilledWorker"
        ):
            return f"no headrace like this one ({type(error).__name__}: {error})"
    except (TimeoutError, CancelledError):
        pass  # it is gone, or will be asked for its answer again
    return None


def _host(worker: str) -> str:
    return urllib.parse.urlsplit(worker).hostname or worker


def _claimed(window: _Window[Job, Result], host: str) -> _Task[Job] | None:
    """The next task that no other driver has, and that did not die on this host while there are
    others to try.
    """
    if window.elsewhere and not window.waiting and time.monotonic() - window.asked > _ASK_S:
        window.asked = time.monotonic()
        window.waiting.extend(window.elsewhere)
        window.elsewhere.clear()
    while True:
        allowed = (
            task
            for task in window.waiting
            if host not in task.died_on or window.healthy <= task.died_on
        )
        if (task := next(allowed, None)) is None:
            return None
        window.waiting.remove(task)
        if window.options.claims is None or window.options.claims.take(task.key):
            return task
        window.elsewhere.append(task)


def _submit(window: _Window[Job, Result], task: _Task[Job], worker: str) -> None:
    task.launched += 1
    name = f"{task.key}-{task.launched}"
    future = window.client.submit(
        window.function,
        task.job,
        key=name,
        pure=False,
        retries=0,
        workers=[worker],
        allow_other_workers=False,
    )
    window.flying[name] = _Flight(task, worker, future, time.monotonic())
    window.options.on_event("started", task=task.key, worker=worker, attempt=task.launched)
    future.add_done_callback(lambda _: window.landed.put(name))


def _next(window: _Window[Job, Result]) -> list[str]:
    """Names of flights that are over. Waits for the first, but not for long."""
    names: list[str] = []
    with contextlib.suppress(queue.Empty):
        names.append(window.landed.get(timeout=_LOOK_S))
        while not names[-1]:  # greetings: any number of them is one reason to look
            names.append(window.landed.get_nowait())
    if names:
        return names
    top_up(window.client)
    task_timeout_s = window.options.task_timeout_s
    late = [f for f in window.flying.values() if time.monotonic() - f.since > task_timeout_s]
    for worker in {flight.worker for flight in late} - set(window.ended):
        window.ended[worker] = f"it ran for more than {task_timeout_s:g} s"
        threading.Thread(target=_end_worker, args=(window.client, worker), daemon=True).start()
    # A scheduler that allows deaths keeps a task whose worker is gone, for another worker of that
    # address.
    gone = {flight.worker for flight in window.flying.values()} - set(window.client.nthreads())
    return [
        name
        for name, f in window.flying.items()
        if f.worker in gone and f.future.status == "pending"
    ]


def _end_worker(client: Client, worker: str) -> None:
    """Its nanny asks it to end, kills it where it does not, and starts another.

    Waiting does not concern the others.
    """
    with contextlib.suppress(
        OSError, TimeoutError, CancelledError
    ):  # as when the run has ended meanwhile
        client.restart_workers([worker], timeout=30, raise_for_error=False)


def _land(window: _Window[Job, Result], flight: _Flight[Job]) -> Outcome[Job, Result] | None:
    """The outcome of a flight that is over; None if its task is to be tried again."""
    task, future, on_event = flight.task, flight.future, window.options.on_event
    seconds = round(time.monotonic() - flight.since, 3)
    error: BaseException | None = None
    where = ""
    try:
        if future.status == "finished":
            result = future.result(timeout=_FETCH_S)
            _absolve(window, flight.worker)
            window.innocent += task.deaths
            on_event("finished", task=task.key, seconds=seconds, result=_plain(result))
            return Outcome(task.job, result, None)
        if future.status == "error":
            error = future.exception(timeout=_FETCH_S)
            where = "".join(traceback.format_tb(future.traceback(timeout=_FETCH_S)))
    except (TimeoutError, CancelledError):
        pass  # the worker is gone, and the result with it
    if error is not None and type(error).__name__ != "KilledWorker":
        _absolve(window, flight.worker)
        window.innocent += task.deaths
        on_event(
            "failed",
            task=task.key,
            seconds=seconds,
            error=f"{type(error).__name__}: {error}",
            traceback=where,
        )
        return Outcome(
            task.job, None, f"{type(error).__name__}: {error}", of_machine=is_of_machine(error)
        )
    # To run for ever twice is proof enough: every further time would cost as long again.
    task.deaths += 2 if flight.worker in window.ended else 1
    _suspect(window, flight)
    reason = window.ended.get(flight.worker) or "its worker died"
    on_event("died", task=task.key, worker=flight.worker, seconds=seconds, error=reason)
    if task.deaths >= window.limit:
        return Outcome(
            task.job, None, f"{reason}, whenever it was tried ({task.launched} times)", fatal=True
        )
    window.waiting.appendleft(task)
    return None


def is_of_machine(error: BaseException) -> bool:
    """Whether an error is the machine's: no room, no right to write, no memory, no descriptors."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _OF_MACHINE
    )


def _absolve(window: _Window[Job, Result], worker: str) -> None:
    """A task has ended on this worker: its host works."""
    window.proven.add(worker)
    window.hosts[_host(worker)] = _Host()


def _suspect(window: _Window[Job, Result], flight: _Flight[Job]) -> None:
    """Blame the host instead of the tasks where its new workers die under one task after the other,
    and others are well.
    """
    name, task = _host(flight.worker), flight.task
    task.died_on.add(name)
    if flight.worker in window.proven or flight.worker in window.ended:
        return
    host = window.hosts.setdefault(name, _Host())
    host.strikes.add(task.key)
    host.charged.append(task)
    if len(host.strikes) >= _STRIKES and window.healthy - {name}:
        for blamed in host.charged:
            blamed.deaths -= 1
        host.charged.clear()
        if host.paused_until < (now := time.monotonic()):
            host.paused_until = now + _PAUSE_S
            window.healthy.discard(name)
            window.options.on_event("paused", host=name, seconds=_PAUSE_S)


def _plain(result: object) -> object:
    return (
        dataclasses.asdict(result)
        if dataclasses.is_dataclass(result) and not isinstance(result, type)
        else result
    )


def _divide(
    window: _Window[Job, Result],
    guilty: _Task[Job],
    split: Callable[[Job], Sequence[tuple[str, Job]]],
) -> bool:
    """Put the parts of a guilty task in its place. False if it has none."""
    parts = split(guilty.job)
    for key, job in reversed(parts):
        # What was found guilty together needs no three more deaths to be divided again, but a part
        # that cannot be divided has to be found guilty by itself.
        deaths = max(1, guilty.deaths - (1 if split(job) else 2))
        window.waiting.appendleft(_Task(key, job, deaths=deaths))
    event = "divided" if parts else "guilty"
    window.options.on_event(event, task=guilty.key, parts=[key for key, _ in parts])
    return bool(parts)
