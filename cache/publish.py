"""Writing: create a feature set, publish a shard into it.

What a reader finds if the writer dies: before the link, nothing; between the link and the
manifest's line, a shard that is not listed and so does not exist (the next writer of the unit
checks and lists it); after the line, the shard.

A feature set's directory gets its name when its spec.json is in it. One without spec.json and
without shards, as killed writers of earlier versions left them, is absent for every reader, and the
next writer completes it.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import (
    PARTIAL_SUFFIX,
    explain_os_errors,
    publish_bytes,
    publish_parts,
    sync_directory,
)
from headrace.cache.checksum import verify_shard
from headrace.cache.errors import FeatureSetMissing, ManifestCorrupt, ShardCorrupt, SpecMismatch
from headrace.cache.format.encoding import encode
from headrace.cache.format.shard import FailedSample, build_shard
from headrace.cache.manifest import MANIFEST, ShardEntry, append_entry, read_manifest
from headrace.cache.spec import FeatureSpec, spec_difference

FEATURES = "features"
SHARDS = "shards"
SPEC = "spec.json"

# Unit names become file names and are compared as text; the leading letter or digit keeps them
# visible and relative.
_UNIT = re.compile(r"[0-9a-z][0-9a-z_-]{0,63}")
_HEX = b"0123456789abcdef"
_WRITTEN_BY = f"headrace {version('headrace')}"
_COMPRESSIONS = (None, "bitshuffle-lz4")


def feature_set_path(cache_root: Path, spec: FeatureSpec) -> Path:
    """Where the feature set of a spec lives, there or not."""
    return cache_root / FEATURES / spec.fingerprint


def shard_path(directory: Path, unit: str) -> Path:
    """Where a unit's shard lives, there or not."""
    return directory / SHARDS / f"{unit}.h5"


def is_feature_set(directory: Path) -> bool:
    """Whether there is something to open or to repair: a spec.json, or shards that have outlived
    theirs.

    That the directory exists says neither.
    """
    if directory.name.startswith("."):  # being made, or being removed
        return False
    if (directory / SPEC).exists() or (directory / MANIFEST).exists():
        return True
    return next((directory / SHARDS).glob("*.h5"), None) is not None


def create_feature_set(cache_root: Path, spec: FeatureSpec) -> Path:
    """The directory of the spec's feature set, made if it is not there.

    Any number of processes may do this at once.

    Raises SpecMismatch, naming the field, when the directory holds another spec; PublishFailed.
    """
    directory = feature_set_path(cache_root, spec)
    with explain_os_errors(directory):
        if not directory.exists():
            _make_with_spec(directory, spec)
        (directory / SHARDS).mkdir(parents=True, exist_ok=True)
    if not publish_bytes(directory / SPEC, _spec_bytes(spec)):
        found = read_spec(directory, check_name=False)
        if difference := spec_difference(found, spec):
            raise SpecMismatch(
                f"{directory} holds features of another spec: {difference}. {_SPEC_ADVICE}; where "
                "the shards are of the other one too, remove it with `headrace cache rm`"
            )
    return directory


