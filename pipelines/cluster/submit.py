"""Running of many small tasks on a Dask client, one per worker thread; outcomes are yielded as they
come.

Every task is pinned to one worker, and a worker gets its next task when the outcome of the last one
has come. So the death of a worker ends only the tasks that it was running, and only these can be
its cause. (Dask itself blames every task that a dead worker had been given, also waiting ones, and
runs finished tasks again whose futures are kept.) The few milliseconds between tasks are nothing
beside tasks of seconds.
"""

import contextlib
import dataclasses
import datetime
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

from headrace.pipelines.cluster.clients import restart_lost_workers, why_no_worker
from headrace.pipelines.cluster.dask_client import ClusterError
from headrace.pipelines.cluster.task_leases import TaskLeases
from headrace.pipelines.cluster.worker import versions
from headrace.pipelines.console import PlainConsole

Job = TypeVar("Job")
Result = TypeVar("Result")

# A task counts as crashing its workers after this many of them died.
MAX_ATTEMPTS = 3
# If new workers of a host die under this many tasks in a row before finishing any, the host is
# broken (a missing driver, mount or package), not the tasks, and it gets none for _PAUSE_S.
_MAX_STRIKES = 3
_PAUSE_S = 300.0
_LOOK_S = 0.5  # seconds between looks at the workers while no task ends
# Seconds without a worker after which that is told: workers of this machine have come by then.
_TELL_WAIT_S = 30.0
_TELL_AGAIN_S = 600.0
_LEASE_RETRY_S = 1.0  # seconds between attempts to lease tasks that another driver has
# To fetch a result of a few hundred bytes. If it takes longer, the worker died after finishing and
# before sending it.
_FETCH_S = 10.0
# Without EIO, which comes from a file that can never be read, and says nothing about the machine.
_MACHINE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}


@dataclass(frozen=True)
class Outcome(Generic[Job, Result]):
    """The end of a task: a result, or the reason why there is none."""

    job: Job
    result: Result | None
    error: str | None
    fatal: bool = False  # at every attempt its worker died, or it never ended
    machine_fault: bool = False  # the reason is the machine's, such as a full disk, not the job's


@dataclass(eq=False)
class _Task(Generic[Job]):
    key: str
    job: Job
    n_attempts: int = 0
    worker_deaths: int = 0  # workers that died while running it; one that was stopped counts twice
    death_hosts: set[str] = field(default_factory=set)


@dataclass
class _HostRecord:
    """Deaths of new workers (that had finished no task) on a host since a task last ended there."""

    strikes: set[str] = field(default_factory=set)  # keys of the tasks that they were running
    blamed_tasks: list[_Task[Any]] = field(default_factory=list)
    paused_until: float = -math.inf


class OnEvent(Protocol):
    """A function that is called at each event of a task; `task_log` lists the events."""

    def __call__(self, event: str, **details: Any) -> None: ...


@dataclass(frozen=True)
class TaskOptions:
    """Timeout, leases and listener of tasks."""

    task_timeout_s: float = math.inf  # a task that takes longer counts as hung
    leases: TaskLeases | None = None  # shared with other drivers that may do the same tasks
    on_event: OnEvent = lambda event, **details: None


@dataclass(frozen=True)
class _InFlight(Generic[Job]):
    """A task that a worker has been given and that has not ended."""

    task: _Task[Job]
    worker: str
    future: Any
    started_at: float  # on this process's monotonic clock


