"""Task leases: which of several drivers on one run does a task, so that two of them share the work
instead of doing it twice.

A lease is a symbolic link `<task>.lease` whose target names its driver: made in one step that only
one process can win, never half written, and readable from every node. A driver is alive while it
holds its own lock with a heartbeat, `<driver>.driver` (one lock per driver instead of one per task:
a thousand tasks in progress need one heartbeat); the leases of one that is not alive are free. A
lease can be held twice for a moment, by a driver that was frozen for longer than its lock lives.
That costs double work and nothing else: results are published by the first.
"""

import contextlib
import datetime
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import SoftFileLease, Timeout

from headrace.cache.atomic_io import LEASE_S, names_owner

_LOOK_S = 2.0  # how long another driver's being alive is believed without looking again


@dataclass
class TaskLeases:
    """The tasks in a directory that one driver has taken."""

    directory: Path
    driver: str
    # when another driver was last seen alive
    _seen_alive: dict[str, float] = field(default_factory=dict)

    def acquire(self, task: str) -> bool:
        """Take a task; return False while another living driver has it."""
        lease_path = self.directory / f"{task}.lease"
        while True:
            try:
                os.symlink(self.driver, lease_path)
                return True
            except FileExistsError:
                owner = _owner(lease_path)
            except OSError:
                # a file system without symbolic links: several drivers then do the same work twice
                return True
            if owner == self.driver:
                return True
            if owner is not None and self._is_alive(owner):
                return False
            _remove_abandoned(lease_path, owner)

    def release(self, task: str) -> None:
        """Give a task back, once the task's results are published or it has failed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / f"{task}.lease")

    def _is_alive(self, driver: str) -> bool:
        now = time.monotonic()
        if now - self._seen_alive.get(driver, -_LOOK_S) < _LOOK_S:
            return True
        if not driver_lives(self.directory, driver):
            return False
        self._seen_alive[driver] = now
        return True


@contextlib.contextmanager
def task_leases(directory: Path) -> Iterator[TaskLeases]:
    """Give this process's task leases in a directory, from now to the end of the block.

    Leases and locks that dead drivers left there are removed.
    """
    driver = driver_name()
    with driver_lock(directory, driver):
        remove_dead(directory)
        try:
            yield TaskLeases(directory, driver)
        finally:
            for lease_path in directory.glob("*.lease"):
                if _owner(lease_path) == driver:
                    lease_path.unlink(missing_ok=True)


def remove_dead(directory: Path) -> int:
    """Remove the leases and locks of drivers that are not alive; return how many files."""
    drivers = [path.stem for path in sorted(directory.glob("*.driver"))]
    dead_drivers = [driver for driver in drivers if not driver_lives(directory, driver)]
    living_drivers = set(drivers) - set(dead_drivers)
    n_removed = len(dead_drivers)
    # Drivers lock before they take leases: a lease whose driver has no lock is a dead driver's.
    # Looked at again, for a driver may have begun since.
    for lease_path in (*directory.glob("*.lease"), *directory.glob("*.lease.*")):
        owner = _owner(lease_path)
        if owner is not None and owner not in living_drivers and not driver_lives(directory, owner):
            n_removed += 1
            _remove_abandoned(lease_path, owner)
    return n_removed


def _remove_abandoned(lease_path: Path, owner: str | None) -> None:
    # Moved before it is removed: of two drivers that find it abandoned, one moves it, and both try
    # again.
    moved_lease = lease_path.with_name(f"{lease_path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lease_path, moved_lease)
        # Another driver was faster, and this is its lease.
        if _owner(moved_lease) not in (owner, None):
            with contextlib.suppress(FileExistsError):
                os.symlink(_owner(moved_lease) or "", lease_path)
        os.unlink(moved_lease)


def driver_name() -> str:
    """Return a name that no other driver has: "20261124T181500Z-node7-4321-9f3a"."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


@contextlib.contextmanager
def driver_lock(directory: Path, driver: str) -> Iterator[None]:
    """Be alive under this name, for everyone who looks at the directory, until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(directory, driver)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def driver_lives(directory: Path, driver: str) -> bool:
    """Tell whether a driver holds its lock: a living process, or a recent heartbeat elsewhere."""
    lock_path = directory / f"{driver}.driver"
    try:
        age_s = time.time() - lock_path.stat().st_mtime
    except FileNotFoundError:
        return False
    # filelock waits for ever for a lock whose holder died before it had written its name,
    # microseconds after making it.
    if age_s > LEASE_S and not names_owner(lock_path):
        lock_path.unlink(missing_ok=True)
        return False
    lock = _lock(directory, driver)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    lock_path.unlink(missing_ok=True)
    return False


def _lock(directory: Path, driver: str) -> SoftFileLease:
    return SoftFileLease(
        directory / f"{driver}.driver",
        lease_duration=LEASE_S,
        heartbeat_interval=LEASE_S / 6,
        poll_interval=0.05,
    )


def _owner(lease_path: Path) -> str | None:
    try:
        return os.readlink(lease_path)
    except OSError:
        return None
