"""Files that appear whole or not at all.

A file is written under a unique hidden name in its own directory, flushed to the disk, and only
then linked to its name. What a process that dies leaves behind:

    while writing     `.<name>.<random>.partial`, which nobody reads and `headrace cache gc` removes
    before the link   the same
    after the link    the finished file, and perhaps the hidden name too
"""

import contextlib
import ctypes
import errno
import functools
import os
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import SoftFileLease, Timeout

from headrace.cache.errors import PublishFailed

PARTIAL_SUFFIX = ".partial"

# A lock whose holder shows no sign of life for this long is taken over. It is waited out only for
# holders on other machines, and for lock files that name no owner: a dead holder on this machine is
# recognized by its process id.
LEASE_S = 30.0

# Errnos of file systems without hard links (FAT, some FUSE and cluster file systems).
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
# One call writes 16 MiB at most, up to the next multiple of 16 MiB. Not the whole file at once, so
# that the disk begins to write early. Not less, because Linux keeps what one call writes in pages
# of about that size, and random rows are read 10 to 20 % slower from small pages.
_WRITE_BLOCK_BYTES = 1 << 24
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
# Errnos of file systems that cannot sync a directory.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF}


@contextlib.contextmanager
def lease(lock_path: Path) -> Iterator[None]:
    """Hold the lock file `lock_path`, an existence lock with a heartbeat.

    The file system has to support nothing but O_EXCL; `flock` is node-local on some cluster file
    systems, so it is not used. A holder that is frozen for longer than LEASE_S may lose the lock
    without noticing, so two processes can hold it at once. Whatever the lock protects must survive
    that: the manifest's lock only keeps lines apart.
    """
    file_lock = SoftFileLease(
        lock_path, lease_duration=LEASE_S, heartbeat_interval=LEASE_S / 6, poll_interval=0.005
    )
    ownerless_lock: _OwnerlessLock | None = None
    while not file_lock.is_locked:
        try:
            file_lock.acquire(timeout=LEASE_S / 4)
        except Timeout:
            # A lock without its owner's name is waited for by filelock for ever, not by us.
            ownerless_lock = _watch_ownerless(lock_path, ownerless_lock)
    try:
        yield
    finally:
        file_lock.release()


def names_owner(lock_path: Path) -> bool:
    """Return whether a lock file names the process that holds it.

    After a kill, a full disk or a power cut it may be empty or torn, and names none.
    """
    return SoftFileLease(lock_path).pid is not None


class _OwnerlessLock(NamedTuple):
    """A lock file that does not name its owner."""

    inode: int
    changed_ns: int
    since_s: float  # on this process's monotonic clock


