"""Content hashes of image files, with an index so that files that have not changed are not read again."""

import hashlib
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pyarrow import ArrowInvalid

from headrace.cache import publish_replace
from headrace.extract.locate import file_of, read_bytes

HASH_DIGITS = 32
# A file written in the same clock tick as it was hashed could change again under the same time stamp. File systems
# tick at up to 2 s (FAT, old NFS), so younger files are hashed again next time.
SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Unreadable:
    """A sample whose file could not be read at all, and so has no content hash."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """Content hashes of N samples, in their order."""

    hashes: tuple[str | None, ...]  # first 32 hex digits of the SHA-256 of the file's bytes; None where unreadable
    unreadable: tuple[Unreadable, ...]
    read: int  # files read in this call; the others were in the index


def hash_bytes(data: bytes | memoryview) -> str:
    """The content hash of one image's bytes: the first 32 hex digits of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def content_hashes(
    samples: pd.DataFrame, index: Path, progress: Callable[[int, int], None] | None = None, threads: int = 8
) -> Contents:
    """Content hashes of `samples` (columns `id`, `path`), reading only files that `index` does not know.

    `index` is a Parquet file keyed by (path, size, modification time); it is created, updated and replaced atomically,
    and a damaged one is rebuilt. `progress(done, total)` is called from this thread as files are read.
    """
    known = _read_index(index)
    paths = [str(path) for path in samples["path"]]
    ids = [str(name) for name in samples["id"]]
    started_ns = time.time_ns()
    hashes: list[str | None] = []
    keys: list[tuple[str, int, int] | None] = []
    reasons: dict[int, str] = {}
    for row, path in enumerate(paths):
        try:
            status = os.stat(file_of(path))
        except (OSError, ValueError) as error:
            keys.append(None)
            hashes.append(None)
            reasons[row] = _reason(error)
            continue
        key = (path, status.st_size, status.st_mtime_ns)
        keys.append(key)
        hashes.append(known.get(key))
    missing = [row for row, key in enumerate(keys) if key is not None and hashes[row] is None]
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
    fresh = {
        key: name
        for key, name in ((keys[row], hashes[row]) for row in missing)
        if key is not None and name is not None and key[2] < started_ns - SETTLED_NS
    }
    if fresh:
        _write_index(index, {**known, **fresh})
    unreadable = tuple(Unreadable(ids[row], paths[row], reason) for row, reason in sorted(reasons.items()))
    return Contents(tuple(hashes), unreadable, len(missing))


def _hash(path: str) -> str | OSError:
    try:
        return hash_bytes(read_bytes(path))
    except OSError as error:
        return error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _read_index(index: Path) -> dict[tuple[str, int, int], str]:
    try:
        frame = pd.read_parquet(index, columns=["path", "size", "mtime_ns", "content"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ArrowInvalid):
        return {}  # damaged: it only saves time, so it is rebuilt
    columns = (frame[name].tolist() for name in ("path", "size", "mtime_ns", "content"))
    return {(path, size, mtime): content for path, size, mtime, content in zip(*columns, strict=True)}


def _write_index(index: Path, entries: dict[tuple[str, int, int], str]) -> None:
    frame = pd.DataFrame(
        {
            "path": [key[0] for key in entries],
            "size": [key[1] for key in entries],
            "mtime_ns": [key[2] for key in entries],
            "content": list(entries.values()),
        }
    )
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    index.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(index, buffer.getvalue())
