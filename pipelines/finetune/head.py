"""A trained head as a torch module, so that gradients pass through it into the backbone.

n rows, D features, C outputs.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.heads.data.task import TaskKind
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.layers import Arrays
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.spec import HeadSpec
from headrace.pipelines.finetune.errors import DIFFERENTIABLE, FinetuneRefused


class Head(nn.Module):
    """Features (n, D), or maps (n, D, h, w) for a convolution head, to logits (n, C).

    Logits are what `link` makes probabilities of: one column of a single-label task is the log-odds
    of the second class, and for regression they are the values. After `standardise` the parameters
    are in coordinates where each feature has mean 0 and deviation 1, which is where gradient steps
    of one size make sense.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        centre: Tensor,
        scale: Tensor,
        convolutions: Sequence[nn.Conv2d],
        layers: Sequence[nn.Linear],
        gain: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.convolutions = nn.ModuleList(convolutions)
        self.layers = nn.ModuleList(layers)
        self.gain, self.dropout = gain, dropout

    @property
    def spatial(self) -> bool:
        """Whether it takes maps."""
        return len(self.convolutions) > 0

    def forward(self, features: Tensor) -> Tensor:
        if self.spatial:
            value = (features - self.centre[:, None, None]) / self.scale[:, None, None]
            for convolution in self.convolutions:
                value = F.relu(convolution(value))
            value = value.mean((2, 3))
        else:
            value = (features - self.centre) / self.scale
        for place, layer in enumerate(self.layers):
            value = layer(F.dropout(value, self.dropout, self.training))
            if place < len(self.layers) - 1:
                value = F.relu(value)
        return value * self.gain


def require_differentiable(spec: HeadSpec) -> None:
    """Raises FinetuneRefused for a head that no gradient passes through."""
    if spec.kind not in DIFFERENTIABLE:
        raise FinetuneRefused(
            f"a {spec.kind} head is no function that gradients pass through: fine-tune a head of "
            f"kind {', '.join(DIFFERENTIABLE)}"
        )


def head_module(spec: HeadSpec, arrays: Arrays, task: TaskKind) -> Head:
    """The module that predicts what `predict_head` does.

    Raises FinetuneRefused for kinds without gradients.
    """
    require_differentiable(spec)
    if not arrays:
        raise FinetuneRefused(
            f"this {spec.kind} head has no arrays, because it failed or was stopped early: "
            "fine-tune another"
        )
    layers_of = HEAD_KINDS[spec.kind].layers
    assert layers_of is not None  # of a differentiable head
    layers = layers_of(spec, arrays)
    dense = [_linear(_tensor(weight), _tensor(bias)) for weight, bias in layers.dense]
    gain = 1.0 if task == "regression" else layers.decision_scale
    if layers.mean is None or layers.inverse_scale is None:
        n_features = dense[0].in_features
        return Head(
            torch.zeros(n_features), torch.ones(n_features), [], dense, gain, layers.dropout
        )
    convolutions = []
    for kernel, shift in layers.convolutions:
        convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
        convolution.weight.data, convolution.bias.data = _tensor(kernel), _tensor(shift)  # type: ignore[union-attr]
        convolutions.append(convolution)
    return Head(
        _tensor(layers.mean),
        1 / _tensor(layers.inverse_scale),
        convolutions,
        dense,
        gain,
        layers.dropout,
    )


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def new_head(spec: MLPSpec, features: int, outputs: int) -> Head:
    """A head with random parameters, torch.nn.Linear's distribution, drawn from the spec's seed."""
    generator = torch.Generator().manual_seed(spec.seed)
    layers = []
    widths = (features, *spec.hidden, outputs)
    for inputs, width in itertools.pairwise(widths):
        bound = 1 / math.sqrt(inputs)
        weight = (torch.rand(width, inputs, generator=generator) * 2 - 1) * bound
        layers.append(_linear(weight, (torch.rand(width, generator=generator) * 2 - 1) * bound))
    return Head(torch.zeros(features), torch.ones(features), [], layers, 1.0, spec.dropout)


def standardise(head: Head, mean: Tensor, deviation: Tensor, *, new: bool) -> None:
    """Put a head's first layer into standardised coordinates; convolution heads are in them from
    the start.

    mean, deviation: (D,) of the features over some training rows; a constant feature counts with
    deviation 1. A trained head stays the same function; a new one is taken to have been drawn in
    these coordinates.
    """
    if head.spatial:
        return
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation)).double()
    first = head.layers[0]
    assert isinstance(first, nn.Linear)
    if not new:
        with torch.no_grad():
            # In float64: weights in raw coordinates can be large and of opposite signs.
            weight, shift = first.weight.double() / head.scale, mean.double() - head.centre
            first.bias.copy_(first.bias.double() + weight @ shift)
            first.weight.copy_(weight * deviation)
    head.centre, head.scale = mean.float(), deviation.float()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return layer
