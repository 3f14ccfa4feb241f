"""What the networks of one fold train on, and the way back from standardized to raw coordinates.

N rows, D features, C outputs, R columns of side inputs, M numbers that may be missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from headrace.heads.arrays import Array, Arrays, Doubles, Index
from headrace.heads.data.side_columns import fold_fills, imputed_numbers, weight_with_fills
from headrace.heads.data.standardize import Moments, merge, moments
from headrace.heads.data.streamed import StreamedStack
from headrace.heads.data.training_data import TrainingData
from headrace.heads.networks.mlp_batch import Rows, StreamedTensor


@dataclass(frozen=True)
class Imputed:
    """What stands for missing numbers of side columns in a fold."""

    # columns of the input, each followed by that which is 1 for a missing number
    numbers: list[int]
    fills: Array  # (M,) float64, the mean of each over the fold's training rows

    def fill(self, rows: Array) -> None:
        """Fill missing numbers of rows (n, D, …), in place."""
        for column, fill in zip(self.numbers, self.fills, strict=True):
            rows[:, column] += rows[:, column + 1] * np.float32(fill)


@dataclass
class FoldData:
    """The data of one fold as its heads see it."""

    rows: Rows
    train: Index  # numbers of the training rows that have a weight
    held_out: Index
    mean: Array  # (D,) float64, of the features
    scale: Array  # (D,) float64
    target_mean: Array  # (C,) float64; 0 and 1 unless regression
    target_scale: Array
    imputed: Imputed | None = None


def prepare(
    stacked: Array | StreamedStack,
    features: torch.Tensor | StreamedTensor,
    data: TrainingData,
    weight: Doubles,
    held_out_fold: int,
    *,
    standardize: bool,
) -> FoldData:
    """Return the data of a fold, scaled and filled in by its training rows."""
    train = weighted_training_rows(data, weight, held_out_fold)
    imputed = _imputed(stacked, data, train)
    mean, scale = np.zeros(stacked.shape[2]), np.ones(stacked.shape[2])
    if standardize:
        mean, scale = mean_and_scale(stacked, train, imputed)
        if data.side:
            # A column of one value learns nothing, such as that of a level which no training row
            # has. Divided by infinity, it never meets its first weights in held-out rows either.
            inputs = _side_inputs(stacked, data)[train]
            scale[data.side[0].start :][(inputs == inputs[:1]).all(0)] = np.inf
    return fold_data(features, data, weight, held_out_fold, mean, scale, imputed)


def fold_data(
    features: torch.Tensor | StreamedTensor,
    data: TrainingData,
    weight: Doubles,
    held_out_fold: int,
    mean: Array,
    scale: Array,
    imputed: Imputed | None = None,
) -> FoldData:
    """Encode targets and weights of a fold's rows, with the scaling (D,) of their features."""
    n, target, outputs, task = len(data.fold), data.target, data.n_outputs, data.task_kind
    held_out = data.held_out_rows(held_out_fold)
    train = weighted_training_rows(data, weight, held_out_fold)
    shape = (-1,) + (1,) * (len(features.shape) - 2)  # of maps, (D, 1, 1)
    target_mean, target_scale = np.zeros(outputs), np.ones(outputs)
    plain = weight / weight[train].mean()
    balanced, label_weight = plain, None
    if task == "single":
        encoded = torch.from_numpy(np.ascontiguousarray(target, np.int64))
        count = np.bincount(target[train], weights=weight[train], minlength=outputs)
        balance = weight[train].sum() / (np.count_nonzero(count) * np.maximum(count, 1e-300))
        balanced = weight * np.where(count > 0, balance, 0)[target]
        balanced = balanced / balanced[train].mean()
    else:
        values = np.asarray(target, np.float64).reshape(n, outputs)
        if task == "regression":
            target_mean, target_scale = values[train].mean(0), values[train].std(0)
            target_scale[target_scale == 0] = 1
            values = (values - target_mean) / target_scale
        else:
            present = np.average(values[train], axis=0, weights=weight[train])
            shares = np.stack([1 - present, present])
            label_weight = np.where(shares > 0, 0.5 / np.maximum(shares, 1e-300), 0)
        encoded = torch.from_numpy(np.ascontiguousarray(values.T, np.float32))

    def on_device(values: Array) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(features.device)

    rows = Rows(
        features,
        n,
        encoded.to(features.device),
        on_device(np.stack([plain, balanced])),
        None if label_weight is None else on_device(label_weight),
        on_device(mean).view(shape),
        on_device(1 / scale).view(shape),
        task,
        outputs,
    )
    if imputed is not None:
        numbers = torch.tensor(imputed.numbers, device=features.device)
        rows = replace(rows, imputed=(numbers, on_device(imputed.fills)))
    return FoldData(rows, train, held_out, mean, scale, target_mean, target_scale, imputed)


