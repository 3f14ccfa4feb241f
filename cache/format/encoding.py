"""Storage dtypes, and the quantization error that each one causes.

float16    2 bytes, relative error 2^-11, largest value 65504
bfloat16   2 bytes (as uint16: the upper half of a float32), relative error 2^-8, range of float32
float32    4 bytes, as computed
uint8      1 byte, value = offset[c] + scale[c] * stored, error <= scale / 2;
           scale and offset per channel and shard
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.errors import CacheError
from headrace.cache.format.float16 import float16_to_float32

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "uint8": np.dtype("u1"),
}

# Rows are converted in blocks that stay in the second-level cache.
_BLOCK_BYTES = 1 << 19


@dataclass(frozen=True)
class QuantizationError:
    """Difference between stored values and those before storing, over a set of rows."""

    largest: float = 0.0  # largest absolute error
    squared_error: float = 0.0  # sum of squared errors
    squared: float = 0.0  # sum of the squared values before storing

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error divided by that of the values."""
        return float(np.sqrt(self.squared_error / self.squared)) if self.squared else 0.0

    def __add__(self, other: "QuantizationError") -> "QuantizationError":
        return QuantizationError(
            max(self.largest, other.largest),
            self.squared_error + other.squared_error,
            self.squared + other.squared,
        )


@dataclass(frozen=True)
class EncodedRows:
    """Rows in their storage dtype."""

    stored: npt.NDArray[Any]  # (n, *shape), one of NUMPY_DTYPES
    scale: npt.NDArray[np.float32] | None  # (C,), uint8 only
    offset: npt.NDArray[np.float32] | None  # (C,), uint8 only
    quantization_error: QuantizationError


def encode_rows(
    features: npt.NDArray[Any], sample_ids: Sequence[str], storage_dtype: str
) -> EncodedRows:
    """Convert rows (n, *shape) of any real dtype to the storage dtype.

    sample_ids: n ids, to name a sample in an error.

    Raises CacheError on NaN and infinity, in the features or by overflow of the storage dtype.
    """
    if features.dtype == NUMPY_DTYPES[storage_dtype] and storage_dtype in ("float16", "float32"):
        # Nothing is converted, so the error is 0. The sum of squares, the denominator of
        # `relative_rms`, is not needed then either.
        features = np.ascontiguousarray(features)
        for row_block in _row_blocks(features):
            values = features[row_block]
            if not _all_finite(values, storage_dtype):
                is_bad = _not_finite(values, storage_dtype)
                _refuse_values(is_bad, values, sample_ids, row_block.start, storage_dtype)
        return EncodedRows(features, None, None, QuantizationError())
    stored_rows = np.empty(features.shape, NUMPY_DTYPES[storage_dtype])
    quantization_error = QuantizationError()
    channel_scale, channel_offset = (
        _channel_range(features, sample_ids) if storage_dtype == "uint8" else (None, None)
    )
    for row_block in _row_blocks(features):
        wide_dtype = np.float64 if features.dtype == np.float64 else np.float32
        values = features[row_block].astype(wide_dtype)
        stored_rows[row_block] = _encode_block(values, storage_dtype, channel_scale, channel_offset)
        # Values that are not finite, or overflow, are found by the result of the conversion; those
        # for uint8 were found when `_channel_range` measured them.
        if storage_dtype != "uint8":
            is_bad = _not_finite(stored_rows[row_block], storage_dtype)
            _refuse_values(is_bad, values, sample_ids, row_block.start, storage_dtype)
        error = values - _decode_as_float32(
            stored_rows[row_block], storage_dtype, channel_scale, channel_offset
        )
        largest_error = max(float(error.max(initial=0)), -float(error.min(initial=0)))
        quantization_error += QuantizationError(
            largest_error, _sum_of_squares(error), _sum_of_squares(values)
        )
    return EncodedRows(stored_rows, channel_scale, channel_offset, quantization_error)