@dataclass
class _SubmitState(Generic[Job, Result]):
    """The state of `run_tasks`: tasks that wait, tasks in flight, and what is known of workers and
    hosts.
    """

    client: Client
    function: Callable[[Job], Result]
    options: TaskOptions
    waiting: deque[_Task[Job]]
    leased_elsewhere: deque[_Task[Job]] = field(default_factory=deque)  # by other drivers
    asked_again_at: float = 0.0  # when these were last tried
    in_flight: dict[str, _InFlight[Job]] = field(default_factory=dict)  # by Dask's key
    # Dask's keys of tasks that have ended; "" for a worker's answer about its versions
    ended_keys: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    stopped_workers: dict[str, str] = field(default_factory=dict)  # reason by worker
    own_versions: dict[str, str] = field(default_factory=versions)  # that workers must have too
    version_futures: dict[str, Any] = field(default_factory=dict)  # by worker
    accepted_workers: set[str] = field(default_factory=set)  # those with our versions
    refused_workers: dict[str, str] = field(default_factory=dict)  # difference by worker
    proven_workers: set[str] = field(default_factory=set)  # those that have ended a task
    host_records: dict[str, _HostRecord] = field(default_factory=dict)
    healthy_hosts: set[str] = field(default_factory=set)  # those that get tasks
    unrelated_deaths: int = 0  # deaths of workers under tasks that ended afterwards
    # when the lack of any worker is told, on this process's monotonic clock
    tell_wait_at: float = field(default_factory=lambda: time.monotonic() + _TELL_WAIT_S)

    @property
    def max_attempts(self) -> int:
        """How many deaths a task may have: one more for each doubling of the unrelated deaths."""
        # On a cluster whose workers come and go (preemption, wall times), three deaths under one
        # task are soon a coincidence.
        return MAX_ATTEMPTS + int(math.log2(1 + self.unrelated_deaths))


_DEFAULT = TaskOptions()


