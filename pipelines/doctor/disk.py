"""Checks of the folder for features: free space, speed, locks, HDF5."""

import errno
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.pipelines.doctor.finding import Finding

_MIN_FREE_BYTES = 2e9  # not even a small run fits into less
_SLOW_BYTES_PER_S = 20e6  # a slower disk delays a GPU, and a dozen cores
_PROBE_BYTES = 32 << 20  # written to measure the speed, or as much as two seconds allow
# Difference between this machine's clock and the file system's from which on ages of files are
# wrong.
_SKEW_S = 2.0


def check_disk(
    folder: Path,
    measure_speed: Callable[[Path], tuple[float, float]] | None = None,
    free_space: Callable[[Path], float] | None = None,
) -> Finding:
    """Check that the folder can be written, has free space, and is not slow.

    measure_speed: returns bytes per second written and read. free_space: returns bytes. Tests give
    their own.
    """
    try:
        free_bytes = (free_space or (lambda path: shutil.disk_usage(path).free))(folder)
        written_per_s, read_per_s = (measure_speed or _speed)(folder)
    except OSError as error:
        return Finding(
            "disk",
            "fail",
            f"{folder}: {error.strerror or error}",
            "choose a folder that can be written: --folder, and `cache` in the recipe",
        )
    observation = (
        f"{free_bytes / 1e9:,.0f} GB free, {written_per_s / 1e6:,.0f} MB/s written and flushed, "
        f"{read_per_s / 1e6:,.0f} MB/s read"
    )
    if free_bytes < _MIN_FREE_BYTES:
        return Finding(
            "disk",
            "fail",
            observation,
            "make room, or put `cache` and `out` of the recipe elsewhere",
        )
    # A slow disk delays a run, but does not stop it.
    if written_per_s < _SLOW_BYTES_PER_S:
        return Finding(
            "disk", "note", observation, "a local disk for `cache` in the recipe would be faster"
        )
    return Finding("disk", "ok", observation)


def check_locking(
    folder: Path,
    make_link: Callable[[Any, Any], None] = os.link,
    read_clock: Callable[[], float] = time.time,
) -> Finding:
    """Check that locks exclude, that files can be linked, and that the file system's clock is
    right.
    """
    from headrace.cache.atomic_io import lease

    try:
        with _scratch(folder) as scratch_folder:
            is_held = threading.Event()
            with lease(scratch_folder / "lock"):
                other_thread = threading.Thread(
                    target=_hold, args=(scratch_folder / "lock", is_held), daemon=True
                )
                other_thread.start()
                # Long enough for a thread that a broken lock lets through, and not felt in a run of
                # the doctor.
                if is_held.wait(0.2):
                    return Finding(
                        "locking",
                        "fail",
                        "two threads held one lock",
                        "use another file system for `cache`: O_EXCL is broken here",
                    )
            # A network disk may show a removed file for some seconds more.
            if not is_held.wait(10):
                return Finding(
                    "locking",
                    "fail",
                    "a lock that was released was not seen to be",
                    "use another file system for `cache`",
                )
            other_thread.join(5)
            (scratch_folder / "one").write_bytes(b"1")
            has_links = True
            try:
                make_link(scratch_folder / "one", scratch_folder / "two")
            except OSError:
                has_links = False
            clock_skew_s = (scratch_folder / "one").stat().st_mtime - read_clock()
    except OSError as error:
        error_name = errno.errorcode.get(error.errno or 0, "")
        return Finding(
            "locking",
            "fail",
            f"{folder}: {error_name} {error.strerror or error}",
            "use a file system for `cache` that can create files exclusively",
        )
    # By ages of files it is told whether the owner of a lock is alive.
    if abs(clock_skew_s) > _SKEW_S:
        return Finding(
            "locking",
            "note",
            f"the file system's clock is {clock_skew_s:+.0f} s from this machine's",
            "set both by one time server (NTP)",
        )
    if not has_links:
        return Finding(
            "locking",
            "note",
            "works; no hard links here, so a lock is used in their place",
            "nothing to do",
        )
    return Finding("locking", "ok", "locks exclude, files appear whole")


def check_hdf5(
    folder: Path,
    write_file: Callable[[Path], None] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Finding:
    """Check that an HDF5 file can be written, and opened twice at once."""
    import h5py

    from headrace.cache.format.hdf5_values import open_hdf5

    observation = f"HDF5 {h5py.version.hdf5_version}, h5py {h5py.version.version}"
    try:
        with _scratch(folder) as scratch_folder:
            (write_file or _write_hdf5)(scratch_folder / "probe.h5")
            with (
                open_hdf5(scratch_folder / "probe.h5") as first_reader,
                open_hdf5(scratch_folder / "probe.h5") as second_reader,  # as two workers do
            ):
                reads_agree = (
                    first_reader["x"][:].tolist() == second_reader["x"][:].tolist() == [1, 2, 3]
                )
    except (OSError, RuntimeError, KeyError) as error:
        return Finding(
            "HDF5",
            "fail",
            f"{observation}: {' '.join(str(error).split())[:160]}",
            "pip install --force-reinstall h5py; on a network disk unset HDF5_USE_FILE_LOCKING",
        )
    if not reads_agree:
        return Finding(
            "HDF5",
            "fail",
            f"{observation}: what was read is not what was written",
            "pip install --force-reinstall h5py",
        )
    if environment.get("HDF5_PLUGIN_PATH"):
        return Finding(
            "HDF5",
            "note",
            f"{observation}, plugins from HDF5_PLUGIN_PATH",
            "unset it if a compressed shard cannot be read",
        )
    return Finding("HDF5", "ok", observation)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".headrace-doctor-") as scratch_folder:
        yield Path(scratch_folder)


def _hold(lock_path: Path, is_held: threading.Event) -> None:
    from headrace.cache.atomic_io import lease

    with lease(lock_path):
        is_held.set()


def _speed(folder: Path) -> tuple[float, float]:
    """Return bytes per second of flushed writing, and of reading (perhaps from memory)."""
    # Random, because a file system that compresses would write zeros at no cost.
    random_block = os.urandom(1 << 20)
    with _scratch(folder) as scratch_folder:
        probe_path = scratch_folder / uuid.uuid4().hex
        started_at = time.perf_counter()
        with probe_path.open("wb") as probe_file:
            # After two seconds a slow disk is known to be slow.
            while probe_file.tell() < _PROBE_BYTES and time.perf_counter() - started_at < 2:
                probe_file.write(random_block)
            n_bytes = probe_file.tell()
            probe_file.flush()
            # Without this, the speed would be that of the memory that buffers the file.
            os.fsync(probe_file.fileno())
        written_at = time.perf_counter()
        probe_path.read_bytes()
        ended_at = time.perf_counter()
    return n_bytes / (written_at - started_at), n_bytes / (ended_at - written_at)


def _write_hdf5(path: Path) -> None:
    import h5py

    # In the newest format, in which the results of heads are written.
    with h5py.File(path, "w", libver="latest", locking=False) as file:
        file["x"] = [1, 2, 3]
