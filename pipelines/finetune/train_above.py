"""The blocks of a network that train above a node."""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from headrace.pipelines.models.errors import CannotSplit
from headrace.pipelines.models.torch_network import Network


def trainable_blocks(network: Network, train_above: str) -> list[list[str]]:
    """The blocks of the backbone that train above this node, from the bottom up, each a list of
    modules; "head": none.

    Blocks that no tap needs are left out: no gradient reaches them. Raises CannotSplit for an
    unknown node, and for one that has nothing of the network above it.
    """
    if train_above == "head":
        return []
    module = network.backbone
    if train_above != "all" and train_above not in dict(module.named_modules()):
        raise CannotSplit(
            f"the network has no node {train_above!r} to train above: `headrace backbones "
            "NAME` lists them"
        )
    owners = owners_above(
        network.untouched, None if train_above == "all" else train_above, network.preprocessing.crop
    )
    reached = _reached(network)
    found = blocks_of(module, [owner for owner in owners if owner in reached])
    if not found:
        raise CannotSplit(
            f"nothing between {train_above} and the head's taps "
            f"({', '.join(str(tap) for tap in network.taps)}) has parameters: train above an "
            "earlier node"
        )
    return found


def _reached(network: Network) -> set[str]:
    """Names of the backbone's modules whose own parameters the logits depend on."""
    owners = {
        name: list(child.parameters(recurse=False))
        for name, child in network.backbone.named_modules()
    }
    owned = [
        (name, parameter)
        for name, own in owners.items()
        for parameter in own
        if parameter.is_floating_point()
    ]
    for _, parameter in owned:
        parameter.requires_grad_(True)
    device = owned[0][1].device
    kind = torch.uint8 if network.split_node is None else torch.float32
    inputs = torch.zeros(2, *network.input_shape, dtype=kind, device=device)
    logits = network(inputs, torch.zeros(2, network.n_features_below, device=device))
    gradients = torch.autograd.grad(
        logits.sum(), [parameter for _, parameter in owned], allow_unused=True
    )
    for _, parameter in owned:
        parameter.requires_grad_(False)
    return {
        name for (name, _), gradient in zip(owned, gradients, strict=True) if gradient is not None
    }


def owners_above(module: nn.Module, node: str | None, size: tuple[int, int]) -> list[str]:
    """Names of the modules with parameters of their own that run after the node has its output, in
    running order.

    node None: all. Found by running the network once on shapes alone, or on zeros where that is not
    possible.
    """
    try:
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return _running_order(copy.deepcopy(module, memo), node, size, "meta")
    except Exception:  # noqa: BLE001 (networks that compute with values of their own)
        return _running_order(copy.deepcopy(module), node, size, "cpu")


def _running_order(
    module: nn.Module, node: str | None, size: tuple[int, int], device: str
) -> list[str]:
    order: list[str] = []
    passed = [node is None]

    def before(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            if passed[0] and name not in order:
                order.append(name)

        return hook

    for name, child in module.named_modules():
        if next(child.parameters(recurse=False), None) is not None:
            child.register_forward_pre_hook(before(name))
        if node is not None and name == node:
            child.register_forward_hook(lambda *_: operator.setitem(passed, 0, True))
    with torch.no_grad():
        module.eval()(torch.zeros(2, 3, *size, device=device))
    return order


def blocks_of(module: nn.Module, owners: Sequence[str]) -> list[list[str]]:
    """The owners grouped into blocks, from the bottom up: by the first module on their path that is
    no mere sequence, as `blocks.5.0`, `layer4.1`, `features.24` or `Mixed_6b`.
    """
    blocks: dict[str, list[str]] = {}
    for owner in owners:
        parts, depth = owner.split("."), 1
        while depth < len(parts) and isinstance(
            module.get_submodule(".".join(parts[:depth])), nn.Sequential | nn.ModuleList
        ):
            depth += 1
        blocks.setdefault(".".join(parts[:depth]), []).append(owner)
    return list(blocks.values())
