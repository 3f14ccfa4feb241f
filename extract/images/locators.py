"""Locators: texts that say where the bytes of a sample are.

A plain path is a file; `FILE::KIND:DETAILS` is one item inside a file.

    shard-000.tar::tar:OFFSET:SIZE:NAME             a member of a tar archive
    shard-000.tar.gz::tgz:OFFSET:SIZE:NAME          of a compressed one; OFFSET in its
                                                    decompressed bytes
    photos.zip::zip:HEADER:COMPRESSED:SIZE:METHOD:CRC:NAME      a member of a zip archive
    images.npy::npy:INDEX                           one image of an array
    images.npz::npz:KEY:INDEX
    images.h5::h5:DATASET:INDEX
    train-images-idx3-ubyte.gz::idx:INDEX
    train-00000.parquet::parquet:COLUMN:ROW         an encoded image in a cell of a table
    data-00000.arrow::arrow:COLUMN:ROW
    IMAGE::crop:LEFT,TOP,WIDTH,HEIGHT               a rectangle of any of these (crops.py)

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

from headrace.cache.atomic_io import read_regular
from headrace.cache.file_stamps import file_stamp
from headrace.cache.format.hdf5_values import open_hdf5
from headrace.extract.errors import SourceError
from headrace.extract.images.crops import split_crop
from headrace.extract.images.opening import MAX_DEFLATE_RATIO, MAX_FILE_PIXELS

_LOCATOR = re.compile(
    r"(?P<file>.+?)::(?P<kind>tar|tgz|zip|npy|npz|h5|idx|parquet|arrow|crop):(?P<details>.*)",
    re.DOTALL,
)
_ENCODED = "bytes:"  # begins a path that is percent-encoded
# HDF5 allows one caller at a time, and an array or archive that several threads need is
# decompressed once, by the first of them.
_LOCK = threading.Lock()
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_H5_CURE = (
    "Links, external storage and virtual data sets are not followed, for they can name any file. "
    "Copy the values into one file: h5repack, or h5py: new['images'] = old['images'][:]"
)
# Signature, other fields, lengths of the name and of the extra field.
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_STORED, _ZIP_DEFLATED = 0, 8  # methods of the zip format


def encode_path(path: str | Path) -> str:
    """Return a path as UTF-8 text that is no locator; `locator_file` is the inverse."""
    text = str(path)
    if text.startswith(_ENCODED) or _match_locator(text) or not _is_utf8(text):
        return _ENCODED + urllib.parse.quote(os.fsencode(text))
    return text


def printable_name(name: str) -> str:
    r"""A file's name as text that UTF-8 can hold: bytes that are no UTF-8 are written as \xNN."""
    return name if _is_utf8(name) else os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_utf8(text: str) -> bool:
    if text.isascii():  # a third of the time that encoding it takes
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def locator_file(path: str) -> str:
    """Return the file that a locator points into, or the file of a plain path, to be opened."""
    match = _match_locator(path)
    file_text = match["file"] if match else path
    if file_text.startswith(_ENCODED):
        return os.fsdecode(urllib.parse.unquote_to_bytes(file_text.removeprefix(_ENCODED)))
    return file_text


def is_locator(path: str) -> bool:
    """Return whether a path means an item inside a file."""
    return _match_locator(path) is not None


def _match_locator(path: str) -> re.Match[str] | None:
    # Nearly all paths are plain, and a listing has millions: they cost no regular expression.
    return _LOCATOR.fullmatch(path) if "::" in path else None


def read_bytes(path: str) -> bytes:
    """Return the bytes of one sample; for a crop those of its whole image.

    Raises OSError when they cannot be read, also for a damaged file around them.
    """
    path, _ = split_crop(path)
    match = _match_locator(path)
    file_path = locator_file(path)
    try:
        if match is None:
            return read_regular(file_path)
        container_kind, details = match["kind"], match["details"]
        if container_kind == "tar":
            return _read_tar_member(file_path, details)
        if container_kind == "tgz":
            return _read_compressed_tar_member(file_path, details)
        if container_kind == "zip":
            return _read_zip_member(file_path, details)
        array_key, _, image_index = details.rpartition(":")
        if container_kind in ("parquet", "arrow"):
            return _read_cell(file_path, container_kind, array_key, int(image_index))
        with _LOCK:
            image_array = open_array(file_path, container_kind, array_key)
            if math.prod(image_array.shape[1:]) > 4 * MAX_FILE_PIXELS:  # of up to 4 channels
                raise OSError(
                    f"an image of shape {image_array.shape[1:]}: more than the limit of "
                    f"{MAX_FILE_PIXELS:,} pixels"
                )
            return array_bytes(np.asarray(image_array[int(image_index)]))
    except (OSError, MemoryError):
        raise
    # Libraries raise anything on damaged containers; callers handle one kind of error.
    except Exception as error:
        raise OSError(str(error)) from error


