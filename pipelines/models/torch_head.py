"""Trained heads as torch modules, for fine-tuning and export: the same functions as
`heads.predict.predict_head`.

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

from headrace.heads.arrays import Arrays
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import FLOOR, MAX_LOG_ODDS
from headrace.heads.kinds import HEAD_KINDS
from headrace.heads.layers import dense_layers
from headrace.heads.neighbors.bank import SIMILARITY_FACTOR
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.heads.persist import TrainedHead
from headrace.heads.predict import probability_floor
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import HeadSpec
from headrace.pipelines.models.errors import ModelError


class Head(nn.Module):
    """From features (n, D), or maps (n, D, h, w) for a convolution head, to logits (n, C).

    `ProbabilityLink` turns logits into probabilities; for regression logits are the values.
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
        # Buffers, and so moved and saved with the parameters, but not trained.
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.convolutions = nn.ModuleList(convolutions)
        self.layers = nn.ModuleList(layers)
        self.gain, self.dropout = gain, dropout

    @property
    def spatial(self) -> bool:
        """Whether it reads feature maps."""
        return len(self.convolutions) > 0

    def forward(self, features: Tensor) -> Tensor:
        if self.spatial:
            hidden = (features - self.centre[:, None, None]) / self.scale[:, None, None]
            for convolution in self.convolutions:
                hidden = F.relu(convolution(hidden))
            hidden = hidden.mean((2, 3))
        else:
            hidden = (features - self.centre) / self.scale
        for layer_index, layer in enumerate(self.layers):
            hidden = layer(F.dropout(hidden, self.dropout, self.training))
            if layer_index < len(self.layers) - 1:
                hidden = F.relu(hidden)
        return hidden * self.gain


def head_module(spec: HeadSpec, head_arrays: Arrays, task_kind: TaskKind) -> Head:
    """Return a head of a differentiable kind as a module. Raises ModelError for a head without
    arrays.
    """
    if not head_arrays:
        raise ModelError(
            f"this {spec.kind} head has no arrays, because it failed or was stopped early: "
            "fine-tune another"
        )
    layers_of = HEAD_KINDS[spec.kind].layers
    assert layers_of is not None  # of a differentiable kind
    layers = layers_of(spec, head_arrays)
    dense = [
        _linear_layer(_float_tensor(weight), _float_tensor(bias)) for weight, bias in layers.dense
    ]
    # The values of a regression are what is asked for, and must not be scaled.
    gain = 1.0 if task_kind == "regression" else layers.decision_scale
    if layers.mean is None or layers.inverse_scale is None:
        n_features = dense[0].in_features
        return Head(
            torch.zeros(n_features), torch.ones(n_features), [], dense, gain, layers.dropout
        )
    convolutions = []
    for kernel, shift in layers.convolutions:
        convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
        convolution.weight.data = _float_tensor(kernel)
        convolution.bias.data = _float_tensor(shift)  # type: ignore[union-attr]
        convolutions.append(convolution)
    return Head(
        _float_tensor(layers.mean),
        1 / _float_tensor(layers.inverse_scale),
        convolutions,
        dense,
        gain,
        layers.dropout,
    )


def _float_tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def new_head(spec: MLPSpec, n_features: int, n_outputs: int) -> Head:
    """Return a head with random parameters, distributed as torch.nn.Linear's, from the spec's
    seed.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    layers = []
    for n_inputs, n_units in itertools.pairwise((n_features, *spec.hidden, n_outputs)):
        bound = 1 / math.sqrt(n_inputs)
        weight = (torch.rand(n_units, n_inputs, generator=generator) * 2 - 1) * bound
        bias = (torch.rand(n_units, generator=generator) * 2 - 1) * bound
        layers.append(_linear_layer(weight, bias))
    return Head(torch.zeros(n_features), torch.ones(n_features), [], layers, 1.0, spec.dropout)


def standardize_head(
    head: Head, feature_mean: Tensor, feature_deviation: Tensor, *, is_new: bool
) -> None:
    """Put a head's first layer into coordinates where each feature has mean 0 and deviation 1; a
    convolution head already is in them.

    A trained head remains the same function; the weights of a new one are kept, as if drawn in
    these coordinates.

    feature_mean, feature_deviation: (D,) over some training rows; a deviation of 0 counts as 1.
    """
    if head.spatial:
        return
    # So that one learning rate suits all features.
    feature_deviation = torch.where(
        feature_deviation > 0, feature_deviation, torch.ones_like(feature_deviation)
    ).double()
    first_layer = head.layers[0]
    assert isinstance(first_layer, nn.Linear)
    if not is_new:
        with torch.no_grad():
            # In float64, because large weights of opposite signs cancel in the sum for the bias.
            weight = first_layer.weight.double() / head.scale
            mean_shift = feature_mean.double() - head.centre
            first_layer.bias.copy_(first_layer.bias.double() + weight @ mean_shift)
            first_layer.weight.copy_(weight * feature_deviation)
    head.centre, head.scale = feature_mean.float(), feature_deviation.float()


def _linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def tempered(
    probabilities: Tensor, task_kind: TaskKind, temperature: float, floor: float = FLOOR
) -> Tensor:
    """Return probabilities at a temperature, as heads.evaluate.temperature.with_temperature."""
    if task_kind == "regression" or temperature == 1:
        return probabilities
    # Near a probability of 1, float32 has hardly any digits of the difference from 1.
    values = probabilities.double()
    if task_kind == "multi":
        clamped = values.clamp(floor, 1 - floor)
        return torch.sigmoid((torch.log(clamped) - torch.log(1 - clamped)) / temperature).float()
    return torch.softmax(torch.log(values.clamp(min=floor)) / temperature, dim=1).float()


def softmax_at(decision: Tensor, temperature: float) -> Tensor:
    """Return probabilities (n, C) of decisions (n, C) at a temperature other than 1, a class being
    at most MAX_LOG_ODDS behind the best one; at 1 the plain softmax.
    """
    if temperature == 1:
        return torch.softmax(decision, dim=1)
    distance_to_best = decision - decision.max(dim=1, keepdim=True).values
    return torch.softmax(distance_to_best.clamp(min=-MAX_LOG_ODDS) / temperature, dim=1)


class ProbabilityLink(nn.Module):
    """From decisions to probabilities (n, C) at a temperature; regression values pass through.

    A single column of a single-label task is the log-odds of the second class.
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
            decision = decision.clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS) / self.temperature
        positive = torch.sigmoid(decision)
        return positive if self.task_kind == "multi" else torch.cat([1 - positive, positive], dim=1)


