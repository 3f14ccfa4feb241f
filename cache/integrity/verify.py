"""Verification of a feature set: every byte, every source image, and rows computed again."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import PARTIAL_SUFFIX
from headrace.cache.checksum import verify_listed_shard
from headrace.cache.errors import (
    CacheError,
    ManifestCorrupt,
    ShardMissing,
    ShardUnreadable,
    SpecMismatch,
)
from headrace.cache.feature_set import FeatureSet
from headrace.cache.manifest import ShardEntry, read_manifest
from headrace.cache.publish import SHARDS, read_spec, shard_path
from headrace.cache.spec import FeatureSpec

# Difference that another batch size, machine or number of threads may cause beyond the quantization
# error, relative to the root mean square of the feature. Convolutions summed in another order vary
# by 1e-6 to 1e-4; a wrong resize by 1e-1.
RECOMPUTE_TOLERANCE = 5e-3

# Half a unit in the last place, relative to the value.
_HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "uint8": 0.0}


@dataclass(frozen=True)
class FeatureSetProblem:
    """Deviation of a feature set from what was published."""

    # unreadable: the system refused to read a shard, which may be intact
    kind: Literal["spec", "manifest", "missing", "corrupt", "unreadable", "unlisted", "temporary"]
    path: Path
    message: str

    @property
    def is_harmless(self) -> bool:
        """True for leftovers of a process that died, which no reader ever sees."""
        return self.kind in ("unlisted", "temporary")


def verify_bytes(directory: Path) -> list[FeatureSetProblem]:
    """Read every byte of a feature set, also of shards verified before, and return its problems."""
    try:
        spec = read_spec(directory)
    except (ManifestCorrupt, SpecMismatch) as error:
        return [FeatureSetProblem("spec", directory / "spec.json", str(error))]
    try:
        entries = read_manifest(directory)
    except ManifestCorrupt as error:
        return [
            FeatureSetProblem("manifest", directory / "manifest.jsonl", str(error)),
            *_find_leftovers(directory, None),
        ]
    # Threads, because reading and hashing release the interpreter lock.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        shard_problems = pool.map(
            lambda entry: _find_shard_problem(directory, spec, entry), entries.values()
        )
    return [
        *(problem for problem in shard_problems if problem),
        *_find_leftovers(directory, set(entries)),
    ]


def _find_shard_problem(
    directory: Path, spec: FeatureSpec, entry: ShardEntry
) -> FeatureSetProblem | None:
    shard_file = shard_path(directory, entry.unit)
    try:
        verify_listed_shard(shard_file, spec, entry)
    except ShardMissing as error:
        return FeatureSetProblem("missing", shard_file, str(error))
    except ShardUnreadable as error:
        return FeatureSetProblem("unreadable", shard_file, str(error))
    except CacheError as error:
        return FeatureSetProblem("corrupt", shard_file, str(error))
    return None


def _find_leftovers(directory: Path, listed_units: set[str] | None) -> Iterator[FeatureSetProblem]:
    """Yield temporary files and shards that the manifest does not list.

    listed_units: None if the manifest is unreadable; then only temporary files.
    """
    for path in sorted(directory.rglob(f".*{PARTIAL_SUFFIX}")):
        yield FeatureSetProblem(
            "temporary", path, f"{path}: left by a writer that died, or still being written"
        )
    for path in sorted((directory / SHARDS).glob("*.h5")):
        if listed_units is not None and path.stem not in listed_units:
            yield FeatureSetProblem(
                "unlisted",
                path,
                f"{path}: no line of the manifest lists it, so no reader sees it: its writer died "
                "or is about to list it. The next extraction or `headrace cache repair` lists it",
            )


@dataclass(frozen=True)
class SourceProblem:
    """Image that differs from the one whose features are stored."""

    id: str
    message: str
    # True if the data set has no image of this id: another data set may share the cache
    is_harmless: bool = False


def verify_sources(
    feature_set: FeatureSet, current_hashes: Mapping[str, str | None]
) -> list[SourceProblem]:
    """Compare today's images with those whose features (or failures) are stored, by sample id.

    current_hashes: {sample id: content hash of its image now, None if it cannot be read}.

    In the feature set an id may stand for several images: one that was extracted, changed and
    extracted again is stored under both hashes and is no problem; nor is a new image. Images of
    another data set that shares the cache are reported as not in this one.
    """
    stored_hashes: dict[str, set[str]] = defaultdict(set)
    row_hashes = feature_set.content_hashes().astype("U32").tolist()
    for sample_id, content_hash in zip(feature_set.ids(), row_hashes, strict=True):
        stored_hashes[sample_id].add(content_hash)
    for failure in feature_set.failures():
        stored_hashes[failure.id].add(failure.content_hash)
    problems = []
    for sample_id, known_hashes in stored_hashes.items():
        # "": no image has the id; None: it has an image, which cannot be read.
        current_hash = current_hashes.get(sample_id, "")
        stored_text = ", ".join(sorted(known_hashes))
        if current_hash in known_hashes:
            continue
        if current_hash:
            message = (
                f"the image has changed since it was extracted: its hash is {current_hash}, was "
                f"{stored_text}"
            )
            message += " (or another data set's, of this name)" if len(known_hashes) > 1 else ""
        elif current_hash is None:
            message = f"the image can no longer be read; features are stored under {stored_text}"
        else:
            message = (
                "the image is no longer in the data set, or it is another one's in this cache; "
                f"features are stored under {stored_text}"
            )
        is_absent = current_hash == ""
        problems.append(SourceProblem(sample_id, f"{sample_id}: {message}", is_absent))
    return problems


@dataclass(frozen=True)
class RecomputeResult:
    """Difference between stored rows and the same rows computed again."""

    n_rows: int
    largest_difference: float  # over the root mean square of the stored values
    tolerance: float  # in the same unit: what storing and another machine explain
    worst_id: str

    @property
    def is_equal(self) -> bool:
        """True if the largest difference is within the tolerance."""
        return self.largest_difference <= self.tolerance


def verify_recompute(
    feature_set: FeatureSet,
    recompute: Callable[[list[str], list[str]], npt.NDArray[Any]],
    n_rows: int,
    *,
    candidate_rows: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
) -> RecomputeResult:
    """Compute n_rows random rows again and compare them with the stored ones.

    recompute: function of n ids and n content hashes that returns features (n, *shape).
    candidate_rows: positions of rows whose images still exist; None: all.

    The tolerance is half a unit in the last place of the largest value (uint8: the largest error
    measured when it was written), plus RECOMPUTE_TOLERANCE times the root mean square of the rows.
    """
    possible_rows = np.arange(feature_set.n_rows) if candidate_rows is None else candidate_rows
    n_drawn = min(n_rows, len(possible_rows))
    drawn_rows = np.random.default_rng(seed).choice(possible_rows, n_drawn, replace=False)
    row_positions = np.sort(drawn_rows)  # in the order of the disk
    ids, content_hashes = feature_set.ids(), feature_set.content_hashes()
    sample_ids = [ids[row] for row in row_positions.tolist()]
    stored_rows = feature_set.read(row_positions).reshape(len(row_positions), -1).astype(np.float64)
    recomputed_rows = recompute(
        sample_ids, [value.decode() for value in content_hashes[row_positions].tolist()]
    )
    # A NaN counts as an infinite difference; in a comparison it would be smaller than any
    # tolerance.
    row_differences = np.nan_to_num(
        np.abs(recomputed_rows.reshape(stored_rows.shape) - stored_rows), nan=np.inf
    ).max(axis=1, initial=0)
    root_mean_square = float(np.sqrt(np.mean(stored_rows**2))) if stored_rows.size else 0.0
    root_mean_square = root_mean_square or 1.0  # no rows, or zeros: differences stay absolute
    quantization_error = max(
        _HALF_ULP[feature_set.spec.dtype] * float(np.abs(stored_rows).max(initial=0)),
        feature_set.quantization_error.largest,
    )
    worst_row = int(row_differences.argmax()) if len(row_differences) else -1
    return RecomputeResult(
        n_rows=len(row_positions),
        largest_difference=float(row_differences.max(initial=0)) / root_mean_square,
        tolerance=RECOMPUTE_TOLERANCE + quantization_error / root_mean_square,
        worst_id=sample_ids[worst_row] if sample_ids else "",
    )