def announced(options: TaskOptions, console: Console) -> TaskOptions:
    """Return options that also print the events of workers and hosts, and of tasks if verbose."""
    is_verbose = isinstance(console, PlainConsole) and console.verbose

    def announce(event: str, **details: Any) -> None:
        options.on_event(event, **details)
        if is_verbose and "task" in details:
            texts = [f"{details[name]}" for name in ("worker", "error") if details.get(name)]
            texts += [f"{details['seconds']:.1f} s"] if "seconds" in details else []
            console.print(
                f"{datetime.datetime.now():%H:%M:%S} {event} {details['task']} · "
                f"{' · '.join(texts)}",
                soft_wrap=True,
            )
        sentence = ""
        if event == "refused":
            sentence = (
                f"Worker {details['worker']} is given no task, for its features and heads would "
                f"differ: it has {details['error']}."
            )
        elif event == "paused":
            sentence = (
                f"Host {details['host']} is given no task for {details['seconds']:.0f} s: its "
                "workers die as soon as they have one."
            )
        elif event == "waiting":
            sentence = details["reason"]
        if sentence:
            console.print(sentence, soft_wrap=True, markup=False)

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

    The function must be a module-level one that takes paths and specs, publishes its results, and
    returns something small.

    A task that raises is not tried again, as it would raise again. A task is tried again if its
    worker dies, or if it does not end within the timeout; then its worker is stopped. When it has
    so lost `max_attempts` workers (a stopped one counts as two), the parts that `split` makes of
    its job replace it, so that the crashing part is found; the outcome of a job without parts is
    fatal.

    A task that another driver has leased is left to it and run here when the lease ends, so that
    the other's results exist when this function ends.
    """
    state = _SubmitState(client, function, options, deque(_Task(key, job) for key, job in jobs))
    try:
        while state.waiting or state.in_flight or state.leased_elsewhere:
            workers = client.nthreads()
            _give_tasks(state, workers)
            for dask_key in _wait_for_ends(state):
                flight = state.in_flight.pop(dask_key, None)
                # Its worker was found gone before, and the release of its future was reported too.
                if flight is None:
                    continue
                outcome = _outcome_of(state, flight)
                flight.future.release()
                if outcome is None:
                    continue
                if not (outcome.fatal and _split_task(state, flight.task, split)):
                    yield outcome
                if options.leases:  # after the caller has published what it makes of the outcome
                    options.leases.release(flight.task.key)
    finally:
        futures = [flight.future for flight in state.in_flight.values()]
        client.cancel([*futures, *state.version_futures.values()], force=True)


def _give_tasks(state: _SubmitState[Job, Result], workers: Mapping[str, int]) -> None:
    """Give a task to every free thread of the accepted workers on healthy hosts."""
    workers = _accepted_workers(state, workers)
    now = time.monotonic()
    hosts = {_host(worker) for worker in workers if worker not in state.stopped_workers}
    state.healthy_hosts = {
        host
        for host in hosts
        if state.host_records.setdefault(host, _HostRecord()).paused_until < now
    }
    tasks_of: dict[str, list[_Task[Job]]] = {worker: [] for worker in workers}
    for flight in state.in_flight.values():
        tasks_of.setdefault(flight.worker, []).append(flight.task)
    for worker, threads in workers.items():
        running = tasks_of[worker]
        host = _host(worker)
        if worker in state.stopped_workers or (
            state.healthy_hosts and host not in state.healthy_hosts
        ):
            continue
        while len(running) < threads and (task := _next_task(state, host)):
            # If a worker dies with several tasks, any of them may have killed it. So a task with a
            # death runs alone on its worker from then on.
            if running and (task.worker_deaths or any(other.worker_deaths for other in running)):
                state.waiting.appendleft(task)
                break
            running.append(task)
            _submit(state, task, worker)


def _accepted_workers(
    state: _SubmitState[Job, Result], workers: Mapping[str, int]
) -> dict[str, int]:
    """Return the threads of the workers that have our versions.

    Each worker is asked once, when it joins. Raises ClusterError if there are workers but none has
    them.
    """
    for worker in workers.keys() - state.version_futures.keys():
        dask_key = f"versions-{uuid.uuid4().hex}"
        future = _submit_to(state.client, worker, dask_key, versions)
        state.version_futures[worker] = future
        future.add_done_callback(lambda _: state.ended_keys.put(""))
    for worker in state.version_futures.keys() - workers.keys():
        del state.version_futures[worker]
    for worker in workers.keys() - state.accepted_workers - state.refused_workers.keys():
        answer = state.version_futures[worker]
        version_difference = _version_difference(state, answer)
        if version_difference:
            state.refused_workers[worker] = f"{worker} has {version_difference}"
            state.options.on_event("refused", worker=worker, error=version_difference)
        elif version_difference == "":
            state.accepted_workers.add(worker)
        elif answer.status in ("error", "cancelled", "lost"):
            del state.version_futures[worker]  # if the worker still exists, it is asked again
    if workers and not state.in_flight and workers.keys() <= state.refused_workers.keys():
        raise ClusterError(
            "no worker of the cluster has the versions of this process, so they would not make "
            f"the same features and heads: {state.refused_workers[next(iter(workers))]}. Install "
            "the same here and there"
        )
    return {
        worker: threads for worker, threads in workers.items() if worker in state.accepted_workers
    }


def _version_difference(state: _SubmitState[Job, Result], answer: Any) -> str | None:
    """Return how a worker's versions differ: "" if they do not, None without an answer yet."""
    try:
        if answer.status == "finished":
            worker_versions = answer.result(timeout=_FETCH_S)
            return ", ".join(
                f"{name} {worker_versions.get(name, 'unknown')} (here: {version})"
                for name, version in state.own_versions.items()
                if worker_versions.get(name) != version
            )
        if (
            answer.status == "error"
            and type(error := answer.exception(timeout=_FETCH_S)).__name__ != "KilledWorker"
        ):
            return f"no headrace like this one ({type(error).__name__}: {error})"
    except (TimeoutError, CancelledError):
        pass  # the worker is gone, or its answer is looked at again later
    return None


def _host(worker: str) -> str:
    return urllib.parse.urlsplit(worker).hostname or worker