def weighted_training_rows(data: TrainingData, weight: Doubles, held_out_fold: int) -> Index:
    """Return the training rows of a fold that have a weight. Raises ValueError if none has."""
    train = data.training_rows(held_out_fold)
    train = train[weight[train] > 0]
    if len(train) == 0:
        raise ValueError(
            f"fold {held_out_fold} leaves no row to train on: use fewer folds, or add images"
        )
    return train


def _side_inputs(stacked: Array | StreamedStack, data: TrainingData) -> Array:
    """Return the side columns (N, R)."""
    if isinstance(stacked, StreamedStack):
        return stacked.rows.side
    return np.asarray(stacked[0][:, data.side[0].start :])


def _imputed(stacked: Array | StreamedStack, data: TrainingData, train: Index) -> Imputed | None:
    numbers = imputed_numbers(data.side)
    if not numbers:
        return None
    inputs = _side_inputs(stacked, data)[train]
    return Imputed(numbers, fold_fills(inputs, data.side[0].start, numbers))


def mean_and_scale(
    stacked: Array | StreamedStack, train: Index, imputed: Imputed | None = None
) -> tuple[Doubles, Doubles]:
    """Return mean and scale (D,) float64 of the training rows, over views and positions.

    The scale is the standard deviation, or 1 for a feature that varies by less than float32 can
    tell from its mean. Raises ValueError for features that are not finite.
    """
    positions = int(np.prod(stacked.shape[3:], dtype=np.int64))
    step = max(1, 4096 // positions)
    parts: list[Moments] = []
    for view in stacked:
        for start in range(0, len(train), step):
            row_block = train[start : start + step]
            values = view[row_block].reshape(len(row_block), stacked.shape[2], positions)
            if imputed is not None:
                imputed.fill(values)
            parts.append(moments(values.transpose(0, 2, 1).reshape(-1, stacked.shape[2])))
    whole = merge(parts)
    deviation = np.sqrt(whole.squares / whole.count)
    # More than `Moments.constant` finds, which is for float64: networks standardize in float32, and
    # of such a feature they would see the rounding of (value - mean) only.
    is_constant = deviation <= 10 * np.finfo(np.float32).eps * np.abs(whole.mean)
    return whole.mean, np.where(is_constant, 1.0, deviation)


def folded_arrays(layers: Sequence[tuple[Array, Array]], data: FoldData) -> Arrays:
    """Return weight0, bias0, weight1, … float32 of layers, for raw inputs and targets.

    Standardization, and what stands for missing numbers, are folded into the layers.
    """
    # float64: weights divided by small deviations, times large means, cancel in the bias.
    exact = [(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in layers]
    first, shift = exact[0]
    first = first / data.scale
    shift = shift - first @ data.mean
    if data.imputed is not None:
        first = weight_with_fills(first, data.imputed.numbers, data.imputed.fills)
    exact[0] = (first, shift)
    last, shift = exact[-1]
    exact[-1] = last * data.target_scale[:, None], shift * data.target_scale + data.target_mean
    arrays = {}
    for layer, (weight, bias) in enumerate(exact):
        arrays[f"weight{layer}"] = weight.astype(np.float32)
        arrays[f"bias{layer}"] = bias.astype(np.float32)
    return arrays
