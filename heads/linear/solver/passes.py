"""One pass of logistic heads over the row blocks: losses and gradients.

A heads, C classes, n_outputs weight vectors of a head (C for a softmax, 1 for a sigmoid), c = C - 1
of them free (1 for a sigmoid), n rows of a block, W coordinates of a row as the blocks store them.

A pass holds the weights of its heads for all blocks and sums their losses and gradients:
`add(block)` does so for the heads that train on the block, `losses()` returns the sums (A,)
float64, `gradient()` those of the gradients (A, c, W). A block is a training block of the heads of
some folds only: `heads_by_folds` lists them (A',) by the block's folds. `NumpyPass`,
`CompiledPass` of `compiled_blocks` (faster, in float32) and `DevicePass` of `torch_blocks` compute
the same.
"""

from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array, Index
from headrace.heads.linear.solver.design import DesignMatrix, RowBlock
from headrace.heads.linear.solver.loss import sigmoid_loss, softmax_loss

HeadsByFolds = dict[tuple[int, ...], Index]


@dataclass(frozen=True)
class RowWeighting:
    """Weights of the rows for every regularization path, and the labels that each path learns."""

    n_outputs: int  # C, or 1 for sigmoids
    class_factors: Array  # (paths, C), or (paths, 2) for sigmoids
    # (paths,) row of `RowBlock.labels`; -1: a softmax over the classes
    labels: Index
    weighted: bool  # some class factor or sample weight is not one

    def row_weights(self, block: RowBlock, path_index: Index) -> Array | None:
        """Return weights (A, n) of a block's rows for the given paths, None where all are one."""
        if not self.weighted:
            return None
        class_factors = self.class_factors[path_index]
        if self.n_outputs > 1:
            weights = class_factors[:, block.classes]
        else:
            label = block.labels[self.labels[path_index]]
            weights = class_factors[:, :1] * (1 - label) + class_factors[:, 1:] * label
        return np.asarray(weights if block.sample_weight is None else weights * block.sample_weight)


class NumpyPass:
    """The pass in NumPy, in any float type: product, losses, product back."""

    def __init__(
        self,
        design: DesignMatrix,
        weighting: RowWeighting,
        path_index: Index,
        weights: Array,
        heads_by_folds: HeadsByFolds,
    ) -> None:
        self.design, self.weighting, self.path_index = design, weighting, path_index
        self.heads_by_folds = heads_by_folds
        self.shape, self.dtype = weights.shape, weights.dtype
        # The class axis first, as in the decisions of `loss`.
        self.weights = {
            folds: weights[heads].transpose(1, 0, 2).reshape(-1, weights.shape[-1])
            for folds, heads in heads_by_folds.items()
        }
        self.gradients = {folds: np.zeros_like(weight) for folds, weight in self.weights.items()}
        self.loss_sums = np.zeros(len(weights))

    def add(self, block: RowBlock) -> None:
        """Add the losses of the heads that train on a block, and its gradients."""
        n_outputs, n_rows, n_free = self.weighting.n_outputs, len(block.row_index), self.shape[1]
        weights = self.weights[block.folds]
        heads = self.heads_by_folds[block.folds]
        path_index = self.path_index[heads]
        values = self.design.read(block)
        row_weights = self.weighting.row_weights(block, path_index)
        decisions = np.empty((n_outputs, len(path_index), n_rows), weights.dtype)
        np.matmul(weights, values.T, out=decisions[:n_free].reshape(-1, n_rows))
        if n_outputs > 1:
            loss = softmax_loss(decisions, block.class_offsets, row_weights)
        else:
            labels = block.labels[self.weighting.labels[path_index]]
            loss = sigmoid_loss(decisions, labels, row_weights)
        self.gradients[block.folds] += decisions[:n_free].reshape(-1, n_rows) @ values
        self.loss_sums[heads] += loss

    def losses(self) -> Array:
        """Return the losses (A,) float64 summed over the blocks so far."""
        return self.loss_sums

    def gradient(self) -> Array:
        """Return the gradients (A, c, W) summed over the blocks so far."""
        _, n_free, width = self.shape
        total = np.zeros(self.shape, self.dtype)
        for folds, heads in self.heads_by_folds.items():
            by_class = self.gradients[folds].reshape(n_free, len(heads), width)
            total[heads] += by_class.transpose(1, 0, 2)
        return total
