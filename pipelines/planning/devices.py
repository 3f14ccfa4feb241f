"""Devices: of the forward pass, and of the heads."""

from pathlib import Path

from headrace.heads.bank import check_device
from headrace.pipelines.recipe.load import Recipe


def find_device(requested_device: str) -> str:
    """Return `requested_device`, or for "auto" a GPU where PyTorch sees one."""
    if requested_device != "auto":
        return requested_device
    # PyTorch is asked only where there can be a GPU, because asking imports it.
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find_heads_device(recipe: Recipe, workers: int | None = None) -> str:
    """Return the device on which this run's workers train heads; `workers` overrides the recipe's.

    "auto" is a GPU for the one worker of this machine: several would each want its memory, and
    workers of a cluster are given none for heads. Raises BadBank where a GPU is asked for by name
    and this machine, which would train, has none.
    """
    requested_device = recipe.compute.heads_device
    on_this_machine = recipe.cluster.where in ("local", "cuda")
    if requested_device == "auto":
        one_worker = (workers or recipe.compute.workers) == 1
        return find_device("auto") if on_this_machine and one_worker else "cpu"
    if on_this_machine:
        check_device(requested_device)
    return requested_device
