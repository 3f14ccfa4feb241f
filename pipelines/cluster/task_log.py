"""The log of every task of a run, as lines of JSON: one file per driver, written as things happen.

Each line has `time` (UTC) and `event`:

    run       a driver starts: `driver`, `pid`, `host`
    cluster   its workers are there, or asked for: `where`, `role`, and the `dashboard`'s address
    stage     a stage starts: `stage`, `total` of its `unit`, in so many `tasks`
    started   a task is given to a worker: `task`, `worker`, `attempt`
    finished  its results are published: `task`, `seconds`, and the `result` that it returned
    failed    it raised: `task`, `seconds`, `error`, and the `traceback`
    died      its worker died or had to be ended while it ran: `error`; it is tried again, or:
    divided   every attempt crashed, and its `parts` take its place
    quarantined  every attempt crashed, and it has no parts
    refused   a `worker` of other versions is given nothing: `error`
    waiting   there has been no worker for half a minute: `reason`; again every ten minutes
    paused    a `host` whose workers die as soon as they have a task is given none for `seconds`
    cost      what a bank of a `kind` took: `seconds`, beside `assumed_s`
    progress  how far the stage is: `done`, and `failed` images or heads
    end       the driver is through, or has ended with an `error`
"""

import contextlib
import datetime
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json
from headrace.pipelines.cluster.task_leases import driver_lock, driver_name
from headrace.pipelines.paths import RunPaths


class TaskLog:
    """Appends events to a file, each in one write, so that readers hardly ever see half a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: str, **details: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        json_line = sealed_json({"time": now, "event": event, **details}, default=str) + b"\n"
        with self._lock, self.path.open("ab", buffering=0) as log_file:
            log_file.write(json_line)


@contextlib.contextmanager
def task_log(paths: RunPaths) -> Iterator[TaskLog]:
    """Open the log of one driver, which records its start and its end."""
    driver = driver_name()
    log = TaskLog(paths.logs / f"{driver}.jsonl")
    with driver_lock(paths.leases, driver):
        log("run", driver=driver, pid=os.getpid(), host=socket.gethostname())
        try:
            yield log
        # Also Ctrl-C, or `headrace status` would show the run as killed.
        except BaseException as error:
            log("end", error=f"{type(error).__name__}: {error}")
            raise
        log("end")


def read_log(log_path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield a file's events in order; a line that is half written or cut off is left out."""
    for line in log_path.read_bytes().split(b"\n"):
        try:
            event = read_sealed_json(line)
        except SealBroken:
            continue
        if {"time", "event"} <= event.keys():
            yield event
