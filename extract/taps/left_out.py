"""What a checkpoint lacks or has too much: a warning above the taps, an error below them."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.checkpoint_names import owner_module
from headrace.extract.backbones.nodes import Node, Nodes, output_tensor
from headrace.extract.backbones.weights import first_names
from headrace.extract.errors import BackboneError
from headrace.extract.taps.capture import TapCapture
from headrace.extract.taps.resolve import Tap


class WeightsWarning(UserWarning):
    """Tensors of a checkpoint that the network has no use for, or that it lacks above the taps."""


def require_loaded(backbone: Backbone, taps: Sequence[Tap], nodes: Nodes) -> None:
    """Warn of what was left out when the weights were loaded, once.

    Raises BackboneError if a tap depends on it, which one pass shows: tensors that the weights lack
    are NaN, a module for which they have more tensors than it takes outputs NaN, and a tap that is
    NaN depends on one of them.
    """
    left_out = backbone.left_out
    if not left_out:
        return
    tap_nodes = [(tap, nodes[tap.node]) for tap in taps]
    values, _ = _run_marked(backbone, tap_nodes)
    for tap, node in tap_nodes:
        if values[tap].isfinite().all():
            continue
        _, modules_run = _run_marked(backbone, [(tap, node)])
        module_names = {name for name, _ in backbone.module.named_modules()}
        absent, surplus, not_numbers = (
            [name for name in names if owner_module(name, module_names) in modules_run]
            for names in (left_out.absent, left_out.surplus, left_out.not_numbers)
        )
        if not_numbers:
            raise BackboneError(
                f"{_weights_text(backbone)}: {tap} depends on tensors that hold NaN or infinities "
                f"({len(not_numbers)}): {first_names(not_numbers)}. The training that wrote them "
                "has failed, or the file is damaged: take an earlier checkpoint, or tap below them"
            )
        differences = "; ".join(
            f"{label} ({len(names)}): {first_names(names)}"
            for label, names in (
                ("not in the file, or of another shape there", absent),
                ("in the file, and not in the network", surplus),
            )
            if names
        )
        raise BackboneError(
            f"{_weights_text(backbone)}: {tap} depends on tensors in which the two differ: "
            f"{differences}. Below its taps a network must be that of its weights: check its name, "
            "image_size, bands and model: arguments (such as init_values, reg_tokens), or tap "
            "below them"
        )
    warnings.warn(left_out_note(backbone), WeightsWarning, stacklevel=3)


def left_out_note(backbone: Backbone) -> str:
    """Return what was left out when the weights were loaded, in one line; "" for nothing."""
    left_out = backbone.left_out
    return f"{_weights_text(backbone)}: {left_out.describe()}" if left_out else ""


def _weights_text(backbone: Backbone) -> str:
    return f"{backbone.spec.name} with weights {backbone.spec.weights or '(default)'}"


def _run_marked(
    backbone: Backbone, tap_nodes: Sequence[tuple[Tap, Node]]
) -> tuple[dict[Tap, Tensor], set[str]]:
    """Return the values of taps on a random image, and the names of the modules that ran for them.

    Values are NaN if they depend on what was left out.
    """
    # A copy for hooks of its own, which shares parameters and buffers.
    tensors = (*backbone.module.parameters(), *backbone.module.buffers())
    module = copy.deepcopy(backbone.module, {id(tensor): tensor for tensor in tensors})
    module_names = {name for name, _ in module.named_modules()}
    modules_run: set[str] = set()
    for name, child in module.named_modules():
        child.register_forward_pre_hook(lambda *_, name=name: modules_run.add(name))
    owners = {owner_module(name, module_names) for name in backbone.left_out.surplus}
    for owner in owners - {""}:  # what belongs to the network itself, "", is part of its head
        module.get_submodule(owner).register_forward_hook(_as_nan)
    generator = torch.Generator().manual_seed(0)
    preprocessing = backbone.preprocessing
    image = torch.randn(1, preprocessing.n_channels, *preprocessing.crop, generator=generator)
    with torch.inference_mode():
        return TapCapture(module, tap_nodes).run(module, image), modules_run


def _as_nan(_module: nn.Module, _args: Any, output: Any) -> Any:
    if not isinstance(tensor := output_tensor(output), Tensor):
        return output
    unknown = torch.full_like(tensor, torch.nan)
    return (unknown, *output[1:]) if isinstance(output, tuple) else unknown
