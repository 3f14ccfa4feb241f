"""Verification of a whole shard: checksum, user block and structure; each machine does it once.

A verified shard is recognized by its `FileStamp`, as `make` and git recognize files. The record is
a small file per feature set under `$XDG_CACHE_HOME/headrace` (a home directory on a network file
system is fine: the inode and times are part of the record). Losing it costs one more hashing.
`headrace cache verify` never uses it.
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

from headrace.cache.count_text import count_text
from headrace.cache.errors import ShardCorrupt, ShardMissing, ShardUnreadable
from headrace.cache.file_stamps import file_stamp
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

_BLOCK_BYTES = 1 << 20  # read and hashed at a time
_REPAIR = "`headrace cache repair` removes it, and the next run extracts its samples again"


@dataclass(frozen=True)
class VerifiedShard:
    """Layout and checksum of a shard after all of it was read."""

    layout: ShardLayout
    quantization_error: QuantizationError
    bytes: int
    xxh3: str


def verify_shard(
    shard_path: Path, spec: FeatureSpec, unit_name: str, expected_checksum: str | None = None
) -> VerifiedShard:
    """Read every byte of a shard and validate every object in it.

    The user block must name the checksum of all bytes behind it. `expected_checksum`, from the
    manifest, must be that checksum too; otherwise this is another, intact shard under the wrong
    name. Raises ShardMissing, ShardUnreadable, and ShardCorrupt on any flipped bit.
    """
    file_bytes, actual_checksum, header_block = shard_checksum(shard_path)
    if header_block != user_block(actual_checksum):
        raise ShardCorrupt(
            f"{shard_path}: its bytes have changed since they were written: they have the digest "
            f"{actual_checksum}, and its user block says "
            f"{header_block[:96].decode('ascii', 'replace').split(chr(10))[:2]}. {_REPAIR}"
        )
    if expected_checksum not in (None, actual_checksum):
        raise ShardCorrupt(
            f"{shard_path}: this is another shard than the one that was published under this name: "
            f"its digest is {actual_checksum}, and the manifest says {expected_checksum}. {_REPAIR}"
        )
    layout, quantization_error = validate_shard(shard_path, spec, unit_name)
    return VerifiedShard(layout, quantization_error, file_bytes, actual_checksum)


def verify_listed_shard(shard_path: Path, spec: FeatureSpec, entry: ShardEntry) -> VerifiedShard:
    """Verify a listed shard, which must have as many rows and failures as the manifest states."""
    verified_shard = verify_shard(shard_path, spec, entry.unit, entry.xxh3)
    _require_counts(shard_path, verified_shard.layout, entry)
    return verified_shard


def _require_counts(shard_path: Path, layout: ShardLayout, entry: ShardEntry) -> None:
    if (layout.n_rows, layout.n_failed) != (entry.rows, entry.failed):
        raise ShardCorrupt(
            f"{shard_path}: it holds {count_text(layout.n_rows, 'row')} and "
            f"{count_text(layout.n_failed, 'failure')}, and the manifest says {entry.rows} and "
            f"{entry.failed}. `headrace cache repair` lists it as it is"
        )


def shard_checksum(shard_path: Path) -> tuple[int, str, bytes]:
    """Return a shard's size in bytes, XXH3-128 of what follows the user block, and that block.

    Raises ShardMissing and ShardUnreadable.
    """
    hasher, file_bytes = xxhash.xxh3_128(), 0
    read_buffer = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with open(shard_path, "rb", buffering=0) as file:
            header_block = file.read(USER_BLOCK_BYTES)
            file_bytes = len(header_block)
            while n_read := file.readinto(read_buffer):
                hasher.update(read_buffer[:n_read])
                file_bytes += n_read
    except FileNotFoundError as error:
        raise _shard_missing(shard_path) from error
    except OSError as error:
        # Not ShardCorrupt, which repair deletes: the shard itself may be intact.
        errno_name = errno.errorcode.get(error.errno or 0, "unknown errno")
        raise ShardUnreadable(
            error.errno,
            f"{shard_path} cannot be read: {errno_name} ({error.strerror or error}). Look at the "
            "disk and the permissions",
        ) from error
    return file_bytes, hasher.hexdigest(), header_block


def _shard_missing(shard_path: Path) -> ShardMissing:
    """Return the error for a listed shard that does not exist."""
    return ShardMissing(
        f"{shard_path} is listed in the manifest and is not there. `headrace cache repair` takes "
        "it off the list, and the next run extracts its samples again"
    )


class VerifiedShards:
    """The shards of one feature set that this machine has verified before, with their layouts."""

    def __init__(self, directory: Path) -> None:
        state_path = state_directory()
        # The host's name, because inode numbers mean something on one machine only. os.fsencode,
        # because a path that is no UTF-8 has lone surrogates, which `encode` refuses.
        machine_key = os.fsencode(f"{socket.gethostname()}\0{directory.resolve()}")
        file_name = f"{hashlib.sha256(machine_key).hexdigest()[:24]}.jsonl"
        # None (no state directory): each process verifies again.
        self._path = None if state_path is None else state_path / "verified" / file_name
        self._records: dict[str, dict[str, Any]] | None = None

    def verify(self, shard_path: Path, spec: FeatureSpec, entry: ShardEntry) -> ShardLayout:
        """Return the layout of a shard, reading all of it unless this machine has done so before.

        Raises ShardMissing, ShardCorrupt, ShardUnreadable.
        """
        # Taken before reading, so that a change during the reading is noticed the next time.
        try:
            stamp = file_stamp(shard_path)
        except FileNotFoundError as error:
            raise _shard_missing(shard_path) from error
        identity = {"unit": entry.unit, "xxh3": entry.xxh3, "stamp": stamp.text}
        if self._records is None:
            self._records = self._read_records()
        stored_record = self._records.get(entry.unit)
        if stored_record is not None and stored_record.items() >= identity.items():
            # A record of another version, whose layout has other fields, is not used.
            with contextlib.suppress(KeyError, TypeError):
                layout = ShardLayout(**stored_record["layout"])
                _require_counts(shard_path, layout, entry)
                return layout
        layout = verify_listed_shard(shard_path, spec, entry).layout
        if stamp.is_settled(time.time_ns()):
            self._append_record(identity | {"layout": dataclasses.asdict(layout)})
        return layout

    # One line per shard, appended in one write without a lock: a torn line fails its own checksum
    # and is ignored.
    def _append_record(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        # A record that cannot be written is no error: the shard is only hashed once more.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file_descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file_descriptor, to_checksummed_line(record))
            finally:
                os.close(file_descriptor)

    def _read_records(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return {}
        try:
            lines = self._path.read_bytes().splitlines()
        # The record only saves time: without it all shards are read again.
        except OSError:
            return {}
        records = {}
        for line in lines:
            with contextlib.suppress(LineCorrupt):
                record = from_checksummed_line(line)
                records[record.get("unit", "")] = record
        return records
