"""The parity check: before training, the network must predict what the cached head predicted.

n rows, C outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.count_text import count_text
from headrace.heads.data.task import TaskKind
from headrace.heads.link import link
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.torch_head import Head
from headrace.pipelines.models.torch_network import Network

# Largest and mean difference of probabilities; for a regression, in standard deviations of the
# stored predictions. Differences by rounding (order of sums, float16 features and maps) are a
# hundred times smaller in the tests.
MAX_DIFFERENCE = 0.01
MAX_MEAN_DIFFERENCE = 0.001
# Root mean square difference of features, as a share of their spread. Where a head is certain of
# every image, predictions do not show a wrong resize, but features do.
MAX_FEATURE_ERROR = 0.005


@dataclass(frozen=True)
class ParityResult:
    """Differences between the network and the cached head on some images, each measured as the
    limit that it is held against.
    """

    rows: int
    largest: float
    mean: float
    features: float

    @property
    def holds(self) -> bool:
        """Whether all differences are within their tolerance; NaN is not."""
        return (
            self.largest <= MAX_DIFFERENCE
            and self.mean <= MAX_MEAN_DIFFERENCE
            and self.features <= MAX_FEATURE_ERROR
        )


def check_parity(
    network: Network,
    head_of_fold: Mapping[int, Head],
    view_inputs: Sequence[Tensor],
    fold_of_row: npt.NDArray[np.int16],
    expected_predictions: npt.NDArray[np.float32],
    cached_features: Sequence[npt.NDArray[np.float32]],
    task_kind: TaskKind,
    *,
    features_below: Sequence[Tensor | None] = (None,),
) -> ParityResult:
    """Compare features and predictions of `network`, in its present mode, with the stored ones.

    head_of_fold: the head of each fold, used in place of the network's head.
    view_inputs, features_below: inputs of the network (n, …) for each view of the same rows;
    predictions are averaged over views.
    fold_of_row: (n,) the fold that held out each row.
    expected_predictions: (n, C) out-of-fold predictions of the head.
    cached_features: for each view the features (n, …) from which the head predicted those.

    Raises ModelError, with the differences and the usual reasons.
    """
    features = [
        _network_features(network, view_input, view_features_below)
        for view_input, view_features_below in zip(view_inputs, features_below, strict=True)
    ]
    view_predictions = [
        _fold_predictions(head_of_fold, view_features, fold_of_row, task_kind)
        for view_features in features
    ]
    predicted = np.mean(view_predictions, axis=0, dtype=np.float64)
    feature_errors = [_feature_error(*pair) for pair in zip(features, cached_features, strict=True)]
    prediction_scale = np.ones(1)
    if task_kind == "regression":
        # Numbers may be metres or grams, and are measured in their spread; probabilities have one
        # scale.
        prediction_scale = np.maximum(expected_predictions.std(0, dtype=np.float64), 1e-12)
    differences = np.abs(predicted - expected_predictions) / prediction_scale
    n_rows, largest = len(expected_predictions), float(differences.max(initial=0))
    mean = float(differences.mean()) if n_rows else 0.0
    parity = ParityResult(n_rows, largest, mean, max(feature_errors))
    if not parity.holds:
        raise ModelError(
            "the network put together from the backbone and the head does not predict what the "
            f"cached head predicted: over {count_text(parity.rows, 'image')} the predictions "
            f"differ by {parity.largest:.3g} at most and {parity.mean:.2g} on average, the "
            f"features by {parity.features:.2g} of their spread; allowed are "
            f"{MAX_DIFFERENCE:g}, {MAX_MEAN_DIFFERENCE:g} and {MAX_FEATURE_ERROR:g}. Usual "
            "reasons: another resize, crop, mean or std than the features were made with, other "
            "weights, another tap, classes in another order, or batch normalization in training "
            "mode. Nothing was trained; the head stays as it is"
        )
    return parity


def _network_features(network: Network, inputs: Tensor, features_below: Tensor | None) -> Tensor:
    # Few images at once: the maps of all of them might not fit on a GPU.
    feature_blocks = []
    with torch.no_grad():
        for start in range(0, len(inputs), 16):
            rows = slice(start, start + 16)
            below = None if features_below is None else features_below[rows]
            feature_blocks.append(network.features(inputs[rows], below))
    return torch.cat(feature_blocks)


def _fold_predictions(
    head_of_fold: Mapping[int, Head],
    features: Tensor,
    fold_of_row: npt.NDArray[Any],
    task_kind: TaskKind,
) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        predictions_of_fold = {
            fold: link(head_of_fold[fold](features).cpu().numpy(), task_kind)
            for fold in sorted(set(fold_of_row.tolist()))
        }
    return np.stack([predictions_of_fold[int(fold)][row] for row, fold in enumerate(fold_of_row)])


def _feature_error(features: Tensor, stored_features: npt.NDArray[np.float32]) -> float:
    network_features = features.flatten(1).double().cpu().numpy()
    cached_features = stored_features.reshape(len(stored_features), -1).astype(np.float64)
    spread = np.sqrt(((cached_features - cached_features.mean(0)) ** 2).mean())
    return float(np.sqrt(((network_features - cached_features) ** 2).mean()) / max(spread, 1e-12))
