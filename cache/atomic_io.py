"""Files that appear whole or not at all.

A file is written under a unique hidden name in its own directory, flushed to the disk, and only
then linked to its name. What a process that dies leaves behind:

    while writing     `.<name>.<random>.partial`, which nobody reads and `headrace cache gc` removes
    before the link   the same
    after the link    the finished file, and perhaps the second name
"""

import contextlib
import ctypes
import errno
import functools
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import SoftFileLease, Timeout

from headrace.cache.errors import PublishFailed

PARTIAL_SUFFIX = ".partial"

# A lock whose holder shows no sign of life for this long is taken over. Only network file systems
# and killed processes of other machines ever wait it out: a dead holder on this machine is
# recognised by its process id.
LEASE_S = 30.0

# What file systems answer that know no hard links (FAT, some FUSE and cluster file systems).
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
# Small enough for the disk to begin early. Large, and from one multiple of itself to the next,
# because the system keeps what is written at once in pages as large: from small ones random rows
# come 10 to 20 % slower.
_PIECE_BYTES = 1 << 24
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF}


@contextlib.contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: an existence lock with a heartbeat, which needs nothing of the
    file system but O_EXCL.

    `flock` is node-local on some cluster file systems, so it is not used. A lease can in principle
    be held twice (a holder that was frozen for longer than LEASE_S); whatever it protects must
    survive that, and here it only keeps lines apart.
    """
    lock = SoftFileLease(
        path, lease_duration=LEASE_S, heartbeat_interval=LEASE_S / 6, poll_interval=0.005
    )
    blank: _Blank | None = None
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LEASE_S / 4)
        except Timeout:
            blank = _watch_blank(path, blank)
    try:
        yield
    finally:
        lock.release()


class _Blank(NamedTuple):
    """A lock file without an owner in it."""

    inode: int
    changed_ns: int
    since_s: float  # on this process's monotonic clock


def _watch_blank(path: Path, before: _Blank | None) -> _Blank | None:
    """Break a lock whose holder died between creating it and writing its name into it, microseconds
    later.

    filelock takes such a file for the lock of a version that wrote no names, and so would wait for
    it for ever.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if status.st_size:
        return None
    if before is None or (before.inode, before.changed_ns) != (status.st_ino, status.st_ctime_ns):
        return _Blank(status.st_ino, status.st_ctime_ns, time.monotonic())
    if time.monotonic() - before.since_s < LEASE_S:
        return before
    # Moved before it is removed, and looked at again: another process may have broken it and made a
    # new one meanwhile.
    broken = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, broken)
        if broken.stat().st_ino != before.inode:
            with contextlib.suppress(OSError):
                os.link(broken, path)
        os.unlink(broken)
    return None


def publish_bytes(path: Path, data: bytes) -> bool:
    """Publish a file that never changes.

    True if this call did it, False if the file was there (the first one wins).

    Raises PublishFailed, naming the errno, and then leaves neither the file nor a temporary.
    """
    return publish_parts(path, [data])


def publish_replace(path: Path, data: bytes) -> None:
    """Publish a file that may be replaced: readers see the old bytes or the new ones.

    Raises PublishFailed.
    """
    with explain_os_errors(path):
        temporary = _write_temporary(path, [data])
        try:
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
        sync_directory(path.parent)


def publish_parts(path: Path, parts: Sequence[bytes | memoryview]) -> bool:
    """`publish_bytes` of the parts one after the other, without joining them in memory."""
    if path.exists():
        return False
    with explain_os_errors(path):
        temporary = _write_temporary(path, parts)
        try:
            won = _link_first_wins(temporary, path)
        finally:
            _remove(temporary)
        sync_directory(path.parent)
        return won


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written: a write to a nearly full disk may be short without
    being an error.
    """
    rest = memoryview(data).cast("B")
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    while rest.nbytes:
        written = os.write(descriptor, rest[: _PIECE_BYTES - place % _PIECE_BYTES])
        if written == 0:
            raise OSError(errno.ENOSPC, "the operating system wrote nothing")
        rest, place = rest[written:], place + written
        if rest.nbytes:
            _begin_writing_out(descriptor)


def _begin_writing_out(descriptor: int) -> None:
    """Let the disk begin with what is written so far (Linux), where it would begin at fsync.

    Promises nothing.
    """
    if sys.platform == "linux":
        _libc().sync_file_range(
            descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE
        )


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; file systems that cannot do this say so, and are
    believed.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into PublishFailed, which names the file and the errno."""
    try:
        yield
    except PublishFailed:
        raise
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown errno")
        raise PublishFailed(
            error.errno,
            f"{path}: {name} ({error.strerror or error}). Nothing was published and no temporary "
            "file is left. Make room or repair the disk and run the same command again; finished "
            "work is kept",
        ) from error


def _write_temporary(path: Path, parts: Sequence[bytes | memoryview]) -> Path:
    # Unique over processes and machines, so the leftover of a killed process is in nobody's way.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for part in parts:
                write_all(descriptor, part)
            os.fsync(descriptor)
        finally:
            # Network file systems may report a failed write only here.
            os.close(descriptor)
    except BaseException:
        _remove(temporary)
        raise
    return temporary


def _link_first_wins(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a request whose answer was lost: then the name that is in the way is our
        # own.
        return os.path.samefile(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with lease(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return False
            os.rename(temporary, path)
    return True


def _remove(temporary: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
