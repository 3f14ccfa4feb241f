"""K small convolutional networks of one shape trained side by side.

K heads, D channels of the tap, h × w positions, E channels of a new layer, C outputs, B rows of a
minibatch.

The layers of all heads are one convolution with K·E output channels. After the mean over positions
the heads are networks as in `mlp_batch.py`: samples last, batched products.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.heads.arrays import Array, Arrays, Index
from headrace.heads.networks.kind import ConvSpec
from headrace.heads.networks.mlp_batch import (
    DropoutBits,
    Rows,
    adamw_broadcast,
    draw_layers,
    dropout_columns,
    head_columns,
    loss_and_gradient,
)

MOMENTUM, EPSILON = 0.1, 1e-5  # of batch normalization, torch's defaults
EVALUATION_ROWS = 512  # rows of one block when no gradient is needed


def random_start(
    spec: ConvSpec, n_inputs: int, n_outputs: int
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """Return first kernels [(E, channels below, 3, 3)] and layers [(weight, bias)] of a head.

    Kernels are from He's normal distribution, for ReLU; layers as torch.nn.Linear draws them.
    """
    generator = np.random.default_rng([spec.seed, 2])
    kernels = [
        (generator.standard_normal((o, i, 3, 3), np.float32) * np.float32(math.sqrt(2 / (9 * i))))
        for i, o in itertools.pairwise((n_inputs, *spec.channels))
    ]
    return kernels, draw_layers(generator, (spec.channels[-1], *spec.hidden, n_outputs))


class ConvBatch:
    """The state of K convolutional networks; heads leave it when they are done."""

    def __init__(
        self, specs: Sequence[ConvSpec], rows: Rows, *, fold: int, device: torch.device
    ) -> None:
        self.specs, self.rows, self.device = list(specs), rows, device
        self.step = 0
        self.depth, self.layers = len(specs[0].channels), len(specs[0].hidden) + 1
        n_inputs = int(rows.features.shape[1])
        kernels, layers = zip(
            *(random_start(spec, n_inputs, rows.outputs) for spec in specs), strict=True
        )

        def stack(arrays: Sequence[Array]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device)

        ones, zeros = (
            [make(len(specs), width, device=device) for width in specs[0].channels]
            for make in (torch.ones, torch.zeros)
        )
        # In this order: kernels, gains, shifts (per convolution), weights, biases (per layer); each
        # (K, …).
        self.parameters = [stack(of_heads) for of_heads in zip(*kernels, strict=True)]
        self.parameters += [*ones, *zeros]
        self.parameters += [
            stack([layer[part] for layer in of_heads])
            for part in (0, 1)
            for of_heads in zip(*layers, strict=True)
        ]
        self.first_moments = [torch.zeros_like(p) for p in self.parameters]
        self.second_moments = [torch.zeros_like(p) for p in self.parameters]
        # Running means, then running variances. Copies: gains and shifts are changed in place.
        self.running = [tensor.clone() for tensor in (*zeros, *ones)]
        self.best = [tensor.clone() for tensor in (*self.parameters, *self.running)]
        self.bits = DropoutBits([spec.seed for spec in specs], fold, device)
        self._read_specs()

    def _read_specs(self) -> None:
        self.drops, self.drop_below, self.drop_scale = dropout_columns(self.specs, self.device)
        self.rates, self.shrink, self.smoothing, self.balanced = head_columns(
            self.specs, self.device
        )

    def __len__(self) -> int:
        return len(self.specs)

    def keep(self, heads: Sequence[int]) -> None:
        """Drop every head that is not listed."""
        index = torch.tensor(list(heads), dtype=torch.int64, device=self.device)
        moments = self.first_moments, self.second_moments
        for tensors in (self.parameters, *moments, self.running, self.best):
            tensors[:] = [tensor.index_select(0, index) for tensor in tensors]
        self.specs = [self.specs[head] for head in heads]
        self.bits.seed_of_head = [self.bits.seed_of_head[head] for head in heads]
        self._read_specs()

    def save_best(self, heads: Sequence[int]) -> None:
        """Make the present parameters and running statistics of these heads their best ones."""
        for head in heads:
            for best, now in zip(self.best, (*self.parameters, *self.running), strict=True):
                best[head].copy_(now[head])

    def best_layers(self, head: int) -> Arrays:
        """Return the best kernel0 (E, D, 3, 3), shift0 (E,), …, weight0, bias0, …, float32.

        They are for standardized inputs, with batch normalization folded into kernels and shifts.
        """
        best_arrays = [tensor[head].double().cpu().numpy() for tensor in self.best]
        d, n = self.depth, self.layers
        kernels, gains, shifts = best_arrays[:d], best_arrays[d : 2 * d], best_arrays[2 * d : 3 * d]
        weights, biases = best_arrays[3 * d : 3 * d + n], best_arrays[3 * d + n : 3 * d + 2 * n]
        means, variances = best_arrays[-2 * d : -d], best_arrays[-d:]
        arrays = {}
        for layer in range(d):
            gain = gains[layer] / np.sqrt(variances[layer] + EPSILON)
            arrays[f"kernel{layer}"] = kernels[layer] * gain[:, None, None, None]
            arrays[f"shift{layer}"] = shifts[layer] - gain * means[layer]
        for layer in range(n):
            arrays[f"weight{layer}"], arrays[f"bias{layer}"] = weights[layer], biases[layer]
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def train_epoch(self, order: Index, view: Index, batch_size: int) -> Array:
        """Train on rows `order` once, each in the given view; return mean losses (K,) float64."""
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        positions = math.prod(self.rows.features.shape[2:])
        # Copied to a device once an epoch: a copy at every minibatch would make the device wait.
        indices = torch.from_numpy(order).to(self.device)
        feature_indices = indices + torch.from_numpy(view).to(self.device) * self.rows.n
        for start in range(0, len(order), batch_size):
            batch = slice(start, start + batch_size)
            if len(indices[batch]) * positions == 1 and start:
                continue  # one value has no variance to normalize by
            total += self._step(indices[batch], feature_indices[batch])
        return (total / len(order)).cpu().numpy()

    def outputs(self, index: Index) -> Tensor:
        """Return decisions (K, C, n) of feature rows, by running statistics, without dropout."""
        row_blocks = torch.split(torch.from_numpy(index).to(self.device), EVALUATION_ROWS)
        with torch.no_grad():
            blocks = [
                self._forward(self.rows.minibatch(rows), self.parameters, train=False)
                for rows in row_blocks
            ]
        return torch.cat(blocks, dim=2)

    def _forward(self, maps: Tensor, parameters: Sequence[Tensor], *, train: bool) -> Tensor:
        """Return decisions (K, C, B) for standardized maps (B, D, h, w)."""
        heads, d, n = len(self), self.depth, self.layers
        for layer in range(d):
            # The first layers of all heads see the same maps, later ones those of their own head.
            # Batch normalization treats channels apart, and so it treats heads apart too.
            kernel = parameters[layer]
            maps = F.conv2d(
                maps, kernel.flatten(0, 1), padding=1, groups=1 if layer == 0 else heads
            )
            gain, shift = parameters[d + layer].view(-1), parameters[2 * d + layer].view(-1)
            mean, variance = self.running[layer].view(-1), self.running[d + layer].view(-1)
            maps = F.relu(F.batch_norm(maps, mean, variance, gain, shift, train, MOMENTUM, EPSILON))
        value = maps.mean((2, 3)).view(len(maps), heads, -1).permute(1, 2, 0)
        for layer in range(n):
            if train and self.drops:
                is_kept = self.bits.draw(value.shape[1], value.shape[2]) >= self.drop_below
                value = value * is_kept * self.drop_scale
            weight, bias = parameters[3 * d + layer], parameters[3 * d + n + layer]
            value = torch.baddbmm(bias.unsqueeze(2), weight, value)
            if layer < n - 1:
                value = F.relu(value)
        return value

    def _step(self, index: Tensor, feature_index: Tensor) -> Tensor:
        """Make one AdamW step of every head; return this minibatch's summed losses (K,) float64."""
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        decision = self._forward(self.rows.minibatch(feature_index), leaves, train=True)
        weight = self.rows.weight.index_select(1, index).index_select(0, self.balanced)
        with torch.no_grad():
            loss, grad_output = loss_and_gradient(
                self.rows, decision, index, weight, self.smoothing, self.balanced
            )
            gradients = torch.autograd.grad(decision, leaves, grad_output / len(index))
            self.step += 1
            moments = self.first_moments, self.second_moments
            for tensors in zip(self.parameters, gradients, *moments, strict=True):
                adamw_broadcast(*tensors, self.rates, self.shrink, self.step)
        return loss.sum(1)
