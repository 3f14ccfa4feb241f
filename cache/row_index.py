"""Finding rows by content hash."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Odd constants with well-mixed bits (of splitmix64 and xxhash), one per 8 of the 32 characters.
_MIX = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)


def as_content_hashes(content: Sequence[str] | npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    """Content hashes as (n,) S32, from text, bytes, or an array of either.

    Raises ValueError on another length.
    """
    hashes = np.asarray(content)
    if hashes.dtype.kind == "U":
        hashes = np.char.encode(hashes, "ascii")
    if not hashes.size:
        return np.empty(0, "S32")
    if hashes.ndim != 1 or hashes.dtype.kind != "S" or hashes.dtype.itemsize != 32:
        raise ValueError(
            f"content hashes are {hashes.dtype} of shape {hashes.shape}; expected n texts of 32 "
            "hex digits, the first half of a SHA-256"
        )
    return np.ascontiguousarray(hashes)


class RowIndex:
    """Row positions by content hash; 10 million rows take about 500 MB and a few
    seconds to sort.
    """

    def __init__(self, content: npt.NDArray[np.bytes_]) -> None:
        self._content = content
        keys = _keys(content)
        # Stable, so that of equal hashes (two units that overlap) the first row is found.
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def locate(self, content: npt.NDArray[np.bytes_]) -> npt.NDArray[np.int64]:
        """(n,) int64 row positions, -1 where there is none. content: (n,) S32."""
        found = np.full(len(content), -1, np.int64)
        if not len(self._content) or not len(content):
            return found
        at = np.searchsorted(self._sorted, _keys(content), side="left")
        inside = at < len(self._sorted)
        candidates = self._order[np.where(inside, at, 0)]
        equal = inside & (self._content[candidates] == content)
        found[equal] = candidates[equal]
        # Two hashes with one 64-bit key hide each other: one pair is expected in 6 billion rows.
        # Look at those one by one.
        keys = _keys(content)
        for row in np.flatnonzero(inside & ~equal):
            position = int(at[row])
            while position < len(self._sorted) and self._sorted[position] == keys[row]:
                if self._content[self._order[position]] == content[row]:
                    found[row] = self._order[position]
                    break
                position += 1
        return found


def _keys(content: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """(n,) uint64 that spread over the whole range: sorting integers is ten times faster than
    sorting texts.
    """
    words = np.ascontiguousarray(content).view(np.uint64).reshape(-1, 4)
    keys = words[:, 0] * _MIX[0]
    for column in range(1, 4):
        keys = (keys ^ (keys >> np.uint64(29))) + words[:, column] * _MIX[column]
    return np.asarray(keys)
