"""Locators: where a sample's bytes are, as text.

A plain path is a file; `FILE::KIND:DETAILS` is one item inside a file.

    shard-000.tar::tar:OFFSET:SIZE:NAME                     a member of a tar archive
    shard-000.tar.gz::tgz:OFFSET:SIZE:NAME                  of a compressed one; the offset is in
    what it decompresses to photos.zip::zip:HEADER:COMPRESSED:SIZE:METHOD:CRC:NAME  a member of a
    zip archive images.npy::npy:INDEX                                   one image of an array
    images.npz::npz:KEY:INDEX images.h5::h5:DATASET:INDEX train-images-idx3-ubyte.gz::idx:INDEX
    train-00000.parquet::parquet:COLUMN:ROW                 an encoded image in a cell of a table
    data-00000.arrow::arrow:COLUMN:ROW

The bytes of an array's item are those of an `.npy` file that holds it alone, so that it has a
content hash as any file has. A path that is no UTF-8, or that reads like a locator, is written as
`bytes:` and its bytes, percent-encoded.
"""

import bz2
import functools
import gzip
import io
import lzma
import math
import os
import re
import struct
import threading
import urllib.parse
import zlib
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.extract.errors import SourceError
from headrace.extract.images.decoding import MAX_PIXELS
from headrace.extract.images.file_stamps import file_stamp

_LOCATOR = re.compile(
    r"(?P<file>.+?)::(?P<kind>tar|tgz|zip|npy|npz|h5|idx|parquet|arrow):(?P<details>.*)", re.DOTALL
)
_ENCODED = "bytes:"
# HDF5 allows one caller at a time, and an archive that must be decompressed whole should be so
# once.
_LOCK = threading.Lock()
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_H5_CURE = (
    "Links, external storage and virtual data sets are not followed, for they can name any file. "
    "Copy the values into one file: h5repack, or h5py: new['images'] = old['images'][:]"
)
_MOST_COMPRESSED = 1032  # deflate's bound; no other filter of HDF5's own does better on images
_ZIP_LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # signature, …, lengths of the name and of the extra field
_ZIP_STORED, _ZIP_DEFLATED = 0, 8


def path_text(path: str | Path) -> str:
    """A file's path as text that UTF-8 can hold and that is no locator; `file_of` gives the path
    back.
    """
    text = str(path)
    if text.isascii() and "::" not in text and not text.startswith(_ENCODED):
        return text  # nearly all, and a listing has millions
    if text.startswith(_ENCODED) or _LOCATOR.fullmatch(text) or not _is_utf8(text):
        return _ENCODED + urllib.parse.quote(os.fsencode(text))
    return text


def printable(name: str) -> str:
    r"""A file's name as text that UTF-8 can hold: bytes that are no UTF-8 are written as \xNN."""
    return name if _is_utf8(name) else os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_of(path: str) -> str:
    """The file that a locator points into, as the system takes it; a plain path is its own."""
    match = _LOCATOR.fullmatch(path)
    file = match["file"] if match else path
    if file.startswith(_ENCODED):
        return os.fsdecode(urllib.parse.unquote_to_bytes(file.removeprefix(_ENCODED)))
    return file


def read_bytes(path: str) -> bytes:
    """The bytes of one sample.

    Raises OSError when they are not there, whatever is wrong with the file around them.
    """
    match = _LOCATOR.fullmatch(path)
    file = file_of(path)
    try:
        if match is None:
            return Path(file).read_bytes()
        kind, details = match["kind"], match["details"]
        if kind == "tar":
            return _read_tar_member(file, details)
        if kind == "tgz":
            return _read_compressed_tar_member(file, details)
        if kind == "zip":
            return _read_zip_member(file, details)
        key, _, index = details.rpartition(":")
        if kind in ("parquet", "arrow"):
            return _read_cell(file, kind, key, int(index))
        with _LOCK:
            array = open_array(file, kind, key)
            if math.prod(array.shape[1:]) > 4 * MAX_PIXELS:
                raise OSError(
                    f"an image of shape {array.shape[1:]}: more than the limit of {MAX_PIXELS} "
                    "pixels"
                )
            return array_bytes(np.asarray(array[int(index)]))
    except (OSError, MemoryError):
        raise
    # Damaged containers make their libraries raise anything; for the caller the bytes are not
    # there.
    except Exception as error:
        raise OSError(str(error)) from error


