"""The two products and the loss of a tile on any device that torch knows; everything around them
stays in NumPy.

A heads, C classes, c = C - 1 rows of weights a head (1 for a sigmoid), n rows, R + 1 coordinates. A
tile is copied to the device once, a streamed one on every pass; weights and gradients, a few
megabytes, travel on every evaluation.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.heads.linear.solver.design import Tile

Array = npt.NDArray[Any]


class TorchTiles:
    """The tiles of a design on a device."""

    def __init__(self, tiles: list[Tile], rows: int, device: str, *, keep: bool) -> None:
        self.rows, self.device = rows, torch.device(device)
        kept = tiles if keep else []
        self.values = {id(tile): torch.from_numpy(tile.values).to(self.device) for tile in kept}
        self.classes = {
            id(tile): torch.from_numpy(tile.classes.astype(np.int64)).to(self.device)
            for tile in tiles
            if rows > 1
        }

    def __call__(
        self,
        tile: Tile,
        streamed: Array,
        weights: Array,
        labels: Array | None,
        weight: Array | None,
    ) -> tuple[Array, Array]:
        """Losses (A,) float64 and gradient (c * A, R + 1) of weights (c * A, R + 1), class first;
        labels and weight are (A, n) or None, as for `softmax_loss` and `sigmoid_loss`. `streamed`
        (n, R + 1) are the values of a tile that is not kept.
        """
        values = self.values.get(id(tile))
        if values is None:
            values = torch.from_numpy(streamed).to(self.device)
        columns = max(self.rows - 1, 1)
        decision = (torch.from_numpy(weights).to(self.device) @ values.T).reshape(
            columns, -1, len(values)
        )
        w = (
            None
            if weight is None
            else torch.from_numpy(np.ascontiguousarray(weight)).to(self.device)
        )
        if labels is not None:
            own = torch.from_numpy(labels).to(self.device)
            towards = (1 - 2 * own) * decision[
                0
            ]  # the wrong label; sums of small numbers, as in `loss`
            loss = torch.nn.functional.softplus(towards)
            residual = ((1 - 2 * own) * torch.sigmoid(towards))[None]
        else:
            every = torch.cat([decision, -decision.sum(0, keepdim=True)])
            label = self.classes[id(tile)].expand(1, every.shape[1], -1)
            towards = (
                torch.logsumexp(every.scatter(0, label, -torch.inf), 0) - every.gather(0, label)[0]
            )
            loss = torch.nn.functional.softplus(towards)
            residual = torch.softmax(every, 0).scatter(0, label, -torch.sigmoid(towards)[None])[
                :columns
            ]
        if w is not None:
            loss, residual = loss * w, residual * w
        gradient = residual.reshape(len(weights), -1) @ values
        return loss.sum(1, dtype=torch.float64).cpu().numpy(), gradient.cpu().numpy()
