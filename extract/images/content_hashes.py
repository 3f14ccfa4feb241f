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

HASH_DIGITS = 32  # hex digits, 128 bits: no two images of any cache collide by chance
_COLUMNS = ("path", "stamp", "content")
_DIGEST = b"headrace-digest"  # in the index file's metadata

# path as bytes -> (stamp as text, content hash) of the file when it was last read
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

    # first 32 hex digits of the SHA-256 of the file's bytes; None where unreadable
    hashes: tuple[str | None, ...]
    unreadable: tuple[UnreadableSample, ...]
    read: int  # files read in this call; the others were in the index


def hash_bytes(data: bytes | memoryview) -> str:
    """The content hash of one image's bytes: the first 32 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def content_hashes(
    samples: pd.DataFrame,
    index: Path,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 8,
    *,
    keep: bool = True,
) -> ContentHashes:
    """Return the content hashes of `samples` (columns `id`, `path`), reading only files that
    `index` does not know.

    `index` is a Parquet file with one entry per path: the stamp of the file when it was last read,
    and its hash. It is created, updated and replaced atomically, and one that is damaged or of
    another version is rebuilt; with `keep` off, it is only read. A path may be a locator; its file
    is asked for once. What a stamp cannot tell is in `FileStamp`. `progress(done, total)` is called
    from this thread as files are read.
    """
    known_files = _read_index(index)
    located = [split_crop(str(path)) for path in samples["path"]]
    # crops of one image are hashed with one reading of it
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
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the GIL
        for n_done, (row, hash_or_error) in enumerate(
            zip(
                unhashed_rows,
                pool.map(_hash, (image_paths[row] for row in unhashed_rows)),
                strict=True,
            )
        ):
            if isinstance(hash_or_error, str):
                hashes[row] = hash_or_error
            else:
                failure_reasons[row] = _reason(hash_or_error)
            if progress is not None:
                progress(n_done + 1, len(unhashed_rows))
    # A file that was replaced between its stamp and its reading would be known under the stamp of
    # the earlier one.
    stamps_after = file_stamps(locator_file(image_paths[row]) for row in unhashed_rows)
    new_entries: _Index = {}
    for row, stamp_after in zip(unhashed_rows, stamps_after, strict=True):
        content_hash = hashes[row]
        if (
            content_hash is not None
            and isinstance(stamp_after, FileStamp)
            and stamp_after == file_stamps_before[row]
            and stamp_after.is_settled(started_ns)
        ):
            new_entries[_key(image_paths[row])] = (stamp_after.text, content_hash)
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
    """Return the content hashes that an index knows of images, (path, text of the stamp of its
    file) each; None for those that it does not know, or knows otherwise. No file is asked for.
    """
    known_files = _read_index(index)
    hashes: list[str | None] = []
    for path, stamp in files:
        image_path, crop = split_crop(path)
        entry = known_files.get(_key(image_path))
        is_known = entry is not None and entry[0] == stamp
        hashes.append(crop_content(entry[1], crop) if entry and is_known else None)
    return hashes


def _hash(path: str) -> str | OSError:
    try:
        return hash_bytes(read_bytes(path))
    except OSError as error:
        return error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read_index(index: Path) -> _Index:
    """Return an index's entries; {} for an absent, damaged or older one: it only saves time."""
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
        # Parquet has no checksum of its own here: one changed digit of a hash would be believed for
        # ever.
        return entries if (table.schema.metadata or {}).get(_DIGEST) == _digest(entries) else {}
    except (OSError, ValueError, TypeError, AttributeError, pa.ArrowException):
        # of damaged bytes, types and schemas
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
    # names of files, and of members of archives, need not be UTF-8
    return path.encode("utf-8", "surrogatepass")


def _digest(entries: Mapping[bytes, tuple[str, str]]) -> bytes:
    hasher = hashlib.sha256()
    for path, (stamp, content_hash) in entries.items():
        hasher.update(b"%b\0%b\0%b\n" % (path, stamp.encode(), content_hash.encode()))
    return hasher.hexdigest().encode()