def array_bytes(item: npt.NDArray[Any]) -> bytes:
    """An array as the bytes of an `.npy` file, the same bytes for the same values, type
    and shape.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(item), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def open_array(file: str, kind: str, key: str) -> Any:
    """Something with `shape`, `dtype` and `[index]` that reads images from the file.

    Raises SourceError, OSError.
    """
    return _open_array(file, kind, key, file_stamp(file))


@functools.lru_cache(maxsize=8)
def _open_array(file: str, kind: str, key: str, stamp: object) -> Any:
    try:
        if kind == "npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        if kind == "npz":
            with np.load(file, allow_pickle=False) as archive:
                if key not in archive.files:
                    raise SourceError(
                        f"{file} has no array {key!r}; it has {', '.join(archive.files)}"
                    )
                _require_held(
                    archive.zip.getinfo(f"{key}.npy").file_size, os.path.getsize(file), file
                )
                return archive[key]  # decompressed whole, once per process
        if kind == "h5":
            return _own_dataset(h5py.File(file, "r"), file, key)
        return _read_idx(Path(file))
    except (SourceError, OSError):
        raise
    # Damaged headers, arrays of Python objects, and whatever else NumPy, zipfile and h5py make of
    # bytes that are not theirs.
    except Exception as error:
        raise SourceError(f"{file}: cannot be read as {kind}: {error}") from error


def _own_dataset(opened: h5py.File, file: str, key: str) -> h5py.Dataset:
    """The data set of that name, whose values are in this very file. Raises SourceError.

    Links, external storage and virtual data sets can name any file of whoever opens this one, and
    its bytes would be images.
    """
    place: Any = opened
    for part in [part for part in key.split("/") if part]:
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if link is None:
            raise SourceError(f"{file} has no data set {key!r}")
        if not isinstance(link, h5py.HardLink):
            raise SourceError(f"{file}: {key!r} is a link, to another place or file. {_H5_CURE}")
        place = place[part]
    if not isinstance(place, h5py.Dataset):
        raise SourceError(f"{file} has no data set {key!r}")
    if place.external or place.is_virtual:
        raise SourceError(f"{file}: the values of {key!r} lie in other files. {_H5_CURE}")
    _require_held(place.nbytes, os.path.getsize(file), file)
    return place


def _require_held(declared: int, size: int, file: str) -> None:
    """Raises SourceError for values that a file of that size cannot hold, however well they are
    compressed.
    """
    if declared > _MOST_COMPRESSED * size:
        raise SourceError(
            f"{file}: it has {size:,} bytes, and declares {declared:,} bytes of values. Fetch it "
            "again"
        )


def _read_tar_member(file: str, details: str) -> bytes:
    offset, size, _ = details.split(":", 2)
    with open(file, "rb") as archive:
        # A declared size beyond the file's end must not ask for memory.
        if int(offset) + int(size) > (length := os.fstat(archive.fileno()).st_size):
            raise OSError(
                f"the archive ends after {max(0, length - int(offset))} of the member's {size} "
                "bytes"
            )
        archive.seek(int(offset))
        return archive.read(int(size))


def _read_compressed_tar_member(file: str, details: str) -> bytes:
    """Members are read in about the order of the archive, so that its stream mostly
    goes forward.
    """
    offset, size, _ = details.split(":", 2)
    with _LOCK:
        stream = _open_compressed(file, file_stamp(file))
        stream.seek(int(offset))
        data = stream.read(int(size))
    if len(data) != int(size):
        raise OSError(f"the archive ends after {len(data)} of the member's {size} bytes")
    return data


@functools.lru_cache(maxsize=4)
def _open_compressed(file: str, stamp: object) -> IO[bytes]:
    return open_compressed(file)


def open_compressed(file: str | Path) -> IO[bytes]:
    """A gzip, bzip2 or xz file as the stream that it decompresses to.

    Raises SourceError for another one.
    """
    with open(file, "rb") as opened:
        magic = opened.read(2)
    if magic not in _DECOMPRESSORS:
        raise SourceError(f"{file}: expected a file that gzip, bzip2 or xz compressed")
    return _DECOMPRESSORS[magic](file, "rb")  # type: ignore[operator,no-any-return]


def _read_zip_member(file: str, details: str) -> bytes:
    header, compressed_size, size, method, crc, _ = details.split(":", 5)
    with open(file, "rb") as archive:
        archive.seek(int(header))
        signature, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(
            archive.read(_ZIP_LOCAL_HEADER.size)
        )
        if signature != b"PK\3\4":
            raise OSError("the archive has changed: there is no member where there was one")
        start = archive.seek(name_length + extra_length, io.SEEK_CUR)
        # A declared size beyond the file's end must not ask for memory.
        data = archive.read(
            min(int(compressed_size), max(0, os.fstat(archive.fileno()).st_size - start))
        )
    if len(data) != int(compressed_size):
        raise OSError(f"the archive ends after {len(data)} of the member's {compressed_size} bytes")
    if int(method) == _ZIP_DEFLATED:
        # No more than the archive says, so that a few bytes cannot become gigabytes
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(size) + 1)
    if zlib.crc32(data) != int(crc):
        raise OSError("the member's bytes do not have its checksum (CRC-32)")
    return data


def _read_cell(file: str, kind: str, column: str, row: int) -> bytes:
    """The encoded image in a cell: bytes, or a struct with a field `bytes` as Hugging Face writes
    them.
    """
    with _LOCK:
        cells, start = _image_cells(file, kind, column, row)
    value = cells[row - start].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise OSError("the cell holds no image")
    return data


def _image_cells(file: str, kind: str, column: str, row: int) -> tuple[Any, int]:
    """The cells of the row group that holds the row, and its first row."""
    if kind == "arrow":
        return _arrow_column(file, column, file_stamp(file)), 0
    starts = _row_group_starts(file, file_stamp(file))
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _row_group(file, column, group, file_stamp(file)), int(starts[group])


@functools.lru_cache(maxsize=64)
def _row_group_starts(file: str, stamp: object) -> npt.NDArray[np.int64]:
    metadata = pq.ParquetFile(file).metadata
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return np.cumsum([0, *counts])[:-1]


@functools.lru_cache(maxsize=2)  # rows are read in order, so that each group is decompressed once
def _row_group(file: str, column: str, group: int, stamp: object) -> Any:
    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column].combine_chunks()


@functools.lru_cache(maxsize=8)
def _arrow_column(file: str, column: str, stamp: object) -> Any:
    return open_arrow(file)[column]


def open_arrow(file: str | Path) -> pa.Table:
    """An Arrow file, stream (as `datasets` writes) or IPC file, mapped into memory and not read.

    Raises SourceError.
    """
    try:
        source = pa.memory_map(str(file))
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        table.validate(
            full=True
        )  # Arrow believes lengths and offsets otherwise, and reads where there is no memory
        return table
    except Exception as error:
        raise SourceError(f"{file}: cannot be read as Arrow: {error}") from error


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(file: Path) -> npt.NDArray[Any]:
    """The array of an idx file (the format of MNIST), gzipped or not. Raises ValueError."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read(4 + 4 * 255)
            if (
                len(data) > 4 and data[2] in _IDX_TYPES
            ):  # no more than the header says, and one byte that is too much
                bytes_each = np.dtype(_IDX_TYPES[data[2]]).itemsize
                sizes = [
                    int.from_bytes(data[at : at + 4], "big") for at in range(4, 4 + 4 * data[3], 4)
                ]
                _require_held(math.prod(sizes) * bytes_each, max(1, file.stat().st_size), str(file))
                rest = 4 + 4 * data[3] + math.prod(sizes) * bytes_each - len(data) + 1
                data += stream.read(max(1, rest))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"not a whole gzip file ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError("the first four bytes are not those of an idx file")
    dtype, dimensions = np.dtype(_IDX_TYPES[data[2]]), data[3]
    shape = tuple(
        int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions)
    )
    start = 4 + 4 * dimensions
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise ValueError(
            f"its header says {shape}, {expected} bytes, but {len(data) - start} follow"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
