"""A feature set as a torch Dataset.

`FeatureSet.to_torch_dataset` imports this module when it is called, because torch loads slowly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data


class FeatureDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Items (feature (*shape), row position).

    A DataLoader makes batches (features, rows) of them, whose labels are `labels[rows]`.
    """

    def __init__(
        self,
        read_rows: Callable[[Sequence[int], np.dtype[Any]], npt.NDArray[Any]],
        n_rows: int,
        dtype: np.dtype[Any],
    ) -> None:
        """read_rows: `FeatureSet.read`. dtype: of the features."""
        self._read, self._n_rows, self._dtype = read_rows, n_rows, dtype

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        # A negative row counts from the end, and its position is not negative.
        return torch.from_numpy(self._read([row], self._dtype)[0]), row % self._n_rows

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Return the items of a batch with one read; DataLoader prefers it to `__getitem__`."""
        values = torch.from_numpy(self._read(rows, self._dtype))
        return list(zip(values.unbind(0), rows, strict=True))
