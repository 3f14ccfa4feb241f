"""Does a feature set hold what was put into it?

Every byte, every source image, and rows computed again.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import PARTIAL_SUFFIX
from headrace.cache.checksum import verify_listed_shard
from headrace.cache.errors import CacheError, ManifestCorrupt, ShardMissing, SpecMismatch
from headrace.cache.feature_set import FeatureSet
from headrace.cache.manifest import ShardEntry, read_manifest
from headrace.cache.publish import SHARDS, read_spec, shard_path
from headrace.cache.spec import FeatureSpec

# Beyond the round-off of storing: what another batch size, machine or number of threads may change,
# as a part of the root mean square of the feature. Convolutions summed in another order differ by
# 1e-6 to 1e-4; a wrong resize by 1e-1.
RECOMPUTE_TOLERANCE = 5e-3

# Half a unit in the last place, relative to the value.
_HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "uint8": 0.0}


@dataclass(frozen=True)
class Problem:
    """Something in a feature set that is not as it was published."""

    kind: Literal["spec", "manifest", "missing", "corrupt", "unlisted", "temporary"]
    path: Path
    message: str

    @property
    def is_harmless(self) -> bool:
        """Left behind by a process that died: no reader ever sees it."""
        return self.kind in ("unlisted", "temporary")


def verify_bytes(directory: Path) -> list[Problem]:
    """Read every byte of a feature set, whatever this machine remembers; an empty list means that
    nothing is wrong.
    """
    try:
        spec = read_spec(directory)
    except (ManifestCorrupt, SpecMismatch) as error:
        return [Problem("spec", directory / "spec.json", str(error))]
    try:
        entries = read_manifest(directory)
    except ManifestCorrupt as error:
        return [
            Problem("manifest", directory / "manifest.jsonl", str(error)),
            *_leftovers(directory, None),
        ]
    with ThreadPoolExecutor(
        min(4, os.cpu_count() or 1)
    ) as pool:  # reading and hashing release the interpreter
        found = pool.map(lambda entry: _verify_shard(directory, spec, entry), entries.values())
    return [*(problem for problem in found if problem), *_leftovers(directory, set(entries))]


def _verify_shard(directory: Path, spec: FeatureSpec, entry: ShardEntry) -> Problem | None:
    path = shard_path(directory, entry.unit)
    try:
        verify_listed_shard(path, spec, entry)
    except ShardMissing as error:
        return Problem("missing", path, str(error))
    except CacheError as error:
        return Problem("corrupt", path, str(error))
    return None


def _leftovers(directory: Path, listed: set[str] | None) -> Iterator[Problem]:
    """Temporaries, and shards that no line lists (listed None: not known)."""
    for path in sorted(directory.rglob(f".*{PARTIAL_SUFFIX}")):
        yield Problem(
            "temporary", path, f"{path}: left by a writer that died, or still being written"
        )
    for path in sorted((directory / SHARDS).glob("*.h5")):
        if listed is not None and path.stem not in listed:
            yield Problem(
                "unlisted",
                path,
                f"{path}: no line of the manifest lists it, so no reader sees it: its writer died "
                "or is about to list it. The next extraction or `headrace cache repair` lists it",
            )


@dataclass(frozen=True)
class SourceProblem:
    """An image that is not the one whose features are stored."""

    id: str
    message: str


def verify_sources(features: FeatureSet, current: Mapping[str, str | None]) -> list[SourceProblem]:
    """Compare the images of today with those whose features (or failures) are stored, by sample id.

    current: from sample id to the content hash its image has now, None where it cannot be read; ids
    are unique there, and need not be in the feature set. There an id may stand for several images:
    one that was extracted, changed and extracted again is found under both hashes, and is no
    problem; nor is a new one. Images of another data set that shares the cache are told as not in
    this one.
    """
    stored: dict[str, set[str]] = {}
    for sample, content in zip(
        features.ids(), features.content_hashes().astype("U32").tolist(), strict=True
    ):
        stored.setdefault(sample, set()).add(content)
    for failure in features.failures():
        stored.setdefault(failure.id, set()).add(failure.content_hash)
    problems = []
    for sample, contents in stored.items():
        now, before = current.get(sample, ""), ", ".join(sorted(contents))
        if now in contents:
            continue
        if now:
            message = (
                f"the image has changed since it was extracted: its hash is {now}, was {before}"
            )
            message += " (or another data set's, of this name)" if len(contents) > 1 else ""
        elif now is None:
            message = f"the image can no longer be read; features are stored under {before}"
        else:
            message = (
                "the image is no longer in the data set, or in another one of this cache; "
                f"features are stored under {before}"
            )
        problems.append(SourceProblem(sample, f"{sample}: {message}"))
    return problems


@dataclass(frozen=True)
class RecomputeResult:
    """How far stored rows are from the same rows computed again."""

    rows: int
    largest: float  # largest difference, over the root mean square of the stored values
    tolerance: float  # the same unit: what round-off and another machine explain
    worst_id: str

    @property
    def is_equal(self) -> bool:
        """Within the tolerance."""
        return self.largest <= self.tolerance


def verify_recompute(
    features: FeatureSet,
    recompute: Callable[[list[str], list[str]], npt.NDArray[Any]],
    n: int,
    *,
    among: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
) -> RecomputeResult:
    """Compute n random rows again. recompute: from ids and content hashes to features (n, *shape).

    among: the rows that can be computed (whose images are still there); None: all.

    The tolerance is half a unit in the last place of the largest stored value (uint8: the largest
    error measured when it was written), plus RECOMPUTE_TOLERANCE times the root mean square of the
    rows.
    """
    possible = np.arange(features.n_rows) if among is None else among
    rows = np.sort(
        np.random.default_rng(seed).choice(possible, min(n, len(possible)), replace=False)
    )
    ids, content = features.ids(), features.content_hashes()
    chosen = [ids[row] for row in rows.tolist()]
    stored = features.read(rows).reshape(len(rows), -1).astype(np.float64)
    again = recompute(chosen, [value.decode() for value in content[rows].tolist()])
    # A NaN is further off than any number.
    off = np.nan_to_num(np.abs(again.reshape(stored.shape) - stored), nan=np.inf).max(
        axis=1, initial=0
    )
    scale = float(np.sqrt(np.mean(stored**2))) if stored.size else 0.0
    scale = scale or 1.0
    quantization_error = max(
        _HALF_ULP[features.spec.dtype] * float(np.abs(stored).max(initial=0)),
        features.quantization_error.largest,
    )
    worst = int(off.argmax()) if len(off) else -1
    return RecomputeResult(
        rows=len(rows),
        largest=float(off.max(initial=0)) / scale,
        tolerance=RECOMPUTE_TOLERANCE + quantization_error / scale,
        worst_id=chosen[worst] if chosen else "",
    )
