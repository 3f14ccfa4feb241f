"""Content hashes of image files, with an index so that files that have not changed are not read
again.
"""

import hashlib
import io
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.cache.atomic_io import publish_replace
from headrace.extract.images.byte_ranges import file_of, read_bytes
from headrace.extract.images.file_stamps import FileStamp, file_stamps

HASH_DIGITS = 32
_COLUMNS = ("path", "stamp", "content")
_DIGEST = b"headrace-digest"  # in the index file's metadata

# path as bytes -> (stamp as text, content hash) of the file when it was last read
_Index = dict[bytes, tuple[str, str]]


@dataclass(frozen=True)
class Unreadable:
    """A sample whose file could not be read at all, and so has no content hash."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """Content hashes of N samples, in their order."""

    # first 32 hex digits of the SHA-256 of the file's bytes; None where unreadable
    hashes: tuple[str | None, ...]
    unreadable: tuple[Unreadable, ...]
    read: int  # files read in this call; the others were in the index


def hash_bytes(data: bytes | memoryview) -> str:
    """The content hash of one image's bytes: the first 32 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def content_hashes(
    samples: pd.DataFrame,
    index: Path,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 8,
) -> Contents:
    """Content hashes of `samples` (columns `id`, `path`), reading only files that `index` does not
    know.

    `index` is a Parquet file with one entry per path: the stamp of the file when it was last read,
    and its hash. It is created, updated and replaced atomically, and one that is damaged or of
    another version is rebuilt. A path may be a locator; its file is asked for once. What a stamp
    cannot tell is in `FileStamp`. `progress(done, total)` is called from this thread as files are
    read.
    """
    known = _read_index(index)
    paths = [str(path) for path in samples["path"]]
    ids = [str(name) for name in samples["id"]]
    started_ns = time.time_ns()
    stamps = file_stamps(map(file_of, paths))
    hashes: list[str | None] = [None] * len(paths)
    reasons: dict[int, str] = {}
    missing: list[int] = []
    for row, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
        if not isinstance(stamp, FileStamp):
            reasons[row] = _reason(stamp)
            continue
        entry = known.get(_key(path))
        if entry is not None and entry[0] == stamp.text:
            hashes[row] = entry[1]
        else:
            missing.append(row)
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the GIL
        for done, (row, outcome) in enumerate(
            zip(missing, pool.map(_hash, (paths[row] for row in missing)), strict=True)
        ):
            if isinstance(outcome, str):
                hashes[row] = outcome
            else:
                reasons[row] = _reason(outcome)
            if progress is not None:
                progress(done + 1, len(missing))
    # A file that was replaced between its stamp and its reading would be known under the stamp of
    # the earlier one.
    stamps_after = file_stamps(file_of(paths[row]) for row in missing)
    fresh: _Index = {}
    for row, after in zip(missing, stamps_after, strict=True):
        content = hashes[row]
        if (
            content is not None
            and isinstance(after, FileStamp)
            and after == stamps[row]
            and after.is_settled(started_ns)
        ):
            fresh[_key(paths[row])] = (after.text, content)
    if fresh:
        _write_index(index, known | fresh)
    unreadable = tuple(
        Unreadable(ids[row], paths[row], reason) for row, reason in sorted(reasons.items())
    )
    return Contents(tuple(hashes), unreadable, len(missing))


def _hash(path: str) -> str | OSError:
    try:
        return hash_bytes(read_bytes(path))
    except OSError as error:
        return error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read_index(index: Path) -> _Index:
    """The entries of an index file; none where it is absent, damaged or of another version: it only
    saves time.
    """
    try:
        table = pq.read_table(io.BytesIO(index.read_bytes()))
        if table.column_names != list(_COLUMNS) or any(
            column.null_count for column in table.columns
        ):
            return {}
        columns = [table[name].to_pylist() for name in _COLUMNS]
        entries = {path: (stamp, content) for path, stamp, content in zip(*columns, strict=True)}
        # Parquet has no checksum of its own here: one changed digit of a hash would be believed for
        # ever.
        return entries if (table.schema.metadata or {}).get(_DIGEST) == _digest(entries) else {}
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ):  # of damaged bytes, types and schemas
        return {}


def _write_index(index: Path, entries: _Index) -> None:
    values = list(entries.values())
    columns = {
        "path": pa.array(list(entries), pa.binary()),
        "stamp": pa.array([stamp for stamp, _ in values], pa.string()),
        "content": pa.array([content for _, content in values], pa.string()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({_DIGEST: _digest(entries)}), buffer)
    index.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(index, buffer.getvalue())


def _key(path: str) -> bytes:
    return path.encode(
        "utf-8", "surrogatepass"
    )  # names of files, and of members of archives, need not be UTF-8


def _digest(entries: Mapping[bytes, tuple[str, str]]) -> bytes:
    hasher = hashlib.sha256()
    for path, (stamp, content) in entries.items():
        hasher.update(b"%b\0%b\0%b\n" % (path, stamp.encode(), content.encode()))
    return hasher.hexdigest().encode()
