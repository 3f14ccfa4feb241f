"""Garbage collection: feature sets that no recipe uses, and leftovers of killed processes."""

import contextlib
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.atomic_io import PARTIAL_SUFFIX
from headrace.cache.errors import CacheError
from headrace.cache.feature_set import feature_set_directories, unfinished_directories
from headrace.cache.integrity.repair import stale_temporaries
from headrace.cache.publish import FEATURES, SHARDS, SPEC, is_feature_set

# A writer that is alive touches its temporary far more often than this.
STALE_S = 3600.0
_TRASH = ".removed-"


@dataclass(frozen=True)
class Garbage:
    """Removable files of a cache, from `find_garbage`."""

    feature_sets: tuple[Path, ...]
    temporaries: tuple[Path, ...]
    trash: tuple[Path, ...]  # feature sets whose removal or creation was interrupted
    bytes: int

    def remove(self) -> None:
        """Remove all of these files and directories."""
        for path in self.temporaries:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in self.feature_sets:
            remove_feature_set(path)
        for path in self.trash:
            shutil.rmtree(path, ignore_errors=True)


def find_garbage(
    cache_root: Path,
    used_fingerprints: Iterable[str] | None = None,
    *,
    stale_s: float = STALE_S,
    now_s: float | None = None,
) -> Garbage:
    """Find stale temporary files, feature sets whose removal or creation was interrupted and, given
    `used_fingerprints`, feature sets not among them.

    stale_s: age in seconds from which a temporary file counts as abandoned.
    now_s: current time, seconds since the epoch.
    """
    now_s = time.time() if now_s is None else now_s
    kept_fingerprints = None if used_fingerprints is None else set(used_fingerprints)
    unused_sets = [
        path
        for path in feature_set_directories(cache_root)
        if kept_fingerprints is not None and path.name not in kept_fingerprints
    ]
    temporaries = [
        path
        for path in stale_temporaries(cache_root, stale_s, now_s)
        if not any(path.is_relative_to(directory) for directory in unused_sets)
    ]
    trash = sorted((cache_root / FEATURES).glob(f"{_TRASH}*"))
    trash += [
        path
        for path in unfinished_directories(cache_root)
        if now_s - path.stat().st_mtime >= stale_s
    ]
    total_bytes = sum(map(tree_bytes, [*temporaries, *unused_sets, *trash]))
    return Garbage(tuple(unused_sets), tuple(temporaries), tuple(trash), total_bytes)


def remove_temporaries(*paths: Path) -> None:
    """Remove the temporary files of killed writers of just these files or directories.

    A temporary file counts as abandoned when nobody has written to it for STALE_S. Used for paths
    that a user gives: other files of the same folder are the user's, and not looked at.
    """
    for path in paths:
        name_pattern = re.compile(
            rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}{re.escape(PARTIAL_SUFFIX)}"
        )
        for temporary in path.parent.glob(f".*{PARTIAL_SUFFIX}"):
            if name_pattern.fullmatch(temporary.name) and _is_stale(temporary):
                # Without permission to write in the folder it stays.
                with contextlib.suppress(OSError):
                    shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _is_stale(path: Path) -> bool:
    try:
        latest = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
    except FileNotFoundError:  # its writer has finished
        return False
    return time.time() - latest >= STALE_S


def remove_feature_set(directory: Path) -> None:
    """Remove a feature set.

    Raises CacheError when the directory is neither a feature set nor an unfinished one; nothing
    else is ever deleted.
    """
    if not (is_feature_set(directory) or _is_unfinished(directory)):
        raise CacheError(
            f"{directory} is not a feature set; nothing was removed. `headrace cache ls --cache "
            "CACHE` lists those of a cache"
        )
    # Renamed before its files are removed: readers that open the set meanwhile find it complete or
    # not at all, and a removal that is killed leaves only what the next garbage collection removes.
    trash_path = directory.with_name(f"{_TRASH}{directory.name}-{uuid.uuid4().hex[:8]}")
    directory.rename(trash_path)
    remove_trash(trash_path)


def interrupted_removals(cache_root: Path) -> dict[Path, str]:
    """Return {directory: fingerprint} of the feature sets whose removal was killed."""
    trash_paths = sorted((cache_root / FEATURES).glob(f"{_TRASH}*"))
    return {path: path.name.removeprefix(_TRASH).rpartition("-")[0] for path in trash_paths}


def remove_trash(trash_path: Path) -> None:
    """Remove a feature set that `remove_feature_set` has renamed."""
    with contextlib.suppress(FileNotFoundError):  # another process removes it too
        # The spec last: it says which tap the remaining files are of, should this be killed.
        for path in sorted(trash_path.iterdir(), key=lambda path: path.name == SPEC):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        trash_path.rmdir()


def _is_unfinished(directory: Path) -> bool:
    """Return True if a directory holds only what writers make before the spec.

    That is a temporary file and an empty folder for shards.
    """
    if directory.parent.name != FEATURES or not directory.is_dir():
        return False
    return all(
        path.name == SHARDS or path.name.endswith(PARTIAL_SUFFIX) for path in directory.rglob("*")
    )


def tree_bytes(directory: Path) -> int:
    """Return the size in bytes of a file, or of all files below a directory."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