class CentroidModule(nn.Module):
    """The nearest class mean, by scaled Euclidean distance or by cosine."""

    means: Tensor
    center: Tensor
    inverse_scale: Tensor
    absent: Tensor

    def __init__(self, spec: CentroidSpec, head: TrainedHead, temperature: float) -> None:
        super().__init__()
        arrays = head.arrays
        scaled_means = (arrays["means"] - arrays["center"]) * arrays["inverse_scale"]
        self.register_buffer("center", _float_tensor(arrays["center"]))
        self.register_buffer("inverse_scale", _float_tensor(arrays["inverse_scale"]))
        self.register_buffer("means", _float_tensor(scaled_means))
        self.register_buffer("absent", torch.from_numpy(np.asarray(arrays["present"] == 0)))
        self.cosine, self.scale = spec.metric == "cosine", SIMILARITY_FACTOR[spec.metric]
        self.temperature = temperature

    def forward(self, value: Tensor) -> Tensor:
        scaled_rows = (value - self.center) * self.inverse_scale
        if self.cosine:
            lengths = scaled_rows.norm(dim=1, keepdim=True) * self.means.norm(dim=1)
            lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
            similarity = scaled_rows @ self.means.T / lengths
        else:  # minus half the squared distance, less what is equal for all classes
            similarity = (
                scaled_rows @ self.means.T - 0.5 * self.means.square().sum(1)
            ) / self.means.shape[1] ** 0.5
        decision = (self.scale * similarity).masked_fill(self.absent, float("-inf"))
        return softmax_at(decision, self.temperature)


class NeighborModule(nn.Module):
    """Votes of the k nearest rows.

    Neighbours that tie within seven digits may be others than `predict_head`'s.
    """

    references: Tensor
    center: Tensor
    square: Tensor
    values: Tensor
    share: Tensor

    def __init__(self, spec: KNNSpec, head: TrainedHead, temperature: float) -> None:
        super().__init__()
        reference_rows = np.asarray(head.arrays["features"], np.float64)
        # Distances do not change when all rows are moved, but in float32 short vectors keep more
        # digits.
        center = reference_rows.mean(0)
        if spec.metric == "cosine":
            lengths = np.linalg.norm(reference_rows, axis=1, keepdims=True)
            reference_rows = reference_rows / np.where(lengths > 0, lengths, 1)
            center = np.zeros_like(center)
        centred_rows = reference_rows - center
        for name, array in (
            ("references", centred_rows),
            ("center", center),
            ("square", np.square(centred_rows).sum(1)),
            ("values", head.arrays["target"]),
            ("share", head.arrays["sample_weight"]),
        ):
            self.register_buffer(name, _float_tensor(array))
        self.k, self.cosine = spec.k, spec.metric == "cosine"
        self.by_distance = spec.weighting == "distance"
        self.task_kind, self.temperature = head.task_kind, temperature
        self.floor = probability_floor(spec, head.task_kind, len(head.classes))

    def forward(self, value: Tensor) -> Tensor:
        if self.cosine:
            # A row of zeros, which has no direction, stays a row of zeros.
            value = value / value.norm(dim=1, keepdim=True).clamp(min=1e-30)
        centred_rows = value - self.center
        # By products in float32: a difference for every pair and feature would fill the memory.
        squared_distance = (
            self.square
            - 2 * centred_rows @ self.references.T
            + centred_rows.square().sum(1, keepdim=True)
        )
        nearest, neighbour_index = squared_distance.topk(self.k, dim=1, largest=False)
        vote_share = self.share[neighbour_index]
        if self.by_distance:
            # Round-off can make the squared distance to an identical row negative.
            nearest = nearest.clamp(min=0)
            # For unit vectors, half the squared distance is one minus the cosine.
            nearest = nearest / 2 if self.cosine else nearest.sqrt()
            # An identical row has weight 1 / 0: as in scikit-learn, such rows then vote alone.
            is_identical = nearest < 1e-6
            has_identical = is_identical.any(dim=1, keepdim=True)
            vote_share = vote_share * torch.where(
                has_identical, is_identical.float(), 1 / nearest.clamp(min=1e-6)
            )
        vote_sums = (vote_share.unsqueeze(2) * self.values[neighbour_index]).sum(1)
        return tempered(
            vote_sums / vote_share.sum(1, keepdim=True),
            self.task_kind,
            self.temperature,
            self.floor,
        )


