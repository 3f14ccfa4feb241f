"""Memory-mapped rows of many shards in one range of addresses.

A range of addresses is reserved, which takes no memory, and each shard's features are mapped to
their slot in it when first needed. numpy then sees one array, and a random batch is one indexing
operation: with rows of forty shards it costs as much as with rows of one. Python's own `mmap`
cannot do this, and it holds a file descriptor per mapping: 2,000 shards would exceed the usual
limit of 1,024.

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
# Reserves addresses without counting them as memory that may be needed.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PAGE = mmap.PAGESIZE
_HUGE_PAGE = 1 << 21  # bytes, Linux's on x86; see `_slot_shift`
# A quarter of the 1 << 47 bytes of addresses that a process has on most machines.
_MAX_RESERVED_BYTES = 1 << 45

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
    """Rows of a list of files, `values_per_row` items of one dtype each, addressed by file and row.

    Files are mapped by `map`. Touching rows of a file that is not mapped would kill the process, so
    callers check `is_mapped` first.
    """

    def __init__(
        self, rows_per_file: Sequence[int], values_per_row: int, stored_dtype: np.dtype[Any]
    ) -> None:
        self._values_per_row, self._stored_dtype = values_per_row, stored_dtype
        row_bytes = values_per_row * stored_dtype.itemsize
        # Slots whose size is a multiple of a row make one table of rows of the whole range, gaps
        # included. A multiple of a huge page too: see `_slot_shift`.
        self._slot_step = math.lcm(_HUGE_PAGE, row_bytes)
        if self._slot_step * len(rows_per_file) > _MAX_RESERVED_BYTES:
            self._slot_step = _HUGE_PAGE
        # A page more, for data that start in the middle of one, and a step more, because
        # `_slot_shift` moves the data by less than a step.
        slot_bytes = [
            (-(-(n_rows * row_bytes + _PAGE) // self._slot_step) + 1) * self._slot_step
            for n_rows in rows_per_file
        ]
        self._slot_starts = np.concatenate([[0], np.cumsum(slot_bytes, dtype=np.int64)]).astype(
            np.int64
        )
        total_bytes = int(self._slot_starts[-1]) or self._slot_step
        reserved_address = _memory_map(None, total_bytes + _HUGE_PAGE, _PROT_NONE, _RESERVE, -1, 0)
        self._base_address = -(-reserved_address // _HUGE_PAGE) * _HUGE_PAGE
        mapped_memory = (ctypes.c_uint8 * total_bytes).from_address(self._base_address)
        # numpy arrays keep `mapped_memory` alive, so the range is given back when the last array
        # into it is gone. Not at exit: other threads may still read, and the system frees it
        # anyway.
        weakref.finalize(
            mapped_memory, _libc.munmap, reserved_address, total_bytes + _HUGE_PAGE
        ).atexit = False
        memory_items = np.ctypeslib.as_array(mapped_memory)[
            : total_bytes // stored_dtype.itemsize * stored_dtype.itemsize
        ].view(stored_dtype)
        # For files whose rows do not start at a multiple of a row: one window of `values_per_row`
        # items starts at each item, all of them views of the same memory.
        self._row_windows = np.lib.stride_tricks.as_strided(
            memory_items,
            (max(0, len(memory_items) - values_per_row + 1), values_per_row),
            (stored_dtype.itemsize, stored_dtype.itemsize),
            writeable=False,
        )
        self._row_table = memory_items[
            : len(memory_items) // values_per_row * values_per_row
        ].reshape(-1, values_per_row)
        # Until a file is mapped whose rows start elsewhere.
        self._is_table = self._slot_step % row_bytes == 0
        self.first_item = np.zeros(len(rows_per_file), np.int64)  # of each file's row 0
        self.is_mapped = np.zeros(len(rows_per_file), np.bool_)

    def map(self, file_index: int, file_path: Path, data_offset: int, n_rows: int) -> None:
        """Map `n_rows` rows from byte `data_offset` (a multiple of the item size) of a file."""
        data_bytes = n_rows * self._values_per_row * self._stored_dtype.itemsize
        if data_bytes:
            page_lead = data_offset % _PAGE
            map_position = int(self._slot_starts[file_index]) + self._slot_shift(
                data_offset - page_lead
            )
            file_descriptor = os.open(file_path, os.O_RDONLY)
            try:
                _memory_map(
                    self._base_address + map_position,
                    page_lead + data_bytes,
                    mmap.PROT_READ,
                    mmap.MAP_SHARED | _MAP_FIXED,
                    file_descriptor,
                    data_offset - page_lead,
                )
            finally:
                os.close(file_descriptor)
            self.first_item[file_index] = (map_position + page_lead) // self._stored_dtype.itemsize
            self._is_table &= page_lead == 0
        self.is_mapped[file_index] = True

    def _slot_shift(self, file_offset: int) -> int:
        """Return the offset in its slot at which to map this byte of a file, a multiple of a page.

        If an address and its place in the file agree up to a huge page, the processor keeps one
        translation for many pages: random rows of a gigabyte are read at 7.2 GB/s instead of 5.2.
        The shift is a multiple of a row where one fits.
        """
        row_bytes = self._values_per_row * self._stored_dtype.itemsize
        common_divisor = math.gcd(row_bytes, _HUGE_PAGE)
        if not self._is_table:
            return file_offset % _HUGE_PAGE
        # Wanted: a number of rows m with m * row_bytes = file_offset modulo a huge page. There is
        # one if the common divisor of both sizes divides the offset: then a modular inverse gives
        # it.
        if file_offset % common_divisor:
            return 0
        modulus = _HUGE_PAGE // common_divisor
        inverse = pow(row_bytes // common_divisor, -1, modulus)
        return file_offset // common_divisor * inverse % modulus * row_bytes

    def gather(
        self, first_items: npt.NDArray[np.int64], output_rows: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Copy the rows that start at these items into (n, values_per_row), or `output_rows`."""
        if output_rows is None:
            output_rows = np.empty((len(first_items), self._values_per_row), self._stored_dtype)
        if self._is_table:
            # No index is out of range, so "clip" clips none; with the default mode, numpy would
            # write into a buffer first.
            np.take(
                self._row_table,
                first_items // self._values_per_row,
                axis=0,
                out=output_rows,
                mode="clip",
            )
        else:
            output_rows[...] = self._row_windows[first_items]
        return output_rows

    def will_need(self, file_index: int, start_row: int, stop_row: int) -> None:
        """Start reading these rows of a file from the disk, without waiting."""
        item_bytes = self._stored_dtype.itemsize
        first_byte = (
            int(self.first_item[file_index]) + start_row * self._values_per_row
        ) * item_bytes
        page_lead = first_byte % _PAGE
        # The result is not checked: if the system declines, the rows are read when they are used.
        _libc.madvise(
            self._base_address + first_byte - page_lead,
            page_lead + (stop_row - start_row) * self._values_per_row * item_bytes,
            mmap.MADV_WILLNEED,
        )

    def rows(self, file_index: int, start_row: int, stop_row: int) -> npt.NDArray[Any]:
        """Return consecutive rows of one file (stop_row - start_row, values_per_row), a view."""
        first_item = int(self.first_item[file_index]) + start_row * self._values_per_row
        return np.asarray(
            self._row_windows[first_item :: self._values_per_row][: stop_row - start_row]
        )


def _memory_map(
    address: int | None,
    n_bytes: int,
    protection: int,
    flags: int,
    file_descriptor: int,
    file_offset: int,
) -> int:
    mapped_address = _libc.mmap(address, n_bytes, protection, flags, file_descriptor, file_offset)
    if mapped_address in (None, _FAILED):
        error = ctypes.get_errno()
        raise OSError(error, f"mapping {n_bytes} bytes into memory failed: {os.strerror(error)}")
    return int(mapped_address)
