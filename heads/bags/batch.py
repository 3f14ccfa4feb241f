"""K heads on bags trained side by side: the arithmetic of a bank.

K heads, D features, H hidden values, A attention width, C outputs, B units of a minibatch, R rows
in them. Rows come last: hidden values are (K, H, R), weights (K, out, in). The first layer of all
heads is one product of (K·H, D) by (D, R), the others are batched products. Rows of a unit stand
next to one another, and units of one row and of 20,000 cost what their rows cost: nothing is
padded.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.heads.bags.kind import BagsSpec
from headrace.heads.networks.mlp_batch import (
    DropoutBits,
    Rows,
    fused_adamw,
    head_columns,
    loss_and_slope,
    product,
)

# Rows of whole units that are evaluated together, one unit at least.
EVALUATION_ROWS = 4096
# Heads whose hidden values of a minibatch take so much go through a step together on a CPU, one at
# least. Measured with 32 heads, units of 40 and of 225 rows: 0.5 MB takes 1.9 and 1.2 times as
# long, 100 MB 1.06 and 1.17 times.
CACHED_BYTES = 8 << 20


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

        # Heads of one seed and share leave the same values out: each such mask is made once.
        levels = [min(255, round(256 * spec.dropout)) for spec in self.specs]
        of_head = [
            (spec.seed if level else self.specs[0].seed, level)
            for spec, level in zip(self.specs, levels, strict=True)
        ]
        masks = sorted(set(of_head))
        self.drops = any(levels)
        self.bits.of_head = [seed for seed, _ in masks]
        self.mask_of_head = torch.tensor([masks.index(mask) for mask in of_head]).to(self.device)
        self.drop_below = column([level for _, level in masks]).to(torch.uint8)
        self.drop_scale = column([256 / (256 - level) for _, level in masks])
        self.rates, self.shrink, self.smoothing, self.balanced = head_columns(
            self.specs, self.device
        )
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
            return torch.cat([self._evaluate(part) for part in parts], dim=2)

    def _evaluate(self, units: npt.NDArray[np.int64]) -> Tensor:
        batch, sizes = self.rows.bags(units)
        batch = batch.to(self.dtype)
        return torch.cat(
            [
                self._forward(batch, sizes, self._share(heads), heads, [])
                for heads in self._groups(len(batch))
            ]
        )

    def _share(self, heads: slice) -> dict[str, Tensor]:
        return {name: value[heads] for name, value in self.parameters.items()}

    def _groups(self, n_rows: int) -> Iterator[slice]:
        """Yield the heads that go through a step of so many rows together."""
        spec = self.specs[0]
        values = sum(spec.hidden) + 3 * spec.attention_width * (spec.pooling == "attention")
        size = len(self)
        if self.device.type == "cpu":
            size = max(1, min(size, CACHED_BYTES // max(1, 4 * values * n_rows)))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def _forward(
        self,
        batch: Tensor,
        sizes: list[int],
        parameters: dict[str, Tensor],
        heads: slice,
        masks: list[Tensor],
    ) -> Tensor:
        """(k, C, B) decisions of some heads for units of these sizes, whose rows are `batch`
        (R, D). masks: of each hidden layer (M, H, R), 0 for values that are left out.
        """
        n_hidden = len(self.specs[0].hidden)
        hidden = batch.t()  # (D, R): the same for all heads
        for layer in range(n_hidden):
            weight, bias = parameters[f"weight{layer}"], parameters[f"bias{layer}"]
            # a sum of its own: autograd copies what is changed in place and is a view, as this is
            hidden = _times(weight, hidden, self.dtype) + bias.unsqueeze(2)
            if masks:  # before relu, whose result then needs no copy: they are not negative
                hidden.mul_(masks[layer].index_select(0, self.mask_of_head[heads]))
            hidden.relu_()
        pooled = self._pool(hidden, torch.tensor(sizes, device=self.device), parameters)
        weight, bias = parameters[f"weight{n_hidden}"], parameters[f"bias{n_hidden}"]
        return torch.bmm(weight, pooled.expand(len(weight), -1, -1)) + bias.unsqueeze(2)

    def _pool(self, hidden: Tensor, sizes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """(K or 1, H, B) of hidden values (K, H, R), or of features (H, R) that all heads share."""
        by_head = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        if self.specs[0].pooling == "max":
            bags = torch.split_with_sizes(by_head, sizes.tolist(), 2)
            return torch.stack([bag.amax(2) for bag in bags], dim=2)
        # A sum over each unit is a product with its rows' 0/1 columns: as few flops beside the
        # layers' as a minibatch has units beside features, and one call for all units.
        unit_of_row = torch.repeat_interleave(torch.arange(len(sizes), device=self.device), sizes)
        members = torch.nn.functional.one_hot(unit_of_row, len(sizes)).float()  # (R, B)
        if self.specs[0].pooling == "mean":
            weights = (1 / sizes).repeat_interleave(sizes).view(1, 1, -1)
        else:
            # tanh(x) is 2 sigmoid(2 x) - 1; torch's own takes ten times as long on a CPU
            gates = torch.cat([2 * parameters["tanh_weight"], parameters["sigmoid_weight"]], 1)
            biases = torch.cat([2 * parameters["tanh_bias"], parameters["sigmoid_bias"]], 1)
            values = (_times(gates, hidden, self.dtype) + biases.unsqueeze(2)).sigmoid_()
            tanh, sigmoid = values.chunk(2, dim=1)
            logits = torch.bmm(parameters["attention"], (2 * tanh - 1) * sigmoid)
            places = unit_of_row.expand_as(logits)
            lowest = torch.full((*logits.shape[:2], len(sizes)), -torch.inf, device=self.device)
            largest = lowest.scatter_reduce(2, places, logits.detach(), "amax")
            weights = torch.exp(logits - largest.gather(2, places))
            weights = weights / (weights @ members).gather(2, places)
        pooled: Tensor = _SumsOverUnits.apply(by_head * weights, members)
        return pooled

    def _step(self, units: npt.NDArray[np.int64]) -> Tensor:
        """One AdamW step of every head; returns the summed loss (K,) float64 of this minibatch."""
        index = torch.from_numpy(units).to(self.device)
        batch, sizes = self.rows.bags(units)
        batch = batch.to(self.dtype)
        masks = [
            (self.bits.draw(width, len(batch)) >= self.drop_below) * self.drop_scale
            for width in self.specs[0].hidden
            if self.drops
        ]
        weight = self.rows.weight.index_select(1, index).index_select(0, self.balanced)
        losses, gradients = [], []
        for heads in self._groups(len(batch)):
            leaves = [value.detach().requires_grad_() for value in self._share(heads).values()]
            named = dict(zip(self.parameters, leaves, strict=True))
            decision = self._forward(batch, sizes, named, heads, masks)
            with torch.no_grad():
                loss, slope = loss_and_slope(
                    self.rows,
                    decision,
                    index,
                    weight[heads],
                    self.smoothing[heads],
                    self.balanced[heads],
                )
            losses.append(loss.sum(1))
            gradients.append(torch.autograd.grad(decision, leaves, slope / len(units)))
        with torch.no_grad():
            self.step += 1
            step = torch.full((), float(self.step), device=self.device)
            for name, parts in zip(self.units, zip(*gradients, strict=True), strict=True):
                value = self.units[name]
                value.mul_(self.shrink.view((-1,) + (1,) * (value.dim() - 1)))
                fused_adamw(value, torch.cat(parts), self.first[name], self.second[name], step)
            self._multiply_rates()
        return torch.cat(losses)


class _WideProduct(torch.autograd.Function):
    """The product of all heads' weights (K·H, D) with rows (D, R) that need no gradient, in the
    rows' dtype; float32 else.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return product(weight.to(columns.dtype), columns).float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        return product(slope.contiguous().to(columns.dtype), columns.t()).float(), None


class _SumsOverUnits(torch.autograd.Function):
    """Sums (K, H, B) over units of values (K, H, R); members (R, B) is 1 where a row is a unit's.

    One product for all heads, by the faster library of the two.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, members: Tensor) -> Tensor:
        ctx.save_for_backward(members)
        return product(values.flatten(0, 1), members).view(*values.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (members,) = ctx.saved_tensors
        back = product(slope.flatten(0, 1).contiguous(), members.t())
        return back.view(*slope.shape[:2], -1), None


def _times(weight: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, out, R) float32 of weights (K, out, in) and values (K, in, R), or of rows (in, R) that
    all heads share; multiplied in `dtype`.
    """
    if values.dim() == 2:
        wide: Tensor = _WideProduct.apply(weight.flatten(0, 1), values)
        return wide.view(*weight.shape[:2], -1)
    return torch.bmm(weight.to(dtype), values.to(dtype)).float()
