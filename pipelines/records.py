"""Files of a run with digests, so that a damaged or edited file is refused and not believed.

JSON files and arrays contain their own (`headrace.cache.format.sealed`). Tables are for people to
open, and contain none: their digests are in tables.json, where each is written after its table. If
a call is killed in between, the table is refused until the next call writes both.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from headrace.cache.atomic_io import publish_replace, read_regular
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json

_DIGESTS = "tables.json"
RUN_AGAIN = "`headrace run RECIPE` writes it again"


class RunDamaged(HeadraceError, ValueError):
    """A file of a run was altered; the message names the command that writes it again."""


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Publish an object as JSON with its digest. Raises PublishFailed."""
    publish_replace(path, sealed_json(values, indent=2))


def read_record(path: Path, mended_by: str = RUN_AGAIN) -> dict[str, Any]:
    """Read an object that `write_record` wrote.

    mended_by: the end of the message for a damaged file. Raises RunDamaged, FileNotFoundError.
    """
    try:
        return read_sealed_json(read_regular(path))
    except SealBroken as error:
        raise RunDamaged(
            f"{path} has changed since it was written: {error}. {mended_by}"
        ) from error


def publish_table(path: Path, data: bytes) -> None:
    """Publish a table and the digest of its bytes. Raises PublishFailed."""
    # Two processes must not do so in one run at once: one would lose the digest of the other.
    publish_replace(path, data)
    digests = path.with_name(_DIGESTS)
    try:
        recorded_digests = read_record(digests)
    # A damaged list of digests is begun anew: the tables that it lacks are then read unchecked.
    except (FileNotFoundError, RunDamaged):
        recorded_digests = {}
    write_record(digests, {**recorded_digests, path.name: xxhash.xxh3_128_hexdigest(data)})


def read_table(path: Path) -> io.BytesIO:
    """Return the bytes of a table that `publish_table` wrote.

    Raises RunDamaged if they were altered, FileNotFoundError.
    """
    data = path.read_bytes()
    try:
        recorded_digest = read_record(path.with_name(_DIGESTS)).get(path.name)
    # Runs of earlier versions have no digests, and are read unchecked.
    except FileNotFoundError:
        recorded_digest = None
    if recorded_digest is not None and recorded_digest != xxhash.xxh3_128_hexdigest(data):
        raise RunDamaged(
            f"{path} is not as the run wrote it: it was changed, or a call was killed between it "
            f"and {_DIGESTS}. {RUN_AGAIN}"
        )
    return io.BytesIO(data)


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of JSON, each with its own digest, to a file. Raises PublishFailed."""
    existing = path.read_bytes() if path.exists() else b""
    if existing and not existing.endswith(b"\n"):
        existing += b"\n"
    publish_replace(path, existing + b"".join(sealed_json(record) + b"\n" for record in records))


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a file, oldest first, and the number of damaged lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    # No file is ever written empty: one that is has been cut off.
    records, n_damaged = [], int(lines == [b""])
    for line in lines:
        try:
            records += [read_sealed_json(line)] if line else []
        except SealBroken:
            n_damaged += 1
    return records, n_damaged
