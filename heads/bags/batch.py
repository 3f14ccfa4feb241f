"""K heads on bags trained side by side: the arithmetic of a bank.

K heads, D features, H hidden values, A attention width, C outputs, B units of a minibatch, R rows
in them. Rows come last: hidden values are (K, H, R), weights (K, out, in). The first layer of all
heads is one product of (K·H, D) by (D, R), the others are batched products. Rows of a unit stand
next to one another, and each unit is pooled by itself: units of one row and of 20,000 cost what
their rows cost, and nothing is padded.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.heads.bags.kind import BagsSpec
from headrace.heads.networks.mlp_batch import (
    BETA1,
    BETA2,
    EPSILON,
    DropoutBits,
    Rows,
    loss_and_slope,
    product,
)

# Rows of whole units that are evaluated together, one unit at least.
EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class BagRows(Rows):
    """What the heads see of the data: targets and weights are those of `n` units.

    instances: (N,) row numbers of `features`, unit after unit. offsets: (n + 1,) where in them each
    unit begins, and the end.
    """

    instances: npt.NDArray[np.int64] | None = None
    offsets: npt.NDArray[np.int64] | None = None

    def bags(self, units: npt.NDArray[np.int64]) -> tuple[Tensor, list[int]]:
        """Return (R, D) float32 standardised features of the units' rows, and each one's number."""
        assert self.instances is not None
        assert self.offsets is not None
        bounds = zip(self.offsets[units], self.offsets[units + 1], strict=True)
        rows = np.concatenate([self.instances[start:stop] for start, stop in bounds])
        sizes = (self.offsets[units + 1] - self.offsets[units]).tolist()
        return self.minibatch(torch.from_numpy(rows).to(self.features.device)), sizes


def initial_parameters(
    spec: BagsSpec, n_features: int, n_outputs: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return a head's first parameters by name: torch.nn.Linear's distribution, uniform within
    ±1/sqrt(in), from a generator that depends on the seed alone.
    """
    generator = np.random.default_rng([spec.seed, 0])
    parameters: dict[str, npt.NDArray[np.float32]] = {}

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
        # Its bias would move all logits of a unit alike.
        draw("attention", None, spec.attention_width, 1)
    draw(f"weight{len(spec.hidden)}", f"bias{len(spec.hidden)}", widths[-1], n_outputs)
    return parameters


