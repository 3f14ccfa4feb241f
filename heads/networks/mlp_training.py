"""The epochs of one batch of networks: train, validate, remember the best, let finished ones go.

K heads, N rows, V views.
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

    def remember(self, heads: Sequence[int]) -> None:
        """Make the present parameters of these heads their best ones."""

    def best_layers(self, head: int) -> Any:
        """Return the best parameters of a head, as its family's `arrays` takes them."""

    def keep(self, heads: Sequence[int]) -> None:
        """Drop all other heads."""


@dataclass
class Trace:
    """What is known of one head while it trains and after."""

    spec: int  # its index
    fold: int
    limit: int  # epochs at most
    epochs: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_rank: float = float("-inf")  # higher is better; what halving compares
    training_loss: float = float("nan")
    seconds: float = 0.0
    error: str | None = None
    best: Any = None  # once it has left the batch: its best parameters
    data: FoldData | None = None


class Run:
    """One batch of heads, its data, and the bookkeeping of epochs."""

    def __init__(
        self,
        specs: Sequence[NetworkSpec],
        traces: Sequence[Trace],
        data: FoldData,
        make: Callable[[], Batch],
        views: int,
        ranked: bool,
    ) -> None:
        self.data, self.views, self.ranked = data, views, ranked
        self.traces, self.specs = list(traces), list(specs)
        self.batch_size = specs[0].batch_size
        started = time.perf_counter()
        self.batch = make()
        self._share(started)
        self.epoch = 0

    def advance(self, until: int | None) -> None:
        """Train until `until` epochs are done in all, or until every head is done."""
        while self.traces and (until is None or self.epoch < until):
            started = time.perf_counter()
            train_loss = self.batch.train_epoch(*self._order(), self.batch_size)
            self.epoch += 1
            loss, rank = self._validate()
            better = []
            for head, trace in enumerate(self.traces):
                trace.epochs = self.epoch
                if not np.isfinite(train_loss[head]):
                    rate = self.specs[head].learning_rate
                    trace.error = (
                        f"diverged: the loss of epoch {self.epoch} is not finite (learning rate "
                        f"{rate:g})"
                    )
                elif len(self.data.held_out) == 0 or loss[head] < trace.best_loss:
                    better.append(head)
                    trace.best_loss, trace.best_epoch = float(loss[head]), self.epoch
                    trace.training_loss = float(train_loss[head])
                trace.best_rank = max(trace.best_rank, float(rank[head]))
            if len(self.data.held_out):
                self.batch.remember(better)
            self._share(started)
            pairs = zip(self.traces, self.specs, strict=True)
            self.leave([trace for trace, spec in pairs if self._done(trace, spec.patience)])

    def leave(self, leaving: list[Trace]) -> None:
        """Take these heads out of the batch, their best parameters with them."""
        if not leaving:
            return
        # By identity: traces of equal contents are different heads.
        gone = {id(trace) for trace in leaving}
        places = [head for head, trace in enumerate(self.traces) if id(trace) in gone]
        if len(self.data.held_out) == 0:
            self.batch.remember(places)
        for head in places:
            trace = self.traces[head]
            if trace.error is None:
                trace.best, trace.data = self.batch.best_layers(head), self.data
                if trace.best_epoch == 0:
                    trace.error = (
                        "the loss of the held-out rows was never finite: lower the learning rate"
                    )
        stay = [head for head in range(len(self.traces)) if head not in places]
        self.batch.keep(stay)
        self.traces = [self.traces[head] for head in stay]
        self.specs = [self.specs[head] for head in stay]

    def _done(self, trace: Trace, patience: int) -> bool:
        if trace.error is not None or trace.epochs >= trace.limit:
            return True
        return len(self.data.held_out) > 0 and trace.epochs - trace.best_epoch >= patience

    def _share(self, started: float) -> None:
        """Add the seconds since `started` to the heads in equal shares."""
        for trace in self.traces:
            trace.seconds += (time.perf_counter() - started) / len(self.traces)

    def _order(self) -> tuple[Index, Index]:
        """Return this epoch's rows and views: all folds share one permutation."""
        n = self.data.rows.n
        # Of the epoch and N alone: a head's result does not depend on which other heads are in the
        # bank, up to rounding.
        generator = np.random.default_rng([self.epoch, n])
        order = generator.permutation(n)
        view = generator.integers(0, self.views, n) if self.views > 1 else np.zeros(n, np.int64)
        inside = np.zeros(n, np.bool_)
        inside[self.data.train] = True
        order = order[inside[order]]
        return order, view[order]

    def _validate(self) -> tuple[Array, Array]:
        """Return losses (K,) on the held-out rows, and what halving ranks by, higher better."""
        held_out = self.data.held_out
        if len(held_out) == 0:
            return np.full(len(self.traces), np.nan), np.full(len(self.traces), np.nan)
        decision = self.batch.outputs(held_out)
        for view in range(1, self.views):
            decision += self.batch.outputs(held_out + view * self.data.rows.n)
        decision /= self.views
        loss = mean_losses(self.data.rows, decision, held_out)
        if self.data.rows.task != "single" or not self.ranked:
            return loss, -loss
        rows = torch.from_numpy(held_out).to(decision.device)
        is_hit = decision.argmax(1) == self.data.rows.target.index_select(0, rows)
        return loss, is_hit.double().mean(1).cpu().numpy()
