"""Checksummed JSON lines: an object per line, its checksum under the last key, `check`."""

import json
from typing import Any

import xxhash


class LineCorrupt(ValueError):
    """The line is not one that `to_checksummed_line` wrote."""


def to_checksummed_line(values: dict[str, Any]) -> bytes:
    """Return one line, newline included.

    `check` is the XXH3-128 of the canonical JSON of the other keys.
    """
    canonical_json = json.dumps(values, sort_keys=True, separators=(",", ":"))
    checksum = xxhash.xxh3_128_hexdigest(canonical_json.encode())
    return f'{canonical_json[:-1]},"check":"{checksum}"}}\n'.encode()


def from_checksummed_line(line: bytes) -> dict[str, Any]:
    """Return the values of a line, without `check`; its newline may be missing.

    Raises LineCorrupt when a single bit differs.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        values.pop("check")
        expected_line = to_checksummed_line(values)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise LineCorrupt(str(error)) from error
    if expected_line.rstrip(b"\n") != line.rstrip(b"\n"):
        raise LineCorrupt("its checksum is another")
    return values


def is_torn_line(tail: bytes) -> bool:
    """Return True if the text after the last newline is an unfinished line.

    Its writer died, or is still writing.
    """
    # A manifest's object is flat: a closing brace can only be the last character of its line. (A
    # brace inside a string would make a torn line look corrupt, which is the safe side.)
    return b"}" not in tail
