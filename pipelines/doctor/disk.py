"""The folder that features are kept in: room, speed, locks, HDF5."""

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

_LEAST_FREE_BYTES = 2e9
_SLOW_BYTES_PER_S = 20e6  # a disk below this holds up a GPU, and a dozen cores
_PROBE_BYTES = 32 << 20
# between this clock and the file system's: more, and files seem to come from the future
_SKEW_S = 2.0


def check_disk(
    folder: Path,
    probe: Callable[[Path], tuple[float, float]] | None = None,
    free: Callable[[Path], float] | None = None,
) -> Finding:
    """The folder can be written, has room, and is not slow. probe: bytes/s written and read."""
    try:
        room = (free or (lambda path: shutil.disk_usage(path).free))(folder)
        write, read = (probe or _speed)(folder)
    except OSError as error:
        return Finding(
            "disk",
            "fail",
            f"{folder}: {error.strerror or error}",
            "choose a folder that can be written: --folder, and `cache` in the recipe",
        )
    said = (
        f"{room / 1e9:,.0f} GB free, {write / 1e6:,.0f} MB/s written and flushed, "
        f"{read / 1e6:,.0f} MB/s read"
    )
    if room < _LEAST_FREE_BYTES:
        return Finding(
            "disk", "fail", said, "make room, or put `cache` and `out` of the recipe elsewhere"
        )
    if write < _SLOW_BYTES_PER_S:
        return Finding(
            "disk", "note", said, "a local disk for `cache` in the recipe would be faster"
        )
    return Finding("disk", "ok", said)


def check_locking(
    folder: Path, link: Callable[[Any, Any], None] = os.link, clock: Callable[[], float] = time.time
) -> Finding:
    """Two writers cannot hold one lock, names appear whole, and the file system's clock is this
    one's.
    """
    from headrace.cache.atomic_io import lease

    try:
        with _scratch(folder) as place:
            held = threading.Event()
            with lease(place / "lock"):
                other = threading.Thread(target=_hold, args=(place / "lock", held), daemon=True)
                other.start()
                if held.wait(0.2):
                    return Finding(
                        "locking",
                        "fail",
                        "two threads held one lock",
                        "use another file system for `cache`: O_EXCL is broken here",
                    )
            if not held.wait(10):
                return Finding(
                    "locking",
                    "fail",
                    "a lock that was released was not seen to be",
                    "use another file system for `cache`",
                )
            other.join(5)
            (place / "one").write_bytes(b"1")
            links = True
            try:
                link(place / "one", place / "two")
            except OSError:
                links = False
            skew = (place / "one").stat().st_mtime - clock()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        return Finding(
            "locking",
            "fail",
            f"{folder}: {name} {error.strerror or error}",
            "use a file system for `cache` that can create files exclusively",
        )
    if abs(skew) > _SKEW_S:
        return Finding(
            "locking",
            "note",
            f"the file system's clock is {skew:+.0f} s from this machine's",
            "set both by one time server (NTP)",
        )
    if not links:
        return Finding(
            "locking",
            "note",
            "works; no hard links here, so a lock is used in their place",
            "nothing to do",
        )
    return Finding("locking", "ok", "locks exclude, files appear whole")


def check_hdf5(
    folder: Path,
    write: Callable[[Path], None] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Finding:
    """A file is written, and read by two at once."""
    import h5py

    said = f"HDF5 {h5py.version.hdf5_version}, h5py {h5py.version.version}"
    try:
        with _scratch(folder) as place:
            (write or _write_hdf5)(place / "probe.h5")
            with (
                h5py.File(place / "probe.h5", "r") as one,
                h5py.File(place / "probe.h5", "r") as two,
            ):
                same = one["x"][:].tolist() == two["x"][:].tolist() == [1, 2, 3]
    except (OSError, RuntimeError, KeyError) as error:
        return Finding(
            "HDF5",
            "fail",
            f"{said}: {' '.join(str(error).split())[:160]}",
            "if the file system has no locks: export HDF5_USE_FILE_LOCKING=FALSE. Otherwise pip "
            "install --force-reinstall h5py",
        )
    if not same:
        return Finding(
            "HDF5",
            "fail",
            f"{said}: what was read is not what was written",
            "pip install --force-reinstall h5py",
        )
    if environment.get("HDF5_PLUGIN_PATH"):
        return Finding(
            "HDF5",
            "note",
            f"{said}, plugins from HDF5_PLUGIN_PATH",
            "unset it if a compressed shard cannot be read",
        )
    return Finding("HDF5", "ok", said)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".headrace-doctor-") as place:
        yield Path(place)


def _hold(path: Path, held: threading.Event) -> None:
    from headrace.cache.atomic_io import lease

    with lease(path):
        held.set()


def _speed(folder: Path) -> tuple[float, float]:
    """Bytes per second of writing with a flush, and of reading what the system may
    still remember.
    """
    data = os.urandom(1 << 20)
    with _scratch(folder) as place:
        path = place / uuid.uuid4().hex
        started = time.perf_counter()
        with path.open("wb") as file:
            while (
                file.tell() < _PROBE_BYTES and time.perf_counter() - started < 2
            ):  # a slow disk is known by then
                file.write(data)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        ended = time.perf_counter()
    return size / (written - started), size / (ended - written)


def _write_hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "w", libver="latest") as file:
        file["x"] = [1, 2, 3]