def decode_rows(
    stored_rows: npt.NDArray[Any],
    storage_dtype: str,
    channel_scale: npt.NDArray[np.float32] | None = None,
    channel_offset: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[Any]:
    """Convert stored rows (n, *shape) to numbers: float16 and float32 unchanged, others as float32.

    channel_scale and channel_offset: (C,), or (n, C) for rows of several shards; C is the first
    axis of a row.
    """
    if storage_dtype == "bfloat16":
        return (stored_rows.astype(np.uint32) << 16).view(np.float32)
    if storage_dtype == "uint8":
        decoded_values = stored_rows.astype(np.float32)
        # In place, because a batch of maps is large.
        decoded_values *= _over_channels(channel_scale, stored_rows.ndim)
        decoded_values += _over_channels(channel_offset, stored_rows.ndim)
        return decoded_values
    return stored_rows


def _over_channels(
    channel_values: npt.NDArray[np.float32] | None, n_axes: int
) -> npt.NDArray[np.float32]:
    """Return values of channels, (C,) or (n, C), shaped for an array of rows of `n_axes` axes."""
    assert channel_values is not None  # every shard of uint8 has them
    return channel_values.reshape(channel_values.shape + (1,) * (n_axes - 2))


def _decode_as_float32(
    stored_rows: npt.NDArray[Any],
    storage_dtype: str,
    channel_scale: npt.NDArray[np.float32] | None,
    channel_offset: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    if storage_dtype != "float16":
        return decode_rows(stored_rows, storage_dtype, channel_scale, channel_offset)
    decoded_values = np.empty(stored_rows.shape, np.float32)
    float16_to_float32(stored_rows, decoded_values)
    return decoded_values


def _encode_block(
    block_values: npt.NDArray[Any],
    storage_dtype: str,
    channel_scale: npt.NDArray[np.float32] | None,
    channel_offset: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    if storage_dtype == "bfloat16":
        float_bits = block_values.astype(np.float32).view(np.uint32)
        # Round to nearest, ties to even. The sum may wrap the bits of a NaN around to zero, so it
        # is replaced by the bits of a NaN (0x7FC0), which `_not_finite` finds.
        rounded_bits = (float_bits + (((float_bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        return np.where(np.isfinite(block_values), rounded_bits, np.uint32(0x7FC0)).astype(
            np.uint16
        )
    if storage_dtype == "uint8":
        step_sizes = _over_channels(channel_scale, block_values.ndim)
        # A constant channel has scale 0; any divisor stores its values as 0.
        step_sizes = np.where(step_sizes > 0, step_sizes, np.float32(1))
        steps = (block_values - _over_channels(channel_offset, block_values.ndim)) / step_sizes
        return np.asarray(np.clip(np.rint(steps), 0, 255), np.uint8)
    # A value too large for the dtype becomes infinite, which the caller refuses.
    with np.errstate(over="ignore"):
        return block_values.astype(NUMPY_DTYPES[storage_dtype])


def _channel_range(
    features: npt.NDArray[Any], sample_ids: Sequence[str]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return scale and offset, (C,) each, that spread each channel's range over 0..255."""
    for row_block in _row_blocks(features):
        block_values = features[row_block]
        with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
            is_bad = ~np.isfinite(block_values.astype(np.float32))
        _refuse_values(is_bad, block_values, sample_ids, row_block.start, "uint8")
    if not len(features):
        return np.zeros(features.shape[1:2], np.float32), np.zeros(features.shape[1:2], np.float32)
    reduced_axes = (0, *range(2, features.ndim))
    # float64, in which the difference of two float32 extremes does not overflow.
    lowest = features.min(axis=reduced_axes).astype(np.float64)
    highest = features.max(axis=reduced_axes).astype(np.float64)
    return ((highest - lowest) / 255).astype(np.float32), lowest.astype(np.float32)


def _all_finite(values: npt.NDArray[Any], storage_dtype: str) -> bool:
    """Return whether float16 or float32 values have neither NaN nor infinity."""
    if storage_dtype == "float32":
        return bool(np.isfinite(values).all())
    # float16 numbers of one sign are in the order of their bits, infinity and NaN last, so the
    # largest bits of each sign decide. These two maxima take half the time of `_not_finite`.
    largest_positive = values.view(np.int16).max(initial=0)
    largest_negative = values.view(np.uint16).max(initial=0)
    return bool(largest_positive < 0x7C00 and largest_negative < 0xFC00)


def _not_finite(values: npt.NDArray[Any], storage_dtype: str) -> npt.NDArray[np.bool_]:
    if storage_dtype == "float32":
        return np.asarray(~np.isfinite(values))
    # All exponent bits set. numpy's isfinite is ten times slower on float16 than this comparison of
    # integers.
    exponent_mask = np.uint16(0x7C00 if storage_dtype == "float16" else 0x7F80)
    return np.asarray((values.view(np.uint16) & exponent_mask) == exponent_mask)


def _refuse_values(
    is_bad: npt.NDArray[np.bool_],
    block_values: npt.NDArray[Any],
    sample_ids: Sequence[str],
    first_row: int,
    storage_dtype: str,
) -> None:
    """Raise CacheError for the first bad value of a block, if any. first_row: of the block."""
    if not is_bad.any():
        return
    position = tuple(int(axis[0]) for axis in np.nonzero(is_bad))
    bad_value = float(block_values[position])
    location_text = (
        f"sample {sample_ids[first_row + position[0]]!r}: its feature {list(position[1:])}"
    )
    if not np.isfinite(bad_value):
        raise CacheError(
            f"{location_text} is {bad_value}. A network that gives NaN or infinity gives a head "
            "nothing to learn from; look at the image and at the weights, or list it as failed"
        )
    if storage_dtype == "float16":
        raise CacheError(
            f"{location_text} is {bad_value:g}, and float16 ends at 65504. Store this tap as "
            "bfloat16 or float32 (dtype in the recipe)"
        )
    raise CacheError(
        f"{location_text} is {bad_value:g}, and {storage_dtype} ends at 3.4e38. No head can use "
        "such a value; look at the image and the weights"
    )


def _row_blocks(features: npt.NDArray[Any]) -> list[slice]:
    row_bytes = max(1, features[:1].nbytes)
    block_rows = max(1, _BLOCK_BYTES // row_bytes)
    return [
        slice(start_row, min(start_row + block_rows, len(features)))
        for start_row in range(0, len(features), block_rows)
    ]


def _sum_of_squares(values: npt.NDArray[Any]) -> float:
    # Not a dot product: BLAS adds up in an order that depends on the processor, and the sum is
    # stored in the shard, whose bytes must not. float32 blocks are summed in float32: numpy's
    # pairwise sum keeps six digits.
    return float(np.square(values).sum())