def _next_task(state: _SubmitState[Job, Result], host: str) -> _Task[Job] | None:
    """Return the next task that no other driver has. A task under which a worker of this host died
    is left to other hosts, if there are any.
    """
    if (
        state.leased_elsewhere
        and not state.waiting
        and time.monotonic() - state.asked_again_at > _LEASE_RETRY_S
    ):
        state.asked_again_at = time.monotonic()
        state.waiting.extend(state.leased_elsewhere)
        state.leased_elsewhere.clear()
    while True:
        allowed_tasks = (
            task
            for task in state.waiting
            if host not in task.death_hosts or state.healthy_hosts <= task.death_hosts
        )
        if (task := next(allowed_tasks, None)) is None:
            return None
        state.waiting.remove(task)
        if state.options.leases is None or state.options.leases.acquire(task.key):
            return task
        state.leased_elsewhere.append(task)


def _submit_to(
    client: Client, worker: str, dask_key: str, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Submit a call to one worker; return its future."""
    # retries=0, because a task is tried again only after a look at what ended it.
    pinned = {"workers": [worker], "allow_other_workers": False, "retries": 0}
    return client.submit(function, *arguments, key=dask_key, pure=False, **pinned)


def _submit(state: _SubmitState[Job, Result], task: _Task[Job], worker: str) -> None:
    task.n_attempts += 1
    dask_key = f"{task.key}-{task.n_attempts}"
    future = _submit_to(state.client, worker, dask_key, state.function, task.job)
    state.in_flight[dask_key] = _InFlight(task, worker, future, time.monotonic())
    state.options.on_event("started", task=task.key, worker=worker, attempt=task.n_attempts)
    future.add_done_callback(lambda _: state.ended_keys.put(dask_key))


def _wait_for_ends(state: _SubmitState[Job, Result]) -> list[str]:
    """Return Dask's keys of tasks that have ended, after waiting _LOOK_S at most for the first. If
    none has, look after lost and late workers.
    """
    dask_keys: list[str] = []
    # Nothing ends within _LOOK_S when tasks are long: then it is time to look after the workers.
    with contextlib.suppress(queue.Empty):
        dask_keys.append(state.ended_keys.get(timeout=_LOOK_S))
        # An answer about versions is reason enough to return, without waiting for a task's end.
        while not dask_keys[-1]:
            dask_keys.append(state.ended_keys.get_nowait())
    if dask_keys:
        return dask_keys
    restart_lost_workers(state.client)
    now, task_timeout_s = time.monotonic(), state.options.task_timeout_s
    if state.client.nthreads():
        state.tell_wait_at = max(state.tell_wait_at, now + _TELL_WAIT_S)
    elif now >= state.tell_wait_at:
        state.tell_wait_at = now + _TELL_AGAIN_S
        state.options.on_event("waiting", reason=why_no_worker(state.client))
    late_workers = {
        flight.worker
        for flight in state.in_flight.values()
        if now - flight.started_at > task_timeout_s
    }
    for worker in late_workers - set(state.stopped_workers):
        state.stopped_workers[worker] = f"it ran for more than {task_timeout_s:g} s"
        threading.Thread(target=_stop_worker, args=(state.client, worker), daemon=True).start()
    # A user's scheduler whose settings allow deaths keeps the task of a dead worker pending, for a
    # new worker of that address: it is taken back here.
    busy_workers = {flight.worker for flight in state.in_flight.values()}
    gone_workers = busy_workers - set(state.client.nthreads())
    return [
        dask_key
        for dask_key, flight in state.in_flight.items()
        if flight.worker in gone_workers and flight.future.status == "pending"
    ]


def _stop_worker(client: Client, worker: str) -> None:
    """Restart a worker: its nanny asks it to end, kills it if it does not, and starts another."""
    # These errors come if the run has ended meanwhile.
    with contextlib.suppress(OSError, TimeoutError, CancelledError):
        client.restart_workers([worker], timeout=30, raise_for_error=False)


def _outcome_of(
    state: _SubmitState[Job, Result], flight: _InFlight[Job]
) -> Outcome[Job, Result] | None:
    """Return the outcome of a task that is over; None if it is to be tried again."""
    task, future, on_event = flight.task, flight.future, state.options.on_event
    seconds = round(time.monotonic() - flight.started_at, 3)
    error: BaseException | None = None
    trace = ""
    try:
        if future.status == "finished":
            result = future.result(timeout=_FETCH_S)
            _clear_host(state, flight.worker)
            state.unrelated_deaths += task.worker_deaths
            on_event("finished", task=task.key, seconds=seconds, result=_plain(result))
            return Outcome(task.job, result, None)
        if future.status == "error":
            error = future.exception(timeout=_FETCH_S)
            trace = "".join(traceback.format_tb(future.traceback(timeout=_FETCH_S)))
    except (TimeoutError, CancelledError):
        pass  # the worker is gone, and the result with it
    if error is not None and type(error).__name__ != "KilledWorker":
        _clear_host(state, flight.worker)
        state.unrelated_deaths += task.worker_deaths
        text = f"{type(error).__name__}: {error}"
        on_event("failed", task=task.key, seconds=seconds, error=text, traceback=trace)
        return Outcome(task.job, None, text, machine_fault=is_machine_fault(error))
    # A timeout counts twice, because every further attempt would take as long again.
    task.worker_deaths += 2 if flight.worker in state.stopped_workers else 1
    _suspect_host(state, flight)
    reason = state.stopped_workers.get(flight.worker) or "its worker died"
    on_event("died", task=task.key, worker=flight.worker, seconds=seconds, error=reason)
    if task.worker_deaths >= state.max_attempts:
        return Outcome(
            task.job, None, f"{reason}, whenever it was tried ({task.n_attempts} times)", fatal=True
        )
    state.waiting.appendleft(task)
    return None


def is_machine_fault(error: BaseException) -> bool:
    """Return whether an error is the machine's: no disk space, write permission, memory or file
    descriptors.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS
    )


