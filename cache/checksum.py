"""Every byte of a shard: the digest of its contents, its user block, its structure.

And remembering that this was done.

A shard is hashed once per machine and then recognised by inode, size and times, as `make` and git
recognise files. What was verified is kept in a small file per feature set under
`$XDG_CACHE_HOME/headrace` (a home on a network file system is fine: the inode and times are part of
the record). Losing it costs one more hashing. `headrace cache verify` never uses it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from headrace.cache.errors import ShardCorrupt, ShardMissing, ShardUnreadable
from headrace.cache.format.checksummed_lines import (
    LineCorrupt,
    from_checksummed_line,
    to_checksummed_line,
)
from headrace.cache.format.encoding import QuantizationError
from headrace.cache.format.shard import USER_BLOCK_BYTES, user_block
from headrace.cache.format.validate import ShardLayout, validate_shard
from headrace.cache.home import state_directory
from headrace.cache.manifest import ShardEntry
from headrace.cache.spec import FeatureSpec

_BLOCK = 1 << 20
# A file that changed this recently may change again within the same tick of the file system's
# clock, and look as before.
_SETTLED_NS = 2_000_000_000
_REPAIR = "`headrace cache repair` removes it, and the next run extracts its samples again"


@dataclass(frozen=True)
class VerifiedShard:
    """What a shard turned out to be, all of it read."""

    layout: ShardLayout
    quantization_error: QuantizationError
    bytes: int
    xxh3: str


def verify_shard(
    path: Path, spec: FeatureSpec, unit: str, expected_xxh3: str | None = None
) -> VerifiedShard:
    """Read every byte and look at every object.

    Raises ShardMissing; ShardCorrupt on any flipped bit.

    The user block must name the digest of the rest; `expected_xxh3`, from the manifest, must be
    that digest too, or else the shard is a whole one in the wrong place.
    """
    size, found, block = shard_checksum(path)
    if block != user_block(found):
        raise ShardCorrupt(
            f"{path}: its bytes have changed since they were written: they have the digest "
            f"{found}, and its user block says "
            f"{block[:96].decode('ascii', 'replace').split(chr(10))[:2]}. {_REPAIR}"
        )
    if expected_xxh3 not in (None, found):
        raise ShardCorrupt(
            f"{path}: this is another shard than the one that was published under this name: its "
            f"digest is {found}, and the manifest says {expected_xxh3}. {_REPAIR}"
        )
    layout, quantization_error = validate_shard(path, spec, unit)
    return VerifiedShard(layout, quantization_error, size, found)


def verify_listed_shard(path: Path, spec: FeatureSpec, entry: ShardEntry) -> VerifiedShard:
    """`verify_shard` of a listed shard, which must also have as many rows and failures as the
    manifest says.
    """
    checked = verify_shard(path, spec, entry.unit, entry.xxh3)
    _expect_counts(path, checked.layout, entry)
    return checked


def _expect_counts(path: Path, layout: ShardLayout, entry: ShardEntry) -> None:
    if (layout.rows, layout.failed) != (entry.rows, entry.failed):
        raise ShardCorrupt(
            f"{path}: it holds {layout.rows} rows and {layout.failed} failures, and the manifest "
            f"says {entry.rows} and {entry.failed}. `headrace cache repair` lists it as it is"
        )


def shard_checksum(path: Path) -> tuple[int, str, bytes]:
    """Size, XXH3-128 of everything behind the user block, and the user block."""
    hasher, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            block = file.read(USER_BLOCK_BYTES)
            size = len(block)
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                size += count
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    return size, hasher.hexdigest(), block


def unreadable(path: Path, error: OSError) -> ShardUnreadable:
    """The error for a shard that cannot be read, which says nothing about the shard."""
    name = errno.errorcode.get(error.errno or 0, "unknown errno")
    return ShardUnreadable(
        error.errno,
        f"{path} cannot be read: {name} ({error.strerror or error}). Look at the disk and the "
        "permissions",
    )


def missing(path: Path) -> ShardMissing:
    """The error for a listed shard that is not there."""
    return ShardMissing(
        f"{path} is listed in the manifest and is not there. `headrace cache repair` takes it off "
        "the list, and the next run extracts its samples again"
    )


class VerifiedShards:
    """The shards of one feature set that this machine has checked already, with their layouts."""

    def __init__(self, directory: Path) -> None:
        state = state_directory()
        # Inode numbers mean something on one machine only. A path that is no UTF-8 has lone
        # surrogates.
        key = f"{socket.gethostname()}\0{directory.resolve()}".encode("utf-8", "surrogatepass")
        name = f"{hashlib.sha256(key).hexdigest()[:24]}.jsonl"
        self._path = (
            None if state is None else state / "verified" / name
        )  # None: each process checks again
        self._records: dict[str, dict[str, Any]] | None = None

    def check(self, path: Path, spec: FeatureSpec, entry: ShardEntry) -> ShardLayout:
        """The layout of a shard, which is read whole unless this machine has done so.

        Raises ShardMissing, ShardCorrupt.
        """
        # Taken before reading, so that a change during the reading is noticed the next time.
        identity = _identity(path, entry)
        if self._records is None:
            self._records = self._read()
        record = self._records.get(entry.unit)
        if record is not None and all(record.get(key) == value for key, value in identity.items()):
            layout = ShardLayout(
                **{
                    field.name: record[f"layout_{field.name}"]
                    for field in dataclasses.fields(ShardLayout)
                }
            )
            _expect_counts(path, layout, entry)
            return layout
        layout = verify_listed_shard(path, spec, entry).layout
        if time.time_ns() - max(identity["mtime_ns"], identity["ctime_ns"]) < _SETTLED_NS:
            return layout
        self._append(
            {
                **identity,
                **{f"layout_{name}": value for name, value in dataclasses.asdict(layout).items()},
            }
        )
        return layout

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        # Failing to note it is no error: it only costs time.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, to_checksummed_line(record))
            finally:
                os.close(descriptor)

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return {}
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return {}
        records = {}
        for line in lines:
            with contextlib.suppress(LineCorrupt):
                record = from_checksummed_line(line)
                records[record.get("unit", "")] = record
        return records


def _identity(path: Path, entry: ShardEntry) -> dict[str, Any]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise missing(path) from error
    # The change time too: unlike the modification time, no program can set it back.
    return {
        "unit": entry.unit,
        "xxh3": entry.xxh3,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }
