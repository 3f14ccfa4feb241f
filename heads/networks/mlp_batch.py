"""K small networks of one shape trained side by side: the arithmetic of an MLP bank.

K heads, D features, H hidden width, C outputs, B rows of a minibatch, L layers.

Samples come last: activations are (K, H, B), weights (K, out, in). The first layer of all heads is
then one product of (K·H, D) by (D, B), the others are batched products, and every head's slice of
every array is contiguous.

Heads narrower than H are padded with units whose weights start at zero. Such a unit outputs relu(0)
= 0, so its outgoing gradient is 0, and its incoming one too because relu'(0) = 0: AdamW leaves it
at zero for ever, and no mask is needed.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.heads.arrays import Array, Doubles, Index
from headrace.heads.data.streamed import StreamedRows
from headrace.heads.data.task import TaskKind, seed_of_fold
from headrace.heads.networks.kind import NetworkSpec

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.AdamW's defaults
EVALUATION_ROWS = 2048  # rows of one block when no gradient is needed
# Rows of one product for the first layer's gradients: enough for the full rate (64 rows reach 0.8
# of it), few enough that a head's gradient is still in the cache when the optimizer reads it.
GRADIENT_ROWS = 512


class StreamedTensor:
    """Rows of a feature set (V·n, D, …), read when a minibatch needs them.

    Has the part of a tensor's interface that `Rows` uses.
    """

    def __init__(self, rows: StreamedRows, device: torch.device) -> None:
        self.rows, self.device, self.shape = rows, device, rows.shape

    def index_select(self, _: int, index: Tensor) -> Tensor:
        """Read rows (B, D, …) as float32 onto the device."""
        return torch.from_numpy(self.rows.read(index.cpu().numpy())).to(self.device)


@dataclass(frozen=True)
class Rows:
    """What the networks see of the data, on the device.

    Row r in view v is row v·n + r of `features`.
    """

    # (V·n, D), or maps (V·n, D, h, w); any floating dtype, not standardized
    features: "Tensor | StreamedTensor"
    n: int
    target: Tensor  # single: (n,) int64; multi and regression: (L, n) float32
    # (2, n) float32 sample weights, plain ones and, of a single-label task, class-balanced ones;
    # their mean over the training rows is 1
    weight: Tensor
    label_weight: Tensor | None  # multi: (2, L) balanced weights of absent and of present labels
    mean: Tensor  # (D,) float32, for maps (D, 1, 1), of the training rows
    inverse_scale: Tensor  # likewise
    task: TaskKind
    outputs: int  # C
    # (M,) int64 columns of numbers that may be missing, each followed by the column that is 1 where
    # its number is; and (M,) float32, the numbers that are filled in
    imputed: "tuple[Tensor, Tensor] | None" = None

    def minibatch(self, index: Tensor) -> Tensor:
        """Return standardized rows (B, D, …) float32 of `features`."""
        rows = self.features.index_select(0, index).float()
        if self.imputed is not None:
            numbers, fills = self.imputed
            rows[:, numbers] += rows[:, numbers + 1] * fills
        return rows.sub_(self.mean).mul_(self.inverse_scale)


def padded_width(width: int) -> int:
    """Return the next of 8, 12, 16, 24, 32, 48, 64, …: from 6 on, at most a third is padding."""
    power = 8
    while power < width:
        if power * 3 // 2 >= width:
            return power * 3 // 2
        power *= 2
    return power


def initial_layers(spec: NetworkSpec, n_inputs: int, n_outputs: int) -> list[tuple[Array, Array]]:
    """Return first layers for the head's true widths, from a generator of the seed alone."""
    generator = np.random.default_rng([spec.seed, 0])
    return draw_layers(generator, (n_inputs, *spec.hidden, n_outputs))


