"""Removing what nobody needs: feature sets that no recipe uses, and what killed processes left behind."""

import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import feature_set_directories
from headrace.cache.publish import FEATURES, SPEC
from headrace.cache.repair import stale_temporaries

# A writer that is alive touches its temporary far more often than this.
STALE_S = 3600.0
_TRASH = ".removed-"


@dataclass(frozen=True)
class Garbage:
    """What `find_garbage` found; `remove` takes it away."""

    feature_sets: tuple[Path, ...]
    temporaries: tuple[Path, ...]
    trash: tuple[Path, ...]  # feature sets whose removal was interrupted
    bytes: int

    def remove(self) -> None:
        """Remove all of it."""
        for path in self.temporaries:
            path.unlink(missing_ok=True)
        for path in self.feature_sets:
            remove_feature_set(path)
        for path in self.trash:
            shutil.rmtree(path, ignore_errors=True)


def find_garbage(
    cache_root: Path, used: Iterable[str] | None = None, *, stale_s: float = STALE_S, now: float | None = None
) -> Garbage:
    """Stale temporaries and, when `used` (fingerprints) is given, the feature sets that are not among them."""
    now = time.time() if now is None else now
    keep = None if used is None else set(used)
    unused = [path for path in feature_set_directories(cache_root) if keep is not None and path.name not in keep]
    temporaries = [
        path
        for path in stale_temporaries(cache_root, stale_s, now)
        if not any(path.is_relative_to(directory) for directory in unused)
    ]
    trash = sorted((cache_root / FEATURES).glob(f"{_TRASH}*"))
    total = sum(path.stat().st_size for path in temporaries) + sum(map(tree_bytes, [*unused, *trash]))
    return Garbage(tuple(unused), tuple(temporaries), tuple(trash), total)


def remove_feature_set(directory: Path) -> None:
    """Remove a feature set. It disappears at once, by a rename; then its files are deleted.

    Raises CacheError when the directory is no feature set: nothing else is ever deleted.
    """
    if not (directory / SPEC).is_file():
        raise CacheError(f"{directory} is not a feature set (it has no {SPEC}); nothing was removed")
    doomed = directory.with_name(f"{_TRASH}{directory.name}-{uuid.uuid4().hex[:8]}")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
