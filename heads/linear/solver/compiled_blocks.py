"""The compiled pass over a tile (logistic_blocks.c), where it was built and the processor has the
instructions for it.

A heads, C classes (1: a sigmoid), c = C - 1 columns of a head (1 for a sigmoid), n rows, k
coordinates of a row, P columns.
"""

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p
CACHE_LINE = 64  # bytes: a vector that lies across two is loaded at half the speed


def aligned_rows(n: int, k: int, dtype: Any) -> Array:
    """(n, k) zeros, every row at the beginning of a cache line.

    What lies between rows is zero and has to stay so.
    """
    size = np.dtype(dtype).itemsize
    width = _width(k, size)
    room = np.zeros(n * width + CACHE_LINE // size, dtype)
    first = -room.ctypes.data % CACHE_LINE // size
    return room[first : first + n * width].reshape(n, width)[:, :k]


def _width(k: int, size: int = 4) -> int:
    """Numbers of so many bytes from one row of k to the next."""
    step = CACHE_LINE // size
    return -(-k // step) * step


def _apart(rows: Array) -> int:
    """Floats from one of the rows (n, k) to the next, which must have been made by
    `aligned_rows`.
    """
    width = _width(rows.shape[1])
    assert rows.dtype == np.float32
    assert rows.strides == (4 * width, 4)
    return width


@dataclass(frozen=True)
class Compiled:
    """The functions of logistic_blocks.c for this processor.

    They release Python's lock while they run.
    """

    library: Any
    lanes: int  # floats of a vector

    def packed(self, weights: Array) -> Array:
        """Weights (P, k) float32 in the pass's own layout."""
        weights = np.ascontiguousarray(weights, np.float32)
        out = self.room(*weights.shape)
        width = _width(weights.shape[1])
        self.library.logistic_pack(
            self.lanes, *weights.shape, width, weights.ctypes.data, out.ctypes.data
        )
        return out

    def room(self, columns: int, k: int) -> Array:
        """Zero gradients of `columns` columns, in the pass's own layout."""
        size: int = self.library.logistic_packed(self.lanes, columns, _width(k))
        return np.asarray(aligned_rows(1, size, np.float32)[0])

    def unpack(self, gradients: Array, out: Array) -> None:
        """Gradients from the pass's own layout into out (columns, k), float32 and contiguous."""
        assert out.dtype == np.float32
        assert out.flags.c_contiguous
        width = _width(out.shape[1])
        self.library.logistic_unpack(
            self.lanes, *out.shape, width, gradients.ctypes.data, out.ctypes.data
        )

    def run(
        self,
        rows: Array,
        heads: int,
        classes: int,
        weights: Array,
        labels: Array,
        row_weight: Array | None,
        multiplier: Array | None,
        loss: Array,
        gradients: Array,
    ) -> None:
        """Add the losses and gradients of `heads` heads on rows (n, k), made by `aligned_rows`, to
        loss (A,) float64 and to packed gradients.

        weights: packed. labels: int32, the class of each row (n,), or for sigmoids (classes = 1) 0
        or 1 (A, n), whose rows may be apart. row_weight: (n,) float32; multiplier: (A, C), or (A,
        2) for sigmoids, float32; None: all one. Raises MemoryError.
        """
        width = _apart(rows)
        assert labels.dtype == np.int32
        assert labels.strides[-1] == 4
        failed = self.library.logistic_pass(
            self.lanes,
            len(rows),
            width,
            rows.ctypes.data,
            heads,
            classes,
            weights.ctypes.data,
            labels.ctypes.data,
            labels.strides[0] // 4,
            None if row_weight is None else row_weight.ctypes.data,
            None if multiplier is None else multiplier.ctypes.data,
            loss.ctypes.data,
            gradients.ctypes.data,
        )
        if failed:
            raise MemoryError(f"no memory for the decisions of {heads} heads on a block of rows")

    def centred(self, rows: Array, centre: Array, out: Array) -> None:
        """out (n, k) float32 = rows (n, k) float16 - centre (k,) float32, without a copy in
        between.
        """
        assert rows.dtype == np.float16
        assert centre.dtype == out.dtype == np.float32
        assert rows.flags.c_contiguous
        assert centre.flags.c_contiguous
        assert out.shape == rows.shape == (len(rows), len(centre))
        assert out.strides[1] == 4
        self.library.logistic_centred(
            self.lanes,
            *rows.shape,
            rows.ctypes.data,
            centre.ctypes.data,
            out.strides[0] // 4,
            out.ctypes.data,
        )

    def multiplied(self, weights: Array, rows: Array) -> Array:
        """weights rows' (P, n) of weights (P, k) and rows (n, k), made by `aligned_rows`, float32.

        Raises MemoryError.

        BLAS would copy the rows first, which takes as long as the product with some forty weights.
        """
        width = _apart(rows)
        packed = self.packed(weights)
        out = np.empty((len(weights), len(rows)), np.float32)
        failed = self.library.logistic_multiplied(
            self.lanes,
            len(rows),
            width,
            rows.ctypes.data,
            len(weights),
            packed.ctypes.data,
            out.ctypes.data,
        )
        if failed:
            raise MemoryError(
                f"no memory for the products of {len(weights)} weights with a block of rows"
            )
        return out

    def scaled(self, rows: Array, weights: Array, scale: Array) -> Array:
        """rows' diag(scale_p) rows w_p for each of the weights w_p (P, k), of rows (n, k), made by
        `aligned_rows`, and scale (n, P), all float32.

        Raises MemoryError.
        """
        width = _apart(rows)
        assert scale.dtype == np.float32
        assert scale.flags.c_contiguous
        assert scale.shape == (len(rows), len(weights))
        gradients = self.room(*weights.shape)
        packed = self.packed(weights)
        failed = self.library.logistic_scaled(
            self.lanes,
            len(rows),
            width,
            rows.ctypes.data,
            len(weights),
            packed.ctypes.data,
            scale.ctypes.data,
            gradients.ctypes.data,
        )
        if failed:
            raise MemoryError(
                f"no memory for the products of {len(weights)} weights with a block of rows"
            )
        out = np.empty(weights.shape, np.float32)
        self.unpack(gradients, out)
        return out


@functools.cache
def compiled() -> Compiled | None:
    """The compiled pass, or None where no C compiler was there to build it or the processor lacks
    the instructions.
    """
    spec = importlib.util.find_spec("headrace.heads.linear.solver._logistic_blocks")
    if spec is None or spec.origin is None:
        return None
    try:
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
    library.logistic_multiplied.argtypes = [*[_LONG] * 3, _POINTER, _LONG, *[_POINTER] * 2]
    library.logistic_multiplied.restype = _LONG
    library.logistic_scaled.argtypes = [*[_LONG] * 3, _POINTER, _LONG, *[_POINTER] * 3]
    library.logistic_scaled.restype = _LONG
    lanes = int(library.logistic_lanes())
    return Compiled(library, lanes) if lanes else None
