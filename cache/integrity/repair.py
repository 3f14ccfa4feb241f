"""Repair: throw out what is broken, list what is whole, so that the next extraction redoes just the
difference.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py

from headrace.cache.atomic_io import PARTIAL_SUFFIX, lease, publish_replace
from headrace.cache.checksum import shard_checksum
from headrace.cache.errors import (
    CacheError,
    FeatureSetMissing,
    ManifestCorrupt,
    ShardCorrupt,
    ShardMissing,
    SpecMismatch,
)
from headrace.cache.format.shard import user_block
from headrace.cache.manifest import LOCK, MANIFEST, ShardEntry, manifest_bytes, read_manifest
from headrace.cache.publish import SHARDS, SPEC, describe_shard, read_spec, shard_path
from headrace.cache.spec import FeatureSpec


@dataclass(frozen=True)
class RepairResult:
    """What a repair did."""

    kept: tuple[str, ...]  # units whose shards are whole and listed
    # of these, units that the manifest did not list, or listed with other bytes
    listed: tuple[str, ...]
    # units whose shards were broken; their samples are extracted by the next run
    removed: tuple[str, ...]
    missing: tuple[str, ...]  # units that were listed and whose shards are gone
    rewritten: tuple[str, ...]  # files written again: spec.json, manifest.jsonl

    @property
    def is_nothing(self) -> bool:
        """Everything was as it should be."""
        return not (self.listed or self.removed or self.missing or self.rewritten)


def repair(directory: Path) -> RepairResult:
    """Make a feature set whole again, with fewer rows if some are broken.

    Safe while others read, extract or repair.

    Every shard is read whole. Broken ones are deleted. The manifest and spec.json are written again
    when they are not what the shards say. Raises CacheError when no shard is left that knows the
    spec; ShardUnreadable, having deleted nothing that might be whole, when the operating system
    does not let a shard be read.
    """
    rewritten = []
    try:
        spec = read_spec(directory)
    except (FeatureSetMissing, ManifestCorrupt, SpecMismatch):
        spec = _spec_from_shards(directory)
        publish_replace(directory / SPEC, f"{spec.to_json()}\n".encode())
        rewritten.append(SPEC)

    whole: dict[str, ShardEntry] = {}
    removed = []
    for path in sorted((directory / SHARDS).glob("*.h5")):
        try:
            whole[path.stem] = describe_shard(directory, path.stem, spec)
        except ShardMissing:
            continue  # removed meanwhile
        except ShardCorrupt:
            path.unlink(missing_ok=True)
            removed.append(path.stem)

    # Under the lock, because an extraction may be listing shards at the same time; its lines are
    # kept.
    with lease(directory / LOCK):
        entries, is_readable = _readable_entries(directory)
        gone = [
            unit
            for unit in entries
            if unit not in whole and not shard_path(directory, unit).exists()
        ]
        listed = [
            unit for unit, entry in whole.items() if not _same_bytes(entries.get(unit), entry)
        ]
        kept = {unit: entry for unit, entry in entries.items() if unit not in gone}
        kept |= {unit: whole[unit] for unit in listed}
        if gone or listed or not is_readable:
            publish_replace(directory / MANIFEST, manifest_bytes(kept.values()))
            rewritten.append(MANIFEST)
    missing = [unit for unit in gone if unit not in removed]
    return RepairResult(
        tuple(kept), tuple(listed), tuple(removed), tuple(missing), tuple(rewritten)
    )


def stale_temporaries(directory: Path, older_than_s: float, now: float) -> list[Path]:
    """Temporaries under a directory that nobody has written to for that long."""
    found = []
    for path in sorted(directory.rglob(f".*{PARTIAL_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):  # its writer has finished
            if now - path.stat().st_mtime >= older_than_s:
                found.append(path)
    return found


def _readable_entries(directory: Path) -> tuple[dict[str, ShardEntry], bool]:
    try:
        return read_manifest(directory), True
    except ManifestCorrupt:
        return {}, False


def _same_bytes(listed: ShardEntry | None, found: ShardEntry) -> bool:
    return listed is not None and (listed.xxh3, listed.rows, listed.failed) == (
        found.xxh3,
        found.rows,
        found.failed,
    )


def _spec_from_shards(directory: Path) -> FeatureSpec:
    """The spec that a whole shard carries, if it is the one that names the directory."""
    for path in _candidates(directory):
        with contextlib.suppress(CacheError, OSError, ValueError, KeyError, TypeError):
            _, digest, block = shard_checksum(path)
            if block == user_block(digest):
                with path.open("rb") as bytes_of_it, h5py.File(bytes_of_it, "r") as file:
                    text = file.attrs["spec"]
                spec = FeatureSpec.from_json(
                    text.decode() if isinstance(text, bytes) else str(text)
                )
                if spec.fingerprint == directory.name:
                    return spec
    raise CacheError(
        f"{directory}: {SPEC} is broken or gone, and no whole shard is left to write it again "
        "from. Remove the feature set with `headrace cache rm` and extract it again"
    )


def _candidates(directory: Path) -> Iterable[Path]:
    return sorted((directory / SHARDS).glob("*.h5"))
