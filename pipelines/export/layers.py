"""Trained heads as torch modules: the same function as `heads.predict_head`, in a form that can be
exported.

n rows, D features, C outputs, k neighbours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.heads.data.task import TaskKind
from headrace.heads.evaluate.temperature import FARTHEST, FLOOR, floor_of
from headrace.heads.neighbors.bank import CENTROID_TEMPERATURE
from headrace.heads.persist import TrainedHead
from headrace.heads.spec import (
    CentroidSpec,
    ConvSpec,
    KNNSpec,
    LogisticSpec,
    MLPSpec,
    RidgeSpec,
    SklearnSpec,
)
from headrace.pipelines.models.model import ModelError


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


class Linked(nn.Module):
    """From decisions (n, C) to probabilities at a temperature, for regression values; one column of
    a single-label task is log-odds.
    """

    def __init__(self, task_kind: TaskKind, scale: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.task_kind, self.scale, self.temperature = task_kind, scale, temperature

    def forward(self, decision: Tensor) -> Tensor:
        if self.task_kind == "regression":
            return decision
        decision = decision * self.scale
        if self.task_kind != "multi" and decision.shape[1] > 1:
            return softmax_at(decision, self.temperature)
        if self.temperature != 1:
            decision = decision.clamp(-FARTHEST, FARTHEST) / self.temperature
        second = torch.sigmoid(decision)
        return second if self.task_kind == "multi" else torch.cat([1 - second, second], dim=1)


class _Perceptron(nn.Module):
    """Linear layers with ReLU between them; before them convolutions on standardised maps, where
    there are any.
    """

    def __init__(
        self,
        head: TrainedHead,
        convolutions: int,
        layers: list[str],
        scale: float,
        temperature: float,
    ) -> None:
        super().__init__()
        for name, array in head.arrays.items():
            self.register_buffer(name, torch.from_numpy(np.array(array, np.float32)))
        self.convolutions, self.layers = convolutions, layers
        self.link = Linked(head.task_kind, scale, temperature)

    def forward(self, value: Tensor) -> Tensor:
        if self.convolutions:
            value = (value - self.mean[:, None, None]) * self.inverse_scale[:, None, None]  # type: ignore[index]
            for place in range(self.convolutions):
                value = F.relu(
                    F.conv2d(
                        value, self._get(f"kernel{place}"), self._get(f"shift{place}"), padding=1
                    )
                )
            value = value.mean((2, 3))
        for place, suffix in enumerate(self.layers):
            value = F.linear(value, self._get(f"weight{suffix}"), self._get(f"bias{suffix}"))
            if place < len(self.layers) - 1:
                value = F.relu(value)
        return self.link(value)  # type: ignore[no-any-return]

    def _get(self, name: str) -> Tensor:
        return self.get_buffer(name)


class _Centroid(nn.Module):
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


class _Neighbours(nn.Module):
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


def head_module(head: TrainedHead, temperature: float = 1.0) -> nn.Module:
    """Features (n, D), for a convolution head maps (n, D, h, w), to probabilities (n, C) at a
    temperature, for regression values.

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
        return _Neighbours(spec, head, temperature).eval()
    if isinstance(spec, CentroidSpec):
        return _Centroid(spec, head, temperature).eval()
    if isinstance(spec, LogisticSpec | RidgeSpec):
        # Ridge fits -1/+1, not log-odds; see heads.predict.ridge_link.
        return _Perceptron(
            head, 0, [""], 2.0 if isinstance(spec, RidgeSpec) else 1.0, temperature
        ).eval()
    assert isinstance(spec, MLPSpec | ConvSpec)
    layers = [str(place) for place in range(len(spec.hidden) + 1)]
    return _Perceptron(
        head, len(spec.channels) if isinstance(spec, ConvSpec) else 0, layers, 1.0, temperature
    ).eval()
