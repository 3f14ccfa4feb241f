"""Writing: create a feature set, publish a shard into it.

What a writer that dies leaves behind::

    before the link             nothing that is read, see atomic_io.py
    between link and manifest   a shard that is not listed, so it does not exist for readers; the
                                next writer of the work unit verifies and lists it
    after the manifest's line   the shard

A feature set's directory gets its name when its spec.json is in it. A directory without spec.json
and without shards, as killed writers of earlier versions left them, is absent for every reader, and
the next writer completes it.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy.typing as npt

from headrace.cache.atomic_io import (
    explain_os_errors,
    publish_bytes,
    publish_parts,
    sync_directory,
    temporary_name,
)
from headrace.cache.checksum import verify_shard
from headrace.cache.errors import FeatureSetMissing, ManifestCorrupt, ShardCorrupt, SpecMismatch
from headrace.cache.format.encoding import encode_rows
from headrace.cache.format.shard import FailedSample, build_shard
from headrace.cache.manifest import MANIFEST, ShardEntry, append_entry, read_manifest
from headrace.cache.spec import FeatureSpec, spec_difference

FEATURES = "features"
SHARDS = "shards"
SPEC = "spec.json"

# Names of work units become file names: lower case, as some file systems ignore case, and led by a
# letter or digit, which keeps them visible and relative.
_UNIT = re.compile(r"[0-9a-z][0-9a-z_-]{0,63}")
_HEX = b"0123456789abcdef"
_WRITTEN_BY = f"headrace {version('headrace')}"
_COMPRESSIONS = (None, "bitshuffle-lz4")
_SPEC_ADVICE = f"`headrace cache repair` writes {SPEC} again from a shard"


def feature_set_path(cache_root: Path, spec: FeatureSpec) -> Path:
    """Return the directory of the feature set of a spec; it need not exist."""
    return cache_root / FEATURES / spec.fingerprint


def shard_path(directory: Path, unit: str) -> Path:
    """Return the file of a work unit's shard; it need not exist."""
    return directory / SHARDS / f"{unit}.h5"


def is_feature_set(directory: Path) -> bool:
    """Return True if a directory can be opened or repaired: it has a spec, a manifest or shards."""
    if directory.name.startswith("."):  # being created, or being removed
        return False
    if (directory / SPEC).exists() or (directory / MANIFEST).exists():
        return True
    return next((directory / SHARDS).glob("*.h5"), None) is not None


def create_feature_set(cache_root: Path, spec: FeatureSpec) -> Path:
    """Return the directory of the spec's feature set, creating it if necessary.

    Any number of processes may do this at once. Raises SpecMismatch, naming the field, when the
    directory holds another spec; ManifestCorrupt for a damaged spec.json; PublishFailed.
    """
    directory = feature_set_path(cache_root, spec)
    with explain_os_errors(directory):
        if not directory.exists():
            _create_with_spec(directory, spec)
        (directory / SHARDS).mkdir(parents=True, exist_ok=True)
    if not publish_bytes(directory / SPEC, _spec_bytes(spec)):
        # A spec that does not fit the name is answered below, with the field that differs.
        stored_spec = read_spec(directory, check_name=False)
        if spec_change := spec_difference(stored_spec, spec):
            raise SpecMismatch(
                f"{directory} holds features of another spec: {spec_change}. {_SPEC_ADVICE}; where "
                "the shards are of the other one too, remove it with `headrace cache rm`"
            )
    return directory


def _create_with_spec(directory: Path, spec: FeatureSpec) -> None:
    """Create the directory with its spec.json in it, unless another writer was faster."""
    # Under another name first: a reader finds the directory with its spec, or not at all.
    temporary_path = temporary_name(directory)
    try:
        (temporary_path / SHARDS).mkdir(parents=True)
        publish_bytes(temporary_path / SPEC, _spec_bytes(spec))
        os.rename(temporary_path, directory)
        sync_directory(directory.parent)
    except OSError as error:
        # Another writer has created the directory: a rename does not replace one with files in it.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(temporary_path, ignore_errors=True)


def read_spec(directory: Path, *, check_name: bool = True) -> FeatureSpec:
    """Return the spec of a feature set.

    check_name: whether the directory must have the spec's fingerprint as its name.

    Raises FeatureSetMissing; SpecMismatch for another version's spec; ManifestCorrupt when a byte
    of it has changed.
    """
    spec_path = directory / SPEC
    try:
        spec_json = spec_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        advice = (
            _SPEC_ADVICE
            if is_feature_set(directory)
            else "`headrace cache ls` lists those of a cache"
        )
        raise FeatureSetMissing(
            f"{directory} is not a feature set (it has no {SPEC}). {advice}"
        ) from error
    try:
        spec = FeatureSpec.from_json(spec_json.decode())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        digest = hashlib.sha256(spec_json.removesuffix(b"\n")).hexdigest()[:24]
        # A spec of another version still agrees with its directory's name; a damaged one does not.
        if isinstance(error, SpecMismatch) and digest == directory.name:
            raise SpecMismatch(f"{spec_path}: {error}") from error
        raise ManifestCorrupt(
            f"{spec_path} is not the spec that was written ({error}). {_SPEC_ADVICE}"
        ) from error
    if check_name and spec.fingerprint != directory.name:
        raise ManifestCorrupt(
            f"{spec_path}: its fingerprint is {spec.fingerprint}, but the directory is named "
            f"{directory.name}: the spec has changed since it was written, or the directory was "
            f"renamed. {_SPEC_ADVICE}"
        )
    if _spec_bytes(spec) != spec_json:
        raise ManifestCorrupt(
            f"{spec_path}: its text has changed since it was written, as by an editor that formats "
            f"JSON. {_SPEC_ADVICE}"
        )
    return spec


