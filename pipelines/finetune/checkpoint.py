"""Checkpoints: everything that the next epoch depends on, in one file that appears whole or not at
all. No pickle.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import SEAL, UNSEALED, check_seal, seal, tensor_metadata

FORMAT = 2  # 1 had one rate for all layers of a head


@dataclass
class Progress:
    """Where a training stands after `epoch` epochs.

    Random numbers are drawn from the epoch's own seed, so none are here.
    """

    epoch: int
    best_epoch: int
    best_loss: float
    seconds: float  # of training over all calls, by `train.clock`
    # per epoch: epoch, train_loss, validation_loss, and the learning rate at its end
    curve: list[dict[str, float]]


def save_checkpoint(path: Path, key: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Replace the checkpoint. key: names the training, so that no other one goes on from it.

    Raises PublishFailed.
    """
    about = {"format": FORMAT, "key": key, "progress": progress.__dict__}
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    publish_replace(
        path, seal(save(plain, metadata={"headrace": json.dumps(about), SEAL: UNSEALED}))
    )


def load_checkpoint(path: Path, key: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """What `save_checkpoint` wrote; None where there is none, or one that is damaged or of another
    training.
    """
    try:
        data = path.read_bytes()
        check_seal(data)
        about: dict[str, Any] = json.loads(tensor_metadata(data)["headrace"])
        if about["format"] != FORMAT or about["key"] != key:
            return None
        return Progress(**about["progress"]), load(data)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError):
        return None


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts, by the place of their parameter."""
    found = {}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(parameters):
        for name, value in optimiser.state.get(parameter, {}).items():
            found[f"adam.{place}.{name}"] = value
    return found


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, place, field = name.split(".")
            parameter = parameters[int(place)]
            optimiser.state[parameter][field] = (
                value if field == "step" else value.to(parameter.device)
            )