def array_bytes(image_array: npt.NDArray[Any]) -> bytes:
    """Return an array as an `.npy` file: the same bytes for the same values, type and shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(image_array), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def open_array(file_path: str, container_kind: str, array_key: str) -> Any:
    """Open an array of images: `shape`, `dtype` and `[index]` read from the file.

    container_kind: npy, npz, h5 or idx. array_key: name in an npz or h5 file.

    Raises SourceError for damaged files and unknown names, OSError for files that cannot be read.
    """
    return _open_array(file_path, container_kind, array_key, file_stamp(file_path))


@functools.lru_cache(maxsize=8)
def _open_array(file_path: str, container_kind: str, array_key: str, stamp: object) -> Any:
    try:
        if container_kind == "npy":
            return np.load(file_path, mmap_mode="r", allow_pickle=False)
        if container_kind == "npz":
            with np.load(file_path, allow_pickle=False) as npz_archive:
                if array_key not in npz_archive.files:
                    raise SourceError(
                        f"{file_path} has no array {array_key!r}; it has "
                        f"{', '.join(npz_archive.files)}"
                    )
                declared_bytes = npz_archive.zip.getinfo(f"{array_key}.npy").file_size
                _require_possible_size(declared_bytes, os.path.getsize(file_path), file_path)
                return npz_archive[array_key]  # decompressed whole, once per process
        if container_kind == "h5":
            return _own_dataset(open_hdf5(file_path), file_path, array_key)
        return _read_idx(Path(file_path))
    except (SourceError, OSError):
        raise
    # NumPy, zipfile and h5py raise anything on damaged headers and arrays of Python objects.
    except Exception as error:
        raise SourceError(f"{file_path}: cannot be read as {container_kind}: {error}") from error


def _own_dataset(hdf5_file: h5py.File, file_path: str, array_key: str) -> h5py.Dataset:
    """Return the data set of that name, whose values must be in this very file.

    Raises SourceError.
    """
    # Links, external storage and virtual data sets can name any file of the user who opens a
    # stranger's file, and its bytes would become images.
    hdf5_object: Any = hdf5_file
    for key_part in filter(None, array_key.split("/")):
        is_group = isinstance(hdf5_object, h5py.Group)
        link = hdf5_object.get(key_part, getlink=True) if is_group else None
        if link is None:
            raise SourceError(f"{file_path} has no data set {array_key!r}")
        if not isinstance(link, h5py.HardLink):
            raise SourceError(
                f"{file_path}: {array_key!r} is a link, to another place or file. {_H5_CURE}"
            )
        hdf5_object = hdf5_object[key_part]
    if not isinstance(hdf5_object, h5py.Dataset):
        raise SourceError(f"{file_path} has no data set {array_key!r}")
    if hdf5_object.external or hdf5_object.is_virtual:
        raise SourceError(
            f"{file_path}: the values of {array_key!r} lie in other files. {_H5_CURE}"
        )
    _require_possible_size(hdf5_object.nbytes, os.path.getsize(file_path), file_path)
    return hdf5_object


def _require_possible_size(declared_bytes: int, file_bytes: int, file_path: str) -> None:
    """Raise SourceError for more values than a file of that size can hold, compressed or not."""
    if declared_bytes > MAX_DEFLATE_RATIO * file_bytes:
        raise SourceError(
            f"{file_path}: it has {file_bytes:,} bytes, and declares {declared_bytes:,} bytes of "
            "values. Fetch it again"
        )


def _read_tar_member(file_path: str, details: str) -> bytes:
    offset, member_bytes, _ = details.split(":", 2)
    with open(file_path, "rb") as archive:
        # Compared before reading: a declared size beyond the file's end would allocate memory.
        if int(offset) + int(member_bytes) > (archive_bytes := os.fstat(archive.fileno()).st_size):
            raise OSError(
                f"the archive ends after {max(0, archive_bytes - int(offset))} of the member's "
                f"{member_bytes} bytes"
            )
        archive.seek(int(offset))
        return archive.read(int(member_bytes))


def _read_compressed_tar_member(file_path: str, details: str) -> bytes:
    offset, member_bytes, _ = details.split(":", 2)
    with _LOCK:
        # The stream stays open between calls: members are read in about the archive's order, and a
        # step back decompresses everything from the start again.
        stream = _open_compressed(file_path, file_stamp(file_path))
        stream.seek(int(offset))
        data = stream.read(int(member_bytes))
    if len(data) != int(member_bytes):
        raise OSError(f"the archive ends after {len(data)} of the member's {member_bytes} bytes")
    return data


@functools.lru_cache(maxsize=4)
def _open_compressed(file: str, stamp: object) -> IO[bytes]:
    return open_compressed(file)


def open_compressed(file_path: str | Path) -> IO[bytes]:
    """Open a gzip, bzip2 or xz file as a stream of its decompressed bytes.

    Raises SourceError for other files.
    """
    with open(file_path, "rb") as compressed_file:
        magic_bytes = compressed_file.read(2)
    if magic_bytes not in _DECOMPRESSORS:
        raise SourceError(f"{file_path}: expected a file that gzip, bzip2 or xz compressed")
    return _DECOMPRESSORS[magic_bytes](file_path, "rb")  # type: ignore[operator,no-any-return]


def _read_zip_member(file_path: str, details: str) -> bytes:
    header_offset, compressed_size, member_bytes, method, crc, _ = details.split(":", 5)
    with open(file_path, "rb") as archive:
        archive.seek(int(header_offset))
        signature, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(
            archive.read(_ZIP_LOCAL_HEADER.size)
        )
        if signature != b"PK\3\4":
            raise OSError("the archive has changed: there is no member where there was one")
        data_start = archive.seek(name_length + extra_length, io.SEEK_CUR)
        # Up to the file's end: a declared size beyond it would allocate memory.
        data = archive.read(
            min(int(compressed_size), max(0, os.fstat(archive.fileno()).st_size - data_start))
        )
    if len(data) != int(compressed_size):
        raise OSError(f"the archive ends after {len(data)} of the member's {compressed_size} bytes")
    if int(method) == _ZIP_DEFLATED:
        # One byte more than declared shows a wrong size, and a few bytes cannot become gigabytes.
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(member_bytes) + 1)
    if zlib.crc32(data) != int(crc):
        raise OSError("the member's bytes do not have its checksum (CRC-32)")
    return data


def _read_cell(file_path: str, container_kind: str, column_name: str, row_index: int) -> bytes:
    """Return a cell's encoded image: bytes, or the field `bytes` of Hugging Face's struct."""
    with _LOCK:
        stamp, first_row = file_stamp(file_path), 0
        if container_kind == "arrow":
            image_cells = _arrow_column(file_path, column_name, stamp)
        else:
            group_starts = _row_group_starts(file_path, stamp)
            group_index = int(np.searchsorted(group_starts, row_index, side="right")) - 1
            image_cells = _row_group(file_path, column_name, group_index, stamp)
            first_row = int(group_starts[group_index])
    cell_value = image_cells[row_index - first_row].as_py()
    image_bytes = cell_value.get("bytes") if isinstance(cell_value, dict) else cell_value
    if not isinstance(image_bytes, bytes):
        raise OSError("the cell holds no image")
    return image_bytes


@functools.lru_cache(maxsize=64)
def _row_group_starts(file_path: str, stamp: object) -> npt.NDArray[np.int64]:
    metadata = pq.ParquetFile(file_path).metadata
    group_sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return np.cumsum([0, *group_sizes])[:-1]


@functools.lru_cache(maxsize=2)  # rows are read in order, so that each group is decompressed once
def _row_group(file_path: str, column_name: str, group_index: int, stamp: object) -> Any:
    group = pq.ParquetFile(file_path).read_row_group(group_index, columns=[column_name])
    return group[column_name].combine_chunks()


@functools.lru_cache(maxsize=8)
def _arrow_column(file_path: str, column_name: str, stamp: object) -> Any:
    return open_arrow(file_path)[column_name]


def open_arrow(file_path: str | Path) -> pa.Table:
    """Map an Arrow file into memory: a stream, as `datasets` writes it, or an IPC file.

    Raises SourceError.
    """
    try:
        mapped_file = pa.memory_map(str(file_path))
        try:
            arrow_table = pa.ipc.open_stream(mapped_file).read_all()
        except pa.ArrowInvalid:
            arrow_table = pa.ipc.open_file(mapped_file).read_all()
        # Without validation Arrow trusts lengths and offsets, and reads beyond the mapped memory.
        arrow_table.validate(full=True)
        return arrow_table
    except Exception as error:
        raise SourceError(f"{file_path}: cannot be read as Arrow: {error}") from error


_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(file_path: Path) -> npt.NDArray[Any]:
    """Return the array of an idx file (the format of MNIST), gzipped or not. Raises ValueError.

    Its header: two zeros, a type, the number of axes, the length of each as a big-endian uint32.
    """
    try:
        with gzip.open(file_path) if file_path.suffix == ".gz" else file_path.open("rb") as stream:
            header = stream.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in _IDX_TYPES:
                raise ValueError("the first four bytes are not those of an idx file")
            dtype, n_axes = np.dtype(_IDX_TYPES[header[2]]), header[3]
            lengths = stream.read(4 * n_axes)
            if len(lengths) < 4 * n_axes:
                raise ValueError(f"it ends within its header, whose {n_axes} axes have no lengths")
            shape = tuple(np.frombuffer(lengths, ">u4").tolist())
            expected_bytes = math.prod(shape) * dtype.itemsize
            _require_possible_size(expected_bytes, max(1, file_path.stat().st_size), str(file_path))
            # One byte more, which shows a file that is longer than its header says.
            data = stream.read(expected_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"not a whole gzip file ({error})") from error
    if len(data) != expected_bytes:
        raise ValueError(f"its header says {shape}, {expected_bytes} bytes, but {len(data)} follow")
    return np.frombuffer(data, dtype).reshape(shape)
