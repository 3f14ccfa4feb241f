"""Content hashes of image files, with an index so that unchanged files are not read again."""

import hashlib
import io
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.cache.atomic_io import publish_replace
from headrace.cache.file_stamps import FileStamp, file_stamps
from headrace.cache.format.sealed import SEAL, UNSEALED, check_seal, seal
from headrace.extract.images.crops import crop_content, split_crop
from headrace.extract.images.locators import locator_file, read_bytes

HASH_DIGITS = 32  # hex digits, 128 bits: no two images of a cache collide by chance
_COLUMNS = ("path", "stamp", "content")

# {path as bytes: (stamp as text, content hash) of the file when it was last read}
_Index = dict[bytes, tuple[str, str]]


@dataclass(frozen=True)
class UnreadableSample:
    """A sample whose file could not be read at all, and so has no content hash."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class ContentHashes:
    """Content hashes of N samples, in their order."""

    hashes: tuple[str | None, ...]  # N, see `hash_bytes`; None for an unreadable file
    unreadable: tuple[UnreadableSample, ...]
    read: int  # files read in this call; the others were in the index


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the content hash of an image's bytes: the first 32 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def hash_sample(path: str, data: bytes) -> str:
    """Return the content hash of a sample, an image or a crop of it. data: its file's bytes."""
    return crop_content(hash_bytes(data), split_crop(path)[1])


def read_unchanged(path: str, content: str) -> bytes:
    """Return the bytes of a sample's file. Raises OSError also if they have another content hash
    than the sample had.
    """
    data = read_bytes(path)
    if hash_sample(path, data) != content:
        raise OSError("the file has changed since it was hashed")
    return data


def content_hashes(
    samples: pd.DataFrame,
    index: Path,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 8,
    *,
    keep: bool = True,
) -> ContentHashes:
    """Return the content hashes of `samples`, reading only files that `index` does not know.

    samples: N rows with columns `id` and `path` (a file or a locator).
    index: a Parquet file with an entry per path: the stamp of the file when it was last read, and
    its hash. It is created and replaced atomically, and rebuilt if it is damaged or of another
    version. Changes of a file that its stamp does not show are described in `FileStamp`.
    progress: called in this thread with (files read, files to read).
    keep: False to read the index only.

    Raises OSError, PublishFailed among others, if the index cannot be written.
    """
    known_files = _read_index(index)
    located = [split_crop(str(path)) for path in samples["path"]]
    # Each image once, however many crops of it there are.
    image_paths = list(dict.fromkeys(image_path for image_path, _ in located))
    started_ns = time.time_ns()
    stamps = dict(zip(image_paths, file_stamps(map(locator_file, image_paths)), strict=True))
    hash_of_image: dict[str, str] = {}
    reason_of_image: dict[str, str] = {}  # of those that cannot be read
    unhashed: list[str] = []
    for image_path, stamp in stamps.items():
        if not isinstance(stamp, FileStamp):
            reason_of_image[image_path] = _reason(stamp)
        elif (entry := known_files.get(_key(image_path))) and entry[0] == stamp.text:
            hash_of_image[image_path] = entry[1]
        else:
            unhashed.append(image_path)
    results = _hash_images(unhashed, threads, progress)
    # A second stamp: a file that was replaced after its first one and before it was read would get
    # the new hash under the old stamp.
    stamps_after = file_stamps(map(locator_file, unhashed))
    new_entries: _Index = {}
    for image_path, result, stamp in zip(unhashed, results, stamps_after, strict=True):
        if not isinstance(result, str):
            reason_of_image[image_path] = _reason(result)
            continue
        hash_of_image[image_path] = result
        if (
            isinstance(stamp, FileStamp)
            and stamp == stamps[image_path]
            and stamp.is_settled(started_ns)
        ):
            new_entries[_key(image_path)] = (stamp.text, result)
    if new_entries and keep:
        _write_index(index, known_files | new_entries)
    unreadable = tuple(
        UnreadableSample(str(sample_id), str(path), reason_of_image[image_path])
        for sample_id, path, (image_path, _) in zip(
            samples["id"], samples["path"], located, strict=True
        )
        if image_path in reason_of_image
    )
    sample_hashes = tuple(
        crop_content(hash_of_image[image_path], crop) if image_path in hash_of_image else None
        for image_path, crop in located
    )
    return ContentHashes(sample_hashes, unreadable, len(unhashed))


def indexed_hashes(files: Iterable[tuple[str, str]], index: Path) -> list[str | None]:
    """Return the content hashes that an index has of images, without looking at their files.

    files: (path, text of its file's stamp) of each. None for one that is not in the index, or has
    another stamp there.
    """
    known_files = _read_index(index)
    hashes: list[str | None] = []
    for path, stamp in files:
        image_path, crop = split_crop(path)
        known_stamp, image_hash = known_files.get(_key(image_path), (None, ""))
        hashes.append(crop_content(image_hash, crop) if known_stamp == stamp else None)
    return hashes


def _hash_images(
    paths: list[str], threads: int, progress: Callable[[int, int], None] | None
) -> list[str | OSError]:
    """Return the content hash of each path, or the error of reading it."""
    results: list[str | OSError] = []
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the interpreter lock
        for result in pool.map(_hash, paths):
            results.append(result)
            if progress is not None:
                progress(len(results), len(paths))
    return results


def _hash(path: str) -> str | OSError:
    try:
        return hash_bytes(read_bytes(path))
    except OSError as error:
        return error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read_index(index: Path) -> _Index:
    """Return an index's entries; {} if it is absent, damaged or of another version."""
    try:
        data = index.read_bytes()
        # Parquet files have no checksum by default, and one changed digit of a hash would be
        # believed for ever.
        check_seal(data)
        table = pq.read_table(io.BytesIO(data))
        is_sealed = SEAL.encode() in (table.schema.metadata or {})  # not by an earlier version
        has_gaps = any(column.null_count for column in table.columns)
        if table.column_names != list(_COLUMNS) or has_gaps or not is_sealed:
            return {}
        paths, stamps, hashes = (table[name].to_pylist() for name in _COLUMNS)
        return dict(zip(paths, zip(stamps, hashes, strict=True), strict=True))
    # Damaged bytes, types and schemas raise any of these; without the index, files are read again.
    except (OSError, ValueError, TypeError, AttributeError, pa.ArrowException):
        return {}


def _write_index(index: Path, entries: _Index) -> None:
    columns = [
        pa.array(list(entries), pa.binary()),
        pa.array([stamp for stamp, _ in entries.values()], pa.string()),
        pa.array([content_hash for _, content_hash in entries.values()], pa.string()),
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names=_COLUMNS, metadata={SEAL: UNSEALED}), buffer)
    index.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(index, seal(buffer.getvalue()))


def _key(path: str) -> bytes:
    # Names of files, and of members of archives, need not be UTF-8.
    return path.encode("utf-8", "surrogatepass")
