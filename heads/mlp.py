"""A bank of multi-layer perceptrons: specs × folds, trained together.

N rows, V views, D features, C outputs (classes, labels or targets), K heads.

Heads that share a fold, depth, width and batch size share their minibatches (`mlp_batch.py`); since every head of such
a batch trains on the same rows, nothing is masked and no product is spent on held-out rows. A seed decides a head's
first weights and its dropout; the order of rows depends on N and the epoch alone. So a head's result doesn't depend on
which other heads are in the bank, up to rounding.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from headrace.heads.checks import check_finite
from headrace.heads.metrics import TaskKind
from headrace.heads.mlp_batch import Network, NetworkBatch, Rows, padded_width
from headrace.heads.predict import predict_head
from headrace.heads.spec import FULL, HeadFit, MLPSpec
from headrace.heads.task import TEST

Precision = Literal["auto", "float32", "bfloat16"]
Floats = npt.NDArray[Any]

# Parameters and moments of the heads that are trained side by side on a CPU. Measured with 64 heads of 512 × 64: 1 MB
# takes 2.1 times as long as 48 MB, 8 MB 1.15 times; beyond, nothing is gained and memory grows.
CPU_BATCH_BYTES = 64 << 20
# Below this many weights per head the products are too small for reduced precision to pay.
REDUCED_PRECISION_WEIGHTS = 1 << 14


@dataclass(frozen=True)
class Halving:
    """Successive halving: after each of the epochs `after` only the best share `keep` of the specs goes on.

    Specs are ranked by the mean over folds of their best validation accuracy (multi-label, regression: loss) so far.
    """

    after: tuple[int, ...] = (3,)
    keep: float = 0.25

    def __post_init__(self) -> None:
        if (
            not 0 < self.keep <= 1
            or any(epoch < 1 for epoch in self.after)
            or list(self.after) != sorted(set(self.after))
        ):
            raise ValueError(
                f"halving needs rising epochs from 1 on and a share in (0, 1], found {self.after} and {self.keep}"
            )


@dataclass
class _Trace:
    """What is known of one head while it trains and after."""

    spec: int
    fold: int
    limit: int  # epochs at most
    epochs: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_rank: float = float("-inf")  # higher is better; what halving compares
    training_loss: float = float("nan")
    seconds: float = 0.0
    layers: list[tuple[Floats, Floats]] = field(default_factory=list)
    error: str | None = None


@dataclass
class _Fold:
    """The data of one fold as its heads see it."""

    rows: Rows
    train: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]
    mean: Floats  # float64, of the features
    scale: Floats
    target_mean: Floats  # (C,) float64; 0 and 1 unless regression
    target_scale: Floats


def fit_mlp_bank(
    X: Floats,
    target: npt.NDArray[Any],
    *,
    n_classes: int,
    fold: npt.NDArray[np.int16],
    specs: Sequence[MLPSpec],
    full: bool = True,
    sample_weight: npt.NDArray[np.float64] | None = None,
    device: str = "cpu",
    task: TaskKind = "single",
    halving: Halving | None = None,
    precision: Precision = "auto",
) -> list[HeadFit]:
    """Train every spec on every fold, and with `full` on all rows; returns the fits spec by spec, FULL last.

    X: (N, D), or (V, N, D) for V views of each row: training picks one view per row and epoch, prediction averages.
    target: single (N,) class index; multi (N, C) 0/1; regression (N, C). n_classes: C. fold: (N,) as in `Task.fold`.
    Each fold's heads stop early on the loss of its held-out rows and keep their best epoch; FULL heads train for the
    mean best epoch of their spec. With `halving` the losers have fits of fewer epochs and no FULL one.
    precision: "bfloat16" multiplies the first layer's inputs and weights in bfloat16 and adds in float32 (master
    weights, optimiser and every other layer are float32); "auto" does so where the processor is faster at it.
    A head that fails (a bad spec, a loss that is not finite) has an `error`; the others are unaffected.
    Raises ValueError for features that are not finite, naming the row.
    """
    stacked = X if X.ndim == 3 else X[None]
    views, n, width = stacked.shape
    check_finite(stacked)
    weight = np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64)
    folds = sorted(int(number) for number in np.unique(fold[fold >= 0]))
    where = torch.device(device)
    flat = stacked.reshape(views * n, width)
    features = torch.from_numpy(flat if flat.flags.writeable else flat.copy()).to(where)
    traces: list[_Trace] = []
    data: dict[tuple[int, bool], _Fold] = {}

    def data_of(number: int, spec: MLPSpec) -> _Fold:
        if (number, spec.standardize) not in data:
            data[number, spec.standardize] = _prepare(
                stacked, features, target, n_classes, fold, number, weight, task, standardize=spec.standardize
            )
        return data[number, spec.standardize]

    runs = []
    for number in folds:
        wanted = [_Trace(place, number, spec.epochs, error=spec_error(spec, task)) for place, spec in enumerate(specs)]
        traces += wanted
        runs += [
            _Run(
                specs,
                chunk,
                data_of(number, specs[chunk[0].spec]),
                where,
                precision,
                views,
                ranked=halving is not None,
            )
            for chunk in _batches(specs, wanted, width, n_classes, where)
        ]
    alive = set(range(len(specs)))
    if halving is not None:
        for epoch in halving.after:
            for run in runs:
                run.advance(epoch)
            alive = _survivors(traces, alive, halving.keep)
            for run in runs:
                run.leave([trace for trace in run.traces if trace.spec not in alive])
    for run in runs:
        run.advance(None)
    if full:
        wanted = [_full_trace(place, specs[place], traces, task) for place in sorted(alive)]
        traces += wanted
        for chunk in _batches(specs, wanted, width, n_classes, where):
            _Run(specs, chunk, data_of(FULL, specs[chunk[0].spec]), where, precision, views).advance(None)
    order = sorted(traces, key=lambda trace: (trace.spec, trace.fold == FULL, trace.fold))
    return [
        _fit(specs[trace.spec], trace, data.get((trace.fold, specs[trace.spec].standardize)), stacked, task)
        for trace in order
    ]


def spec_error(spec: MLPSpec, task: TaskKind) -> str | None:
    """Why this spec cannot be trained at all, or None."""
    if any(width < 1 for width in spec.hidden):
        return f"hidden widths {spec.hidden} must be at least 1"
    if not spec.learning_rate > 0 or spec.weight_decay < 0:
        return f"learning_rate {spec.learning_rate} must be above 0 and weight_decay {spec.weight_decay} at least 0"
    if not 0 <= spec.dropout < 1 or not 0 <= spec.label_smoothing < 1:
        return f"dropout {spec.dropout} and label_smoothing {spec.label_smoothing} must be in [0, 1)"
    if spec.batch_size < 1 or spec.epochs < 1 or spec.patience < 1:
        return f"batch_size {spec.batch_size}, epochs {spec.epochs} and patience {spec.patience} must be at least 1"
    if task == "regression" and (spec.class_weight != "none" or spec.label_smoothing):
        return "class_weight and label_smoothing have no meaning for regression: leave them out"
    return None


def reduced_precision(spec: MLPSpec, features: int, task: TaskKind, device: torch.device, precision: Precision) -> bool:
    """Whether this head's first layer multiplies in bfloat16; depends on the head and the machine only."""
    if precision != "auto":
        return precision == "bfloat16"
    if task == "regression" or not spec.hidden or features * spec.hidden[0] < REDUCED_PRECISION_WEIGHTS:
        return False
    if device.type != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    able = torch.cpu.get_capabilities()
    # AMD's Zen 4 multiplies bfloat16 at twice the rate of float32 (measured here: 200 against 97 GF/s); Intel does
    # only with AMX, its AVX-512 instruction alone was slower than float32.
    return bool(able.get("amx_bf16")) or (bool(able.get("avx512_bf16")) and "AMD" in str(able.get("cpu_name")))


