"""A bank of heads on bags: specs × folds, trained side by side over the rows of units.

N rows, U units, D features, C outputs. Heads that share a fold, their widths, pooling and batch
size share their minibatches, which are whole units (`batch.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from headrace.heads.arrays import Array, Arrays, Floats, Index
from headrace.heads.bags.batch import BagBatch, BagRows
from headrace.heads.bags.kind import BagsSpec
from headrace.heads.bags.pooling import predict_units
from headrace.heads.data.checks import check_specs, row_weights
from headrace.heads.data.training_data import TrainingData
from headrace.heads.errors import HeadError
from headrace.heads.kind import INSTANCE_WEIGHT
from headrace.heads.networks.bank import Bank, Family, on_device, stack, train_networks
from headrace.heads.networks.mlp import Precision, reduced_precision
from headrace.heads.networks.mlp_data import (
    FoldData,
    fold_data,
    mean_and_scale,
    weighted_training_rows,
)
from headrace.heads.spec import FitResult, Halving

# Parameters, moments and best parameters of the heads that train side by side on a CPU.
CPU_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Units:
    """Units of some rows: which rows each has, and what it is trained on."""

    order: Index  # (N,) row numbers, unit after unit
    offsets: Index  # (U + 1,) where each unit begins in `order`, and its length
    data: TrainingData  # target, fold and weight of each unit; X is that of the rows

    def rows_of(self, units: Array) -> Index:
        """Return the row numbers of some units, unit after unit."""
        unit_rows = [self.order[self.offsets[unit] : self.offsets[unit + 1]] for unit in units]
        return np.concatenate(unit_rows) if unit_rows else np.zeros(0, np.int64)


def units_of(data: TrainingData) -> Units:
    """Return the units of rows. A unit's weight is the mean weight of its rows.

    Raises HeadError if there are none, or a unit has several targets or rows in several folds.
    """
    if data.unit is None:
        raise HeadError(
            "heads of kind bags are trained on units of several images, and the task has none: "
            "name their column, task.unit: patient"
        )
    names, codes = np.unique(np.asarray(data.unit), return_inverse=True)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    sizes = np.bincount(codes)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    first_rows = order[offsets[:-1]]
    for values, what, advice in (
        (data.fold, "folds", "keep a unit's images on one side of every split, task.group"),
        (data.target, "targets", "give all images of a unit one target, or take smaller units"),
    ):
        unit_values = values[first_rows][codes]
        is_other = (values != unit_values).reshape(len(values), -1).any(1)
        if is_other.any():
            unit = names[codes[int(is_other.argmax())]]
            n_mixed = len(np.unique(codes[is_other]))
            raise HeadError(
                f"unit {unit!s} and {n_mixed - 1:,} more of {len(names):,} have images of several "
                f"{what}: {advice}"
            )
    weight = data.sample_weight
    return Units(
        order,
        offsets,
        replace(
            data,
            target=data.target[first_rows],
            fold=data.fold[first_rows],
            sample_weight=None if weight is None else np.bincount(codes, weight) / sizes,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class BagBank(Bank[BagsSpec]):
    """The inputs of a bank whose rows are units of rows."""

    units: Units

    def data(self, fold: int, *, standardize: bool) -> FoldData:
        """Return a fold's data, prepared once, scaled by the rows of its training units."""
        if (fold, standardize) not in self.prepared:
            train = weighted_training_rows(self.rows, self.weight, fold)
            n_features = self.stacked.shape[2]
            mean, scale = np.zeros(n_features), np.ones(n_features)
            if standardize:
                mean, scale = mean_and_scale(self.stacked, np.sort(self.units.rows_of(train)))
            plain = fold_data(self.features, self.rows, self.weight, fold, mean, scale)
            rows = BagRows(
                **vars(plain.rows), instances=self.units.order, offsets=self.units.offsets
            )
            self.prepared[fold, standardize] = replace(plain, rows=rows)
        return self.prepared[fold, standardize]

    def predict_held_out(
        self, spec: BagsSpec, arrays: Arrays, held_out: Index
    ) -> tuple[Floats, Arrays]:
        """Return predictions (n, C) of the held-out units' rows in order, each that of its unit.

        Also returns the weight of each row in its unit's prediction.
        """
        assert self.rows.unit is not None
        (view,) = self.stacked
        rows = np.sort(self.units.rows_of(held_out))
        predicted, weights = predict_units(
            spec, arrays, _Rows(view, rows), self.rows.unit[rows], self.rows.task_kind
        )
        return predicted, {INSTANCE_WEIGHT: weights}


