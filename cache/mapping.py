"""The rows of many shards in one stretch of virtual memory, so that a random batch is one indexing operation.

A range of addresses is reserved (which takes no memory), and each shard's features are mapped into their place in it
when they are first needed. numpy then sees one array, and a batch that touches forty shards costs what it costs in
one. Python's own `mmap` cannot do this, and it keeps a file descriptor per mapping: 2,000 shards would exceed the
usual limit of 1,024.

On 20,000 x 1,280 float16 in 40 shards: random 256-row batches at the speed of a plain `numpy.memmap` of one file.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The same on Linux, macOS and the BSDs; Python does not name them.
_MAP_FIXED = 0x10
_PROT_NONE = 0
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class MappedRows:
    """Rows of `values` items of one dtype in a list of files, addressed by file and row.

    Files are mapped by `map`; touching rows of a file that is not mapped would kill the process, so callers check
    `is_mapped` first.
    """

    def __init__(self, rows: Sequence[int], values: int, dtype: np.dtype[Any]) -> None:
        self._values, self._dtype = values, dtype
        # A page more than needed, because data rarely starts on a page.
        slots = [-(-(count * values * dtype.itemsize) // _PAGE) * _PAGE + _PAGE for count in rows]
        self._slots = np.concatenate([[0], np.cumsum(slots, dtype=np.int64)]).astype(np.int64)
        total = int(self._slots[-1]) or _PAGE
        base = _map(None, total, _PROT_NONE, _RESERVE, -1, 0)
        self._base = base
        memory = (ctypes.c_uint8 * total).from_address(base)
        # numpy arrays keep `memory` alive, so the range is given back when the last array into it is gone.
        weakref.finalize(memory, _libc.munmap, base, total).atexit = False
        items = np.ctypeslib.as_array(memory)[: total // dtype.itemsize * dtype.itemsize].view(dtype)
        # Row k starts at any item: a window of `values` items at every position, all over the same memory.
        self._windows = np.lib.stride_tricks.as_strided(
            items, (max(0, len(items) - values + 1), values), (dtype.itemsize, dtype.itemsize), writeable=False
        )
        self.first_item = np.zeros(len(rows), np.int64)  # of each file's row 0, in items
        self.is_mapped = np.zeros(len(rows), np.bool_)

    def map(self, index: int, path: Path, offset: int, rows: int) -> None:
        """Map a file's `rows` rows, which start at byte `offset` (a multiple of the item size)."""
        data_bytes = rows * self._values * self._dtype.itemsize
        if data_bytes:
            lead = offset % _PAGE
            at = int(self._slots[index])
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _map(
                    self._base + at,
                    lead + data_bytes,
                    mmap.PROT_READ,
                    mmap.MAP_SHARED | _MAP_FIXED,
                    descriptor,
                    offset - lead,
                )
            finally:
                os.close(descriptor)
            self.first_item[index] = (at + lead) // self._dtype.itemsize
        self.is_mapped[index] = True

    def gather(self, items: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A copy (n, values) of the rows that start at these items."""
        return np.asarray(self._windows[items])

    def will_need(self, index: int, start: int, stop: int) -> None:
        """Start reading these rows of a file from the disk, without waiting."""
        item_bytes = self._dtype.itemsize
        first = (int(self.first_item[index]) + start * self._values) * item_bytes
        lead = first % _PAGE
        # Advice only: whatever it answers, the rows are read when they are touched.
        _libc.madvise(self._base + first - lead, lead + (stop - start) * self._values * item_bytes, mmap.MADV_WILLNEED)

    def rows(self, index: int, start: int, stop: int) -> npt.NDArray[Any]:
        """A view (stop - start, values) of consecutive rows of one file, not a copy."""
        first = int(self.first_item[index]) + start * self._values
        return np.asarray(self._windows[first :: self._values][: stop - start])


def _map(address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    result = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result in (None, _FAILED):
        error = ctypes.get_errno()
        raise OSError(error, f"mapping {length} bytes into memory failed: {os.strerror(error)}")
    return int(result)
