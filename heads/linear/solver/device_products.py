"""Matrix products of NumPy arrays on any device that torch knows."""

from collections.abc import Callable

import numpy as np

from headrace.heads.arrays import Array

MatrixProduct = Callable[[Array, Array], Array]


def matrix_product(device: str) -> MatrixProduct:
    """Return the function that multiplies arrays (n, k) and (k, m) of one dtype on a device.

    device: "cpu" (NumPy), or torch's name of a device.
    """
    if device == "cpu":
        return np.matmul
    import torch  # a bank on the CPU does not import it

    def multiply(left: Array, right: Array) -> Array:
        # from_numpy keeps the strides of a transposed view, which the product takes as they are.
        on_device = [torch.from_numpy(side).to(device) for side in (left, right)]
        return np.asarray((on_device[0] @ on_device[1]).cpu().numpy())

    return multiply
