"""Claims: which of several drivers on one run does a task, so that two of them share the work
instead of doing it twice.

A claim is a symbolic link `<task>.claim` whose target names its driver: made in one step that only
one process can win, never half written, and readable from every node. A driver is alive while it
holds its own lock with a heartbeat, `<driver>.driver`; the claims of one that is not are free. That
a claim can be held twice for a moment (a driver that was frozen for longer than its lock lives)
costs double work and nothing else: results are published by the first.
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

from headrace.cache.atomic_io import LEASE_S

_LOOK_S = 2.0  # how long another driver's being alive is believed without looking again


@dataclass
class Claims:
    """One driver's claims in a directory."""

    directory: Path
    driver: str
    _seen: dict[str, float] = field(default_factory=dict)  # when another driver was last seen alive

    def take(self, task: str) -> bool:
        """Whether the task is ours now. False while a living driver has it."""
        claim = self.directory / f"{task}.claim"
        while True:
            try:
                os.symlink(self.driver, claim)
                return True
            except FileExistsError:
                owner = _owner(claim)
            except OSError:
                # a file system without symbolic links: several drivers then do the same work twice
                return True
            if owner == self.driver:
                return True
            if owner is not None and self._lives(owner):
                return False
            _remove_abandoned(claim, owner)

    def drop(self, task: str) -> None:
        """Give a claim back, once the task's results are published or it has failed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / f"{task}.claim")

    def _lives(self, driver: str) -> bool:
        now = time.monotonic()
        if now - self._seen.get(driver, -_LOOK_S) < _LOOK_S:
            return True
        if not driver_lives(self.directory, driver):
            return False
        self._seen[driver] = now
        return True


@contextlib.contextmanager
def claims(directory: Path) -> Iterator[Claims]:
    """This process's claims in a directory, from now to the end of the block.

    What dead drivers left there goes.
    """
    driver = driver_name()
    with driver_lock(directory, driver):
        remove_dead(directory)
        try:
            yield Claims(directory, driver)
        finally:
            for claim in directory.glob("*.claim"):
                if _owner(claim) == driver:
                    claim.unlink(missing_ok=True)


def remove_dead(directory: Path) -> int:
    """Remove the claims and the locks of drivers that are not alive; returns how many files that
    were.
    """
    drivers, removed = sorted(directory.glob("*.driver")), 0
    dead = []
    for path in drivers:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            # filelock waits for ever for a lock whose holder died before it wrote its name,
            # microseconds after making it.
            if not status.st_size and time.time() - status.st_mtime > LEASE_S:
                path.unlink()
        if not driver_lives(directory, path.stem):
            dead.append(path.stem)
    alive = {path.stem for path in drivers} - set(dead)
    # Their locks are older than their claims: a claim whose driver has no lock is a dead driver's.
    # Looked at again, for a driver may have begun since.
    for claim in (*directory.glob("*.claim"), *directory.glob("*.claim.*")):
        owner = _owner(claim)
        if owner is not None and owner not in alive and not driver_lives(directory, owner):
            removed += 1
            _remove_abandoned(claim, owner)
    return removed + len(dead)


def _remove_abandoned(claim: Path, owner: str | None) -> None:
    # Moved before it is removed: of two drivers that find it abandoned, one moves it, and both try
    # again.
    abandoned = claim.with_name(f"{claim.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(claim, abandoned)
        if _owner(abandoned) not in (
            owner,
            None,
        ):  # another driver was faster, and this is its claim
            with contextlib.suppress(FileExistsError):
                os.symlink(_owner(abandoned) or "", claim)
        os.unlink(abandoned)


def driver_name() -> str:
    """A name that no other driver has, and that says when it started and where:

    "20261124T181500Z-node7-4321-9f3a".
    """
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


@contextlib.contextmanager
def driver_lock(directory: Path, driver: str) -> Iterator[None]:
    """Be alive under this name for everyone who looks at the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(directory, driver)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def driver_lives(directory: Path, driver: str) -> bool:
    """Whether a driver holds its lock: its process is there, or, on another node, its heartbeat is
    recent.
    """
    path = directory / f"{driver}.driver"
    if not path.exists():
        return False
    lock = _lock(directory, driver)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    path.unlink(missing_ok=True)
    return False


def _lock(directory: Path, driver: str) -> SoftFileLease:
    return SoftFileLease(
        directory / f"{driver}.driver",
        lease_duration=LEASE_S,
        heartbeat_interval=LEASE_S / 6,
        poll_interval=0.05,
    )


def _owner(claim: Path) -> str | None:
    try:
        return os.readlink(claim)
    except OSError:
        return None
