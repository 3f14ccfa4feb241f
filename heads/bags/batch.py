"""K heads on bags trained side by side: the arithmetic of a bank.

K heads, D features, H hidden values, A attention width, C outputs, B units of a minibatch, R rows
in them. Rows come last: hidden values are (K, H, R), weights (K, out, in). The first layer of all
heads is one product of (K·H, D) by (D, R), the others are batched products. The rows of a unit are
next to each other, and nothing is padded: a unit costs what its rows cost, be it one or 20,000.
Rows, hidden values and their gradients are float32 or bfloat16, parameters and decisions float32.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.heads.arrays import Array, Floats, Index
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.networks.mlp_batch import (
    DropoutBits,
    Rows,
    column,
    fused_adamw,
    head_columns,
    loss_and_gradient,
    product,
)

# Whole units of so many rows are evaluated together, one unit at least, and no more units than
# this: the products of rows' weights and hidden values grow with rows times units.
EVALUATION_ROWS, EVALUATION_UNITS = 4096, 64
# On a CPU, so many heads make a step together that their hidden values of a minibatch take this
# much, one at least. Measured with 32 heads in bfloat16, units of 40 and of 225 rows: with 2 MB,
# which stays in a core's own cache, steps take 1.2 and 1.7 times as long, because there are more
# calls; with 32 MB 1.06 times.
CACHED_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class BagRows(Rows):
    """What the heads see of the data: targets and weights are those of `n` units."""

    instances: Index  # (N,) rows of `features`, unit after unit
    offsets: Index  # (n + 1,) where units begin in it, and its length

    def bags(self, units: Index) -> tuple[Tensor, "Membership"]:
        """Return standardized rows (R, D) float32 of some units, and the unit of each row."""
        bounds = zip(self.offsets[units], self.offsets[units + 1], strict=True)
        rows = np.concatenate([self.instances[start:stop] for start, stop in bounds])
        device = self.features.device
        sizes = torch.from_numpy(self.offsets[units + 1] - self.offsets[units]).to(device)
        unit_of_row = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        others = unit_of_row != torch.arange(len(sizes), device=device).unsqueeze(1)
        rows_of_units = self.minibatch(torch.from_numpy(rows).to(device))
        logits = torch.zeros(others.shape, device=device).masked_fill_(others, -torch.inf)
        return rows_of_units, Membership(sizes, logits)


class Membership(NamedTuple):
    """The unit of each of the R rows of a minibatch of B units; they come unit after unit."""

    sizes: Tensor  # (B,) int64
    logits: Tensor  # (B, R) float32, 0 for rows of the unit and -inf for those of others


def initial_parameters(spec: BagsSpec, n_features: int, n_outputs: int) -> dict[str, Floats]:
    """Return a head's first parameters by name, from a generator of the seed alone.

    As torch.nn.Linear does: uniform within ±1/sqrt(in).
    """
    generator = np.random.default_rng([spec.seed, 0])
    parameters: dict[str, Floats] = {}

    def draw(weight_name: str, bias_name: str | None, fan_in: int, fan_out: int) -> None:
        bound = np.float32(1 / math.sqrt(fan_in))
        parameters[weight_name] = (generator.random((fan_out, fan_in), np.float32) * 2 - 1) * bound
        if bias_name is not None:
            parameters[bias_name] = (generator.random(fan_out, np.float32) * 2 - 1) * bound

    widths = (n_features, *spec.hidden)
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        draw(f"weight{layer}", f"bias{layer}", fan_in, fan_out)
    if spec.pooling == "attention":
        draw("tanh_weight", "tanh_bias", widths[-1], spec.attention_width)
        draw("sigmoid_weight", "sigmoid_bias", widths[-1], spec.attention_width)
        # Without a bias, which would move all logits of a unit alike.
        draw("attention", None, spec.attention_width, 1)
    draw(f"weight{len(spec.hidden)}", f"bias{len(spec.hidden)}", widths[-1], n_outputs)
    return parameters


class BagBatch:
    """The state of K heads of equal widths and pooling; heads leave it when they are done."""

    def __init__(
        self,
        specs: Sequence[BagsSpec],
        rows: BagRows,
        *,
        fold: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.specs, self.rows, self.device, self.dtype = list(specs), rows, device, dtype
        self.step = 0
        starts = [
            {
                name: value / np.float32(spec.learning_rate)
                for name, value in initial_parameters(
                    spec, int(rows.features.shape[1]), rows.outputs
                ).items()
            }
            for spec in specs
        ]
        # Parameters divided by their head's learning rate: an AdamW step is then the same for every
        # rate, and one fused call makes it for all heads.
        self.parameters_over_rate = {
            name: torch.from_numpy(np.stack([start[name] for start in starts])).to(device)
            for name in starts[0]
        }
        self.first_moments, self.second_moments = (
            {name: torch.zeros_like(value) for name, value in self.parameters_over_rate.items()}
            for _ in range(2)
        )
        self.bits = DropoutBits([spec.seed for spec in specs], fold, device)
        self._read_specs()
        self.best = {name: value.clone() for name, value in self.parameters.items()}

    def _read_specs(self) -> None:
        # Heads of equal seed and dropout leave the same values out: their mask is made once.
        levels = [min(255, round(256 * spec.dropout)) for spec in self.specs]
        keys = [(spec.seed, level) for spec, level in zip(self.specs, levels, strict=True)]
        masks = sorted({key for key in keys if key[1]})
        self.bits.seed_of_head = [seed for seed, _ in masks]
        self.mask_index = [masks.index(key) if key[1] else None for key in keys]
        self.drop_below = column([level for _, level in masks], self.device).to(torch.uint8)
        self.kept_scale = column([256 / (256 - level) for level in levels], self.device)
        self.rates, self.shrink, self.smoothing, self.balanced = head_columns(
            self.specs, self.device
        )
        self._multiply_rates()

    def _multiply_rates(self) -> None:
        self.parameters = {
            name: value * self.rates.view((-1,) + (1,) * (value.dim() - 1))
            for name, value in self.parameters_over_rate.items()
        }

    def __len__(self) -> int:
        return len(self.specs)

    def keep(self, heads: Sequence[int]) -> None:
        """Drop every head that is not listed, and its share of all further work."""
        index = torch.tensor(list(heads), dtype=torch.int64, device=self.device)
        moments = self.first_moments, self.second_moments
        for tensors in (self.parameters_over_rate, *moments, self.best):
            tensors.update({name: value.index_select(0, index) for name, value in tensors.items()})
        self.specs = [self.specs[head] for head in heads]
        self._read_specs()

    def save_best(self, heads: Sequence[int]) -> None:
        """Make the present parameters of these heads their best ones."""
        for name, value in self.parameters.items():
            for head in heads:
                self.best[name][head].copy_(value[head])

    def best_layers(self, head: int) -> dict[str, Floats]:
        """Return the best parameters of a head by name, in standardized coordinates."""
        return {name: value[head].cpu().numpy().copy() for name, value in self.best.items()}

    def train_epoch(self, order: Index, view: Index, batch_size: int) -> Array:
        """Train on the units `order` (n,) once; return mean losses (K,) float64.

        Losses are taken before each step; that of a head that diverged is not finite. `view` is
        that of `Batch`, and not read: bags have one view.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for start in range(0, len(order), batch_size):
            total += self._step(order[start : start + batch_size])
        return np.asarray((total / len(order)).cpu().numpy())

    def outputs(self, index: Index) -> Tensor:
        """Return (K, C, n) decisions of units, without dropout."""
        sizes = self.rows.offsets[index + 1] - self.rows.offsets[index]
        # Units whose rows begin in the same stretch of rows are evaluated together.
        stretch = (np.cumsum(sizes) - sizes) // EVALUATION_ROWS
        is_next = np.diff(stretch) + np.diff(np.arange(len(index)) // EVALUATION_UNITS)
        unit_groups = np.split(index, np.flatnonzero(is_next) + 1)
        with torch.no_grad():
            return torch.cat([self._evaluate(units) for units in unit_groups], dim=2)

    def _evaluate(self, units: Index) -> Tensor:
        batch, members = self.rows.bags(units)
        batch = batch.to(self.dtype)
        groups = self._groups(len(batch))
        return torch.cat(
            [
                self._forward(batch, members, self._parameters_of(heads), heads, [])
                for heads in groups
            ]
        )

    def _parameters_of(self, heads: slice) -> dict[str, Tensor]:
        return {name: value[heads] for name, value in self.parameters.items()}

    def _groups(self, n_rows: int) -> Iterator[slice]:
        """Yield the heads that go through a step of so many rows together."""
        spec = self.specs[0]
        values = sum(spec.hidden) + 3 * spec.attention_width * (spec.pooling == "attention")
        size = len(self)
        if self.device.type == "cpu":
            n_bytes = self.dtype.itemsize * values * n_rows
            size = max(1, min(size, CACHED_BYTES // max(1, n_bytes)))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def _forward(
        self,
        batch: Tensor,
        members: Membership,
        parameters: dict[str, Tensor],
        heads: slice,
        masks: list[Tensor],
    ) -> Tensor:
        """Return decisions (k, C, B) of some heads for units whose rows are `batch` (R, D).

        masks: of each hidden layer the different ones, (M, H, R): 0 for values that are left out,
        else 1.
        """
        n_hidden = len(self.specs[0].hidden)
        hidden = batch.t()  # (D, R): the same for all heads
        # Dropout's factor on the values that it keeps is applied to the weights that read them,
        # which are fewer.
        scale = self.kept_scale[heads] if masks else 1.0
        for layer in range(n_hidden):
            weight, layer_masks = parameters[f"weight{layer}"], []
            if masks:
                indices = self.mask_index[heads]
                layer_masks = [None if i is None else masks[layer][i] for i in indices]
            if layer:
                weight = weight * scale
            hidden = _HiddenLayer.apply(weight, parameters[f"bias{layer}"], hidden, layer_masks)
        pooled = self._pool(hidden, members, parameters, scale) * scale
        weight, bias = parameters[f"weight{n_hidden}"], parameters[f"bias{n_hidden}"]
        return torch.bmm(weight, pooled.expand(len(weight), -1, -1)) + bias.unsqueeze(2)

    def _pool(
        self,
        hidden: Tensor,
        members: Membership,
        parameters: dict[str, Tensor],
        scale: Tensor | float,
    ) -> Tensor:
        """Pool hidden values (K, H, R), or features (H, R) of all heads, to (K or 1, H, B).

        scale: (K, 1, 1), the factor with which attention reads hidden values.
        """
        by_head = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        if self.specs[0].pooling == "max":
            bags = torch.split_with_sizes(by_head, members.sizes.tolist(), 2)
            return torch.stack([bag.amax(2) for bag in bags], dim=2).float()
        logits = members.logits.to(self.dtype)
        if self.specs[0].pooling == "mean":
            weights = torch.softmax(logits, 1).t().unsqueeze(0)
            return torch.bmm(by_head, weights.expand(len(by_head), -1, -1)).float()
        # Autograd's types know nothing of what a Function returns.
        pooled: Tensor = _AttentionPool.apply(
            parameters["tanh_weight"] * scale,
            parameters["tanh_bias"],
            parameters["sigmoid_weight"] * scale,
            parameters["sigmoid_bias"],
            parameters["attention"],
            by_head,
            logits,
        )
        return pooled

    def _step(self, units: Index) -> Tensor:
        """Make one AdamW step of every head; return this minibatch's summed losses (K,) float64."""
        index = torch.from_numpy(units).to(self.device)
        batch, members = self.rows.bags(units)
        batch = batch.to(self.dtype)
        masks = [
            (self.bits.draw(width, len(batch)) >= self.drop_below).to(self.dtype)
            for width in self.specs[0].hidden
            if self.bits.seed_of_head
        ]
        weight = self.rows.weight.index_select(1, index).index_select(0, self.balanced)
        losses, gradients = [], []
        for heads in self._groups(len(batch)):
            leaves = [
                value.detach().requires_grad_() for value in self._parameters_of(heads).values()
            ]
            named = dict(zip(self.parameters, leaves, strict=True))
            decision = self._forward(batch, members, named, heads, masks)
            with torch.no_grad():
                loss, grad_output = loss_and_gradient(
                    self.rows,
                    decision,
                    index,
                    weight[heads],
                    self.smoothing[heads],
                    self.balanced[heads],
                )
            losses.append(loss.sum(1))
            # Autograd starts from the decisions: the derivative by them is known in closed form.
            gradients.append(torch.autograd.grad(decision, leaves, grad_output / len(units)))
        with torch.no_grad():
            self.step += 1
            step = torch.full((), float(self.step), device=self.device)
            parameter_gradients = zip(*gradients, strict=True)
            for (name, value), group_gradients in zip(
                self.parameters_over_rate.items(), parameter_gradients, strict=True
            ):
                value.mul_(self.shrink.view((-1,) + (1,) * (value.dim() - 1)))
                moments = self.first_moments[name], self.second_moments[name]
                fused_adamw(value, torch.cat(group_gradients), *moments, step)
            self._multiply_rates()
        return torch.cat(losses)


class _HiddenLayer(torch.autograd.Function):
    """relu(weight values + bias) of weights (K, out, in) and values (K, in, R), in their dtype.

    Values may be rows (in, R) that all heads share and that need no gradient. masks: (out, R) of
    each head that leaves values out, 0 for those and else 1; empty if none does. The derivative
    needs no mask, because a value that is left out is 0. Autograd's own takes twice as many passes
    over the values.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, values: Tensor, masks: list[Tensor | None]
    ) -> Tensor:
        hidden = _multiply(weight.to(values.dtype), values)
        hidden.add_(bias.to(values.dtype).unsqueeze(2))
        hidden.relu_()
        for head, mask in zip(hidden, masks, strict=False):
            if mask is not None:
                head.mul_(mask)
        ctx.save_for_backward(weight, values, hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        weight, values, hidden = ctx.saved_tensors
        grad_output = torch.ops.aten.threshold_backward(grad_output, hidden, 0.0)
        bias_grad = grad_output.sum(2).float()
        weight_grad = _multiply(grad_output, values.transpose(-1, -2)).float()
        if values.dim() == 2:
            return weight_grad, bias_grad, None, None
        return weight_grad, bias_grad, _multiply(weight.to(values.dtype).mT, grad_output), None


class _AttentionPool(torch.autograd.Function):
    """Means (K, H, B) float32 of hidden values h (K, H, R) of units' rows, weighted by attention.

    A row's weight is the softmax, over its unit, of a' (tanh(V h + b) * sigmoid(U h + c)). Hidden
    values may be rows (1, H, R) that all heads share and that need no gradient. unit_logits:
    (B, R), -inf for rows of other units. Whatever has rows is of the hidden values' dtype.
    Autograd's own takes three times as many passes over the values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tanh_weight: Tensor,
        tanh_bias: Tensor,
        sigmoid_weight: Tensor,
        sigmoid_bias: Tensor,
        attention: Tensor,
        hidden: Tensor,
        unit_logits: Tensor,
    ) -> Tensor:
        dtype = hidden.dtype
        # tanh(x) is 2 sigmoid(2 x) - 1; torch's own tanh takes ten times as long on a CPU.
        weight = torch.cat([2 * tanh_weight, sigmoid_weight], 1).to(dtype)
        bias = torch.cat([2 * tanh_bias, sigmoid_bias], 1).to(dtype)
        hidden = hidden.expand(len(weight), -1, -1)
        values = torch.baddbmm(bias.unsqueeze(2), weight, hidden).sigmoid_()
        half_tanh, sigmoid = values.chunk(2, dim=1)
        half_gated = half_tanh.sub_(0.5) * sigmoid
        logits = torch.bmm((2 * attention).to(dtype), half_gated)
        shares = torch.softmax(logits + unit_logits, 2)  # (K, B, R)
        ctx.save_for_backward(
            tanh_weight, sigmoid_weight, attention, hidden, values, half_gated, shares
        )
        return torch.bmm(hidden, shares.mT).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tanh_weight, sigmoid_weight, attention, hidden, values, half_gated, shares = (
            ctx.saved_tensors
        )
        grad_output = grad_output.to(hidden.dtype)
        # Derivatives by the logits, of each unit: the softmax's.
        unit_grads = torch.bmm(grad_output.mT, hidden).mul_(shares)  # (K, B, R)
        unit_grads.addcmul_(shares, unit_grads.sum(2, keepdim=True), value=-1)
        logit_grad = unit_grads.sum(1, keepdim=True)  # (K, 1, R)
        attention_grad = 2 * torch.bmm(logit_grad, half_gated.mT).float()
        half_tanh, sigmoid = values.chunk(2, dim=1)
        # Derivatives of the logits by the arguments of tanh and sigmoid, divided by the attention's
        # weight and by twice it: s (1 - t^2) and t s (1 - s) / 2.
        gate_grads = torch.empty_like(values)
        tanh_grad, sigmoid_grad = gate_grads.chunk(2, dim=1)
        torch.addcmul(sigmoid, half_tanh, half_gated, value=-4, out=tanh_grad)
        torch.addcmul(half_gated, half_gated, sigmoid, value=-1, out=sigmoid_grad)
        gate_grads.mul_(logit_grad)
        scale = torch.cat([attention, 2 * attention], 2).mT  # (K, 2 A, 1)
        biases = (scale.squeeze(2) * gate_grads.sum(2)).chunk(2, dim=1)
        weights = (scale * torch.bmm(gate_grads, hidden.mT)).chunk(2, dim=1)
        hidden_grad = None
        if ctx.needs_input_grad[5]:
            weight = (scale * torch.cat([tanh_weight, sigmoid_weight], 1)).to(hidden.dtype)
            hidden_grad = torch.bmm(grad_output, shares).baddbmm_(weight.mT, gate_grads)
        return weights[0], biases[0], weights[1], biases[1], attention_grad, hidden_grad, None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (K, n, R) by (K, R, m), or by (R, m) for all heads, to (K, n, m).

    The latter is one product, by `product`, which takes the faster library.
    """
    if right.dim() == 3:
        return torch.bmm(left, right)
    return product(left.flatten(0, 1), right).view(*left.shape[:2], -1)
