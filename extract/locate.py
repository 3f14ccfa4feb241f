"""Locators: where a sample's bytes are. A plain path is a file; `FILE::KIND:DETAILS` is one item inside a file.

    shard-000.tar::tar:OFFSET:SIZE:NAME     a member of an uncompressed tar archive
    images.npy::npy:INDEX                   one image of an array
    images.npz::npz:KEY:INDEX
    images.h5::h5:DATASET:INDEX
    train-images-idx3-ubyte.gz::idx:INDEX

The bytes of an array's item are those of an `.npy` file that holds it alone, so that it has a content hash as any
file has.
"""

import functools
import gzip
import io
import os
import re
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from headrace.extract.errors import SourceError

_LOCATOR = re.compile(r"(?P<file>.+?)::(?P<kind>tar|npy|npz|h5|idx):(?P<rest>.*)", re.DOTALL)
# HDF5 allows one caller at a time, and an archive that must be decompressed whole should be so once.
_LOCK = threading.Lock()


def file_of(path: str) -> str:
    """The file that a locator points into; a plain path is its own."""
    match = _LOCATOR.fullmatch(path)
    return match["file"] if match else path


def read_bytes(path: str) -> bytes:
    """The bytes of one sample. Raises OSError when they are not there."""
    match = _LOCATOR.fullmatch(path)
    if match is None:
        with open(path, "rb") as file:
            return file.read()
    if match["kind"] == "tar":
        offset, size, _ = match["rest"].split(":", 2)
        with open(match["file"], "rb") as file:
            file.seek(int(offset))
            data = file.read(int(size))
        if len(data) != int(size):
            raise OSError(f"the archive ends after {len(data)} of the member's {size} bytes")
        return data
    key, _, index = match["rest"].rpartition(":")
    try:
        with _LOCK:
            item = np.asarray(open_array(match["file"], match["kind"], key)[int(index)])
    except (IndexError, ValueError, SourceError) as error:
        raise OSError(str(error)) from error
    return array_bytes(item)


def array_bytes(item: npt.NDArray[Any]) -> bytes:
    """An array as the bytes of an `.npy` file, the same bytes for the same values, type and shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(item), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def open_array(file: str, kind: str, key: str) -> Any:
    """Something with `shape`, `dtype` and `[index]` that reads images from the file. Raises SourceError, OSError."""
    status = os.stat(file)
    return _open(file, kind, key, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _open(file: str, kind: str, key: str, size: int, mtime_ns: int) -> Any:
    try:
        if kind == "npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        if kind == "npz":
            with np.load(file, allow_pickle=False) as archive:
                if key not in archive.files:
                    raise SourceError(f"{file} has no array {key!r}; it has {', '.join(archive.files)}")
                return archive[key]  # decompressed whole, once per process
        if kind == "h5":
            found = h5py.File(file, "r").get(key)
            if not isinstance(found, h5py.Dataset):
                raise SourceError(f"{file} has no data set {key!r}")
            return found
        return _read_idx(Path(file))
    except ValueError as error:  # damaged headers, and arrays of Python objects
        raise SourceError(f"{file}: cannot be read as {kind}: {error}") from error


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(file: Path) -> npt.NDArray[Any]:
    """The array of an idx file (the format of MNIST), gzipped or not. Raises ValueError."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"not a whole gzip file ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError("the first four bytes are not those of an idx file")
    dtype, dimensions = np.dtype(_IDX_TYPES[data[2]]), data[3]
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions))
    start = 4 + 4 * dimensions
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(data) - start != expected:
        raise ValueError(f"its header says {shape}, {expected} bytes, but {len(data) - start} follow")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