class BagBatch:
    """The state of K heads of equal widths and pooling; heads leave it when they are done."""

    def __init__(
        self, specs: Sequence[BagsSpec], rows: BagRows, *, fold: int, device: torch.device
    ) -> None:
        self.specs, self.rows, self.device = list(specs), rows, device
        self.step = 0
        starts = [
            initial_parameters(spec, int(rows.features.shape[1]), rows.outputs) for spec in specs
        ]
        # Parameters are kept in units of their head's learning rate: a step of AdamW is then the
        # same for every rate, and one fused call does it for all heads.
        self.units = {
            name: torch.from_numpy(
                np.stack([start[name] for start in starts])
                / np.array([spec.learning_rate for spec in specs], np.float32).reshape(
                    (-1,) + (1,) * starts[0][name].ndim
                )
            ).to(device)
            for name in starts[0]
        }
        self.first = {name: torch.zeros_like(value) for name, value in self.units.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.units.items()}
        self.bits = DropoutBits([spec.seed for spec in specs], fold, device)
        self._read_specs()
        self.best = {name: value.clone() for name, value in self.parameters.items()}

    def _read_specs(self) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, 1, 1)

        levels = [round(256 * spec.dropout) for spec in self.specs]
        self.drops = any(levels)
        self.drop_below = torch.tensor(levels, dtype=torch.uint8, device=self.device).view(-1, 1, 1)
        self.drop_scale = column([256 / (256 - level) for level in levels])
        self.smoothing = column([spec.label_smoothing for spec in self.specs])
        self.balanced = torch.tensor(
            [int(spec.class_weight == "balanced") for spec in self.specs], device=self.device
        )
        self.rates = column([spec.learning_rate for spec in self.specs])
        self.shrink = column([1 - spec.learning_rate * spec.weight_decay for spec in self.specs])
        self._multiply_rates()

    def _multiply_rates(self) -> None:
        self.parameters = {
            name: value * self.rates.view((-1,) + (1,) * (value.dim() - 1))
            for name, value in self.units.items()
        }

    def __len__(self) -> int:
        return len(self.specs)

    def keep(self, heads: Sequence[int]) -> None:
        """Drop every head that is not listed: its share of all further work is gone."""
        index = torch.tensor(list(heads), dtype=torch.int64, device=self.device)
        for tensors in (self.units, self.first, self.second, self.best):
            tensors.update({name: value.index_select(0, index) for name, value in tensors.items()})
        self.specs = [self.specs[head] for head in heads]
        self.bits.of_head = [self.bits.of_head[head] for head in heads]
        self._read_specs()

    def remember(self, heads: Sequence[int]) -> None:
        """Make the present parameters of these heads their best ones."""
        for name, value in self.parameters.items():
            for head in heads:
                self.best[name][head].copy_(value[head])

    def best_layers(self, head: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the remembered parameters of a head by name, in standardised coordinates."""
        return {name: value[head].cpu().numpy().copy() for name, value in self.best.items()}

    def train_epoch(
        self, order: npt.NDArray[np.int64], view: npt.NDArray[np.int64], batch_size: int
    ) -> npt.NDArray[Any]:
        """One pass over the training units `order` (n,); returns the mean training loss of each
        head (K,) float64, taken before each step. Not finite for a head that diverged.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for start in range(0, len(order), batch_size):
            total += self._step(order[start : start + batch_size])
        return np.asarray((total / len(order)).cpu().numpy())

    def outputs(self, index: npt.NDArray[np.int64]) -> Tensor:
        """Return (K, C, n) decisions of units, without dropout."""
        assert self.rows.offsets is not None
        sizes = self.rows.offsets[index + 1] - self.rows.offsets[index]
        # Units whose rows begin in the same stretch of rows are evaluated together.
        stretch = (np.cumsum(sizes) - sizes) // EVALUATION_ROWS
        parts = np.split(index, np.flatnonzero(np.diff(stretch)) + 1)
        with torch.no_grad():
            return torch.cat(
                [
                    self._forward(*self.rows.bags(part), self.parameters, train=False)
                    for part in parts
                ],
                dim=2,
            )

    def losses(self, decision: Tensor, index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """(K,) float64 mean loss of the decisions (K, C, n) on units (n,), without label smoothing
        or class weights.
        """
        units = torch.from_numpy(index).to(self.device)
        weight = self.rows.weight[:1].index_select(1, units)
        loss, _ = loss_and_slope(self.rows, decision, units, weight, None, None)
        return np.asarray((loss.sum(1) / weight.sum()).cpu().numpy())

    def _forward(
        self, batch: Tensor, sizes: list[int], parameters: dict[str, Tensor], *, train: bool
    ) -> Tensor:
        """(K, C, B) decisions for units of these sizes, whose rows are `batch` (R, D)."""
        n_hidden = len(self.specs[0].hidden)
        hidden = batch.t().contiguous()  # (D, R): the same for all heads
        for layer in range(n_hidden):
            weight, bias = parameters[f"weight{layer}"], parameters[f"bias{layer}"]
            hidden = torch.relu(_times(weight, hidden) + bias.unsqueeze(2))
            if train and self.drops:
                kept = self.bits.draw(hidden.shape[1], hidden.shape[2]) >= self.drop_below
                hidden = hidden * (kept * self.drop_scale)
        pooled = self._pool(hidden, sizes, parameters)
        weight, bias = parameters[f"weight{n_hidden}"], parameters[f"bias{n_hidden}"]
        return torch.bmm(weight, pooled.expand(len(self), -1, -1)) + bias.unsqueeze(2)

    def _pool(self, hidden: Tensor, sizes: list[int], parameters: dict[str, Tensor]) -> Tensor:
        """(K or 1, H, B) of hidden values (K, H, R), or of features (H, R) that all heads share."""
        by_head = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        bags = torch.split_with_sizes(by_head, sizes, 2)
        pooling = self.specs[0].pooling
        if pooling == "mean":
            return torch.stack([bag.mean(2) for bag in bags], dim=2)
        if pooling == "max":
            return torch.stack([bag.amax(2) for bag in bags], dim=2)
        tanh_bias, sigmoid_bias = parameters["tanh_bias"], parameters["sigmoid_bias"]
        gate = torch.tanh(_times(parameters["tanh_weight"], hidden) + tanh_bias.unsqueeze(2))
        gate = gate * torch.sigmoid(
            _times(parameters["sigmoid_weight"], hidden) + sigmoid_bias.unsqueeze(2)
        )
        logits = torch.bmm(parameters["attention"], gate)  # (K, 1, R)
        pooled = [
            torch.bmm(bag.expand(len(self), -1, -1), bag_logits.softmax(2).transpose(1, 2))
            for bag, bag_logits in zip(bags, torch.split_with_sizes(logits, sizes, 2), strict=True)
        ]
        return torch.cat(pooled, dim=2)

    def _step(self, units: npt.NDArray[np.int64]) -> Tensor:
        """One AdamW step of every head; returns the summed loss (K,) float64 of this minibatch."""
        index = torch.from_numpy(units).to(self.device)
        leaves = {name: value.requires_grad_() for name, value in self.parameters.items()}
        decision = self._forward(*self.rows.bags(units), leaves, train=True)
        weight = self.rows.weight.index_select(1, index).index_select(0, self.balanced)
        with torch.no_grad():
            loss, slope = loss_and_slope(
                self.rows, decision, index, weight, self.smoothing, self.balanced
            )
        gradients = torch.autograd.grad(decision, list(leaves.values()), slope / len(units))
        with torch.no_grad():
            self.step += 1
            for name, gradient in zip(leaves, gradients, strict=True):
                value = self.units[name]
                value.mul_(self.shrink.view((-1,) + (1,) * (value.dim() - 1)))
                torch._fused_adamw_(
                    [value],
                    [gradient.contiguous()],
                    [self.first[name]],
                    [self.second[name]],
                    [],
                    [torch.tensor(float(self.step), device=self.device)],
                    lr=1.0,
                    beta1=BETA1,
                    beta2=BETA2,
                    weight_decay=0.0,
                    eps=EPSILON,
                    amsgrad=False,
                    maximize=False,
                )
            self._multiply_rates()
        return loss.sum(1)


class _WideProduct(torch.autograd.Function):
    """The product of all heads' weights (K·H, D) with rows (D, R) that need no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return product(weight, columns)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        return product(slope.contiguous(), columns.t()), None


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """(K, out, R) of weights (K, out, in) and values (K, in, R), or of rows (in, R) that all heads
    share.
    """
    if values.dim() == 2:
        wide: Tensor = _WideProduct.apply(weight.flatten(0, 1), values)
        return wide.view(*weight.shape[:2], -1)
    return torch.bmm(weight, values)
