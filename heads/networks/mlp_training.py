"""The epochs of one batch of networks: train, validate, keep the best, remove finished heads.

K heads, N rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from headrace.heads.arrays import Array, Index
from headrace.heads.networks.kind import NetworkSpec
from headrace.heads.networks.mlp_batch import mean_losses
from headrace.heads.networks.mlp_data import FoldData


class Batch(Protocol):
    """K networks that train side by side. Heads are positions among those still in the batch."""

    def train_epoch(self, order: Index, view: Index, batch_size: int) -> Array:
        """Train on rows `order` (n,), each in the given view (n,); return mean losses (K,)."""

    def outputs(self, index: Index) -> torch.Tensor:
        """Return decisions (K, C, n) for rows of the stacked features."""

    def save_best(self, heads: Sequence[int]) -> None:
        """Make the present parameters of these heads their best ones."""

    def best_layers(self, head: int) -> Any:
        """Return the best parameters of a head, as its family's `to_arrays` takes them."""

    def keep(self, heads: Sequence[int]) -> None:
        """Drop all other heads."""


@dataclass
class HeadState:
    """What is known of one head while it trains and after."""

    spec_index: int
    fold: int
    max_epochs: int
    epochs: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_rank: float = float("-inf")  # higher is better; what halving compares
    training_loss: float = float("nan")
    seconds: float = 0.0
    error: str | None = None
    best_layers: Any = None  # its best parameters, set when it leaves the batch
    data: FoldData | None = None


class BatchTraining:
    """One batch of heads of one fold, its data, and the bookkeeping of epochs.

    ranked: whether heads compete in halving, so that their accuracy is computed too.
    """

    def __init__(
        self,
        specs: Sequence[NetworkSpec],
        states: Sequence[HeadState],
        data: FoldData,
        make_batch: Callable[[], Batch],
        n_views: int,
        ranked: bool,
    ) -> None:
        self.data, self.n_views, self.ranked = data, n_views, ranked
        self.states, self.specs = list(states), list(specs)
        self.batch_size = specs[0].batch_size
        started = time.perf_counter()
        self.batch = make_batch()
        self._add_seconds(started)
        self.epoch = 0

    def train(self, until: int | None = None) -> None:
        """Train up to epoch `until`, counted from the start; None: until every head is done."""
        while self.states and (until is None or self.epoch < until):
            started = time.perf_counter()
            train_loss = self.batch.train_epoch(*self._draw_epoch(), self.batch_size)
            self.epoch += 1
            loss, rank = self._validate()
            improved = []
            for head, state in enumerate(self.states):
                state.epochs = self.epoch
                if not np.isfinite(train_loss[head]):
                    rate = self.specs[head].learning_rate
                    state.error = (
                        f"diverged: the loss of epoch {self.epoch} is not finite (learning rate "
                        f"{rate:g})"
                    )
                elif len(self.data.held_out) == 0 or loss[head] < state.best_loss:
                    improved.append(head)
                    state.best_loss, state.best_epoch = float(loss[head]), self.epoch
                    state.training_loss = float(train_loss[head])
                state.best_rank = max(state.best_rank, float(rank[head]))
            if len(self.data.held_out):
                self.batch.save_best(improved)
            self._add_seconds(started)
            pairs = zip(self.states, self.specs, strict=True)
            self.remove([state for state, spec in pairs if self._is_done(state, spec.patience)])

    def remove(self, removed_states: list[HeadState]) -> None:
        """Remove these heads from the batch; their states get their best parameters."""
        if not removed_states:
            return
        # By identity: states of equal contents are different heads.
        removed_ids = {id(state) for state in removed_states}
        removed = [head for head, state in enumerate(self.states) if id(state) in removed_ids]
        if len(self.data.held_out) == 0:
            self.batch.save_best(removed)
        for head in removed:
            state = self.states[head]
            if state.error is None:
                state.best_layers, state.data = self.batch.best_layers(head), self.data
                if state.best_epoch == 0:
                    state.error = (
                        "the loss of the held-out rows was never finite: lower the learning rate"
                    )
        remaining = [head for head in range(len(self.states)) if head not in removed]
        self.batch.keep(remaining)
        self.states = [self.states[head] for head in remaining]
        self.specs = [self.specs[head] for head in remaining]

    def _is_done(self, state: HeadState, patience: int) -> bool:
        if state.error is not None or state.epochs >= state.max_epochs:
            return True
        return len(self.data.held_out) > 0 and state.epochs - state.best_epoch >= patience

    def _add_seconds(self, started: float) -> None:
        """Add the seconds since `started` to the heads in equal shares."""
        for state in self.states:
            state.seconds += (time.perf_counter() - started) / len(self.states)

    def _draw_epoch(self) -> tuple[Index, Index]:
        """Return this epoch's rows (n,) in order, and the view (n,) of each.

        Drawn for all N rows, so that all folds share one permutation.
        """
        n = self.data.rows.n
        # Of the epoch and N alone: a head's result does not depend on which other heads are in the
        # bank, up to rounding.
        generator = np.random.default_rng([self.epoch, n])
        order = generator.permutation(n)
        view = generator.integers(0, self.n_views, n) if self.n_views > 1 else np.zeros(n, np.int64)
        is_training = np.zeros(n, np.bool_)
        is_training[self.data.train] = True
        order = order[is_training[order]]
        return order, view[order]

    def _validate(self) -> tuple[Array, Array]:
        """Return losses (K,) on the held-out rows, and what halving ranks by, higher better."""
        held_out = self.data.held_out
        if len(held_out) == 0:
            return np.full(len(self.states), np.nan), np.full(len(self.states), np.nan)
        decision = self.batch.outputs(held_out)
        for view in range(1, self.n_views):
            decision += self.batch.outputs(held_out + view * self.data.rows.n)
        decision /= self.n_views
        loss = mean_losses(self.data.rows, decision, held_out)
        if self.data.rows.task != "single" or not self.ranked:
            return loss, -loss
        rows = torch.from_numpy(held_out).to(decision.device)
        is_hit = decision.argmax(1) == self.data.rows.target.index_select(0, rows)
        return loss, is_hit.double().mean(1).cpu().numpy()
