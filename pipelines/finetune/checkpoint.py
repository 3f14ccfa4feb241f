"""Checkpoints of a training: all that the next epoch depends on, in one safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import check_seal, seal_safetensors, tensor_metadata

FORMAT = 2  # in format 1 all layers of a head had one learning rate


@dataclass
class TrainingProgress:
    """The state of a training after `epoch` epochs, without a random state: each epoch has a seed
    of its own.
    """

    epoch: int
    best_epoch: int
    best_loss: float
    seconds: float  # of training over all calls, by `train.clock`
    # by epoch: epoch, train_loss (not of 0, the untrained network), validation_loss if rows are
    # held out
    curve: list[dict[str, float]]


def save_checkpoint(
    checkpoint_path: Path, training_key: str, progress: TrainingProgress, tensors: dict[str, Tensor]
) -> None:
    """Replace the checkpoint. training_key: only a training of the same key resumes from it.

    Raises PublishFailed.
    """
    description = {"format": FORMAT, "key": training_key, "progress": progress.__dict__}
    checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
    host_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    publish_replace(
        checkpoint_path,
        seal_safetensors(save(host_tensors, metadata={"headrace": json.dumps(description)})),
    )


def load_checkpoint(
    checkpoint_path: Path, training_key: str
) -> tuple[TrainingProgress, dict[str, Tensor]] | None:
    """Read a checkpoint; None if it is absent, damaged, or of another training."""
    try:
        data = checkpoint_path.read_bytes()
        check_seal(data)
        description: dict[str, Any] = json.loads(tensor_metadata(data)["headrace"])
        if description["format"] != FORMAT or description["key"] != training_key:
            return None
        return TrainingProgress(**description["progress"]), load(data)
    # A checkpoint only saves time: whatever is wrong with it, training begins anew.
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError):
        return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts, named by the index of their parameter."""
    state_tensors = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for state_name, value in optimizer.state.get(parameter, {}).items():
            state_tensors[f"adam.{index}.{state_name}"] = value
    return state_tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore AdamW's state from `optimizer_tensors`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for tensor_name, value in tensors.items():
        if tensor_name.startswith("adam."):
            _, index, state_name = tensor_name.split(".")
            parameter = parameters[int(index)]
            # PyTorch keeps the step count on the CPU.
            optimizer.state[parameter][state_name] = (
                value if state_name == "step" else value.to(parameter.device)
            )
