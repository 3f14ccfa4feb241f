"""Training one network on one fold: rates by layer, warm-up and cosine, clipping, early stopping,
checkpoints.

N rows of the task, C outputs.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.heads.data.task import REFIT, Task, seed_of_fold
from headrace.heads.link import link
from headrace.heads.spec import FineTuneSpec
from headrace.pipelines.finetune.checkpoint import (
    Progress,
    load_checkpoint,
    optimiser_tensors,
    restore_optimiser,
    save_checkpoint,
)
from headrace.pipelines.finetune.data import Rows, Source, random_flips
from headrace.pipelines.finetune.errors import TrainingFailed
from headrace.pipelines.models.torch_network import Network

EVALUATION_ROWS = 64
# A step of Adam moves every weight by the rate, and so the output of a layer by as much more as the
# layer is wider: from this many inputs on, the head's rate falls with their number (Yang et al.
# 2021), or a wide head forgets in a few steps what it was.
WIDE = 512
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Plan:
    """What to train, on what, for how long."""

    spec: FineTuneSpec
    blocks: list[list[str]]  # modules of the backbone that train, from the bottom up
    task: Task
    fold: int  # held out; REFIT: none
    epochs: int  # to train at most; the schedule is that of spec.epochs
    device: str = "cpu"
    seconds: float | None = None  # of training by `clock`, at most, looked at after each epoch


@dataclass(frozen=True)
class Trained:
    """What came of it; the network has the parameters of the best epoch."""

    progress: Progress
    validation: npt.NDArray[np.float32] | None  # (n_held_out, C)
    resumed_from: int  # the epoch of the checkpoint that it went on from; 0: none
    stopped: str  # why it ended: "epochs", "patience" or "time"


class Training:
    """The state of a training: the network, its optimiser, and the rows."""

    def __init__(self, network: Network, source: Source, plan: Plan) -> None:
        self.network, self.source, self.plan = network.to(plan.device), source, plan
        spec, task = plan.spec, plan.task
        self.train_rows = np.flatnonzero(task.fold != plan.fold)
        self.validation_rows = (
            np.flatnonzero(task.fold == plan.fold) if plan.fold != REFIT else np.empty(0, np.int64)
        )
        self.trained = _trained_modules(network, plan.blocks)
        self.optimiser, self.rates = _optimiser(network, plan)
        self.named: dict[str, Tensor] = {
            name: p for name, p in network.named_parameters() if p.requires_grad
        }
        if spec.batch_norm == "trainable" or spec.start == "random":
            norms = {name for name, module in self.trained if isinstance(module, _BATCH_NORMS)}
            self.named |= {  # their running statistics belong to what is remembered
                name: buffer
                for name, buffer in network.named_buffers()
                if name.rpartition(".")[0] in norms
            }
        self.micro = (
            spec.batch_size
        )  # rows of one forward pass: halved where they do not fit into memory
        self.weight = _row_weights(task, self.train_rows, spec)
        steps = math.ceil(len(self.train_rows) / spec.batch_size)
        self.steps, self.total = steps, steps * spec.epochs

    def run(self, checkpoint: Path | None, key: str) -> Trained:
        """Train to the end, from the checkpoint where there is one.

        Raises TrainingFailed, PublishFailed.
        """
        plan, spec = self.plan, self.plan.spec
        progress, best = Progress(0, 0, math.inf, 0.0, []), self._copy()
        resumed = load_checkpoint(checkpoint, key) if checkpoint is not None else None
        if resumed is not None:
            progress, tensors = resumed
            best = self._restore(tensors)
        elif len(self.validation_rows) and spec.start == "head":
            progress.best_loss = (
                self._validation_loss()
            )  # what is not better than the head itself is not better
            progress.curve.append({"epoch": 0, "validation_loss": progress.best_loss})
        first, stopped = progress.epoch, "epochs"
        while progress.epoch < plan.epochs:
            if len(self.validation_rows) and progress.epoch - progress.best_epoch >= spec.patience:
                stopped = "patience"
                break
            if plan.seconds is not None and progress.epoch and progress.seconds >= plan.seconds:
                stopped = "time"
                break
            started = clock(plan.device)
            row = {"epoch": progress.epoch + 1.0, "train_loss": self._epoch(progress.epoch)}
            progress.epoch += 1
            if len(self.validation_rows):
                loss = row["validation_loss"] = self._validation_loss()
                if loss < progress.best_loss:
                    progress.best_loss, progress.best_epoch, best = (
                        loss,
                        progress.epoch,
                        self._copy(),
                    )
            else:
                progress.best_epoch, best = progress.epoch, self._copy()
            progress.seconds += clock(plan.device) - started
            progress.curve.append(row)
            if checkpoint is not None:
                save_checkpoint(checkpoint, key, progress, self._tensors(best))
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(best[name])
        validation = self.predict(self.validation_rows) if len(self.validation_rows) else None
        return Trained(progress, validation, first, stopped)

    def predict(self, rows: Rows, view: int = 0) -> npt.NDArray[np.float32]:
        """(n, C) predictions."""
        return link(self.logits(rows, view).numpy(), self.plan.task.kind)

    def logits(self, rows: Rows, view: int = 0) -> Tensor:
        """(n, C), on the host."""
        self.network.eval()
        parts = []
        with torch.no_grad(), self._autocast():
            for batch in self.source.batches(rows, min(EVALUATION_ROWS, 2 * self.micro), view=view):
                features_below = (
                    None
                    if batch.features_below is None
                    else batch.features_below.to(self.plan.device)
                )
                parts.append(
                    self.network(batch.inputs.to(self.plan.device), features_below).float().cpu()
                )
        return torch.cat(parts)

    def time_steps(self, count: int = 3) -> float:
        """Seconds of one optimiser step, the least of `count` after one that warms up: what else
        the machine does only adds. Changes the parameters.
        """
        self.mode()
        order = np.resize(self.train_rows, (count + 1) * self.plan.spec.batch_size)
        seconds = []
        draw = np.random.default_rng(0)
        for step, batch in enumerate(self._batches(order, draw)):
            started = clock(self.plan.device)
            self._step(step, *batch)
            if self.plan.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(clock(self.plan.device) - started)
        return min(seconds[1:])

    def _epoch(self, epoch: int) -> float:
        """Mean training loss of one pass over the rows, in an order that the epoch's seed gives."""
        spec, plan = self.plan.spec, self.plan
        seed = [spec.seed, seed_of_fold(plan.fold) + 1, epoch]
        draw = np.random.default_rng(seed)
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # dropout
        self.mode()
        losses = [
            self._step(epoch * self.steps + step, *batch)
            for step, batch in enumerate(self._batches(draw.permutation(self.train_rows), draw))
        ]
        mean = float(np.mean(losses))
        if not math.isfinite(mean):
            raise TrainingFailed(
                f"the training loss of epoch {epoch + 1} is not finite: lower learning_rate (it is "
                f"{spec.learning_rate:g})"
            )
        return mean

    def _batches(
        self, order: Rows, draw: np.random.Generator
    ) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        spec = self.plan.spec
        random_view = draw if spec.augment == "views" else None
        for rows, inputs, features_below in self.source.batches(
            order, spec.batch_size, draw=random_view
        ):
            if spec.augment in ("flip", "flips"):
                inputs = random_flips(
                    inputs, spec.augment, draw, pixels=self.network.split_node is None
                )
            yield rows, inputs, features_below

    def _step(self, step: int, rows: Rows, inputs: Tensor, features_below: Tensor | None) -> float:
        """One optimiser step; a batch that does not fit into memory goes through in halves whose
        gradients add up.
        """
        factor = _schedule(step, self.total, self.plan.spec.warmup_fraction)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        while True:
            try:
                loss = self._gradients(rows, inputs, features_below)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if self.micro == 1:
                    raise TrainingFailed(
                        "not even one image fits into memory: train above a later node, or use "
                        "smaller images"
                    ) from error
                self.micro = max(1, min(self.micro, len(rows)) // 2)
            if self.plan.device != "cpu":
                torch.cuda.empty_cache()
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.named.values() if p.requires_grad], self.plan.spec.grad_clip_norm
        )
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise TrainingFailed(
                f"the loss or its gradient is not finite at step {step + 1}: lower learning_rate "
                f"(it is {self.plan.spec.learning_rate:g})"
            )
        self.optimiser.step()
        return loss

    def _gradients(self, rows: Rows, inputs: Tensor, features_below: Tensor | None) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        device, total = self.plan.device, 0.0
        for start in range(0, len(rows), self.micro):
            part = slice(start, start + self.micro)
            with self._autocast():
                logits = self.network(
                    inputs[part].to(device),
                    None if features_below is None else features_below[part].to(device),
                )
            own = rows[part]
            losses = row_losses(logits.float(), self.plan.task, own, self.plan.spec.label_smoothing)
            loss = (losses * torch.from_numpy(self.weight[own]).to(device)).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _validation_loss(self) -> float:
        losses = row_losses(
            self.logits(self.validation_rows), self.plan.task, self.validation_rows, 0.0
        )
        weight = self.plan.task.weight[self.validation_rows]
        loss = float((losses.double().numpy() * weight).sum() / weight.sum())
        return loss if math.isfinite(loss) else math.inf

    def mode(self) -> None:
        """Training mode for the head, and for batch normalisation where its statistics are to be
        trained.
        """
        self.network.eval()
        self.network.head.train()
        if self.plan.spec.batch_norm == "trainable" or self.plan.spec.start == "random":
            for _, module in self.trained:
                if isinstance(module, _BATCH_NORMS):
                    module.train()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        device, precision = torch.device(self.plan.device).type, self.plan.spec.precision
        # Without tile instructions a CPU is slower in bfloat16 than in float32.
        auto = device == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        if precision == "float32" or (precision == "auto" and not auto):
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.named.items()}

    def _tensors(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        now = {f"now.{name}": tensor for name, tensor in self.named.items()}
        return (
            now
            | {f"best.{name}": tensor for name, tensor in best.items()}
            | optimiser_tensors(self.optimiser)
        )

    def _restore(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, tensor in self.named.items():
                tensor.copy_(tensors[f"now.{name}"])
        restore_optimiser(self.optimiser, tensors)
        return {name: tensors[f"best.{name}"].to(self.plan.device) for name in self.named}


def clock(device: str) -> float:
    """Seconds that count against a budget.

    On a CPU the process's computing: a machine that others use too is slower, but what a candidate
    costs, and so which of them fit, stays what it was. A worker process runs one task at a time.
    """
    return time.process_time() if device == "cpu" else time.perf_counter()


def row_losses(logits: Tensor, task: Task, rows: Rows, smoothing: float) -> Tensor:
    """(n,) loss of each row: cross-entropy, binary cross-entropy averaged over labels, or squared
    error over targets.
    """
    target = torch.from_numpy(np.ascontiguousarray(task.target[rows])).to(logits.device)
    if task.kind == "regression":
        return ((logits - target.float()) ** 2).mean(1)
    if task.kind == "single" and logits.shape[1] > 1:
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    wanted = target.float().view(len(rows), -1)
    wanted = wanted * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def _row_weights(task: Task, train: Rows, spec: FineTuneSpec) -> npt.NDArray[np.float32]:
    """(N,) of each row's loss, mean 1 over the training rows."""
    weight = task.weight.astype(np.float64).copy()
    if spec.class_weight == "balanced" and task.kind == "single":
        counts = np.bincount(task.target[train], weights=weight[train], minlength=len(task.classes))
        weight *= (
            weight[train].sum() / np.maximum(counts, 1e-12) / max(1, int((counts > 0).sum()))
        )[task.target]
    return np.asarray(weight / weight[train].mean(), np.float32)


def _trained_modules(network: Network, blocks: list[list[str]]) -> list[tuple[str, nn.Module]]:
    return [
        (f"backbone.{name}", network.backbone.get_submodule(name))
        for block in blocks
        for name in block
    ]


def _optimiser(network: Network, plan: Plan) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW over the trained parameters, one group per block with and one without weight decay
    (gains and biases).
    """
    spec = plan.spec
    layers: list[tuple[float, list[nn.Parameter]]] = []
    for layer in (*network.head.convolutions, *network.head.layers):
        inputs = math.prod(cast(nn.Linear | nn.Conv2d, layer).weight.shape[1:])
        layers.append((spec.learning_rate * min(1.0, WIDE / inputs), list(layer.parameters())))
    decay = 1.0 if spec.start == "random" else spec.layer_decay
    for height, block in enumerate(reversed(plan.blocks)):
        own = [
            p
            for name in block
            for p in network.backbone.get_submodule(name).parameters(recurse=False)
        ]
        layers.append((spec.learning_rate * decay**height, own))
    groups, rates = [], []
    for rate, parameters in layers:
        for shrink, chosen in (
            (spec.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                for parameter in chosen:
                    parameter.requires_grad_(True)
                groups.append({"params": chosen, "weight_decay": shrink, "lr": rate})
                rates.append(rate)
    return torch.optim.AdamW(groups), rates


def _schedule(step: int, total: int, warmup_fraction: float) -> float:
    """Linear warm-up, then half a cosine down to zero: a factor on every rate."""
    warm = max(1, round(warmup_fraction * total))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def _out_of_memory(error: BaseException) -> bool:
    # On a CPU torch raises a plain RuntimeError with these words.
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )
