"""Storage dtypes: what is written for a feature, and what it costs in round-off.

float16    2 bytes, relative error 2^-11, largest value 65504 bfloat16   2 bytes (as uint16: the
upper half of a float32), relative error 2^-8, the range of float32 float32    4 bytes, as computed
uint8      1 byte, value = offset[c] + scale[c] * stored, with a scale per channel and shard: error
<= scale / 2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import CacheError
from headrace.cache.format.float16 import float16_to_float32

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "uint8": np.dtype("u1"),
}

# Rows are converted in blocks that stay in the second-level cache.
_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class QuantizationError:
    """How far the stored values are from the given ones, over all values of some rows."""

    largest: float = 0.0  # largest absolute error
    squared_error: float = 0.0  # sum of squared errors
    squared: float = 0.0  # sum of squared values as given

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the values."""
        return float(np.sqrt(self.squared_error / self.squared)) if self.squared else 0.0

    def __add__(self, other: "QuantizationError") -> "QuantizationError":
        return QuantizationError(
            max(self.largest, other.largest),
            self.squared_error + other.squared_error,
            self.squared + other.squared,
        )


@dataclass(frozen=True)
class EncodedRows:
    """Rows as they are stored."""

    stored: npt.NDArray[Any]  # (n, *shape), one of STORED_DTYPES
    scale: npt.NDArray[np.float32] | None  # (C,), uint8 only
    offset: npt.NDArray[np.float32] | None  # (C,), uint8 only
    quantization_error: QuantizationError


def encode(features: npt.NDArray[Any], ids: Sequence[str], dtype: str) -> EncodedRows:
    """Rows (n, *shape) of any real dtype as they are stored. `ids` (n,) name a sample in an error.

    Raises CacheError on NaN and infinity, in the features or by overflow of the storage dtype.
    """
    if features.dtype == STORED_DTYPES[dtype] and dtype in ("float16", "float32"):
        # Nothing is converted, so nothing is lost; the squares are left out too, as no ratio needs
        # them.
        features = np.ascontiguousarray(features)
        for rows in _blocks(features):
            if not _all_finite(features[rows], dtype):
                _refuse(_not_finite(features[rows], dtype), features[rows], ids, rows.start, dtype)
        return EncodedRows(features, None, None, QuantizationError())
    stored = np.empty(features.shape, STORED_DTYPES[dtype])
    quantization_error = QuantizationError()
    scale, offset = _channel_range(features, ids) if dtype == "uint8" else (None, None)
    for rows in _blocks(features):
        given = features[rows].astype(np.float32 if features.dtype != np.float64 else np.float64)
        # uint8 was checked when its range was measured.
        stored[rows] = _encode_block(given, dtype, scale, offset)
        if dtype != "uint8":
            _refuse(_not_finite(stored[rows], dtype), given, ids, rows.start, dtype)
        error = given - _restored(stored[rows], dtype, scale, offset)
        largest = max(float(error.max(initial=0)), -float(error.min(initial=0)))
        quantization_error += QuantizationError(
            largest, _sum_of_squares(error), _sum_of_squares(given)
        )
    return EncodedRows(stored, scale, offset, quantization_error)


def decode(
    stored: npt.NDArray[Any],
    dtype: str,
    scale: npt.NDArray[np.float32] | None = None,
    offset: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[Any]:
    """Stored rows (n, *shape) as numbers: float16 and float32 as they are, the others as float32.

    scale and offset: (C,), or (n, C) where rows come from several shards; C is the first axis of a
    row.
    """
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "uint8":
        assert scale is not None
        assert offset is not None
        trailing = (1,) * (stored.ndim - 2)
        values = stored.astype(np.float32)
        values *= scale.reshape(scale.shape + trailing)
        values += offset.reshape(offset.shape + trailing)
        return values
    return stored


def _restored(
    stored: npt.NDArray[Any],
    dtype: str,
    scale: npt.NDArray[np.float32] | None,
    offset: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    if dtype != "float16":
        return decode(stored, dtype, scale, offset)
    values = np.empty(stored.shape, np.float32)
    float16_to_float32(stored, values)
    return values


def _encode_block(
    given: npt.NDArray[Any],
    dtype: str,
    scale: npt.NDArray[np.float32] | None,
    offset: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        bits = given.astype(np.float32).view(np.uint32)
        # Round to nearest, ties to even. A NaN could wrap around to zero here: let it stay one.
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        return np.where(np.isfinite(given), rounded, np.uint32(0x7FC0)).astype(np.uint16)
    if dtype == "uint8":
        assert scale is not None
        assert offset is not None
        trailing = (1,) * (given.ndim - 2)
        steps = np.where(scale > 0, scale, np.float32(1)).reshape(scale.shape + trailing)
        return np.clip(
            np.rint((given - offset.reshape(offset.shape + trailing)) / steps), 0, 255
        ).astype(np.uint8)
    with np.errstate(over="ignore"):
        return given.astype(STORED_DTYPES[dtype])


def _channel_range(
    features: npt.NDArray[Any], ids: Sequence[str]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """scale and offset (C,) that spread each channel's range over 0..255."""
    for rows in _blocks(features):
        given = features[rows]
        with np.errstate(over="ignore"):  # found by its result
            bad = ~np.isfinite(given.astype(np.float32))
        _refuse(bad, given, ids, rows.start, "uint8")
    axes = (0, *range(2, features.ndim))
    if not len(features):
        return np.zeros(features.shape[1:2], np.float32), np.zeros(features.shape[1:2], np.float32)
    low, high = (
        features.min(axis=axes).astype(np.float64),
        features.max(axis=axes).astype(np.float64),
    )
    return ((high - low) / 255).astype(np.float32), low.astype(np.float32)


def _all_finite(values: npt.NDArray[Any], dtype: str) -> bool:
    """Whether float16 or float32 values hold no NaN and no infinity, without writing down which."""
    if dtype == "float32":
        return bool(np.isfinite(values).all())
    # Halves of one sign are in the order of their bits, infinity and NaN last. Two maxima take half
    # of `_not_finite`'s time.
    positive, negative = values.view(np.int16).max(initial=0), values.view(np.uint16).max(initial=0)
    return bool(positive < 0x7C00 and negative < 0xFC00)


def _not_finite(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.bool_]:
    if dtype == "float32":
        return np.asarray(~np.isfinite(values))
    # All exponent bits set. numpy's isfinite is ten times slower on float16 than this comparison of
    # integers.
    exponent = np.uint16(0x7C00 if dtype == "float16" else 0x7F80)
    return np.asarray((values.view(np.uint16) & exponent) == exponent)


def _refuse(
    bad: npt.NDArray[np.bool_],
    given: npt.NDArray[Any],
    ids: Sequence[str],
    first_row: int,
    dtype: str,
) -> None:
    if not bad.any():
        return
    position = tuple(int(axis[0]) for axis in np.nonzero(bad))
    value = float(given[position])
    where = f"sample {ids[first_row + position[0]]!r}: its feature {list(position[1:])}"
    if not np.isfinite(value):
        raise CacheError(
            f"{where} is {value}. A network that gives NaN or infinity gives a head nothing to "
            "learn from; look at the image and at the weights, or list it as failed"
        )
    if dtype == "float16":
        raise CacheError(
            f"{where} is {value:g}, and float16 ends at 65504. Store this tap as bfloat16 or "
            "float32 (dtype in the recipe)"
        )
    raise CacheError(
        f"{where} is {value:g}, and {dtype} ends at 3.4e38. No head can use such a value; look at "
        "the image and the weights"
    )


def _blocks(features: npt.NDArray[Any]) -> list[slice]:
    row_bytes = max(1, features[:1].nbytes)
    step = max(1, _BLOCK_BYTES // row_bytes)
    return [
        slice(start, min(start + step, len(features))) for start in range(0, len(features), step)
    ]


def _sum_of_squares(values: npt.NDArray[Any]) -> float:
    # Not a dot product: BLAS adds up in an order that depends on the processor, and the sum is
    # stored in the shard. In the block's own precision, which numpy's pairwise sum keeps to six
    # digits.
    return float(np.square(values).sum())
