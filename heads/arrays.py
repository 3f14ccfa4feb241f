"""Types of arrays in annotations. Docstrings give the shapes."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]  # of a head, by name
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]  # numbers of rows, classes and the like
Mask = npt.NDArray[np.bool_]
Strings = npt.NDArray[np.str_]