def _make_with_spec(directory: Path, spec: FeatureSpec) -> None:
    """Make the directory with its spec.json in it, in one step for everyone who looks; nothing if
    another was faster.
    """
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        (temporary / SHARDS).mkdir(parents=True)
        publish_bytes(temporary / SPEC, _spec_bytes(spec))
        os.rename(temporary, directory)
        sync_directory(directory.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_spec(directory: Path, *, check_name: bool = True) -> FeatureSpec:
    """The spec of a feature set.

    Raises FeatureSetMissing; SpecMismatch (another version's); ManifestCorrupt when a byte of it
    has changed.
    """
    path = directory / SPEC
    try:
        data = path.read_bytes()
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
        spec = FeatureSpec.from_json(data.decode())
    except SpecMismatch as error:
        # What another version wrote has the name that its bytes ask for; what has changed has not.
        if hashlib.sha256(data.removesuffix(b"\n")).hexdigest()[:24] == directory.name:
            raise SpecMismatch(f"{path}: {error}") from error
        raise ManifestCorrupt(
            f"{path} is not the spec that was written ({error}). {_SPEC_ADVICE}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestCorrupt(
            f"{path} is not the spec that was written ({error}). {_SPEC_ADVICE}"
        ) from error
    if _spec_bytes(spec) != data or (check_name and spec.fingerprint != directory.name):
        raise ManifestCorrupt(
            f"{path}: its fingerprint is {spec.fingerprint}, but the directory is named "
            f"{directory.name}: the spec has changed since it was written, or the directory was "
            f"renamed. {_SPEC_ADVICE}"
        )
    return spec


_SPEC_ADVICE = "`headrace cache repair` writes it again from a shard"


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
    """Publish the n rows of a unit, durably; the first writer wins.

    Returns the entry of the shard that is there then.

    features: (n, *spec.shape), any real dtype, converted to the storage dtype. ids: n sample names.
    content_hashes: n SHA-256 prefixes of 32 hex digits. failures: the unit's samples that have no
    row.
    compression: None or "bitshuffle-lz4".

    Nothing in the shard depends on time, host or writer. Raises CacheError (NaN, infinity,
    overflow; names the sample), ValueError (arguments that do not fit together), PublishFailed
    (names the errno).
    """
    spec = read_spec(directory)
    _check_arguments(spec, unit, features, ids, content_hashes, failures, compression)
    path = shard_path(directory, unit)
    if path.exists() and (entry := _published(directory, unit, spec)):
        return entry
    encoded = encode(features, ids, spec.dtype)
    parts, digest = build_shard(spec, unit, encoded, ids, content_hashes, failures, compression)
    while not publish_parts(path, parts):
        # Another writer was faster. Its shard may differ in last bits (another machine): the entry
        # describes that one.
        if entry := _published(directory, unit, spec):
            return entry
    entry = ShardEntry(
        unit=unit,
        rows=len(ids),
        failed=len(failures),
        bytes=sum(len(part) for part in parts),
        xxh3=digest,
        quantization_error=encoded.quantization_error,
        written_by=_WRITTEN_BY,
    )
    append_entry(directory, entry)
    return entry


def describe_shard(directory: Path, unit: str, spec: FeatureSpec) -> ShardEntry:
    """The entry of a shard by the shard alone, which is checked whole.

    Raises ShardCorrupt, ShardMissing.
    """
    path = shard_path(directory, unit)
    checked = verify_shard(path, spec, unit)
    return ShardEntry(
        unit=unit,
        rows=checked.layout.rows,
        failed=checked.layout.failed,
        bytes=checked.bytes,
        xxh3=checked.xxh3,
        quantization_error=checked.quantization_error,
        written_by=_WRITTEN_BY,
    )


def _published(directory: Path, unit: str, spec: FeatureSpec) -> ShardEntry | None:
    """The entry of a shard whose file is there; one that no line lists is checked and listed.

    None if it was broken.
    """
    if entry := read_manifest(directory).get(unit):
        return entry
    try:
        entry = describe_shard(directory, unit, spec)
    except ShardCorrupt:
        # Never acknowledged, so nobody has read it: a power cut can leave a name whose bytes did
        # not reach the disk.
        shard_path(directory, unit).unlink(missing_ok=True)
        return None
    append_entry(directory, entry)
    return entry


def _spec_bytes(spec: FeatureSpec) -> bytes:
    return f"{spec.to_json()}\n".encode()


def _check_arguments(
    spec: FeatureSpec,
    unit: str,
    features: npt.NDArray[Any],
    ids: Sequence[str],
    content: Sequence[str],
    failures: Sequence[FailedSample],
    compression: str | None,
) -> None:
    if not _UNIT.fullmatch(unit):
        raise ValueError(
            f"unit {unit!r} is not 1 to 64 of the characters a-z, 0-9, _ and -, starting with a "
            "letter or digit"
        )
    if features.shape != (len(ids), *spec.shape) or len(content) != len(ids):
        raise ValueError(
            f"unit {unit}: features have shape {features.shape} for {len(ids)} ids and "
            f"{len(content)} content hashes; the spec {spec.name} says ({len(ids)}, "
            f"{', '.join(map(str, spec.shape))})"
        )
    if not (
        np.issubdtype(features.dtype, np.floating) or np.issubdtype(features.dtype, np.integer)
    ):
        raise ValueError(f"unit {unit}: features are {features.dtype}, expected real numbers")
    names = [*ids, *(failure.id for failure in failures), *(failure.reason for failure in failures)]
    hashes = [*content, *(failure.content_hash for failure in failures)]
    # All at once: one by one, a large shard's would take as long as its bytes take to the disk.
    if set(map(len, hashes)) - {32} or not _is_hex("".join(hashes)):
        bad = next(text for text in hashes if len(text) != 32 or not _is_hex(text))
        raise ValueError(f"unit {unit}: content hash {bad!r} is not 32 lower-case hex digits")
    if not all(names) or "\0" in "".join(names):
        bad = next(text for text in names if not text or "\0" in text)
        raise ValueError(
            f"unit {unit}: {bad!r} is empty or holds a NUL, which fixed-length text in HDF5 cannot "
            "store"
        )
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compression {compression!r} is not one of {_COMPRESSIONS}")


def _is_hex(text: str) -> bool:
    return text.isascii() and not text.encode().translate(None, _HEX)
