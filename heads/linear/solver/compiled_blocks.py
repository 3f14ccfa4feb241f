"""The compiled pass over a row block, logistic_blocks.c, called by ctypes.

A heads, C classes (1: a sigmoid), c = C - 1 free weight vectors of a head (1 for a sigmoid), n
rows, k coordinates of a row, P = A c columns.
"""

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.heads.arrays import Array

_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p
CACHE_LINE = 64  # bytes; a vector across two of them is loaded at half the speed


def aligned_rows(n: int, k: int, dtype: Any) -> Array:
    """Return zeros (n, k) of which every row starts at a cache line.

    The padding between rows is zero and must stay zero.
    """
    item_size = np.dtype(dtype).itemsize
    stride = _row_stride(k, item_size)
    buffer = np.zeros(n * stride + CACHE_LINE // item_size, dtype)
    start = -buffer.ctypes.data % CACHE_LINE // item_size
    return buffer[start : start + n * stride].reshape(n, stride)[:, :k]


def _row_stride(k: int, item_size: int = 4) -> int:
    """Return the distance between rows of k numbers, counted in numbers of `item_size` bytes."""
    per_line = CACHE_LINE // item_size
    return -(-k // per_line) * per_line


@dataclass(frozen=True)
class CompiledKernels:
    """The functions of logistic_blocks.c for this processor."""

    library: Any
    vector_length: int  # in floats

    def pack(self, weights: Array) -> Array:
        """Return weights (P, k) float32 in the packed layout."""
        weights = np.ascontiguousarray(weights, np.float32)
        packed = self.allocate_packed(*weights.shape)
        self.library.logistic_pack(
            self.vector_length,
            *weights.shape,
            _row_stride(weights.shape[1]),
            weights.ctypes.data,
            packed.ctypes.data,
        )
        return packed

    def allocate_packed(self, n_columns: int, k: int) -> Array:
        """Return zeros for the gradients of `n_columns` columns of k, in the packed layout."""
        size: int = self.library.logistic_packed(self.vector_length, n_columns, _row_stride(k))
        return np.asarray(aligned_rows(1, size, np.float32)[0])

    def unpack(self, gradients: Array, out: Array) -> None:
        """Write packed gradients into out (P, k), float32 and contiguous."""
        assert out.dtype == np.float32
        assert out.flags.c_contiguous
        self.library.logistic_unpack(
            self.vector_length,
            *out.shape,
            _row_stride(out.shape[1]),
            gradients.ctypes.data,
            out.ctypes.data,
        )

    def add_losses_and_gradients(
        self,
        rows: Array,
        n_heads: int,
        n_outputs: int,
        packed_weights: Array,
        labels: Array,
        sample_weight: Array | None,
        class_factors: Array | None,
        losses: Array,
        packed_gradients: Array,
    ) -> None:
        """Add losses and gradients of A heads on rows (n, k), which `aligned_rows` made.

        labels: int32, the class of each row, (n,); for sigmoids (n_outputs = 1) 0 or 1, (A, n),
        whose rows need not be adjacent.
        sample_weight: (n,) float32, or None for ones.
        class_factors: (A, C), or (A, 2) for sigmoids, float32, or None for ones.
        losses: (A,) float64, added to; packed_gradients: from `allocate_packed`, added to.

        Raises MemoryError.
        """
        stride = _row_stride(rows.shape[1])
        assert rows.dtype == np.float32
        assert rows.strides == (4 * stride, 4)
        assert labels.dtype == np.int32
        assert labels.strides[-1] == 4
        failed = self.library.logistic_pass(
            self.vector_length,
            len(rows),
            stride,
            rows.ctypes.data,
            n_heads,
            n_outputs,
            packed_weights.ctypes.data,
            labels.ctypes.data,
            labels.strides[0] // 4,
            None if sample_weight is None else sample_weight.ctypes.data,
            None if class_factors is None else class_factors.ctypes.data,
            losses.ctypes.data,
            packed_gradients.ctypes.data,
        )
        if failed:
            raise MemoryError(f"no memory for the decisions of {n_heads} heads on a block of rows")

    def subtract_mean_from_float16(self, rows: Array, mean: Array, out: Array) -> None:
        """Write rows (n, k) float16 - mean (k,) float32 into out (n, k) float32."""
        # In one step: 10,000 streamed rows of 1,280 features take 9 ms, in two steps 21.
        assert rows.dtype == np.float16
        assert mean.dtype == out.dtype == np.float32
        assert rows.flags.c_contiguous
        assert mean.flags.c_contiguous
        assert out.shape == rows.shape == (len(rows), len(mean))
        assert out.strides[1] == 4
        self.library.logistic_centred(
            self.vector_length,
            *rows.shape,
            rows.ctypes.data,
            mean.ctypes.data,
            out.strides[0] // 4,
            out.ctypes.data,
        )


@functools.cache
def load_compiled_kernels() -> CompiledKernels | None:
    """Return the compiled kernels, or None if they were not built or the processor is too old."""
    spec = importlib.util.find_spec("headrace.heads.linear.solver._logistic_blocks")
    if spec is None or spec.origin is None:
        return None
    try:
        # Its calls release the interpreter lock: the threads of a pass run side by side. The file
        # includes no header of Python, so building it needs only a C compiler.
        library = ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None
    library.logistic_lanes.restype = _LONG
    library.logistic_packed.argtypes, library.logistic_packed.restype = [_LONG] * 3, _LONG
    for move in (library.logistic_pack, library.logistic_unpack):
        move.argtypes, move.restype = [*[_LONG] * 4, _POINTER, _POINTER], None
    library.logistic_pass.argtypes = [
        *[_LONG] * 3,
        _POINTER,
        *[_LONG] * 2,
        *[_POINTER] * 2,
        _LONG,
        *[_POINTER] * 4,
    ]
    library.logistic_pass.restype = _LONG
    library.logistic_centred.argtypes = [*[_LONG] * 3, _POINTER, _POINTER, _LONG, _POINTER]
    library.logistic_centred.restype = None
    vector_length = int(library.logistic_lanes())
    return CompiledKernels(library, vector_length) if vector_length else None