def _watch_ownerless(lock_path: Path, previous: _OwnerlessLock | None) -> _OwnerlessLock | None:
    """Remove a lock file that has named no owner for LEASE_S.

    Return what to pass as `previous` next time: None for a lock that names its owner, or that
    is gone.

    The holder of such a file died between creating it and writing its name into it, microseconds
    later. filelock takes the file for the lock of a version that wrote no names, and would wait for
    it for ever.
    """
    try:
        lock_status = lock_path.stat()
    except FileNotFoundError:
        return None  # its holder has released it since
    if names_owner(lock_path):
        return None
    if previous is None or (previous.inode, previous.changed_ns) != (
        lock_status.st_ino,
        lock_status.st_ctime_ns,
    ):
        return _OwnerlessLock(lock_status.st_ino, lock_status.st_ctime_ns, time.monotonic())
    if time.monotonic() - previous.since_s < LEASE_S:
        return previous
    # Renamed before it is removed, and its inode compared again: meanwhile another process may have
    # removed it and made a lock of its own, which is then given its name back.
    broken_path = lock_path.with_name(f"{lock_path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lock_path, broken_path)
        if broken_path.stat().st_ino != previous.inode:
            with contextlib.suppress(OSError):
                os.link(broken_path, lock_path)
        os.unlink(broken_path)
    return None


def read_regular(file_path: Path | str) -> bytes:
    """Return the bytes of a file, or of the one that a link leads to.

    Raises OSError also for what may have no end: a stranger's link to a device, or a pipe.
    """
    # A directory passes: read_bytes names it in an error of its own.
    if not stat.S_ISREG(mode := os.stat(file_path).st_mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "neither a file nor a link to one", str(file_path))
    return Path(file_path).read_bytes()


def publish_bytes(target_path: Path, data: bytes) -> bool:
    """Publish a file that never changes; the first writer wins.

    Return True if this call published it, False if the file exists already. Raises PublishFailed,
    which names the errno; then neither the file nor a temporary one is left.
    """
    return publish_parts(target_path, [data])


def publish_replace(target_path: Path, data: bytes) -> None:
    """Publish a file that may be replaced: readers see old bytes or new ones, no mixture.

    Raises PublishFailed.
    """
    with explain_os_errors(target_path):
        temporary_path = _write_temporary(target_path, [data])
        try:
            os.replace(temporary_path, target_path)
        # Also at Ctrl-C, which is no Exception: no temporary file stays.
        except BaseException:
            temporary_path.unlink(missing_ok=True)
            raise
        sync_directory(target_path.parent)


def publish_parts(target_path: Path, byte_parts: Sequence[bytes | memoryview]) -> bool:
    """Publish the concatenation of `byte_parts` like `publish_bytes`, never joined in memory."""
    # Saves writing in vain; where two writers meet later, the link decides.
    if target_path.exists():
        return False
    with explain_os_errors(target_path):
        temporary_path = _write_temporary(target_path, byte_parts)
        try:
            is_first_writer = _link_first_wins(temporary_path, target_path)
        finally:
            temporary_path.unlink(missing_ok=True)
        sync_directory(target_path.parent)
        return is_first_writer


def write_all(file_descriptor: int, data: bytes | memoryview) -> None:
    """Call `os.write` until all of `data` is written. Raises OSError.

    A write to a nearly full disk may be short without being an error.
    """
    remaining_bytes = memoryview(data).cast("B")
    file_position = os.lseek(file_descriptor, 0, os.SEEK_CUR)
    while remaining_bytes.nbytes:
        n_written = os.write(
            file_descriptor,
            remaining_bytes[: _WRITE_BLOCK_BYTES - file_position % _WRITE_BLOCK_BYTES],
        )
        if n_written == 0:
            raise OSError(errno.ENOSPC, "the operating system wrote nothing")
        remaining_bytes, file_position = remaining_bytes[n_written:], file_position + n_written
        if remaining_bytes.nbytes and sys.platform == "linux":
            # Linux is asked to write dirty pages from now on, before fsync. No guarantee is given
            # or needed.
            all_bytes = ctypes.c_int64(0), ctypes.c_int64(0)
            _load_libc().sync_file_range(file_descriptor, *all_bytes, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the file system can."""
    # A name that was made or renamed is only in memory until its directory is synced.
    directory_descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(directory_descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(directory_descriptor)


@contextlib.contextmanager
def explain_os_errors(target_path: Path) -> Iterator[None]:
    """Turn an OSError into PublishFailed, which names the file and the errno."""
    try:
        yield
    # Is an OSError itself, and says already which file could not be published.
    except PublishFailed:
        raise
    except OSError as error:
        errno_name = errno.errorcode.get(error.errno or 0, "unknown errno")
        raise PublishFailed(
            error.errno,
            f"{target_path}: {errno_name} ({error.strerror or error}). Nothing was published and "
            "no temporary file is left. Make room or repair the disk and run the same command "
            "again; finished work is kept",
        ) from error


def temporary_name(target_path: Path) -> Path:
    """Return a hidden path beside `target_path`, under which to write what gets its name later."""
    # Unique over processes and machines, so the leftover of a killed process is in nobody's way.
    return target_path.with_name(f".{target_path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")


def _write_temporary(target_path: Path, byte_parts: Sequence[bytes | memoryview]) -> Path:
    temporary_path = temporary_name(target_path)
    file_descriptor = os.open(temporary_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for byte_part in byte_parts:
                write_all(file_descriptor, byte_part)
            os.fsync(file_descriptor)
        finally:
            # Network file systems may report a failed write only here.
            os.close(file_descriptor)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    return temporary_path


def _link_first_wins(temporary_path: Path, target_path: Path) -> bool:
    try:
        os.link(temporary_path, target_path)
    except FileExistsError:
        # NFS may repeat a request whose answer was lost: then the name that is in the way is our
        # own.
        return os.path.samefile(temporary_path, target_path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A rename replaces a file that is there, so the first writer wins only under a lock.
        with lease(target_path.with_name(f".{target_path.name}.lock")):
            if target_path.exists():
                return False
            os.rename(temporary_path, target_path)
    return True
