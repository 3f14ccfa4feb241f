"""One pass of logistic heads over the row blocks on any device that torch knows.

A heads, C classes, c = C - 1 free weight vectors of a head (1 for a sigmoid), n rows, W coordinates
of a row as the blocks store them. Blocks, their labels and their sample weights are copied to the
device once, streamed blocks on every pass. An evaluation uploads the weights once, sums losses and
gradients on the device, and downloads the sums once.
"""

import numpy as np
import torch
from torch import Tensor

from headrace.heads.arrays import Array, Index
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.passes import HeadsByFolds, RowWeighting


class DeviceBlocks:
    """The row blocks of a design on a device."""

    def __init__(self, design: DesignMatrix, n_outputs: int, device: str) -> None:
        self.design, self.n_outputs, self.device = design, n_outputs, torch.device(device)
        self._values: dict[int, Tensor] = {}
        if design.streamed_rows is None:
            self._values = {id(block): self.upload(block.values) for block in design.row_blocks}
        # (n,) classes, or (label rows, n) of 0 and 1 for sigmoids
        self.labels = {
            id(block): self.upload(
                block.classes.astype(np.int64) if n_outputs > 1 else block.labels
            )
            for block in design.row_blocks
        }
        self.sample_weights = {
            id(block): self.upload(np.asarray(block.sample_weight, design.dtype))
            for block in design.row_blocks
            if block.sample_weight is not None
        }

    def upload(self, array: Array) -> Tensor:
        """Return a copy on the device; on the CPU it may share the array's memory."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def values(self, block: RowBlock) -> Tensor:
        """Return the rows (n, W) of a block."""
        values = self._values.get(id(block))
        return self.upload(self.design.read(block)) if values is None else values


class DevicePass:
    """The pass on a device: product, losses, product back."""

    def __init__(
        self,
        blocks: DeviceBlocks,
        weighting: RowWeighting,
        path_index: Index,
        weights: Array,
        heads_by_folds: HeadsByFolds,
    ) -> None:
        self.blocks, self.weighting, self.shape = blocks, weighting, weights.shape
        all_weights = blocks.upload(weights)
        self.heads = {folds: blocks.upload(heads) for folds, heads in heads_by_folds.items()}
        # The class axis first, as in decisions.
        self.weights = {
            folds: all_weights[heads].transpose(0, 1).reshape(-1, weights.shape[-1])
            for folds, heads in self.heads.items()
        }
        self.gradients = {folds: torch.zeros_like(weight) for folds, weight in self.weights.items()}
        # MPS has no float64.
        loss_dtype = torch.float32 if blocks.device.type == "mps" else torch.float64
        self.loss_sums = torch.zeros(len(weights), dtype=loss_dtype, device=blocks.device)
        self.label_rows = blocks.upload(weighting.labels[path_index])
        self.class_factors = (
            blocks.upload(weighting.class_factors[path_index]) if weighting.weighted else None
        )

    def add(self, block: RowBlock) -> None:
        """Add the losses of the heads that train on a block, and its gradients."""
        heads, weights = self.heads[block.folds], self.weights[block.folds]
        values, labels = self.blocks.values(block), self.blocks.labels[id(block)]
        n_free = self.shape[1]
        decisions = (weights @ values.T).reshape(n_free, -1, len(values))
        # As in `loss`: the loss and the residual of the true label come from the decision of the
        # wrong labels against it, so that they are sums of small numbers.
        if self.blocks.n_outputs == 1:
            label = labels[self.label_rows[heads]]
            wrong_logit = (1 - 2 * label) * decisions[0]
            loss = torch.nn.functional.softplus(wrong_logit)
            residual = ((1 - 2 * label) * torch.sigmoid(wrong_logit))[None]
        else:
            label = labels
            all_decisions = torch.cat([decisions, -decisions.sum(0, keepdim=True)])
            classes = labels.expand(1, all_decisions.shape[1], -1)
            wrong_decisions = all_decisions.scatter(0, classes, -torch.inf)
            true_decision = all_decisions.gather(0, classes)[0]
            wrong_logit = torch.logsumexp(wrong_decisions, 0) - true_decision
            loss = torch.nn.functional.softplus(wrong_logit)
            true_residual = -torch.sigmoid(wrong_logit)[None]
            residual = torch.softmax(all_decisions, 0).scatter(0, classes, true_residual)[:n_free]
        if (row_weight := self._row_weights(block, heads, label)) is not None:
            loss, residual = loss * row_weight, residual * row_weight
        self.gradients[block.folds] += residual.reshape(len(weights), -1) @ values
        self.loss_sums.index_add_(0, heads, loss.sum(1, dtype=self.loss_sums.dtype))

    def _row_weights(self, block: RowBlock, heads: Tensor, label: Tensor) -> Tensor | None:
        """Return weights (A', n) of a block's rows as `RowWeighting` does; None: all are one."""
        if self.class_factors is None:
            return None
        factors = self.class_factors[heads]
        if self.blocks.n_outputs > 1:
            weights = factors[:, label]
        else:
            weights = factors[:, :1] * (1 - label) + factors[:, 1:] * label
        sample_weight = self.blocks.sample_weights.get(id(block))
        return weights if sample_weight is None else weights * sample_weight

    def losses(self) -> Array:
        """Return the losses (A,) float64 summed over the blocks so far."""
        return np.asarray(self.loss_sums.cpu().numpy(), np.float64)

    def gradient(self) -> Array:
        """Return the gradients (A, c, W) summed over the blocks so far."""
        _, n_free, width = self.shape
        total = torch.zeros(
            self.shape, dtype=next(iter(self.gradients.values())).dtype, device=self.blocks.device
        )
        for folds, heads in self.heads.items():
            by_class = self.gradients[folds].reshape(n_free, len(heads), width)
            total.index_add_(0, heads, by_class.transpose(0, 1))
        return np.asarray(total.cpu().numpy())
