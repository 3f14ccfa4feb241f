"""The manifest of a feature set: the list of its published shards.

One checksummed JSON line per shard is appended after the shard is durable; the last line of a shard
counts. For readers a shard that is not listed does not exist. A writer that dies in the middle of a
line leaves a torn end, which readers skip and the next writer cuts off.
"""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.atomic_io import explain_os_errors, lease, sync_directory, write_all
from headrace.cache.count_text import count_text
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
    """Manifest line of one published shard."""

    unit: str  # name of the work unit, and of its shard
    rows: int
    failed: int  # samples of the work unit that have no row
    bytes: int  # of the file
    xxh3: str  # XXH3-128 of the bytes behind the user block: readers and `cache verify` compare it
    quantization_error: QuantizationError
    written_by: str  # "headrace 0.1.0"

    def to_dict(self) -> dict[str, Any]:
        """Return a flat dictionary of plain values."""
        values = dataclasses.asdict(self)
        # Flattened into three numbers: the object of a checksummed line is flat.
        errors = values.pop("quantization_error")
        return values | {f"round_off_{name}": value for name, value in errors.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShardEntry":
        """Return the entry of such a dictionary.

        Raises LineCorrupt for other keys.
        """
        entry_values = dict(values)
        try:
            errors = {name: entry_values.pop(f"round_off_{name}") for name in _ROUND_OFF_FIELDS}
            entry = cls(quantization_error=QuantizationError(**errors), **entry_values)
            if min(entry.rows, entry.failed) < 0:
                raise LineCorrupt(
                    f"it says {count_text(entry.rows, 'row')} and "
                    f"{count_text(entry.failed, 'failure')}"
                )
            return entry
        except (TypeError, KeyError) as error:
            raise LineCorrupt(f"its keys are not those of this version ({error})") from error


_ROUND_OFF_FIELDS = tuple(field.name for field in dataclasses.fields(QuantizationError))


def read_manifest(directory: Path) -> dict[str, ShardEntry]:
    """Return {unit: entry} of every published shard.

    Raises ManifestCorrupt naming the line that is not as it was written.
    """
    manifest_path = directory / MANIFEST
    try:
        manifest_text = manifest_path.read_bytes()
    except FileNotFoundError:
        return {}
    lines = manifest_text.split(b"\n")
    # The text after the last newline: empty, the line of a writer that died or is still writing, or
    # a whole line whose newline is lacking.
    last_line = lines.pop()
    if last_line and not is_torn_line(last_line):
        lines.append(last_line)
    entries: dict[str, ShardEntry] = {}
    for line_number, line in enumerate(lines, 1):
        try:
            entry = ShardEntry.from_dict(from_checksummed_line(line))
        except LineCorrupt as error:
            raise ManifestCorrupt(
                f"{manifest_path}: line {line_number} is not the one that was written ({error}). "
                "No shard is lost by that: `headrace cache repair` writes the manifest again from "
                "the shards"
            ) from error
        entries[entry.unit] = entry
    return entries


def append_entry(directory: Path, entry: ShardEntry) -> None:
    """Append a line for a shard; when this returns, the line is on the disk.

    Raises PublishFailed, which names the errno.
    """
    manifest_path = directory / MANIFEST
    with explain_os_errors(manifest_path), lease(directory / LOCK):
        is_new = not manifest_path.exists()
        file_descriptor = os.open(manifest_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end_position = _cut_torn_end(file_descriptor)
            try:
                write_all(file_descriptor, to_checksummed_line(entry.to_dict()))
                os.fsync(file_descriptor)
            except OSError:
                # On a full disk half a line may have been written.
                os.ftruncate(file_descriptor, end_position)
                raise
        finally:
            os.close(file_descriptor)
        if is_new:
            sync_directory(directory)


def manifest_bytes(entries: Iterable[ShardEntry]) -> bytes:
    """Return a complete manifest, for repair, which leaves out broken shards."""
    return b"".join(to_checksummed_line(entry.to_dict()) for entry in entries)


def _cut_torn_end(file_descriptor: int) -> int:
    """Cut off an unfinished last line, or add a lacking newline; return the new file size."""
    file_bytes = os.fstat(file_descriptor).st_size
    # No line is longer than 64 KiB, and the file may have megabytes.
    tail_start = max(0, file_bytes - (1 << 16))
    tail_bytes = os.pread(file_descriptor, file_bytes - tail_start, tail_start)
    last_line = tail_bytes[tail_bytes.rfind(b"\n") + 1 :]
    if not last_line:
        return file_bytes
    if is_torn_line(last_line):
        file_bytes -= len(last_line)
        os.ftruncate(file_descriptor, file_bytes)
        return file_bytes
    write_all(file_descriptor, b"\n")
    return file_bytes + 1