class BagsModule(nn.Module):
    """From rows (n, D) of units to probabilities (n, C): each row gets its unit's.

    unit: (n,) int64 from 0 to n - 1, equal for rows of one unit.
    """

    attention: Tensor

    def __init__(self, spec: BagsSpec, head: TrainedHead, temperature: float) -> None:
        super().__init__()
        self.pooling = spec.pooling
        arrays = head.arrays
        self.layers = nn.ModuleList(
            _linear_layer(_float_tensor(weight), _float_tensor(bias))
            for weight, bias in dense_layers(arrays, len(spec.hidden))
        )
        if spec.pooling == "attention":
            tensors = {name: _float_tensor(array) for name, array in arrays.items()}
            self.tanh = _linear_layer(tensors["tanh_weight"], tensors["tanh_bias"])
            self.sigmoid = _linear_layer(tensors["sigmoid_weight"], tensors["sigmoid_bias"])
            self.register_buffer("attention", tensors["attention"])
        self.link = ProbabilityLink(head.task_kind, temperature)

    def forward(self, value: Tensor, unit: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            value = F.relu(layer(value))
        # Sums and maxima over units are scattered into n places, however many units there are: an
        # exported graph cannot have sizes that depend on values.
        if self.pooling == "max":
            places = unit.unsqueeze(1).expand(-1, value.shape[1])
            lowest = torch.full_like(value, -torch.finfo(value.dtype).max)
            pooled = lowest.scatter_reduce(0, places, value, "amax")[unit]
        else:
            # (n, 1) and not (n,), for which the converter to ONNX makes an empty list, and warns.
            weight = torch.ones_like(value[:, :1])
            if self.pooling == "attention":
                gate = torch.tanh(self.tanh(value)) * torch.sigmoid(self.sigmoid(value))
                logits = (gate @ self.attention).unsqueeze(1)
                lowest = torch.full_like(logits, -torch.finfo(logits.dtype).max)
                # Subtracted, so that exp does not overflow.
                largest = lowest.scatter_reduce(0, unit.unsqueeze(1), logits, "amax")
                weight = torch.exp(logits - largest[unit])
            weighted = torch.cat([weight, weight * value], 1)
            sums = torch.zeros_like(weighted).index_add(0, unit, weighted)[unit]
            pooled = sums[:, 1:] / sums[:, :1]
        probabilities: Tensor = self.link(self.layers[-1](pooled))
        return probabilities


def probability_module(head: TrainedHead, temperature: float = 1.0) -> nn.Module:
    """Return a head as a module from features (n, D), or maps (n, D, h, w) for a convolution head,
    to probabilities (n, C) at a temperature, or values. The module of a head on bags also takes
    units (n,).

    Raises ModelError for a kind of head that has no form as a torch module.
    """
    spec = head.spec
    if isinstance(spec, KNNSpec):
        return NeighborModule(spec, head, temperature).eval()
    if isinstance(spec, CentroidSpec):
        return CentroidModule(spec, head, temperature).eval()
    if isinstance(spec, BagsSpec):
        return BagsModule(spec, head, temperature).eval()
    if not HEAD_KINDS[spec.kind].differentiable:
        reason = (
            f" ({spec.estimator}) is code of its own library and"
            if isinstance(spec, SklearnSpec)
            else ""
        )
        raise ModelError(
            f"a head of kind {spec.kind}{reason} cannot be put into a graph. Use headrace predict, "
            "--format safetensors, or the best head of another kind (logistic, mlp, …)"
        )
    logits = head_module(spec, head.arrays, head.task_kind)
    return nn.Sequential(logits, ProbabilityLink(head.task_kind, temperature)).eval()
