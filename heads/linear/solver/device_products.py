"""Matrix products of NumPy arrays on any device that torch knows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MatrixProduct = Callable[[Array, Array], Array]


def matrix_product(device: str) -> MatrixProduct:
    """Return a function of arrays (n, k) and (k, m) of one dtype that gives their product (n, m).

    device: "cpu" (NumPy), or torch's name of the device that the product is taken on.
    """
    if device == "cpu":
        return np.matmul
    import torch  # a bank on the CPU does not import it

    def multiply(left: Array, right: Array) -> Array:
        # A transposed view goes up as it lies: the product reads either order.
        on_device = [torch.from_numpy(side).to(device) for side in (left, right)]
        return np.asarray((on_device[0] @ on_device[1]).cpu().numpy())

    return multiply