class _Rows:
    """Rows of a view by their position in a selection, read when they are indexed."""

    def __init__(self, view: Any, rows: Index) -> None:
        self.view, self.rows = view, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Array) -> Array:
        return np.asarray(self.view[self.rows[index]])


def fit_bags_bank(
    data: TrainingData,
    specs: Sequence[BagsSpec],
    *,
    refit: bool = True,
    device: str = "cpu",
    halving: Halving | None = None,
    precision: Precision = "auto",
) -> list[FitResult]:
    """Train every spec on every fold, and with `refit` on all units, as `fit_mlp_bank` does.

    data: X (N, D), in memory or streamed from shards, with the unit of each row. Early stopping is
    by the loss of the held-out units. `validation` has for each row the prediction of its unit; the
    array `instance_weight` (n_held_out,) is the weight of each row in it. precision: of rows and
    hidden values in training.

    Raises HeadError where `units_of` does, and ValueError for features that are not finite.
    """
    check_specs(specs, "BagsSpec()")
    units = units_of(data)
    stacked = stack(data.X, 2)
    n_features, n_outputs = data.X.shape[1], data.n_outputs

    def head_bytes(spec: BagsSpec) -> int:
        widths = (n_features, *spec.hidden)
        n_weights = sum((i + 1) * o for i, o in zip(widths, (*spec.hidden, n_outputs), strict=True))
        # float32: parameters, their two moments and the best ones.
        return 16 * (n_weights + 2 * spec.attention_width * (widths[-1] + 1))

    def make_batch(chunk: list[BagsSpec], fold: FoldData, held_out_fold: int) -> BagBatch:
        assert isinstance(fold.rows, BagRows)
        where = torch.device(device)
        reduced = reduced_precision(chunk[0], n_features, data.task_kind, where, precision)
        dtype = torch.bfloat16 if reduced else torch.float32
        return BagBatch(chunk, fold.rows, fold=held_out_fold, device=where, dtype=dtype)

    family = Family(
        batch_key=lambda spec: (
            spec.pooling,
            spec.hidden,
            spec.attention_width if spec.pooling == "attention" else 0,
            spec.batch_size,
            spec.standardize,
        ),
        head_bytes=head_bytes,
        batch_bytes=CPU_BATCH_BYTES,
        make_batch=make_batch,
        to_arrays=_raw_arrays,
    )
    weight = row_weights(units.data.sample_weight, len(units.data.fold))
    unit_rows = replace(units.data, unit=np.asarray(data.unit))
    features = on_device(stacked, device)
    bank = BagBank(stacked, features, unit_rows, weight, specs, family, units=units)
    return train_networks(bank, refit=refit, halving=halving)


def _raw_arrays(parameters: Arrays, data: FoldData) -> Arrays:
    """Return a head's parameters for raw features and targets: standardization is folded in."""
    arrays = {name: value.astype(np.float64) for name, value in parameters.items()}
    n_hidden = sum(name.startswith("weight") for name in arrays) - 1
    # The layers that read features. Without hidden layers the last one does so too, of pooled
    # features: weights of a unit's rows sum to one and scales are positive, so that pooling
    # standardized features is standardizing pooled ones.
    readers = [("weight0", "bias0")]
    if not n_hidden and "attention" in arrays:
        readers += [("tanh_weight", "tanh_bias"), ("sigmoid_weight", "sigmoid_bias")]
    for weight, bias in readers:
        arrays[weight] = arrays[weight] / data.scale
        arrays[bias] = arrays[bias] - arrays[weight] @ data.mean
    weight, bias = f"weight{n_hidden}", f"bias{n_hidden}"
    arrays[weight] = arrays[weight] * data.target_scale[:, None]
    arrays[bias] = arrays[bias] * data.target_scale + data.target_mean
    if "attention" in arrays:
        arrays["attention"] = arrays["attention"][0]
    return {name: value.astype(np.float32) for name, value in arrays.items()}
