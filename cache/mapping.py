"""The rows of many shards in one stretch of virtual memory, so that a random batch is one indexing
operation.

A range of addresses is reserved (which takes no memory), and each shard's features are mapped into
their place in it when they are first needed. numpy then sees one array, and a batch that touches
forty shards costs what it costs in one. Python's own `mmap` cannot do this, and it keeps a file
descriptor per mapping: 2,000 shards would exceed the usual limit of 1,024.

Shards of this version start their features on a page, and then a batch is one `numpy.take`, which
is faster than indexing a plain `numpy.memmap` of one file (benchmarks/cache.py).
"""

import ctypes
import math
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
_HUGE_PAGE = 1 << 21
_LARGEST_RESERVATION = 1 << 45  # of the 1 << 47 bytes that a process has on most machines

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class MappedRows:
    """Rows of `values` items of one dtype in a list of files, addressed by file and row.

    Files are mapped by `map`; touching rows of a file that is not mapped would kill the process, so
    callers check `is_mapped` first.
    """

    def __init__(self, rows: Sequence[int], values: int, dtype: np.dtype[Any]) -> None:
        self._values, self._dtype = values, dtype
        row_bytes = values * dtype.itemsize
        # Slots that are multiples of a row make one table of rows of everything, holes included; of
        # a huge page, see `map`.
        self._step = math.lcm(_HUGE_PAGE, row_bytes)
        if self._step * len(rows) > _LARGEST_RESERVATION:
            self._step = _HUGE_PAGE
        # Room for data that start in the middle of a page, and for being shifted by less than a
        # step.
        slots = [(-(-(count * row_bytes + _PAGE) // self._step) + 1) * self._step for count in rows]
        self._slots = np.concatenate([[0], np.cumsum(slots, dtype=np.int64)]).astype(np.int64)
        total = int(self._slots[-1]) or self._step
        reserved = _map(None, total + _HUGE_PAGE, _PROT_NONE, _RESERVE, -1, 0)
        self._base = -(-reserved // _HUGE_PAGE) * _HUGE_PAGE
        memory = (ctypes.c_uint8 * total).from_address(self._base)
        # numpy arrays keep `memory` alive, so the range is given back when the last array into it
        # is gone.
        weakref.finalize(memory, _libc.munmap, reserved, total + _HUGE_PAGE).atexit = False
        items = np.ctypeslib.as_array(memory)[: total // dtype.itemsize * dtype.itemsize].view(
            dtype
        )
        # Row k starts at any item: a window of `values` items at every position, all over the same
        # memory.
        self._windows = np.lib.stride_tricks.as_strided(
            items,
            (max(0, len(items) - values + 1), values),
            (dtype.itemsize, dtype.itemsize),
            writeable=False,
        )
        self._table = items[: len(items) // values * values].reshape(-1, values)
        self._is_table = (
            self._step % row_bytes == 0
        )  # until a file is mapped whose rows start elsewhere
        self.first_item = np.zeros(len(rows), np.int64)  # of each file's row 0, in items
        self.is_mapped = np.zeros(len(rows), np.bool_)

    def map(self, index: int, path: Path, offset: int, rows: int) -> None:
        """Map a file's `rows` rows, which start at byte `offset` (a multiple of the item size)."""
        data_bytes = rows * self._values * self._dtype.itemsize
        if data_bytes:
            lead = offset % _PAGE
            at = int(self._slots[index]) + self._shift(offset - lead)
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
            self._is_table &= lead == 0
        self.is_mapped[index] = True

    def _shift(self, offset: int) -> int:
        """How far into its slot to map what begins at this byte of a file, a multiple of a page.

        An address and its place in the file that agree up to a huge page let the processor keep one
        translation for many
        pages: random rows of a gigabyte are read at 7.2 GB/s instead of 5.2. A shift is a multiple
        of a row if one fits.
        """
        row_bytes = self._values * self._dtype.itemsize
        common = math.gcd(row_bytes, _HUGE_PAGE)
        if not self._is_table:
            return offset % _HUGE_PAGE
        if offset % common:
            return 0
        modulus = _HUGE_PAGE // common
        return offset // common * pow(row_bytes // common, -1, modulus) % modulus * row_bytes

    def gather(
        self, items: npt.NDArray[np.int64], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """The rows that start at these items, as a copy (n, values), or written into `out`, which
        is returned.
        """
        if out is None:
            out = np.empty((len(items), self._values), self._dtype)
        if self._is_table:
            # "clip" never clips here; with the default, numpy would write into a buffer first.
            np.take(self._table, items // self._values, axis=0, out=out, mode="clip")
        else:
            out[...] = self._windows[items]
        return out

    def will_need(self, index: int, start: int, stop: int) -> None:
        """Start reading these rows of a file from the disk, without waiting."""
        item_bytes = self._dtype.itemsize
        first = (int(self.first_item[index]) + start * self._values) * item_bytes
        lead = first % _PAGE
        # Advice only: whatever it answers, the rows are read when they are touched.
        _libc.madvise(
            self._base + first - lead,
            lead + (stop - start) * self._values * item_bytes,
            mmap.MADV_WILLNEED,
        )

    def rows(self, index: int, start: int, stop: int) -> npt.NDArray[Any]:
        """A view (stop - start, values) of consecutive rows of one file, not a copy."""
        first = int(self.first_item[index]) + start * self._values
        return np.asarray(self._windows[first :: self._values][: stop - start])


def _map(
    address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int
) -> int:
    result = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if result in (None, _FAILED):
        error = ctypes.get_errno()
        raise OSError(error, f"mapping {length} bytes into memory failed: {os.strerror(error)}")
    return int(result)
