"""The manifest: which shards a feature set has.

A shard that is not listed does not exist for readers.

One checksummed line per published shard, appended after the shard is durable; the last line of a
unit counts. A writer that dies in the middle of a line leaves a torn end, which readers pass over
and the next writer cuts off.
"""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.atomic_io import explain_os_errors, lease, sync_directory, write_all
from headrace.cache.errors import ManifestCorrupt
from headrace.cache.format.checksummed_lines import (
    LineCorrupt,
    from_checksummed_line,
    is_torn_line,
    to_checksummed_line,
)
from headrace.cache.format.encoding import QuantizationError

MANIFEST = "manifest.jsonl"
LOCK = ".manifest.lock"


@dataclass(frozen=True)
class ShardEntry:
    """One published shard."""

    unit: str
    rows: int
    failed: int  # samples of the unit that have no row
    bytes: int  # of the file
    xxh3: str  # XXH3-128 of the bytes behind the user block: what reading and `cache verify` check
    quantization_error: QuantizationError
    written_by: str  # "headrace 0.1.0"

    def to_dict(self) -> dict[str, Any]:
        """As a flat dictionary of plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["quantization_error"]
        prefixed = {
            f"round_off_{name}": value
            for name, value in dataclasses.asdict(self.quantization_error).items()
        }
        return {**values, **prefixed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShardEntry":
        """Inverse of `to_dict`. Raises LineCorrupt when the keys are others."""
        own = dict(values)
        try:
            quantization_error = QuantizationError(
                **{name: own.pop(f"round_off_{name}") for name in _ROUND_OFF_FIELDS}
            )
            entry = cls(quantization_error=quantization_error, **own)
            if min(entry.rows, entry.failed) < 0:
                raise LineCorrupt(f"it says {entry.rows} rows and {entry.failed} failures")
            return entry
        except (TypeError, KeyError) as error:
            raise LineCorrupt(f"its keys are not those of this version ({error})") from error


_ROUND_OFF_FIELDS = tuple(field.name for field in dataclasses.fields(QuantizationError))


def read_manifest(directory: Path) -> dict[str, ShardEntry]:
    """Every published shard by unit.

    Raises ManifestCorrupt, naming the line, when one is not as it was written.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    lines = data.split(b"\n")
    tail = lines.pop()
    if tail and not is_torn_line(tail):
        lines.append(tail)
    entries: dict[str, ShardEntry] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = ShardEntry.from_dict(from_checksummed_line(line))
        except LineCorrupt as error:
            raise ManifestCorrupt(
                f"{path}: line {number} is not the one that was written ({error}). No shard is "
                "lost by that: `headrace cache repair` writes the manifest again from the shards"
            ) from error
        entries[entry.unit] = entry
    return entries


def append_entry(directory: Path, entry: ShardEntry) -> None:
    """Acknowledge a shard: when this returns, the line is on the disk.

    Raises PublishFailed, naming the errno.
    """
    path = directory / MANIFEST
    with explain_os_errors(path), lease(directory / LOCK):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = _cut_torn_end(descriptor)
            try:
                write_all(descriptor, to_checksummed_line(entry.to_dict()))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_directory(directory)


def manifest_bytes(entries: Iterable[ShardEntry]) -> bytes:
    """A whole manifest, for repair, which leaves out what is broken."""
    return b"".join(to_checksummed_line(entry.to_dict()) for entry in entries)


def _cut_torn_end(descriptor: int) -> int:
    """Cut off a line whose writer died (or end a whole one that lacks its newline); returns the
    size after that.
    """
    size = os.fstat(descriptor).st_size
    # No line is longer than this; the file itself may be megabytes.
    start = max(0, size - (1 << 16))
    data = os.pread(descriptor, size - start, start)
    tail = data[data.rfind(b"\n") + 1 :]
    if not tail:
        return size
    if is_torn_line(tail):
        size -= len(tail)
        os.ftruncate(descriptor, size)
        return size
    write_all(descriptor, b"\n")
    return size + 1
