"""The parity check: before anything is trained, the network has to predict what the cached head
predicted.

n rows, C outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.heads.data.task import TaskKind
from headrace.heads.link import link
from headrace.pipelines.finetune.errors import FinetuneRefused
from headrace.pipelines.models.torch_head import Head
from headrace.pipelines.models.torch_network import Network

# Of probabilities; for regression in deviations of the stored predictions. What rounding leaves
# (the order of sums, a feature on the other side of a float16 step, maps stored in float16) is a
# hundred times less in the tests.
LARGEST = 0.01
MEAN = 0.001
# Of the features' own spread, as a root mean square: predictions that are all sure do not show a
# small mistake, features do.
FEATURES = 0.005


@dataclass(frozen=True)
class Parity:
    """How far the assembled network's predictions are from the cached head's, over some of the
    run's own images.
    """

    rows: int
    # difference of a probability (regression: in deviations of the stored predictions)
    largest: float
    mean: float
    features: float  # root mean square difference of the features, in shares of their own spread

    @property
    def holds(self) -> bool:
        """Within the tolerance; not for numbers that are none."""
        return self.largest <= LARGEST and self.mean <= MEAN and self.features <= FEATURES


def check_parity(
    network: Network,
    heads: Mapping[int, Head],
    inputs: Sequence[Tensor],
    fold: npt.NDArray[np.int16],
    expected: npt.NDArray[np.float32],
    cached: Sequence[npt.NDArray[np.float32]],
    task: TaskKind,
    *,
    features_below: Sequence[Tensor | None] = (None,),
) -> Parity:
    """Compare the features and predictions of `network`, in the mode that it is in, with the stored
    ones.

    heads: the head of each fold, which take the place of the network's own. inputs: one tensor (n,
    …) per view of the same rows (predictions are averaged over views), with its `features_below`.
    fold: (n,) in which each row was held out.
    expected: (n, C) out-of-fold predictions. cached: per view the features (n, …) that they were
    made from. Raises FinetuneRefused, with both figures and what usually is the reason.
    """
    features = [
        _features(network, one, own) for one, own in zip(inputs, features_below, strict=True)
    ]
    predicted = np.mean(
        [_predict(heads, one, fold, task) for one in features], axis=0, dtype=np.float64
    )
    apart = [_apart(one, own) for one, own in zip(features, cached, strict=True)]
    unit = (
        np.ones(1) if task != "regression" else np.maximum(expected.std(0, dtype=np.float64), 1e-12)
    )
    difference = np.abs(predicted - expected) / unit
    mean = float(difference.mean()) if len(expected) else 0.0
    parity = Parity(len(expected), float(difference.max(initial=0)), mean, max(apart))
    if not parity.holds:
        raise FinetuneRefused(
            "the network put together from the backbone and the head does not predict what the "
            f"cached head predicted: over {parity.rows} images the predictions differ by "
            f"{parity.largest:.3g} at most and {parity.mean:.2g} on average, the features by "
            f"{parity.features:.2g} of their spread; allowed are {LARGEST:g}, {MEAN:g} and "
            f"{FEATURES:g}. Usual reasons: another resize, crop, mean or std than the features "
            "were made with, other weights, another tap, classes in another order, or batch "
            "normalisation in training mode. Nothing was trained; the head stays as it is"
        )
    return parity


def _features(network: Network, inputs: Tensor, features_below: Tensor | None) -> Tensor:
    parts = [(start, inputs[start : start + 16]) for start in range(0, len(inputs), 16)]
    with torch.no_grad():
        return torch.cat(
            [
                network.features(
                    part,
                    None if features_below is None else features_below[start : start + len(part)],
                )
                for start, part in parts
            ]
        )


def _predict(
    heads: Mapping[int, Head], features: Tensor, fold: npt.NDArray[Any], task: TaskKind
) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        parts = {
            number: link(heads[number](features).cpu().numpy(), task)
            for number in sorted(set(fold.tolist()))
        }
    return np.stack([parts[int(number)][row] for row, number in enumerate(fold)])


def _apart(features: Tensor, cached: npt.NDArray[np.float32]) -> float:
    found, wanted = (
        features.flatten(1).double().cpu().numpy(),
        cached.reshape(len(cached), -1).astype(np.float64),
    )
    spread = np.sqrt(((wanted - wanted.mean(0)) ** 2).mean())
    return float(np.sqrt(((found - wanted) ** 2).mean()) / max(spread, 1e-12))
