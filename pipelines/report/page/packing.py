"""Arrays and texts for the page's script: small numbers as bytes, deflated, in base64.

The script reads them with `inflate` of `report.js`.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from headrace.heads.arrays import Array
from headrace.pipelines.report.page.blocks import plain_text

_TYPES = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "float32": "f4"}
_ALIGNMENT = 4  # bytes: a typed array begins at a multiple of its element's size


def packed(parts: Mapping[str, Array | Sequence[str]]) -> dict[str, Any]:
    """Return {"parts": [[name, type, bytes], ...], "data": base64 of the deflated parts}.

    parts: arrays of uint8, uint16, uint32 or float32, or texts, which are written as UTF-8 with a
    zero byte between them.
    """
    described: list[tuple[str, str, int]] = []
    content = bytearray()
    for name, values in parts.items():
        if isinstance(values, np.ndarray):
            part_type = _TYPES[values.dtype.name]
            # JavaScript's typed arrays have the machine's byte order: little-endian on all of
            # today's.
            part_bytes = values.astype(values.dtype.newbyteorder("<")).tobytes()
        else:
            part_type = "text"
            # A text cannot contain a zero character: `plain_text` has replaced it.
            part_bytes = "\0".join(map(plain_text, values)).encode("utf-8", "replace")
        described.append((name, part_type, len(part_bytes)))
        content += part_bytes + bytes(-len(part_bytes) % _ALIGNMENT)
    return {"parts": described, "data": base64.b64encode(zlib.compress(bytes(content), 6)).decode()}


def script_json(value: Any) -> Markup:
    """Return a value as JSON that is safe inside a <script> element."""
    json_text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(
        json_text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
