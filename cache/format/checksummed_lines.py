"""Text lines that carry their own checksum: one flat JSON object per line, with `check` as its last
key.
"""

import json
from typing import Any

import xxhash


class LineCorrupt(ValueError):
    """The line is not one that `to_checksummed_line` wrote."""


def to_checksummed_line(values: dict[str, Any]) -> bytes:
    """One line, newline included. `check` is the XXH3-128 of the canonical JSON of the
    other keys.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f'{text[:-1]},"check":"{xxhash.xxh3_128_hexdigest(text.encode())}"}}\n'.encode()


def from_checksummed_line(line: bytes) -> dict[str, Any]:
    """Inverse of `to_checksummed_line`; the newline may be missing.

    Raises LineCorrupt when a single bit differs.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        values.pop("check")
        written = to_checksummed_line(values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LineCorrupt(str(error)) from error
    if written.rstrip(b"\n") != line.rstrip(b"\n"):
        raise LineCorrupt("its checksum is another")
    return values


def is_torn_line(tail: bytes) -> bool:
    """Whether text after the last newline is a line whose writer died, or is still writing: a
    beginning without an end.

    The object is flat, so a closing brace can only be the last character of a whole line. (A brace
    inside a string would make a torn line look corrupt, which is the safe side.)
    """
    return b"}" not in tail
