"""The two products and the loss of a row block on any device that torch knows.

A heads, C classes, c = C - 1 free weight vectors of a head (1 for a sigmoid), n rows, R + 1
coordinates. Everything around the products stays in NumPy. A block is copied to the device once, a
streamed one on every pass; weights and gradients, a few megabytes, travel on every evaluation.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.heads.linear.solver.design import RowBlock

Array = npt.NDArray[Any]


class TorchKernel:
    """The row blocks of a design on a device, and the pass over one of them.

    keep_values: keep the blocks' values on the device; without, they are copied for every pass.
    """

    def __init__(
        self, row_blocks: list[RowBlock], n_outputs: int, device: str, *, keep_values: bool
    ) -> None:
        self.n_outputs, self.device = n_outputs, torch.device(device)
        self.values = {
            id(block): torch.from_numpy(block.values).to(self.device)
            for block in row_blocks
            if keep_values
        }
        self.classes = {
            id(block): torch.from_numpy(block.classes.astype(np.int64)).to(self.device)
            for block in row_blocks
            if n_outputs > 1
        }

    def __call__(
        self,
        block: RowBlock,
        streamed_values: Array,
        weights: Array,
        labels: Array | None,
        row_weights: Array | None,
    ) -> tuple[Array, Array]:
        """Return losses (A,) float64 and gradient (c * A, R + 1) of weights (c * A, R + 1).

        Weights are class first; labels and row_weights are (A, n) or None, as for `softmax_loss`
        and `sigmoid_loss`. streamed_values: (n, R + 1), of a block that is not kept.
        """
        values = self.values.get(id(block))
        if values is None:
            values = torch.from_numpy(streamed_values).to(self.device)
        n_free = max(self.n_outputs - 1, 1)
        decisions = (torch.from_numpy(weights).to(self.device) @ values.T).reshape(
            n_free, -1, len(values)
        )
        # As in `loss`: the loss and the residual of the true label come from the decision of the
        # wrong labels against it, so that they are sums of small numbers.
        if labels is not None:
            label = torch.from_numpy(labels).to(self.device)
            wrong_logit = (1 - 2 * label) * decisions[0]
            loss = torch.nn.functional.softplus(wrong_logit)
            residual = ((1 - 2 * label) * torch.sigmoid(wrong_logit))[None]
        else:
            all_decisions = torch.cat([decisions, -decisions.sum(0, keepdim=True)])
            classes = self.classes[id(block)].expand(1, all_decisions.shape[1], -1)
            wrong_decisions = all_decisions.scatter(0, classes, -torch.inf)
            true_decision = all_decisions.gather(0, classes)[0]
            wrong_logit = torch.logsumexp(wrong_decisions, 0) - true_decision
            loss = torch.nn.functional.softplus(wrong_logit)
            true_residual = -torch.sigmoid(wrong_logit)[None]
            residual = torch.softmax(all_decisions, 0).scatter(0, classes, true_residual)[:n_free]
        if row_weights is not None:
            weight = torch.from_numpy(np.ascontiguousarray(row_weights)).to(self.device)
            loss, residual = loss * weight, residual * weight
        gradient = residual.reshape(len(weights), -1) @ values
        return loss.sum(1, dtype=torch.float64).cpu().numpy(), gradient.cpu().numpy()
