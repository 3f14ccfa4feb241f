"""Training of one network on one fold: layer-wise learning rates, warm-up, gradient clipping, early
stopping, checkpoints.

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

from headrace.cache.errors import HeadraceError
from headrace.cache.out_of_memory import is_out_of_memory
from headrace.heads.data.task import REFIT, Task, seed_of_fold
from headrace.heads.link import link
from headrace.pipelines.finetune.checkpoint import (
    TrainingProgress,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from headrace.pipelines.finetune.data import BatchSource, Rows, TrainingBatch, random_flips
from headrace.pipelines.models.torch_network import Network
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

EVALUATION_ROWS = 64  # images of a batch without gradients
# Adam moves every weight by about the learning rate, so the change of a layer's output grows with
# the number of its inputs. Beyond this many inputs, a head layer's learning rate falls as their
# number grows (Yang et al. 2021); otherwise a wide head loses in a few steps what it has learned.
WIDE = 512


@dataclass(frozen=True)
class TrainingPlan:
    """The blocks to train, on which rows, for how long."""

    spec: FineTuneSpec
    blocks: list[list[str]]  # names of the backbone's modules to train, from the bottom up
    task: Task
    fold: int  # held out; REFIT: none
    epochs: int  # at most; the learning rate's schedule is over spec.epochs
    device: str = "cpu"
    seconds: float = math.inf  # at most, by `clock`; checked after each epoch


@dataclass(frozen=True)
class TrainedFold:
    """The outcome of a training; the network has the parameters of the best epoch."""

    progress: TrainingProgress
    # predictions (n, C) of the n held-out rows; None if all rows are trained on
    validation: npt.NDArray[np.float32] | None
    resumed_from: int  # epoch of the checkpoint that it was resumed from; 0: none
    stopped: str  # why it ended: "epochs", "patience" or "time"


class Training:
    """The state of a training: the network, its optimizer, and the rows."""

    def __init__(self, network: Network, source: BatchSource, plan: TrainingPlan) -> None:
        self.network, self.source, self.plan = network.to(plan.device), source, plan
        spec, task = plan.spec, plan.task
        self.train_rows = np.flatnonzero(task.fold != plan.fold)
        self.validation_rows = (
            np.flatnonzero(task.fold == plan.fold) if plan.fold != REFIT else np.empty(0, np.int64)
        )
        self.optimizer = _make_optimizer(network, plan)
        # before the schedule
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.trained_tensors: dict[str, Tensor] = {
            name: parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        self.batch_norms: dict[str, nn.Module] = {}  # those that train
        if spec.batch_norm == "trainable" or spec.start == "random":
            for name in (name for block in plan.blocks for name in block):
                module = network.backbone.get_submodule(name)
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                    self.batch_norms[f"backbone.{name}"] = module
            # Their running statistics are part of the best epoch's state.
            self.trained_tensors |= {
                name: buffer
                for name, buffer in network.named_buffers()
                if name.rpartition(".")[0] in self.batch_norms
            }
        # rows of one pass; halved when they do not fit into memory
        self.micro_batch_size = spec.batch_size
        self.row_weights = _row_weights(task, self.train_rows, spec)
        self.steps_per_epoch = math.ceil(len(self.train_rows) / spec.batch_size)
        self.n_steps = self.steps_per_epoch * spec.epochs

    def run(self, checkpoint_path: Path | None, key: str) -> TrainedFold:
        """Train to the end, from the checkpoint if there is one. key: of the checkpoint.

        Raises HeadraceError, PublishFailed.
        """
        plan, spec = self.plan, self.plan.spec
        progress, best_tensors = TrainingProgress(0, 0, math.inf, 0.0, []), self._copy_tensors()
        if checkpoint_path is not None and (resumed := load_checkpoint(checkpoint_path, key)):
            progress, best_tensors = resumed[0], self._restore_tensors(resumed[1])
        elif len(self.validation_rows) and spec.start == "head":
            # The untrained network, with its head, is epoch 0: later epochs must be better.
            progress.best_loss = self._validation_loss()
            progress.curve.append({"epoch": 0, "validation_loss": progress.best_loss})
        first_epoch, stop_reason = progress.epoch, "epochs"
        while progress.epoch < plan.epochs:
            if len(self.validation_rows) and progress.epoch - progress.best_epoch >= spec.patience:
                stop_reason = "patience"
                break
            if progress.epoch and progress.seconds >= plan.seconds:
                stop_reason = "time"
                break
            started_s = clock(plan.device)
            curve_row = {
                "epoch": progress.epoch + 1.0,
                "train_loss": self._train_epoch(progress.epoch),
            }
            progress.epoch += 1
            if len(self.validation_rows):
                validation_loss = curve_row["validation_loss"] = self._validation_loss()
                if validation_loss < progress.best_loss:
                    progress.best_loss, progress.best_epoch = validation_loss, progress.epoch
                    best_tensors = self._copy_tensors()
            else:
                progress.best_epoch, best_tensors = progress.epoch, self._copy_tensors()
            progress.seconds += clock(plan.device) - started_s
            progress.curve.append(curve_row)
            if checkpoint_path is not None:
                save_checkpoint(
                    checkpoint_path, key, progress, self._checkpoint_tensors(best_tensors)
                )
        with torch.no_grad():
            for name, tensor in self.trained_tensors.items():
                tensor.copy_(best_tensors[name])
        validation = None
        if len(self.validation_rows):
            validation = link(self.logits(self.validation_rows).numpy(), plan.task.kind)
        return TrainedFold(progress, validation, first_epoch, stop_reason)

    def logits(self, row_index: Rows) -> Tensor:
        """Return the (n, C) logits of the rows, on the host."""
        self.network.eval()
        n_rows = min(EVALUATION_ROWS, 2 * self.micro_batch_size)
        with torch.no_grad(), self._autocast():
            logit_blocks = [
                self.network(*batch.on_device(self.plan.device)).float().cpu()
                for batch in self.source.batches(row_index, n_rows)
            ]
        return torch.cat(logit_blocks)

    def time_steps(self) -> float:
        """Return the seconds of one optimizer step. Changes the parameters."""
        self.train_mode()
        row_order = np.resize(self.train_rows, 4 * self.plan.spec.batch_size)
        step_seconds = []
        generator = np.random.default_rng(0)
        for step, batch in enumerate(self._augmented_batches(row_order, generator)):
            started_s = clock(self.plan.device)
            self._optimizer_step(step, batch)
            if self.plan.device != "cpu":
                torch.accelerator.synchronize(self.plan.device)
            step_seconds.append(clock(self.plan.device) - started_s)
        # The minimum, because other work on the machine only adds time; without the first, which
        # loads kernels and reserves memory.
        return min(step_seconds[1:])

    def _train_epoch(self, epoch: int) -> float:
        """Train on all rows once, in the epoch's random order; return the mean training loss."""
        spec, plan = self.plan.spec, self.plan
        seed_parts = [spec.seed, seed_of_fold(plan.fold) + 1, epoch]
        generator = np.random.default_rng(seed_parts)
        # By the epoch, so that training from a checkpoint draws what an uninterrupted one would.
        torch.manual_seed(int(np.random.SeedSequence(seed_parts).generate_state(1)[0]))  # dropout
        self.train_mode()
        row_order = generator.permutation(self.train_rows)
        step_losses = [
            self._optimizer_step(epoch * self.steps_per_epoch + step, batch)
            for step, batch in enumerate(self._augmented_batches(row_order, generator))
        ]
        return float(np.mean(step_losses))

    def _augmented_batches(
        self, row_order: Rows, generator: np.random.Generator
    ) -> Iterator[TrainingBatch]:
        spec, is_pixels = self.plan.spec, self.network.split_node is None
        view_generator = generator if spec.augment == "views" else None
        for batch in self.source.batches(row_order, spec.batch_size, generator=view_generator):
            if spec.augment in ("flip", "flips"):
                flipped = random_flips(
                    batch.inputs, spec.augment, generator, channels_last=is_pixels
                )
                yield batch._replace(inputs=flipped)
            else:
                yield batch

    def _optimizer_step(self, step: int, batch: TrainingBatch) -> float:
        """Take one optimizer step and return the loss. A batch that does not fit into memory is
        divided, and the gradients of its parts are added.
        """
        rate_factor = _rate_schedule(step, self.n_steps, self.plan.spec.warmup_fraction)
        groups = self.optimizer.param_groups
        for parameter_group, learning_rate in zip(groups, self.learning_rates, strict=True):
            parameter_group["lr"] = learning_rate * rate_factor
        while True:
            try:
                loss = self._accumulate_gradients(batch)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch_size == 1:
                    raise HeadraceError(
                        "not even one image fits into memory: train above a later node, or use "
                        "smaller images"
                    ) from error
                self.micro_batch_size = max(1, min(self.micro_batch_size, len(batch.rows)) // 2)
            if self.plan.device != "cpu":
                torch.accelerator.memory.empty_cache()
        gradient_norm = nn.utils.clip_grad_norm_(
            [parameter for parameter in self.trained_tensors.values() if parameter.requires_grad],
            self.plan.spec.grad_clip_norm,
        )
        if not math.isfinite(loss) or not bool(torch.isfinite(gradient_norm)):
            raise HeadraceError(
                f"the loss or its gradient is not finite at step {step + 1}: lower learning_rate "
                f"(it is {self.plan.spec.learning_rate:g})"
            )
        self.optimizer.step()
        return loss

    def _accumulate_gradients(self, batch: TrainingBatch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        plan, total_loss = self.plan, 0.0
        for start in range(0, len(batch.rows), self.micro_batch_size):
            micro_batch = batch.part(start, self.micro_batch_size)
            with self._autocast():
                logits = self.network(*micro_batch.on_device(plan.device))
            row_loss = row_losses(
                logits.float(), plan.task, micro_batch.rows, plan.spec.label_smoothing
            )
            row_weight = torch.from_numpy(self.row_weights[micro_batch.rows]).to(plan.device)
            loss = (row_loss * row_weight).sum() / len(batch.rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total_loss += float(loss.detach())
        return total_loss

    def _validation_loss(self) -> float:
        row_loss = row_losses(
            self.logits(self.validation_rows), self.plan.task, self.validation_rows, 0.0
        )
        row_weight = self.plan.task.weight[self.validation_rows]
        loss = float((row_loss.double().numpy() * row_weight).sum() / row_weight.sum())
        return loss if math.isfinite(loss) else math.inf

    def train_mode(self) -> None:
        """Put the head into training mode, and batch normalization if it is trained."""
        self.network.eval()
        self.network.head.train()
        for module in self.batch_norms.values():
            module.train()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        device_type, precision = torch.device(self.plan.device).type, self.plan.spec.precision
        # A CPU without AMX tile instructions is slower in bfloat16 than in float32.
        bfloat16_is_fast = (
            device_type == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        )
        if precision == "float32" or (precision == "auto" and not bfloat16_is_fast):
            return contextlib.nullcontext()
        return torch.autocast(device_type, torch.bfloat16)

    def _copy_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.trained_tensors.items()}

    def _checkpoint_tensors(self, best_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return (
            {f"now.{name}": tensor for name, tensor in self.trained_tensors.items()}
            | {f"best.{name}": tensor for name, tensor in best_tensors.items()}
            | optimizer_tensors(self.optimizer)
        )

    def _restore_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, tensor in self.trained_tensors.items():
                tensor.copy_(tensors[f"now.{name}"])
        restore_optimizer(self.optimizer, tensors)
        return {name: tensors[f"best.{name}"].to(self.plan.device) for name in self.trained_tensors}


def clock(device: str) -> float:
    """Return a clock's seconds, for times that count against a budget."""
    # The process's CPU time on a CPU, so that other users of the machine do not change which
    # candidates fit the budget. A worker process runs one task at a time.
    return time.process_time() if device == "cpu" else time.perf_counter()


def row_losses(logits: Tensor, task: Task, row_index: Rows, smoothing: float) -> Tensor:
    """Return the (n,) loss of each row: cross-entropy, binary cross-entropy averaged over labels,
    or squared error averaged over targets.
    """
    target = torch.from_numpy(np.ascontiguousarray(task.target[row_index])).to(logits.device)
    if task.kind == "regression":
        return ((logits - target.float()) ** 2).mean(1)
    if task.kind == "single" and logits.shape[1] > 1:
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    soft_target = target.float().view(len(row_index), -1)
    soft_target = soft_target * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, soft_target, reduction="none").mean(1)


def _row_weights(task: Task, train_rows: Rows, spec: FineTuneSpec) -> npt.NDArray[np.float32]:
    """Return the (N,) weight of each row's loss, mean 1 over the training rows."""
    row_weight = task.weight.astype(np.float64).copy()
    if spec.class_weight == "balanced" and task.kind == "single":
        class_weights = np.bincount(
            task.target[train_rows], weights=row_weight[train_rows], minlength=len(task.classes)
        )
        row_weight *= (
            row_weight[train_rows].sum()
            / np.maximum(class_weights, 1e-12)
            / max(1, int((class_weights > 0).sum()))
        )[task.target]
    return np.asarray(row_weight / row_weight[train_rows].mean(), np.float32)


def _make_optimizer(network: Network, plan: TrainingPlan) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, with one or two groups of them for each layer of
    the head and each block of the backbone.
    """
    spec = plan.spec
    rates_and_parameters: list[tuple[float, list[nn.Parameter]]] = []
    for layer in (*network.head.convolutions, *network.head.layers):
        n_inputs = math.prod(cast(nn.Linear | nn.Conv2d, layer).weight.shape[1:])
        rates_and_parameters.append(
            (spec.learning_rate * min(1.0, WIDE / n_inputs), list(layer.parameters()))
        )
    # Lower layers learn more slowly to keep what pretraining gave them; random ones have nothing.
    layer_decay = 1.0 if spec.start == "random" else spec.layer_decay
    for height, block in enumerate(reversed(plan.blocks)):
        block_parameters = [
            parameter
            for module_name in block
            for parameter in network.backbone.get_submodule(module_name).parameters(recurse=False)
        ]
        rates_and_parameters.append((spec.learning_rate * layer_decay**height, block_parameters))
    parameter_groups = []
    for learning_rate, parameters in rates_and_parameters:
        for weight_decay, group_parameters in (
            (spec.weight_decay, [parameter for parameter in parameters if parameter.ndim > 1]),
            # Gains and biases have no weight decay.
            (0.0, [parameter for parameter in parameters if parameter.ndim <= 1]),
        ):
            if group_parameters:
                for parameter in group_parameters:
                    parameter.requires_grad_(True)
                parameter_groups.append(
                    {"params": group_parameters, "weight_decay": weight_decay, "lr": learning_rate}
                )
    return torch.optim.AdamW(parameter_groups)


def _rate_schedule(step: int, n_steps: int, warmup_fraction: float) -> float:
    """Return the factor on all learning rates: linear warm-up, then half a cosine down to zero."""
    # AdamW's first steps rest on few gradients, and at the full rate would undo the pretraining.
    warmup_steps = max(1, round(warmup_fraction * n_steps))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (
        1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, n_steps - warmup_steps)))
    )