def draw_layers(generator: np.random.Generator, sizes: Sequence[int]) -> list[tuple[Array, Array]]:
    """Draw layers [(weight (out, in), bias (out,))] float32 between layers of the given sizes.

    As torch.nn.Linear does: uniform within ±1/sqrt(in).
    """
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        bound = np.float32(1 / math.sqrt(fan_in))
        weight = (generator.random((fan_out, fan_in), np.float32) * 2 - 1) * bound
        bias = (generator.random(fan_out, np.float32) * 2 - 1) * bound
        layers.append((weight, bias))
    return layers


class DropoutBits:
    """Random bytes, one stream per seed: heads of one seed see the same noise in any batch.

    A unit is dropped where its byte is below round(256 · dropout); the kept ones are divided by the
    share that this keeps.
    """

    def __init__(self, seeds: Sequence[int], fold: int, device: torch.device) -> None:
        self.device = device
        self.seed_of_head = list(seeds)
        entropy = {seed: [seed, 1, seed_of_fold(fold) + 1] for seed in sorted(set(seeds))}
        if device.type == "cpu":  # NumPy's SFC64 is four times faster than torch's generator there
            self.numpy = {
                seed: np.random.Generator(np.random.SFC64(np.random.SeedSequence(numbers)))
                for seed, numbers in entropy.items()
            }
        else:
            self.torch = {
                seed: torch.Generator(device).manual_seed(
                    int(np.random.SeedSequence(numbers).generate_state(1)[0])
                )
                for seed, numbers in entropy.items()
            }

    def draw(self, units: int, batch: int) -> Tensor:
        """Return random bytes (K, units, batch) uint8."""
        drawn = {}
        for seed in sorted(set(self.seed_of_head)):
            if self.device.type == "cpu":
                raw = bytearray(self.numpy[seed].bytes(units * batch))
                drawn[seed] = torch.frombuffer(raw, dtype=torch.uint8).view(units, batch)
            else:
                drawn[seed] = torch.empty((units, batch), dtype=torch.uint8, device=self.device)
                drawn[seed].random_(0, 256, generator=self.torch[seed])
        return torch.stack([drawn[seed] for seed in self.seed_of_head])


