"""A feature set as a torch Dataset. Imported only by `FeatureSet.to_torch_dataset`, because it imports torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.data

if TYPE_CHECKING:
    from headrace.cache.feature_set import FeatureSet


class FeatureDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Items (feature (*shape), row position). Labels are joined by position: `labels[rows]`."""

    def __init__(self, features: "FeatureSet", dtype: np.dtype[Any]) -> None:
        self.features, self.dtype = features, dtype

    def __len__(self) -> int:
        return self.features.n_rows

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        if row < 0:
            row += len(self)
        return torch.from_numpy(self.features.read([row], self.dtype)[0]), row

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """DataLoader's way to ask for a batch: one read for all of it."""
        values = torch.from_numpy(self.features.read(rows, self.dtype))
        return list(zip(values.unbind(0), rows, strict=True))
