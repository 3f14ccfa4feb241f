"""A feature set as a torch Dataset.

Imported only by `FeatureSet.to_torch_dataset`, because it imports torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data


class FeatureDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Items (feature (*shape), row position). Join labels by position: `labels[rows]`."""

    def __init__(
        self, read_rows: Callable[..., npt.NDArray[Any]], n_rows: int, dtype: np.dtype[Any]
    ) -> None:
        """read_rows: `FeatureSet.read`, which takes row positions and a dtype."""
        self._read, self._n_rows, self._dtype = read_rows, n_rows, dtype

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self._read([row], self._dtype)[0]), row % self._n_rows

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Return the items of a batch with one read; DataLoader prefers it to `__getitem__`."""
        values = torch.from_numpy(self._read(rows, self._dtype))
        return list(zip(values.unbind(0), rows, strict=True))