class NetworkBatch:
    """K networks of equal depth and padded width; heads leave when they are done."""

    def __init__(
        self,
        specs: Sequence[NetworkSpec],
        rows: Rows,
        *,
        fold: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.device, self.dtype = rows, device, dtype
        self.specs = list(specs)
        self.padded = tuple(padded_width(width) for width in specs[0].hidden)
        self.step = 0
        inputs = int(rows.features.shape[1])
        sizes = [inputs, *self.padded, rows.outputs]
        self.weights = [torch.zeros(len(specs), o, i) for i, o in itertools.pairwise(sizes)]
        self.biases = [torch.zeros(len(specs), o) for o in sizes[1:]]
        for head, spec in enumerate(specs):
            for layer, (weight, bias) in enumerate(initial_layers(spec, inputs, rows.outputs)):
                self.weights[layer][head, : weight.shape[0], : weight.shape[1]] = torch.from_numpy(
                    weight
                )
                self.biases[layer][head, : len(bias)] = torch.from_numpy(bias)
        # The first layer's weights are stored divided by their head's learning rate: an AdamW step
        # is then the same for every rate, and one fused call makes it for many heads.
        # `weights_to_multiply` are the weights themselves.
        self.weights[0] /= torch.tensor([spec.learning_rate for spec in specs]).view(-1, 1, 1)
        self.weights = [w.to(device) for w in self.weights]
        self.biases = [b.to(device) for b in self.biases]
        self.first_moments = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]
        self.second_moments = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]
        self.best = [p.clone() for p in (*self.weights, *self.biases)]
        self.bits = DropoutBits([spec.seed for spec in specs], fold, device)
        self._read_specs()

    def _read_specs(self) -> None:
        """Make tensors of the settings of the heads that are in the batch now."""
        self.drops, self.drop_below, self.drop_scale = dropout_columns(self.specs, self.device)
        self.rates, self.shrink, self.smoothing, self.balanced = head_columns(
            self.specs, self.device
        )
        self.weights_to_multiply = (self.weights[0] * self.rates).to(self.dtype)
        n_units = self.weights[0].shape[1]
        rows = GRADIENT_ROWS if self.device.type == "cpu" else len(self) * n_units
        self.heads_at_once = max(1, rows // max(1, n_units))

    def __len__(self) -> int:
        return len(self.specs)

    def keep(self, heads: Sequence[int]) -> None:
        """Drop every head that is not listed, and its share of all further work."""
        index = torch.tensor(list(heads), dtype=torch.int64, device=self.device)
        moments = self.first_moments, self.second_moments
        for tensors in (self.weights, self.biases, *moments, self.best):
            tensors[:] = [tensor.index_select(0, index) for tensor in tensors]
        self.specs = [self.specs[head] for head in heads]
        self.bits.seed_of_head = [self.bits.seed_of_head[head] for head in heads]
        self._read_specs()

    def save_best(self, heads: Sequence[int]) -> None:
        """Make the present parameters of these heads their best ones."""
        for head in heads:
            for best, now in zip(self.best, (*self.weights, *self.biases), strict=True):
                best[head].copy_(now[head])

    def best_layers(self, head: int) -> list[tuple[Array, Array]]:
        """Return the best layers [(weight, bias)] float32, for standardized inputs."""
        inputs = int(self.weights[0].shape[2])
        hidden = self.specs[head].hidden
        layers = []
        for layer, (i, o) in enumerate(itertools.pairwise((inputs, *hidden, self.rows.outputs))):
            weight = self.best[layer][head, :o, :i].cpu().numpy().copy()
            if layer == 0:
                weight *= np.float32(self.specs[head].learning_rate)
            bias = self.best[len(self.weights) + layer][head, :o].cpu().numpy().copy()
            layers.append((weight, bias))
        return layers

    def train_epoch(self, order: Index, view: Index, batch_size: int) -> Array:
        """Train on rows `order` (n,) once, each in the given view (n,); return mean losses (K,).

        Losses are taken before each step; that of a head that diverged is not finite.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        with torch.no_grad(), np.errstate(all="ignore"):
            # Copied to a device once an epoch: a copy at every minibatch would make it wait.
            indices = torch.from_numpy(order).to(self.device)
            feature_indices = indices + torch.from_numpy(view).to(self.device) * self.rows.n
            for start in range(0, len(order), batch_size):
                batch = slice(start, start + batch_size)
                total += self._step(indices[batch], feature_indices[batch])
        return (total / len(order)).cpu().numpy()

    def outputs(self, index: Index) -> Tensor:
        """Return decisions (K, C, n) for rows of `features`, without dropout."""
        blocks = []
        with torch.no_grad(), np.errstate(all="ignore"):
            for start in range(0, len(index), EVALUATION_ROWS):
                row_block = torch.from_numpy(index[start : start + EVALUATION_ROWS]).to(self.device)
                batch = self.rows.minibatch(row_block).to(self.dtype)
                blocks.append(self._forward(batch.t().contiguous(), train=False)[-1])
        return torch.cat(blocks, dim=2)

    def _forward(self, columns: Tensor, *, train: bool) -> list[Tensor]:
        """Return each layer's activations, after dropout, and the decisions (K, C, B) last."""
        heads, last_layer = len(self), len(self.weights) - 1
        values: list[Tensor] = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer == 0:
                wide = product(self.weights_to_multiply.flatten(0, 1), columns)
                # In float32, whatever the product's dtype.
                value = wide.view(heads, -1, columns.shape[1]).float().add_(bias.unsqueeze(2))
            else:
                value = torch.baddbmm(bias.unsqueeze(2), weight, values[-1])
            if layer < last_layer:
                value.relu_()
                if train and self.drops:
                    is_kept = self.bits.draw(value.shape[1], value.shape[2]) >= self.drop_below
                    value.mul_(is_kept).mul_(self.drop_scale)
            values.append(value)
        return values

    def _step(self, index: Tensor, feature_index: Tensor) -> Tensor:
        """Make one AdamW step of every head; return this minibatch's summed losses (K,) float64."""
        batch = self.rows.minibatch(feature_index).to(self.dtype)
        values = self._forward(batch.t().contiguous(), train=True)
        weight = self.rows.weight.index_select(1, index).index_select(0, self.balanced)
        loss, grad_output = loss_and_gradient(
            self.rows, values[-1], index, weight, self.smoothing, self.balanced
        )
        grad_output.div_(len(index))
        self.step += 1
        gradients: list[tuple[int, Tensor]] = []
        for layer in range(len(self.weights) - 1, 0, -1):
            below = values[layer - 1]
            gradients.append((layer, torch.bmm(grad_output, below.transpose(1, 2))))
            gradients.append((len(self.weights) + layer, grad_output.sum(2)))
            grad_output = torch.ops.aten.threshold_backward(
                torch.bmm(self.weights[layer].transpose(1, 2), grad_output), below, 0.0
            )
            if self.drops:
                grad_output.mul_(self.drop_scale)
        gradients.append((len(self.weights), grad_output.sum(2)))
        self._update(gradients, grad_output.to(self.dtype), batch)
        return loss.sum(1)

    def _update(
        self, gradients: list[tuple[int, Tensor]], grad_output: Tensor, batch: Tensor
    ) -> None:
        """Update parameters by their gradients, the first weights by that of their outputs."""
        parameters = (*self.weights, *self.biases)
        for i, gradient in gradients:
            moments = self.first_moments[i], self.second_moments[i]
            adamw_broadcast(parameters[i], gradient, *moments, self.rates, self.shrink, self.step)
        # A few heads at a time: their gradient is used while it is in the cache. One fused pass
        # reads it, the parameters and the moments; broadcast operations would make six passes
        # through memory.
        step_count = torch.full((), float(self.step), device=self.device)
        for start in range(0, len(self), self.heads_at_once):
            heads = slice(start, start + self.heads_at_once)
            weight = self.weights[0][heads]
            gradient = product(grad_output[heads].flatten(0, 1), batch).float().view_as(weight)
            weight.mul_(self.shrink[heads])
            moments = self.first_moments[0][heads], self.second_moments[0][heads]
            fused_adamw(weight, gradient, *moments, step_count)
            torch.mul(weight, self.rates[heads], out=self.weights_to_multiply[heads])


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, in float32 on a CPU by NumPy's OpenBLAS.

    Measured on AMD Zen 4: 95-104 GF/s a core, where torch's MKL reached 66-95.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32:
        out = torch.empty(a.shape[0], b.shape[1])
        np.matmul(a.numpy(), b.numpy(), out=out.numpy())
        return out
    return torch.mm(a, b)


def head_columns(
    specs: Sequence[NetworkSpec], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what heads that share minibatches differ in.

    Learning rates, the share of a weight that a step of weight decay leaves, and label smoothing,
    (K, 1, 1) each; and (K,) 1 where classes are balanced.
    """
    return (
        column([spec.learning_rate for spec in specs], device),
        column([1 - spec.learning_rate * spec.weight_decay for spec in specs], device),
        column([spec.label_smoothing for spec in specs], device),
        torch.tensor([int(spec.class_weight == "balanced") for spec in specs], device=device),
    )


def dropout_columns(
    specs: Sequence[NetworkSpec], device: torch.device
) -> tuple[bool, Tensor, Tensor]:
    """Return whether any head leaves values out, below which bytes, and the factors of the others.

    Bytes and factors are (K, 1, 1).
    """
    levels = [min(255, round(256 * spec.dropout)) for spec in specs]
    scale = column([256 / (256 - level) for level in levels], device)
    return any(levels), column(levels, device).to(torch.uint8), scale


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """Return a value of each head as (K, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def fused_adamw(
    parameter: Tensor, gradient: Tensor, first_moment: Tensor, second_moment: Tensor, step: Tensor
) -> None:
    """Make one AdamW step in place, at a learning rate of 1 and without weight decay.

    For parameters in units of their head's learning rate.
    """
    torch._fused_adamw_(
        [parameter],
        [gradient],
        [first_moment],
        [second_moment],
        [],
        [step],
        lr=1.0,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def adamw_broadcast(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    rates: Tensor,
    shrink: Tensor,
    step: int,
) -> None:
    """Make one AdamW step in place on a parameter (K, …) of every head.

    rates: (K, 1, 1) learning rates. shrink: (K, 1, 1) factors 1 - rate · decay of the weights.
    """
    shape = (-1,) + (1,) * (parameter.dim() - 1)
    parameter.mul_(shrink.view(shape))
    first_moment.lerp_(gradient, 1 - BETA1)
    second_moment.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    denominator = second_moment.sqrt().div_(math.sqrt(1 - BETA2**step)).add_(EPSILON)
    parameter.addcdiv_(first_moment * rates.view(shape), denominator, value=-1 / (1 - BETA1**step))


def mean_losses(rows: Rows, decision: Tensor, index: Index) -> Doubles:
    """Return mean losses (K,) of decisions (K, C, n), without smoothing or class weights."""
    places = torch.from_numpy(index).to(decision.device)
    weight = rows.weight[:1].index_select(1, places)
    loss, _ = loss_and_gradient(rows, decision, places, weight, None, None)
    return np.asarray((loss.sum(1) / weight.sum()).cpu().numpy())


def loss_and_gradient(
    rows: Rows,
    decision: Tensor,
    index: Tensor,
    weight: Tensor,
    smoothing: Tensor | None,
    balanced: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return weighted losses (K, B) float64 and their derivatives (K, C, B) by the decisions.

    single: cross-entropy; multi: mean binary cross-entropy over labels; regression: half the mean
    squared error. weight: (K or 1, B).
    """
    n_outputs = decision.shape[1]
    if rows.task == "single":
        log_p = torch.log_softmax(decision, 1)
        target_index = rows.target.index_select(0, index).expand(len(decision), 1, -1)
        loss = -log_p.gather(1, target_index).squeeze(1)
        # The derivative of cross-entropy is p less the target distribution.
        grad_output = log_p.exp()
        if smoothing is None:
            grad_output.scatter_add_(1, target_index, torch.full_like(loss, -1).unsqueeze(1))
        else:
            head_smoothing = smoothing.view(-1, 1)
            # The target distribution is 1 - smoothing at the class, and smoothing / C everywhere.
            loss = (1 - head_smoothing) * loss - head_smoothing * log_p.mean(1)
            grad_output.scatter_add_(
                1, target_index, (smoothing - 1).expand(-1, 1, len(index)).contiguous()
            ).sub_(smoothing / n_outputs)
    else:
        target = rows.target.index_select(1, index)
        scale = 1 / n_outputs
        if rows.task == "multi":
            per_label = torch.ones_like(target).unsqueeze(0)
            if rows.label_weight is not None and balanced is not None:
                absent, present = rows.label_weight.unsqueeze(2)
                of_balanced = absent * (1 - target) + present * target
                per_label = torch.stack([per_label[0], of_balanced]).index_select(0, balanced)
            smoothed = target if smoothing is None else target * (1 - smoothing) + smoothing / 2
            # Cross-entropy of the decision z and the target t is softplus(z) - t z.
            per_output = torch.nn.functional.softplus(decision).sub_(smoothed * decision)
            loss = per_output.mul_(per_label).sum(1) * scale
            grad_output = (torch.sigmoid(decision) - smoothed).mul_(per_label).mul_(scale)
        else:
            grad_output = decision - target
            loss = grad_output.square().sum(1) * (0.5 * scale)
            grad_output = grad_output * scale
    # Losses are summed over an epoch's minibatches, which float32 would round.
    return (loss * weight).double(), grad_output.mul_(weight.unsqueeze(1))
