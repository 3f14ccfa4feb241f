"""The blocks of a network that are trained when it is trained above a node."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from headrace.extract.backbones.nodes import shapes_only
from headrace.pipelines.models.errors import CannotSplit
from headrace.pipelines.models.torch_network import Network


def trainable_blocks(network: Network, train_above: str) -> list[list[str]]:
    """Return the blocks of the backbone above a node, from the bottom up, each as names of modules;
    [] for "head".

    Raises CannotSplit for an unknown node, and for one without parameters between it and the taps.
    """
    if train_above == "head":
        return []
    module = network.backbone
    if train_above != "all" and train_above not in dict(module.named_modules()):
        raise CannotSplit(
            f"the network has no node {train_above!r} to train above: `headrace backbones NAME` "
            "lists them"
        )
    owner_names = owners_above(
        network.source_module,
        None if train_above == "all" else train_above,
        network.preprocessing.pixel_shape,
    )
    # Without the blocks that the taps do not need, which no gradient reaches.
    reached_owners = _modules_with_gradient(network)
    trained_blocks = blocks_of(module, [owner for owner in owner_names if owner in reached_owners])
    if not trained_blocks:
        raise CannotSplit(
            f"nothing between {train_above} and the head's taps "
            f"({', '.join(str(tap) for tap in network.taps)}) has parameters: train above an "
            "earlier node"
        )
    return trained_blocks


def _modules_with_gradient(network: Network) -> set[str]:
    """Return the names of the backbone's modules whose own parameters the logits depend on."""
    named_parameters = [
        (module_name, parameter)
        for module_name, child in network.backbone.named_modules()
        for parameter in child.parameters(recurse=False)
        if parameter.is_floating_point()
    ]
    for _, parameter in named_parameters:
        parameter.requires_grad_(True)
    device = named_parameters[0][1].device
    # Zeros will do: the parameters that logits depend on are the same for any pixels.
    inputs = torch.zeros(2, *network.input_shape, device=device)
    logits = network(inputs, torch.zeros(2, network.n_features_below, device=device))
    gradients = torch.autograd.grad(
        logits.sum(), [parameter for _, parameter in named_parameters], allow_unused=True
    )
    for _, parameter in named_parameters:
        parameter.requires_grad_(False)
    return {
        module_name
        for (module_name, _), gradient in zip(named_parameters, gradients, strict=True)
        if gradient is not None
    }


def owners_above(
    module: nn.Module, node_name: str | None, image_shape: tuple[int, int, int]
) -> list[str]:
    """Return the names of the modules that have parameters of their own and run after the node, in
    the order in which they run.

    node_name: None for all. image_shape: (H, W, C). The network is run once on the device "meta",
    which computes shapes alone, or on zeros if that is not possible.
    """
    try:
        return _running_order(shapes_only(module), node_name, image_shape, "meta")
    except Exception:  # noqa: BLE001 (networks that need values, which "meta" lacks, raise anything)
        return _running_order(copy.deepcopy(module), node_name, image_shape, "cpu")


def _running_order(
    module: nn.Module, node_name: str | None, image_shape: tuple[int, int, int], device: str
) -> list[str]:
    owner_names: dict[str, None] = {}  # an ordered set
    node_passed = node_name is None

    def note_owner(module_name: str) -> None:
        if node_passed:
            owner_names.setdefault(module_name)

    def note_node() -> None:
        nonlocal node_passed
        node_passed = True

    for module_name, child in module.named_modules():
        if next(child.parameters(recurse=False), None) is not None:
            child.register_forward_pre_hook(lambda *_, name=module_name: note_owner(name))
        if node_name is not None and module_name == node_name:
            child.register_forward_hook(lambda *_: note_node())
    with torch.no_grad():
        height, width, n_channels = image_shape
        module.eval()(torch.zeros(2, n_channels, height, width, device=device))
    return list(owner_names)


def blocks_of(module: nn.Module, owner_names: Sequence[str]) -> list[list[str]]:
    """Group modules into blocks, from the bottom up: by the first module on their path that is not
    a Sequential or ModuleList, such as `blocks.5.0`, `layer4.1`, `features.24` or `Mixed_6b`.
    """
    owners_of_block: dict[str, list[str]] = {}
    for owner_name in owner_names:
        path_parts, n_parts = owner_name.split("."), 1
        while n_parts < len(path_parts) and isinstance(
            module.get_submodule(".".join(path_parts[:n_parts])), nn.Sequential | nn.ModuleList
        ):
            n_parts += 1
        owners_of_block.setdefault(".".join(path_parts[:n_parts]), []).append(owner_name)
    return list(owners_of_block.values())
