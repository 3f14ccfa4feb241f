"""Content hashes of image files, with an index so that unchanged files are not read again."""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.cache.atomic_io import publish_replace
from headrace.extract.images.byte_ranges import locator_file, read_bytes
from headrace.extract.images.crops import crop_content, split_crop
from headrace.extract.images.file_stamps import FileStamp, file_stamps

HASH_DIGITS = 32  # hex digits, 128 bits: no two images of a cache collide by chance
_COLUMNS = ("path", "stamp", "content")
_DIGEST = b"headrace-digest"  # in the index file's metadata

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
    """
    known_files = _read_index(index)
    located = [split_crop(str(path)) for path in samples["path"]]
    # Each image once, however many crops of it there are.
    image_paths = list(dict.fromkeys(image_path for image_path, _ in located))
    started_ns = time.time_ns()
    file_stamps_before = file_stamps(map(locator_file, image_paths))
    hashes: list[str | None] = [None] * len(image_paths)
    failure_reasons: dict[int, str] = {}
    unhashed_rows: list[int] = []
    for row, (image_path, stamp) in enumerate(zip(image_paths, file_stamps_before, strict=True)):
        if not isinstance(stamp, FileStamp):
            failure_reasons[row] = _reason(stamp)
            continue
        index_entry = known_files.get(_key(image_path))
        if index_entry is not None and index_entry[0] == stamp.text:
            hashes[row] = index_entry[1]
        else:
            unhashed_rows.append(row)
    hash_results = _hash_images([image_paths[row] for row in unhashed_rows], threads, progress)
    # A second stamp: a file that was replaced after its first one and before it was read would get
    # the new hash under the old stamp.
    stamps_after = file_stamps(locator_file(image_paths[row]) for row in unhashed_rows)
    new_entries: _Index = {}
    for row, result, stamp_after in zip(unhashed_rows, hash_results, stamps_after, strict=True):
        if not isinstance(result, str):
            failure_reasons[row] = _reason(result)
            continue
        hashes[row] = result
        if (
            isinstance(stamp_after, FileStamp)
            and stamp_after == file_stamps_before[row]
            and stamp_after.is_settled(started_ns)
        ):
            new_entries[_key(image_paths[row])] = (stamp_after.text, result)
    if new_entries and keep:
        _write_index(index, known_files | new_entries)
    hash_of_image = dict(zip(image_paths, hashes, strict=True))
    reason_of_image = {image_paths[row]: reason for row, reason in failure_reasons.items()}
    unreadable = tuple(
        UnreadableSample(str(sample_id), str(path), reason_of_image[image_path])
        for sample_id, path, (image_path, _) in zip(
            samples["id"], samples["path"], located, strict=True
        )
        if image_path in reason_of_image
    )
    sample_hashes = [
        None
        if (image_hash := hash_of_image[image_path]) is None
        else crop_content(image_hash, crop)
        for image_path, crop in located
    ]
    return ContentHashes(tuple(sample_hashes), unreadable, len(unhashed_rows))


def indexed_hashes(files: Iterable[tuple[str, str]], index: Path) -> list[str | None]:
    """Return the content hashes that an index has of images, without looking at their files.

    files: (path, text of its file's stamp) of each. None for one that is not in the index, or has
    another stamp there.
    """
    known_files = _read_index(index)
    hashes: list[str | None] = []
    for path, stamp in files:
        image_path, crop = split_crop(path)
        entry = known_files.get(_key(image_path))
        is_known = entry is not None and entry[0] == stamp
        hashes.append(crop_content(entry[1], crop) if entry and is_known else None)
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
        table = pq.read_table(io.BytesIO(index.read_bytes()))
        if table.column_names != list(_COLUMNS) or any(
            column.null_count for column in table.columns
        ):
            return {}
        index_columns = [table[name].to_pylist() for name in _COLUMNS]
        entries = {
            path: (stamp, content_hash)
            for path, stamp, content_hash in zip(*index_columns, strict=True)
        }
        # Parquet files have no checksum by default, and one changed digit of a hash would be
        # believed for ever.
        return entries if (table.schema.metadata or {}).get(_DIGEST) == _digest(entries) else {}
    # Damaged bytes, types and schemas raise any of these; without the index, files are read again.
    except (OSError, ValueError, TypeError, AttributeError, pa.ArrowException):
        return {}


def _write_index(index: Path, entries: _Index) -> None:
    index_values = list(entries.values())
    index_columns = {
        "path": pa.array(list(entries), pa.binary()),
        "stamp": pa.array([stamp for stamp, _ in index_values], pa.string()),
        "content": pa.array([content_hash for _, content_hash in index_values], pa.string()),
    }
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(index_columns).replace_schema_metadata({_DIGEST: _digest(entries)}), buffer
    )
    index.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(index, buffer.getvalue())


def _key(path: str) -> bytes:
    # Names of files, and of members of archives, need not be UTF-8.
    return path.encode("utf-8", "surrogatepass")


def _digest(entries: Mapping[bytes, tuple[str, str]]) -> bytes:
    hasher = hashlib.sha256()
    for path, (stamp, content_hash) in entries.items():
        hasher.update(b"%b\0%b\0%b\n" % (path, stamp.encode(), content_hash.encode()))
    return hasher.hexdigest().encode()
