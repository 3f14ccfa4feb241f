"""The compiled pass over a row block, logistic_blocks.c, called by ctypes.

A heads, C classes (1: a sigmoid), c = C - 1 free weight vectors of a head (1 for a sigmoid), n
rows, k coordinates of a row, P = A c columns.
"""

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headrace.heads.arrays import Array, Index

if TYPE_CHECKING:
    from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
    from headrace.heads.linear.solver.passes import HeadsByFolds, RowWeighting

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

        Raises MemoryError where there is none for the heads' decisions on these rows.
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


class CompiledPass:
    """The pass (see `passes`) in compiled float32: a row is read once, and decisions stay in the
    nearer caches. Threads divide a block's rows among them; each has its own sums.
    """

    def __init__(
        self,
        design: "DesignMatrix",
        weighting: "RowWeighting",
        path_index: Index,
        weights: Array,
        heads_by_folds: "HeadsByFolds",
        kernels: CompiledKernels,
        threads: ThreadPoolExecutor | None = None,
        n_threads: int = 1,
    ) -> None:
        self.design, self.weighting, self.path_index = design, weighting, path_index
        self.heads_by_folds, self.kernels, self.shape = heads_by_folds, kernels, weights.shape
        self.threads, self.n_threads = threads, n_threads
        self.packed_weights: dict[tuple[int, ...], Array] = {}
        self.packed_gradients: dict[tuple[int, ...], list[Array]] = {}  # one for each thread
        for folds, heads in heads_by_folds.items():
            columns = weights[heads].reshape(-1, weights.shape[-1])
            self.packed_weights[folds] = kernels.pack(columns)
            self.packed_gradients[folds] = [
                kernels.allocate_packed(*columns.shape) for _ in range(n_threads)
            ]
        self.class_factors: Array | None = weighting.class_factors[path_index].astype(np.float32)
        if (self.class_factors == 1).all():
            self.class_factors = None
        self.loss_sums = np.zeros(len(weights))

    def add(self, block: "RowBlock") -> None:
        """Add the losses of the heads that train on a block, and its gradients."""
        values, sample_weight = self.design.read(block), block.sample_weight
        heads = self.heads_by_folds[block.folds]
        labels = self._labels(block, heads)
        losses = np.zeros((self.n_threads, len(heads)))

        def add_rows(thread: int) -> None:
            first, end = (len(values) * i // self.n_threads for i in (thread, thread + 1))
            rows = slice(first, end)
            self.kernels.add_losses_and_gradients(
                values[rows],
                len(heads),
                self.weighting.n_outputs,
                self.packed_weights[block.folds],
                labels[..., rows],
                None if sample_weight is None else sample_weight[rows],
                None if self.class_factors is None else self.class_factors[heads],
                losses[thread],
                self.packed_gradients[block.folds][thread],
            )

        if self.threads is None:
            add_rows(0)
        else:
            # `list` waits for all threads, and raises their errors.
            list(self.threads.map(add_rows, range(self.n_threads)))
        self.loss_sums[heads] += losses.sum(axis=0)

    def losses(self) -> Array:
        """Return the losses (A,) float64 summed over the blocks so far."""
        return self.loss_sums

    def _labels(self, block: "RowBlock", heads: Index) -> npt.NDArray[np.int32]:
        """Return classes (n,) of a block's rows, or labels (heads, n) of 0 and 1 for sigmoids."""
        if self.weighting.n_outputs > 1:
            return block.classes
        return block.labels[self.weighting.labels[self.path_index[heads]]].astype(np.int32)

    def gradient(self) -> Array:
        """Return the gradients (A, c, k) summed over the blocks so far."""
        _, n_free, width = self.shape
        total = np.zeros(self.shape, np.float32)
        for folds, heads in self.heads_by_folds.items():
            # In the order of the threads: the result does not depend on which is done first.
            packed, *others = self.packed_gradients[folds]
            for thread_gradients in others:
                packed = packed + thread_gradients
            gradients = np.empty((len(heads), n_free, width), np.float32)
            self.kernels.unpack(packed, gradients.reshape(-1, width))
            total[heads] += gradients
        return total


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