def publish_shard(
    directory: Path,
    unit: str,
    *,
    features: npt.NDArray[Any],
    ids: Sequence[str],
    content_hashes: Sequence[str],
    failures: Sequence[FailedSample] = (),
    compression: str | None = None,
) -> ShardEntry:
    """Publish the n rows of a work unit durably; the first writer wins.

    features: (n, *spec.shape), any real dtype, converted to the storage dtype.
    ids: n sample names.
    content_hashes: n SHA-256 prefixes of 32 hex digits.
    failures: samples of the work unit without a row.
    compression: None or "bitshuffle-lz4".

    Return the manifest entry of the shard that exists then, which may be another writer's. Nothing
    in the shard depends on time, host or writer. Raises CacheError for NaN, infinity and overflow,
    naming the sample; ValueError for arguments that do not fit together; PublishFailed.
    """
    spec = read_spec(directory)
    _validate_arguments(spec, unit, features, ids, content_hashes, failures, compression)
    shard_file = shard_path(directory, unit)
    if shard_file.exists() and (entry := _existing_entry(directory, unit, spec)):
        return entry
    # Before anything is written: a value that cannot be stored leaves no trace.
    encoded_rows = encode_rows(features, ids, spec.dtype)
    with explain_os_errors(shard_file):  # a limit of file sizes counts for files in memory too
        file_parts, checksum = build_shard(
            spec, unit, encoded_rows, ids, content_hashes, failures, compression
        )
    while not publish_parts(shard_file, file_parts):
        # Another writer was faster. The entry must describe its shard, whose last bits may differ
        # (another machine). None: that shard was broken and is deleted, so try again.
        if entry := _existing_entry(directory, unit, spec):
            return entry
    entry = ShardEntry(
        unit=unit,
        rows=len(ids),
        failed=len(failures),
        bytes=sum(len(file_part) for file_part in file_parts),
        xxh3=checksum,
        quantization_error=encoded_rows.quantization_error,
        written_by=_WRITTEN_BY,
    )
    # Only now does the shard exist for readers: the manifest's line is the acknowledgement.
    append_entry(directory, entry)
    return entry


def describe_shard(directory: Path, unit: str, spec: FeatureSpec) -> ShardEntry:
    """Verify a shard and return its manifest entry, made from the shard alone.

    Raises ShardMissing, ShardCorrupt, ShardUnreadable.
    """
    shard_file = shard_path(directory, unit)
    verified_shard = verify_shard(shard_file, spec, unit)
    return ShardEntry(
        unit=unit,
        rows=verified_shard.layout.n_rows,
        failed=verified_shard.layout.n_failed,
        bytes=verified_shard.bytes,
        xxh3=verified_shard.xxh3,
        quantization_error=verified_shard.quantization_error,
        written_by=_WRITTEN_BY,
    )


def _existing_entry(directory: Path, unit: str, spec: FeatureSpec) -> ShardEntry | None:
    """Return the entry of a shard whose file exists, verified and listed if it was not listed.

    Return None if it was broken, after deleting it.
    """
    if entry := read_manifest(directory).get(unit):
        return entry
    try:
        entry = describe_shard(directory, unit, spec)
    except ShardCorrupt:
        # A power cut can leave a name whose bytes did not reach the disk. No line lists the shard,
        # so nobody has read it.
        shard_path(directory, unit).unlink(missing_ok=True)
        return None
    append_entry(directory, entry)
    return entry


def _spec_bytes(spec: FeatureSpec) -> bytes:
    return f"{spec.to_json()}\n".encode()


def _validate_arguments(
    spec: FeatureSpec,
    unit: str,
    features: npt.NDArray[Any],
    sample_ids: Sequence[str],
    content_hashes: Sequence[str],
    failures: Sequence[FailedSample],
    compression: str | None,
) -> None:
    if not _UNIT.fullmatch(unit):
        raise ValueError(
            f"work unit {unit!r}: its name is not 1 to 64 of the characters a-z, 0-9, _ and -, "
            "starting with a letter or digit"
        )
    if features.shape != (len(sample_ids), *spec.shape) or len(content_hashes) != len(sample_ids):
        raise ValueError(
            f"work unit {unit}: features have shape {features.shape} for {len(sample_ids)} ids and "
            f"{len(content_hashes)} content hashes; the spec {spec.name} says ({len(sample_ids)}, "
            f"{', '.join(map(str, spec.shape))})"
        )
    if features.dtype.kind not in "fiu":
        raise ValueError(f"work unit {unit}: features are {features.dtype}, not real numbers")
    stored_texts = [*sample_ids]
    for failure in failures:
        stored_texts += (failure.id, failure.reason)
    hash_texts = [*content_hashes, *(failure.content_hash for failure in failures)]
    # All hashes as one text: checked one by one, those of a large shard would take as long as
    # writing its bytes to the disk.
    if set(map(len, hash_texts)) - {32} or not _is_hex("".join(hash_texts)):
        invalid_text = next(text for text in hash_texts if len(text) != 32 or not _is_hex(text))
        raise ValueError(
            f"work unit {unit}: content hash {invalid_text!r} is not 32 lower-case hex digits"
        )
    if not all(stored_texts) or "\0" in "".join(stored_texts):
        invalid_text = next(text for text in stored_texts if not text or "\0" in text)
        raise ValueError(
            f"work unit {unit}: {invalid_text!r} is empty or holds a NUL, which fixed-length text "
            "in HDF5 cannot store"
        )
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compression {compression!r} is not one of {_COMPRESSIONS}")


def _is_hex(text: str) -> bool:
    return text.isascii() and not text.encode().translate(None, _HEX)