class _Run:
    """One batch of heads, its data, and the bookkeeping of epochs."""

    def __init__(
        self,
        specs: Sequence[MLPSpec],
        traces: list[_Trace],
        data: _Fold,
        device: torch.device,
        precision: Precision,
        views: int,
        *,
        ranked: bool = False,
    ) -> None:
        self.specs, self.data, self.views, self.ranked = specs, data, views, ranked
        self.traces = list(traces)
        first = specs[traces[0].spec]
        self.batch_size = first.batch_size
        reduced = reduced_precision(first, int(data.rows.features.shape[1]), data.rows.task, device, precision)
        started = time.perf_counter()
        self.batch = NetworkBatch(
            [_network(specs[trace.spec], trace.limit) for trace in traces],
            data.rows,
            fold=traces[0].fold,
            device=device,
            dtype=torch.bfloat16 if reduced else torch.float32,
        )
        self._share(started)
        self.epoch = 0

    def advance(self, until: int | None) -> None:
        """Train up to `until` epochs in all, or until every head is done."""
        while self.traces and (until is None or self.epoch < until):
            started = time.perf_counter()
            train_loss = self.batch.train_epoch(*self._order(), self.batch_size)
            self.epoch += 1
            loss, rank = self._validate()
            better = []
            for head, trace in enumerate(self.traces):
                trace.epochs = self.epoch
                if not np.isfinite(train_loss[head]):
                    rate = self.specs[trace.spec].learning_rate
                    trace.error = f"diverged: the loss of epoch {self.epoch} is not finite (learning rate {rate:g})"
                elif len(self.data.held) == 0 or loss[head] < trace.best_loss:
                    better.append(head)
                    trace.best_loss, trace.best_epoch = float(loss[head]), self.epoch
                    trace.training_loss = float(train_loss[head])
                trace.best_rank = max(trace.best_rank, float(rank[head]))
            if len(self.data.held):
                self.batch.remember(better)
            self._share(started)
            self.leave([trace for trace in self.traces if self._done(trace)])

    def leave(self, leaving: list[_Trace]) -> None:
        """Take these heads out of the batch, their best parameters with them."""
        if not leaving:
            return
        gone = [id(trace) for trace in leaving]
        places = [head for head, trace in enumerate(self.traces) if id(trace) in gone]
        if len(self.data.held) == 0:
            self.batch.remember(places)
        for head in places:
            if self.traces[head].error is None:
                self.traces[head].layers = self.batch.best_layers(head)
                if self.traces[head].best_epoch == 0:
                    self.traces[head].error = "the loss of the held-out rows was never finite: lower the learning rate"
        stay = [head for head in range(len(self.traces)) if head not in places]
        self.batch.keep(stay)
        self.traces = [self.traces[head] for head in stay]

    def _done(self, trace: _Trace) -> bool:
        if trace.error is not None or trace.epochs >= trace.limit:
            return True
        return len(self.data.held) > 0 and trace.epochs - trace.best_epoch >= self.specs[trace.spec].patience

    def _share(self, started: float) -> None:
        for trace in self.traces:
            trace.seconds += (time.perf_counter() - started) / len(self.traces)

    def _order(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The training rows in this epoch's order and the view of each: all folds share one permutation."""
        n = self.data.rows.n
        generator = np.random.default_rng([self.epoch, n])
        order = generator.permutation(n)
        view = generator.integers(0, self.views, n) if self.views > 1 else np.zeros(n, np.int64)
        inside = np.zeros(n, np.bool_)
        inside[self.data.train] = True
        order = order[inside[order]]
        return order, view[order]

    def _validate(self) -> tuple[Floats, Floats]:
        """Loss (K,) on the held-out rows, and what halving ranks by (K,), higher better."""
        held = self.data.held
        if len(held) == 0:
            return np.full(len(self.traces), np.nan), np.full(len(self.traces), np.nan)
        decision = self.batch.outputs(held)
        for view in range(1, self.views):
            decision += self.batch.outputs(held + view * self.data.rows.n)
        decision /= self.views
        loss = self.batch.losses(decision, held)
        if self.data.rows.task != "single" or not self.ranked:
            return loss, -loss
        wanted = self.data.rows.target.index_select(0, torch.from_numpy(held).to(decision.device))
        return loss, (decision.argmax(1) == wanted).double().mean(1).cpu().numpy()


def _network(spec: MLPSpec, epochs: int) -> Network:
    return Network(
        spec.hidden,
        spec.learning_rate,
        spec.weight_decay,
        spec.dropout,
        spec.label_smoothing,
        spec.class_weight == "balanced",
        spec.seed,
        epochs,
    )


def _batches(
    specs: Sequence[MLPSpec], traces: Sequence[_Trace], inputs: int, outputs: int, device: torch.device
) -> list[list[_Trace]]:
    """The heads that can train side by side, in batches that fit a CPU's cache (on other devices: all of them)."""
    alike: dict[tuple[Any, ...], list[_Trace]] = {}
    for trace in traces:
        spec = specs[trace.spec]
        if trace.error is None:
            key = (tuple(padded_width(width) for width in spec.hidden), spec.batch_size, spec.standardize)
            alike.setdefault(key, []).append(trace)
    batches = []
    for (widths, _, _), heads in alike.items():
        sizes = (inputs, *widths, outputs)
        parameters = sum((i + 1) * o for i, o in itertools.pairwise(sizes))
        share = len(heads) if device.type != "cpu" else max(1, CPU_BATCH_BYTES // (12 * parameters))
        number = -(-len(heads) // share)
        batches += [heads[part * len(heads) // number : (part + 1) * len(heads) // number] for part in range(number)]
    return batches


def _survivors(traces: Sequence[_Trace], alive: set[int], keep: float) -> set[int]:
    """The best share `keep` of the specs alive, at least one, by the mean over folds; a spec that failed is out."""
    own = {place: [trace for trace in traces if trace.spec == place] for place in alive}
    mean = {
        place: float(np.mean([trace.best_rank for trace in heads]))
        for place, heads in own.items()
        if all(trace.error is None for trace in heads)
    }
    ranked = sorted(mean, key=lambda place: (-mean[place], place))
    return set(ranked[: max(1, round(keep * len(ranked)))])


def _full_trace(place: int, spec: MLPSpec, traces: Sequence[_Trace], task: TaskKind) -> _Trace:
    own = [trace for trace in traces if trace.spec == place]
    best = [trace.best_epoch for trace in own if trace.error is None]
    error = spec_error(spec, task)
    if own and not best and error is None:
        error = f"not trained on all rows, because it failed in every fold: {own[0].error}"
    return _Trace(place, FULL, max(1, round(float(np.mean(best)))) if best else spec.epochs, error=error)


def _prepare(
    stacked: Floats,
    features: torch.Tensor,
    target: npt.NDArray[Any],
    outputs: int,
    fold: npt.NDArray[np.int16],
    number: int,
    weight: npt.NDArray[np.float64],
    task: TaskKind,
    *,
    standardize: bool,
) -> _Fold:
    n = len(fold)
    held = np.flatnonzero(fold == number) if number != FULL else np.zeros(0, np.int64)
    train = np.flatnonzero((fold != TEST) & ((fold != number) | (number == FULL)) & (weight > 0))
    if len(train) == 0:
        raise ValueError(f"fold {number} leaves no row to train on: use fewer folds, or add images")
    mean, scale = moments(stacked, train) if standardize else (np.zeros(stacked.shape[2]), np.ones(stacked.shape[2]))
    target_mean, target_scale = np.zeros(outputs), np.ones(outputs)
    plain = weight / weight[train].mean()
    heavy, label_weight = plain, None
    if task == "single":
        encoded = torch.from_numpy(np.ascontiguousarray(target, np.int64))
        count = np.bincount(target[train], weights=weight[train], minlength=outputs)
        balance = weight[train].sum() / (np.count_nonzero(count) * np.maximum(count, 1e-300))
        heavy = weight * np.where(count > 0, balance, 0)[target]
        heavy = heavy / heavy[train].mean()
    else:
        values = np.asarray(target, np.float64).reshape(n, outputs)
        if task == "regression":
            target_mean, target_scale = values[train].mean(0), values[train].std(0)
            target_scale[target_scale == 0] = 1
            values = (values - target_mean) / target_scale
        else:
            present = np.average(values[train], axis=0, weights=weight[train])
            shares = np.stack([1 - present, present])
            label_weight = torch.from_numpy(
                np.where(shares > 0, 0.5 / np.maximum(shares, 1e-300), 0).astype(np.float32)
            )
        encoded = torch.from_numpy(np.ascontiguousarray(values.T, np.float32))
    device = features.device
    rows = Rows(
        features,
        n,
        encoded.to(device),
        torch.from_numpy(np.stack([plain, heavy]).astype(np.float32)).to(device),
        None if label_weight is None else label_weight.to(device),
        torch.from_numpy(mean.astype(np.float32)).to(device),
        torch.from_numpy((1 / scale).astype(np.float32)).to(device),
        task,
        outputs,
    )
    return _Fold(rows, train, held, mean, scale, target_mean, target_scale)


def moments(stacked: Floats, train: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation (D,) float64 of the training rows over all views; 1 for a constant feature.

    Two passes in blocks: a difference of sums of squares loses a feature whose mean is large beside its deviation.
    """
    count = len(train) * len(stacked)
    blocks = [(view, train[start : start + 4096]) for view in stacked for start in range(0, len(train), 4096)]
    mean = np.sum([view[rows].sum(0, dtype=np.float64) for view, rows in blocks], axis=0) / count
    square = np.sum([np.square(view[rows] - mean).sum(0) for view, rows in blocks], axis=0) / count
    scale = np.sqrt(square)
    constant = scale <= 10 * np.finfo(np.float32).eps * np.abs(mean)
    scale[constant | (scale == 0)] = 1
    return mean, scale


def _fit(spec: MLPSpec, trace: _Trace, data: _Fold | None, stacked: Floats, task: TaskKind) -> HeadFit:
    nan = float("nan")
    if trace.error is not None or data is None:
        return HeadFit(spec, trace.fold, {}, nan, nan, trace.epochs, trace.seconds, None, trace.error)
    arrays = folded_arrays(trace.layers, data.mean, data.scale, data.target_mean, data.target_scale)
    validation = None
    if trace.fold != FULL:
        per_view = [predict_head(spec, arrays, view[data.held], task) for view in stacked]
        validation = np.stack(per_view).mean(0, dtype=np.float32) if len(per_view) > 1 else per_view[0]
    return HeadFit(spec, trace.fold, arrays, trace.training_loss, nan, trace.epochs, trace.seconds, validation)


def folded_arrays(
    layers: Sequence[tuple[Floats, Floats]], mean: Floats, scale: Floats, target_mean: Floats, target_scale: Floats
) -> dict[str, npt.NDArray[Any]]:
    """weight0, bias0, weight1, … float32 in raw coordinates: the standardisation of inputs and targets folded in."""
    exact = [(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in layers]
    first, shift = exact[0]
    first = first / scale
    exact[0] = (first, shift - first @ mean)
    last, shift = exact[-1]
    exact[-1] = (last * target_scale[:, None], shift * target_scale + target_mean)
    arrays = {}
    for layer, (weight, bias) in enumerate(exact):
        arrays[f"weight{layer}"] = weight.astype(np.float32)
        arrays[f"bias{layer}"] = bias.astype(np.float32)
    return arrays
