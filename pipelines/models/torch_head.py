"""A trained head as a torch module: the same function as `heads.predict.predict_head`, in a form
that gradients pass through and that can be exported.

n rows, D features, C outputs, k neighbours.
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
from headrace.heads.evaluate.temperature import FARTHEST, FLOOR
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.layers import Arrays
from headrace.heads.neighbors.bank import CENTROID_TEMPERATURE
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.persist import TrainedHead
from headrace.heads.predict import floor_of
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import HeadSpec
from headrace.pipelines.models.errors import ModelError


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


def head_module(spec: HeadSpec, arrays: Arrays, task: TaskKind) -> Head:
    """The module that predicts what `predict_head` does.

    spec: of a differentiable kind. Raises ModelError for a head without arrays.
    """
    if not arrays:
        raise ModelError(
            f"this {spec.kind} head has no arrays, because it failed or was stopped early: "
            "fine-tune another"
        )
    layers_of = HEAD_KINDS[spec.kind].layers
    assert layers_of is not None  # of a differentiable kind
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
        convolution.weight.data = _tensor(kernel)
        convolution.bias.data = _tensor(shift)  # type: ignore[union-attr]
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


def tempered(
    probabilities: Tensor, task_kind: TaskKind, temperature: float, floor: float = FLOOR
) -> Tensor:
    """As heads.with_temperature, and in float64 like it: near one, float32 has hardly any digits of
    what is left.
    """
    if task_kind == "regression" or temperature == 1:
        return probabilities
    values = probabilities.double()
    if task_kind == "multi":
        inside = values.clamp(floor, 1 - floor)
        return torch.sigmoid((torch.log(inside) - torch.log(1 - inside)) / temperature).float()
    return torch.softmax(torch.log(values.clamp(min=floor)) / temperature, dim=1).float()


def softmax_at(decision: Tensor, temperature: float) -> Tensor:
    """(n, C) probabilities of decisions; at a temperature of one, whatever lies behind is as far as
    it is.
    """
    if temperature == 1:
        return torch.softmax(decision, dim=1)
    behind = decision - decision.max(dim=1, keepdim=True).values
    return torch.softmax(behind.clamp(min=-FARTHEST) / temperature, dim=1)


class ProbabilityLink(nn.Module):
    """From decisions (n, C) to probabilities at a temperature, for regression values; one column of
    a single-label task is log-odds.
    """

    def __init__(self, task_kind: TaskKind, temperature: float = 1.0) -> None:
        super().__init__()
        self.task_kind, self.temperature = task_kind, temperature

    def forward(self, decision: Tensor) -> Tensor:
        if self.task_kind == "regression":
            return decision
        if self.task_kind != "multi" and decision.shape[1] > 1:
            return softmax_at(decision, self.temperature)
        if self.temperature != 1:
            decision = decision.clamp(-FARTHEST, FARTHEST) / self.temperature
        second = torch.sigmoid(decision)
        return second if self.task_kind == "multi" else torch.cat([1 - second, second], dim=1)


class CentroidModule(nn.Module):
    means: Tensor
    center: Tensor
    inverse_scale: Tensor
    absent: Tensor

    def __init__(self, spec: CentroidSpec, head: TrainedHead, temperature: float) -> None:
        super().__init__()
        arrays = head.arrays
        self.register_buffer("center", torch.from_numpy(np.array(arrays["center"], np.float32)))
        self.register_buffer(
            "inverse_scale", torch.from_numpy(np.array(arrays["inverse_scale"], np.float32))
        )
        means = (arrays["means"] - arrays["center"]) * arrays["inverse_scale"]
        self.register_buffer("means", torch.from_numpy(np.array(means, np.float32)))
        self.register_buffer("absent", torch.from_numpy(np.asarray(arrays["present"] == 0)))
        self.cosine, self.scale = spec.metric == "cosine", CENTROID_TEMPERATURE[spec.metric]
        self.temperature = temperature

    def forward(self, value: Tensor) -> Tensor:
        rows = (value - self.center) * self.inverse_scale
        if self.cosine:
            lengths = rows.norm(dim=1, keepdim=True) * self.means.norm(dim=1)
            similar = (
                rows @ self.means.T / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
            )
        else:
            similar = (rows @ self.means.T - 0.5 * self.means.square().sum(1)) / self.means.shape[
                1
            ] ** 0.5
        decision = (self.scale * similar).masked_fill(self.absent, float("-inf"))
        return softmax_at(decision, self.temperature)


class NeighborModule(nn.Module):
    """Neighbours by float32 products; among references at distances equal to seven digits, others
    may be taken.
    """

    references: Tensor
    center: Tensor
    square: Tensor
    values: Tensor
    share: Tensor

    def __init__(self, spec: KNNSpec, head: TrainedHead, temperature: float) -> None:
        super().__init__()
        rows = np.asarray(head.arrays["features"], np.float64)
        center = rows.mean(0)
        if spec.metric == "cosine":
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows, center = rows / np.where(lengths > 0, lengths, 1), np.zeros_like(center)
        centred = rows - center
        for name, array in (
            ("references", centred),
            ("center", center),
            ("square", np.square(centred).sum(1)),
            ("values", head.arrays["target"]),
            ("share", head.arrays["sample_weight"]),
        ):
            self.register_buffer(name, torch.from_numpy(np.array(array, np.float32)))
        self.k, self.cosine, self.by_distance = (
            spec.k,
            spec.metric == "cosine",
            spec.weighting == "distance",
        )
        self.task_kind, self.temperature = head.task_kind, temperature
        self.floor = floor_of(spec, head.task_kind, len(head.classes))

    def forward(self, value: Tensor) -> Tensor:
        if self.cosine:
            value = value / value.norm(dim=1, keepdim=True).clamp(min=1e-30)
        rows = value - self.center
        distance = self.square - 2 * rows @ self.references.T + rows.square().sum(1, keepdim=True)
        near, place = distance.topk(self.k, dim=1, largest=False)
        share = self.share[place]
        if self.by_distance:
            near = near.clamp(min=0)
            # Of unit vectors, half the squared distance is one minus the cosine.
            near = near / 2 if self.cosine else near.sqrt()
            zero = near < 1e-6
            alone = zero.any(dim=1, keepdim=True)
            share = share * torch.where(alone, zero.float(), 1 / near.clamp(min=1e-6))
        votes = (share.unsqueeze(2) * self.values[place]).sum(1)
        return tempered(
            votes / share.sum(1, keepdim=True), self.task_kind, self.temperature, self.floor
        )


def probability_module(head: TrainedHead, temperature: float = 1.0) -> nn.Module:
    """Return the module from features (n, D), for a convolution head maps (n, D, h, w), to
    probabilities (n, C) at a temperature, for regression values.

    Raises ModelError for a scikit-learn estimator, which has no such form.
    """
    spec = head.spec
    if isinstance(spec, SklearnSpec):
        raise ModelError(
            f"a head of kind sklearn ({spec.estimator}) is code of its own library and cannot be "
            "put into a graph. Use headrace predict, --format safetensors, or the best head of "
            "another kind (logistic, mlp, …)"
        )
    if isinstance(spec, KNNSpec):
        return NeighborModule(spec, head, temperature).eval()
    if isinstance(spec, CentroidSpec):
        return CentroidModule(spec, head, temperature).eval()
    logits = head_module(spec, head.arrays, head.task_kind)
    return nn.Sequential(logits, ProbabilityLink(head.task_kind, temperature)).eval()
