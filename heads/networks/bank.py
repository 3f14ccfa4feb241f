"""Banks of networks of any kind: specs × folds, halving, early stopping, refits.

N rows, V views, C outputs. What is special to a kind of network is in its `Family`.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from headrace.heads.arrays import Array, Arrays, Doubles, Floats, Index
from headrace.heads.data.checks import check_finite, row_weights
from headrace.heads.data.standardize import chunks
from headrace.heads.data.streamed import StreamedRows, StreamedStack
from headrace.heads.data.task import REFIT, TaskKind
from headrace.heads.data.training_data import TrainingData
from headrace.heads.networks.kind import CONV, MLP, ConvSpec, NetworkSpec
from headrace.heads.networks.mlp_batch import StreamedTensor
from headrace.heads.networks.mlp_data import FoldData, prepare
from headrace.heads.networks.mlp_training import Batch, BatchTraining, HeadState
from headrace.heads.spec import FitResult, Halving

Stacked = Array | StreamedStack  # (V, N, D, …)
Spec = TypeVar("Spec", bound=NetworkSpec)

ROWS_AT_ONCE = 4096  # held-out rows that are read from shards and predicted at once


@dataclass(frozen=True)
class Family(Generic[Spec]):
    """What differs between kinds of networks."""

    # Heads whose specs have equal keys can train side by side. The key's last item: whether the
    # features are standardized.
    batch_key: Callable[[Spec], tuple[Any, ...]]
    head_bytes: Callable[[Spec], int]  # memory that one head of a batch takes
    batch_bytes: int  # on a CPU, heads side by side take at most so much
    # Makes the batch of some specs from their data and their fold.
    make_batch: Callable[[list[Spec], FoldData, int], Batch]
    # Converts a head's best parameters (`Batch.best_layers`) to arrays for raw features.
    to_arrays: Callable[[Any, FoldData], Arrays]


@dataclass(frozen=True)
class Bank(Generic[Spec]):
    """The inputs of a bank in the form that its parts share."""

    stacked: Stacked
    features: torch.Tensor | StreamedTensor  # (V·N, D, …) on the device
    rows: TrainingData
    weight: Doubles
    specs: Sequence[Spec]
    family: Family[Spec]
    prepared: dict[tuple[int, bool], FoldData] = field(default_factory=dict)

    def data(self, fold: int, *, standardize: bool) -> FoldData:
        """Return a fold's data, prepared once: its means and deviations read all features."""
        if (fold, standardize) not in self.prepared:
            self.prepared[fold, standardize] = prepare(
                self.stacked, self.features, self.rows, self.weight, fold, standardize=standardize
            )
        return self.prepared[fold, standardize]

    def training_makers(
        self, states: Sequence[HeadState], *, ranked: bool
    ) -> list[Callable[[], BatchTraining]]:
        """Return functions that make the batches of these heads, all of one fold.

        They are called one by one, because the parameters of a batch take memory.
        """
        groups: dict[tuple[Any, ...], list[HeadState]] = {}
        for state in states:
            if state.error is None:
                groups.setdefault(self.family.batch_key(self.specs[state.spec_index]), []).append(
                    state
                )
        training_makers: list[Callable[[], BatchTraining]] = []
        for group in groups.values():
            n_batches = 1
            if self.features.device.type == "cpu":
                head_bytes = max(
                    self.family.head_bytes(self.specs[state.spec_index]) for state in group
                )
                heads_per_batch = max(1, self.family.batch_bytes // head_bytes)
                n_batches = -(-len(group) // heads_per_batch)
            bounds = [i * len(group) // n_batches for i in range(n_batches + 1)]
            training_makers += [
                partial(self._make_training, group[start:stop], ranked)
                for start, stop in itertools.pairwise(bounds)
            ]
        return training_makers

    def _make_training(self, chunk: list[HeadState], ranked: bool) -> BatchTraining:
        specs = [self.specs[state.spec_index] for state in chunk]
        data = self.data(chunk[0].fold, standardize=self.family.batch_key(specs[0])[-1])
        make_batch = partial(self.family.make_batch, specs, data, chunk[0].fold)
        return BatchTraining(specs, chunk, data, make_batch, len(self.stacked), ranked)

    def fit(self, state: HeadState) -> FitResult:
        """Return the fit of a head that has left its batch."""
        spec = self.specs[state.spec_index]
        result = FitResult(spec, state.fold, iterations=state.epochs, seconds=state.seconds)
        if state.error is not None or state.data is None:
            return replace(result, error=state.error)
        arrays = self.family.to_arrays(state.best_layers, state.data)
        validation = None
        if state.fold != REFIT:
            validation, learned = self.predict_held_out(spec, arrays, state.data.held_out)
            arrays |= learned
        return replace(result, arrays=arrays, objective=state.training_loss, validation=validation)

    def predict_held_out(
        self, spec: Spec, arrays: Arrays, held_out: Index
    ) -> tuple[Floats, Arrays]:
        """Return predictions (n, C) of held-out rows, the mean over their views.

        Also returns arrays of the head that a kind learns from them: none here.
        """
        kind = CONV if isinstance(spec, ConvSpec) else MLP
        per_view = [
            np.concatenate(
                [
                    kind.predict(spec, arrays, view[rows], self.rows.task_kind, 1.0)
                    for rows in chunks(held_out, ROWS_AT_ONCE)
                ]
            )
            for view in self.stacked
        ]
        # Of a single view the mean would be a copy.
        mean = np.stack(per_view).mean(0, dtype=np.float32) if len(per_view) > 1 else per_view[0]
        return mean, {}


def stack(X: Array | StreamedRows, dimensions: int) -> Stacked:
    """Return features with a view axis in front, added if X has `dimensions` axes only."""
    if isinstance(X, StreamedRows):
        return StreamedStack(X)
    return X if X.ndim == dimensions + 1 else X[None]


def on_device(stacked: Stacked, device: str) -> torch.Tensor | StreamedTensor:
    """Return the rows of all views (V·N, D, …). Raises HeadError for NaN and infinity."""
    if isinstance(stacked, StreamedStack):
        return StreamedTensor(stacked.rows, torch.device(device))
    views, n = stacked.shape[:2]
    check_finite(stacked.reshape(views, n, -1))
    return as_tensor(stacked.reshape(views * n, *stacked.shape[2:])).to(device)


def fit_networks(
    stacked: Stacked,
    data: TrainingData,
    specs: Sequence[Spec],
    family: Family[Spec],
    *,
    refit: bool,
    device: str,
    halving: Halving | None,
) -> list[FitResult]:
    """Fit a bank as `fit_mlp_bank` does, for any family. stacked: (V, N, D, …)."""
    weight = row_weights(data.sample_weight, stacked.shape[1])
    bank = Bank(stacked, on_device(stacked, device), data, weight, specs, family)
    return train_networks(bank, refit=refit, halving=halving)


def train_networks(bank: Bank[Spec], *, refit: bool, halving: Halving | None) -> list[FitResult]:
    """Train the specs of a bank on every fold, and with `refit` on all rows."""
    data, specs = bank.rows, bank.specs
    states: list[HeadState] = []
    training_makers: list[Callable[[], BatchTraining]] = []
    for held_out_fold in data.folds:
        fold_states = [
            HeadState(i, held_out_fold, spec.epochs, error=spec_error(spec, data.task_kind))
            for i, spec in enumerate(specs)
        ]
        states += fold_states
        training_makers += bank.training_makers(fold_states, ranked=halving is not None)
    surviving = set(range(len(specs)))
    if halving is None:
        for make_training in training_makers:
            make_training().train()
    else:
        # All at once: a rung compares all heads.
        trainings = [make_training() for make_training in training_makers]
        for epoch in halving.after:
            for training in trainings:
                training.train(epoch)
            surviving = _survivors(states, surviving, halving.keep)
            for training in trainings:
                dropped = [s for s in training.states if s.spec_index not in surviving]
                training.remove(dropped)
        for training in trainings:
            training.train()
    if refit:
        refit_states = [
            _refit_state(i, specs[i], states, data.task_kind) for i in sorted(surviving)
        ]
        states += refit_states
        for make_training in bank.training_makers(refit_states, ranked=False):
            make_training().train()
    states.sort(key=lambda state: (state.spec_index, state.fold == REFIT, state.fold))
    return [bank.fit(state) for state in states]


def spec_error(spec: NetworkSpec, task: TaskKind) -> str | None:
    """Return why this spec cannot be trained at all, or None."""
    if any(width < 1 for width in spec.hidden):
        return f"hidden widths {spec.hidden} must be at least 1"
    if isinstance(spec, ConvSpec) and min(spec.channels, default=0) < 1:
        return f"channels {spec.channels} must name at least one layer of at least 1 channel"
    if not spec.learning_rate > 0 or spec.weight_decay < 0:
        return (
            f"learning_rate {spec.learning_rate} must be above 0 and weight_decay "
            f"{spec.weight_decay} at least 0"
        )
    if not 0 <= spec.dropout < 1 or not 0 <= spec.label_smoothing < 1:
        return (
            f"dropout {spec.dropout} and label_smoothing {spec.label_smoothing} must be in [0, 1)"
        )
    if spec.batch_size < 1 or spec.epochs < 1 or spec.patience < 1:
        return (
            f"batch_size {spec.batch_size}, epochs {spec.epochs} and patience {spec.patience} must "
            "be at least 1"
        )
    if task == "regression" and (spec.class_weight != "none" or spec.label_smoothing):
        return "class_weight and label_smoothing have no meaning for regression: leave them out"
    return None


def as_tensor(array: Array) -> torch.Tensor:
    """Return a tensor of the same memory; it may be read-only, for nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _survivors(states: Sequence[HeadState], surviving: set[int], keep: float) -> set[int]:
    """Return the share `keep` of the specs with the best mean rank over folds; at least one."""
    mean_rank = {}
    for i in surviving:
        spec_states = [state for state in states if state.spec_index == i]
        if all(state.error is None for state in spec_states):
            mean_rank[i] = float(np.mean([state.best_rank for state in spec_states]))
    ranked_specs = sorted(mean_rank, key=lambda i: (-mean_rank[i], i))
    return set(ranked_specs[: max(1, round(keep * len(ranked_specs)))])


def _refit_state(
    spec_index: int, spec: NetworkSpec, states: Sequence[HeadState], task: TaskKind
) -> HeadState:
    """Return the state of a head for all rows, to train for the mean best epoch of its folds."""
    spec_states = [state for state in states if state.spec_index == spec_index]
    best_epochs = [state.best_epoch for state in spec_states if state.error is None]
    error = spec_error(spec, task)
    if spec_states and not best_epochs and error is None:
        error = f"not trained on all rows, because it failed in every fold: {spec_states[0].error}"
    epochs = max(1, round(float(np.mean(best_epochs)))) if best_epochs else spec.epochs
    return HeadState(spec_index, REFIT, epochs, error=error)
