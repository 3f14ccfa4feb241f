"""Repair: delete broken shards and list intact ones; the next extraction redoes the rest."""

import contextlib
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
    """Outcome of a repair, by work unit (the images of one shard)."""

    intact_units: tuple[str, ...]  # their shards are whole, and listed now
    # those of the intact units that the manifest did not list, or listed with other bytes
    listed_units: tuple[str, ...]
    removed_units: tuple[str, ...]  # their shards were broken; the next run extracts them again
    missing_units: tuple[str, ...]  # listed before, and their shards are gone
    rewritten_files: tuple[str, ...]  # of spec.json and manifest.jsonl

    @property
    def was_consistent(self) -> bool:
        """True if there was nothing to repair."""
        return not (
            self.listed_units or self.removed_units or self.missing_units or self.rewritten_files
        )


def repair(directory: Path) -> RepairResult:
    """Make a feature set consistent again, with fewer rows if some are broken.

    Every shard is read completely. Broken ones are deleted; the manifest and spec.json are written
    again when they do not agree with the shards. Safe while others read, extract or repair.

    Raises CacheError when spec.json is broken and no shard is left that holds its text;
    ShardUnreadable when the operating system cannot read a shard, which may be intact and stays.
    """
    rewritten_files = []
    try:
        spec = read_spec(directory)
    except (FeatureSetMissing, ManifestCorrupt, SpecMismatch):
        # Every shard holds the text of the spec too.
        spec = _spec_from_shards(directory)
        publish_replace(directory / SPEC, f"{spec.to_json()}\n".encode())
        rewritten_files.append(SPEC)

    intact_shards: dict[str, ShardEntry] = {}
    removed_units = []
    for shard_file in sorted((directory / SHARDS).glob("*.h5")):
        try:
            intact_shards[shard_file.stem] = describe_shard(directory, shard_file.stem, spec)
        except ShardMissing:
            continue  # removed meanwhile
        except ShardCorrupt:
            # Its rows are lost either way, and the next run can publish the unit again only if the
            # name is free.
            shard_file.unlink(missing_ok=True)
            removed_units.append(shard_file.stem)

    # Under the lock, because an extraction may be listing shards at the same time; its lines are
    # kept.
    with lease(directory / LOCK):
        entries: dict[str, ShardEntry] = {}
        is_readable = False
        with contextlib.suppress(ManifestCorrupt):
            entries, is_readable = read_manifest(directory), True
        vanished_units = [
            unit
            for unit in entries
            if unit not in intact_shards and not shard_path(directory, unit).exists()
        ]
        listed_units = [
            unit
            for unit, entry in intact_shards.items()
            if not _same_bytes(entries.get(unit), entry)
        ]
        kept_entries = entries | {unit: intact_shards[unit] for unit in listed_units}
        for unit in vanished_units:
            del kept_entries[unit]
        if vanished_units or listed_units or not is_readable:
            publish_replace(directory / MANIFEST, manifest_bytes(kept_entries.values()))
            rewritten_files.append(MANIFEST)
    missing_units = [unit for unit in vanished_units if unit not in removed_units]
    return RepairResult(
        tuple(kept_entries),
        tuple(listed_units),
        tuple(removed_units),
        tuple(missing_units),
        tuple(rewritten_files),
    )


def stale_temporaries(directory: Path, older_than_s: float, now_s: float) -> list[Path]:
    """Return temporary files under a directory that nobody has written to for that long."""
    stale_paths = []
    for path in sorted(directory.rglob(f".*{PARTIAL_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):  # its writer has finished
            if now_s - path.stat().st_mtime >= older_than_s:
                stale_paths.append(path)
    return stale_paths


def _same_bytes(listed: ShardEntry | None, actual: ShardEntry) -> bool:
    # Without `written_by` and the errors, which say nothing of the file.
    return listed is not None and (
        (listed.xxh3, listed.rows, listed.failed) == (actual.xxh3, actual.rows, actual.failed)
    )


def _spec_from_shards(directory: Path) -> FeatureSpec:
    """Return the spec stored in an intact shard, if it is the one that names the directory."""
    for shard_file in sorted((directory / SHARDS).glob("*.h5")):
        # A shard that cannot be read, or is not as it was written, is passed over for the next one.
        with contextlib.suppress(
            CacheError, OSError, ValueError, KeyError, TypeError, RecursionError
        ):
            _, actual_checksum, header_block = shard_checksum(shard_file)
            if header_block == user_block(actual_checksum):
                with shard_file.open("rb") as opened_file, h5py.File(opened_file, "r") as hdf5_file:
                    spec_json = hdf5_file.attrs["spec"]
                is_bytes = isinstance(spec_json, bytes)
                spec = FeatureSpec.from_json(spec_json.decode() if is_bytes else str(spec_json))
                if spec.fingerprint == directory.name:
                    return spec
    raise CacheError(
        f"{directory}: {SPEC} is broken or gone, and no whole shard is left to write it again "
        "from. Remove the feature set with `headrace cache rm` and extract it again"
    )
