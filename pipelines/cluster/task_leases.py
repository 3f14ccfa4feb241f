"""Task leases, by which several drivers on one run share its tasks instead of doing them twice.

A lease is a symbolic link `<task>.lease` whose target names its driver: it is made in one step that
only one process can win, is never half written, and can be read from every node. A driver is alive
while it holds a lock with a heartbeat, `<driver>.driver` (one per driver and not per task, so that
a thousand tasks in progress need one heartbeat). The leases of a driver that is not alive are free.
A driver that was frozen for longer than its lock lives may do a task that another has taken over.
That costs double work and nothing else, because the first one publishes the results.
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

_LOOK_S = 2.0  # seconds for which another driver counts as alive without another look at its lock


@dataclass
class TaskLeases:
    """The leases of one driver in a directory."""

    directory: Path
    driver: str
    # monotonic times at which other drivers were last seen alive
    _seen_alive: dict[str, float] = field(default_factory=dict)

    def acquire(self, task: str) -> bool:
        """Lease a task; return False while another living driver has it."""
        lease_path = self.directory / f"{task}.lease"
        while True:
            try:
                os.symlink(self.driver, lease_path)
                return True
            except FileExistsError:
                owner = _owner(lease_path)
            except OSError:
                # The file system has no symbolic links: several drivers then do the same work.
                return True
            if owner == self.driver:
                return True
            if owner is not None and self._is_alive(owner):
                return False
            _remove_abandoned(lease_path, owner)

    def release(self, task: str) -> None:
        """Give a task back, after its results are published or it has failed."""
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
    """Open task leases of this process in a directory, which end with the block. Leases and locks
    of dead drivers are removed.
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
    # A driver takes its lock before any lease, so a lease whose driver has no lock is a dead
    # driver's. Each is looked at again, because a driver may have started since.
    for lease_path in (*directory.glob("*.lease"), *directory.glob("*.lease.*")):
        owner = _owner(lease_path)
        if owner is not None and owner not in living_drivers and not driver_lives(directory, owner):
            n_removed += 1
            _remove_abandoned(lease_path, owner)
    return n_removed


def _remove_abandoned(lease_path: Path, owner: str | None) -> None:
    # Renamed before it is removed: if two drivers find it abandoned, one renames it, and neither
    # removes the new lease of the other.
    moved_lease = lease_path.with_name(f"{lease_path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lease_path, moved_lease)
        # What was renamed is the new lease of a driver that was faster: it is put back.
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
    """Hold the lock that shows this driver to be alive, until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(directory, driver)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def driver_lives(directory: Path, driver: str) -> bool:
    """Return whether a driver holds its lock: its process lives here, or its heartbeat is recent.

    Removes the lock of a dead driver.
    """
    lock_path = directory / f"{driver}.driver"
    try:
        age_s = time.time() - lock_path.stat().st_mtime
    except FileNotFoundError:
        return False
    # For a lock whose holder died in the microseconds before it wrote its name, filelock would wait
    # for ever.
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
        # Several heartbeats within a lease, so that one late write on a network disk costs no
        # lease.
        heartbeat_interval=LEASE_S / 6,
        poll_interval=0.05,
    )


def _owner(lease_path: Path) -> str | None:
    try:
        return os.readlink(lease_path)
    except OSError:  # released meanwhile
        return None