def _clear_host(state: _SubmitState[Job, Result], worker: str) -> None:
    """Note that a task has ended on this worker, so that its host is not broken."""
    state.proven_workers.add(worker)
    state.host_records[_host(worker)] = _HostRecord()


def _suspect_host(state: _SubmitState[Job, Result], flight: _InFlight[Job]) -> None:
    """Blame the host instead of its tasks if its new workers die under one task after the other and
    other hosts are healthy.
    """
    host_name, task = _host(flight.worker), flight.task
    task.death_hosts.add(host_name)
    if flight.worker in state.proven_workers or flight.worker in state.stopped_workers:
        return
    host_record = state.host_records.setdefault(host_name, _HostRecord())
    host_record.strikes.add(task.key)
    host_record.blamed_tasks.append(task)
    if len(host_record.strikes) >= _MAX_STRIKES and state.healthy_hosts - {host_name}:
        for blamed_task in host_record.blamed_tasks:
            blamed_task.worker_deaths -= 1
        host_record.blamed_tasks.clear()
        if host_record.paused_until < (now := time.monotonic()):
            host_record.paused_until = now + _PAUSE_S
            state.healthy_hosts.discard(host_name)
            state.options.on_event("paused", host=host_name, seconds=_PAUSE_S)


def _plain(result: object) -> object:
    return (
        dataclasses.asdict(result)
        if dataclasses.is_dataclass(result) and not isinstance(result, type)
        else result
    )


def _split_task(
    state: _SubmitState[Job, Result],
    crashing: _Task[Job],
    split: Callable[[Job], Sequence[tuple[str, Job]]],
) -> bool:
    """Replace a crashing task by its parts; return False if it has none."""
    parts = split(crashing.job)
    for key, job in reversed(parts):
        # Parts inherit deaths, so that one more is enough to divide them again; a part that cannot
        # be divided needs two of its own.
        worker_deaths = max(1, state.max_attempts - (1 if split(job) else 2))
        state.waiting.appendleft(_Task(key, job, worker_deaths=worker_deaths))
    event = "divided" if parts else "quarantined"
    state.options.on_event(event, task=crashing.key, parts=[key for key, _ in parts])
    return bool(parts)
