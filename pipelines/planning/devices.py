"""The devices on which networks run and heads are trained."""

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.pipelines.recipe.load import Recipe


def find_device(requested_device: str) -> str:
    """Return `requested_device`, or for "auto" the accelerator that PyTorch sees, else "cpu"."""
    if requested_device != "auto":
        return requested_device
    # PyTorch is asked only where there can be one, because asking imports it.
    if not _may_have_accelerator():
        return "cpu"
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _may_have_accelerator() -> bool:
    devices = Path("/dev")
    return (
        any(devices.glob("nvidia[0-9]*"))
        or (devices / "kfd").exists()  # ROCm
        or (devices / "dxg").exists()  # Windows' subsystem for Linux
        or sys.platform == "darwin"
        # Most machines have a GPU by Intel, but few a PyTorch that is built for it.
        or "+xpu" in importlib.metadata.version("torch")
    )


def find_heads_device(recipe: "Recipe", workers: int | None = None) -> str:
    """Return the device on which this run's workers train heads; `workers` overrides the recipe's.

    Raises HeadError if the recipe names a GPU, this machine would train, and it has none.
    """
    requested_device = recipe.compute.heads_device
    on_this_machine = recipe.cluster.where in ("local", "cuda")
    if requested_device == "auto":
        # Several workers would each want the GPU's memory; those of a cluster train heads on CPUs.
        one_worker = (workers or recipe.compute.workers) == 1
        device = find_device("auto") if on_this_machine and one_worker else "cpu"
        return "cpu" if device == "mps" else device  # heads sum in float64, which MPS lacks
    if on_this_machine:
        from headrace.heads.bank import check_device

        check_device(requested_device)
    return requested_device
