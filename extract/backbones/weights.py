"""Weights of a file: fitted to a network by name or by order, and digested."""

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from headrace.cache.count_text import count_text
from headrace.extract.backbones.checkpoint_names import (
    is_head_name,
    network_prefix,
    owner_module,
    with_child_names,
    without_chunks,
    without_wrappers,
)
from headrace.extract.backbones.weights_file import HOW_TO_SAVE, UnorderedTensors
from headrace.extract.errors import BackboneError
from headrace.extract.spec import WeightsMatch

# {role of a tensor in a layer: ends of its name in PyTorch, TensorFlow, Keras, Flax, MXNet and
# Paddle}. The tensors of a normalization all have one shape, so only their names tell them apart.
_ROLES = {
    "weight": ("weight", "weights", "kernel", "gamma", "scale"),
    "bias": ("bias", "biases", "beta"),
    "mean": ("running_mean", "moving_mean", "mean"),
    "variance": ("running_var", "moving_variance", "moving_var", "variance", "var"),
    "batch counter": ("num_batches_tracked",),
}
_ROLE_OF = {ending: role for role, endings in _ROLES.items() for ending in endings}
_ENDING = re.compile(rf"(?:.*[./_])?({'|'.join(_ROLE_OF)})(?::0)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class LeftOut:
    """Tensors that only a checkpoint, or only the network that it was loaded into, has."""

    # Of the network: not in the file, or of another shape there. They are set to NaN, so that an
    # output that depends on them is NaN too.
    absent: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()  # of the file: not in the network
    others: tuple[str, ...] = ()  # of the file, outside of `prefix`: other networks'
    not_numbers: tuple[str, ...] = ()  # of the network: NaN or infinite, from a failed training
    prefix: str = ""  # before the network's names in the file

    def __bool__(self) -> bool:
        return bool(self.absent or self.surplus or self.others or self.not_numbers)

    def describe(self) -> str:
        """Return one line about the prefix and the tensors left out."""
        parts = [
            f"{label} ({len(names)}): {first_names(names)}"
            for label, names in (
                ("not in the file, or of another shape there", self.absent),
                ("not in the network", self.surplus),
                ("of other networks", self.others),
            )
            if names
        ]
        taken = [f"taken from {self.prefix}*"] if self.prefix else []
        left_out = [f"left out: {'; '.join(parts)}"] if parts else []
        return "; ".join([*taken, *left_out, *self._nan_text()])

    def _nan_text(self) -> list[str]:
        if not self.not_numbers:
            return []
        n_tensors, names_text = len(self.not_numbers), first_names(self.not_numbers)
        return [f"NaN or infinite in {n_tensors} of its tensors: {names_text}"]


NOTHING_LEFT_OUT = LeftOut()


def fit_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    weights_match: WeightsMatch,
    network_description: str,
) -> LeftOut:
    """Load `tensors` into `module`, and return the names that only one of them has.

    weights_match "name": tensors are matched by their names (see `own_tensors`). Those that the
    file lacks, or has in another shape, become NaN: usually a head, which lies above every tap;
    `require_loaded` refuses taps that depend on others.
    weights_match "order": the n-th tensor of the file belongs to the n-th of the network, for files
    from another implementation of the same network. Every shape is compared, and the role (weight,
    bias, mean, variance) that a name states. A file without an order, or in alphabetical order, is
    refused, unless its names are the network's own. Not detected: two tensors of one shape and role
    that the other implementation registers in another order.

    Raises BackboneError listing missing and unexpected names if less than half of the network fits,
    or if the file has tensors at the network's top level that are no head; or naming the first pair
    that does not fit in order.
    """
    expected = module.state_dict()
    tensors_by_name = (
        _by_order(expected, without_wrappers(tensors), network_description)
        if weights_match == "order"
        else dict(tensors)
    )
    missing_names = [name for name in expected if name not in tensors_by_name]
    # Files from before PyTorch 0.4.1 have no batch counters; evaluation does not use them.
    for name in [name for name in missing_names if name.endswith("num_batches_tracked")]:
        tensors_by_name[name] = expected[name]
        missing_names.remove(name)
    unexpected_names = [name for name in tensors_by_name if name not in expected]
    other_shapes = [
        name
        for name in expected
        if name in tensors_by_name and tensors_by_name[name].shape != expected[name].shape
    ]
    module_names = {name for name, _ in module.named_modules()}
    misplaced_names = [
        name
        for name in unexpected_names
        if not owner_module(name, module_names) and not is_head_name(name)
    ]
    n_fitting = len(expected) - len(missing_names) - len(other_shapes)
    if misplaced_names or 2 * n_fitting < len(expected):
        shape_mismatches = [
            f"{name}: file {tuple(tensors_by_name[name].shape)}, network "
            f"{tuple(expected[name].shape)}"
            for name in other_shapes
        ]
        raise BackboneError(
            _mismatch_message(
                network_description,
                missing_names,
                misplaced_names or unexpected_names,
                shape_mismatches,
                len(expected),
                len(tensors),
            )
        )
    absent_names = (*missing_names, *other_shapes)
    fitting = {
        name: tensor
        for name, tensor in tensors_by_name.items()
        if name in expected and name not in absent_names
    }
    module.load_state_dict(fitting, strict=False)
    mark_absent(module, absent_names)
    return LeftOut(absent_names, tuple(unexpected_names))


def own_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], prefix: str | None, network_description: str
) -> tuple[dict[str, Tensor], LeftOut]:
    """Return the tensors of a file under a prefix, with the prefix removed, and the other names.

    prefix: None to find it, see `network_prefix`. Raises BackboneError.
    """
    expected = module.state_dict()
    tensors = without_chunks(without_wrappers(tensors), expected)
    children = [name for name, child in module.named_children() if child.state_dict()]
    tensors = with_child_names(tensors, expected, children)
    if prefix is None:
        prefix = network_prefix(tensors, expected, network_description)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if not own:
        first_parts = sorted({name.partition(".")[0] for name in tensors})
        raise BackboneError(
            f"{network_description}: no tensor's name begins with weights_prefix {prefix!r}. They "
            f"begin with: {first_names(first_parts)}"
        )
    others = tuple(name for name in tensors if not name.startswith(prefix))
    return own, LeftOut(others=others, prefix=prefix)


def converted_by_timm(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under timm's names, if timm's code converts those of the file, as it does for
    files as DINOv2, Swin or DeiT were published.
    """
    network_code = sys.modules.get(type(module).__module__)
    convert = getattr(network_code, "checkpoint_filter_fn", None)
    if not type(module).__module__.startswith("timm.") or convert is None:
        return dict(tensors)
    try:
        converted: dict[str, Tensor] = convert(dict(tensors), module)
    except Exception:  # noqa: BLE001 - its code raises anything on files that it does not know
        return dict(tensors)
    expected = module.state_dict().keys()
    gained = len(expected & converted.keys()) > len(expected & tensors.keys())
    return converted if gained else dict(tensors)


def names_of_nan(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's tensors that hold NaN, and of its parameters that hold
    infinities; buffers may, as masks of attention.
    """
    parameter_names = {name for name, _ in module.named_parameters()}
    return tuple(
        name
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
        and bool(tensor.isnan().any() or (name in parameter_names and tensor.isinf().any()))
    )


def mark_absent(module: nn.Module, names: Collection[str]) -> None:
    """Fill floating-point tensors, which no file has given, with NaN."""
    state = module.state_dict()
    for name in names:
        # Integers, such as tables of positions, are computed by the network's code and right.
        if state[name].is_floating_point():
            state[name].fill_(torch.nan)


def first_names(names: Sequence[str]) -> str:
    """Return the beginning of a list for a message: "a, b, c, d, and 7 more"."""
    rest = f", and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 (hex) of name, dtype, shape and bytes of all tensors, sorted by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        # As bytes, because bfloat16 has no NumPy dtype.
        hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hasher.hexdigest()


def _by_order(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], network_description: str
) -> dict[str, Tensor]:
    file_names, network_names = list(tensors), list(expected)
    if len(file_names) != len(network_names):
        file_names = [name for name in file_names if not name.endswith("num_batches_tracked")]
        network_names = [name for name in network_names if not name.endswith("num_batches_tracked")]
    if set(file_names) == set(network_names) and all(
        tensors[name].shape == expected[name].shape for name in network_names
    ):
        return dict(tensors)  # the names are the network's own, so no order is needed
    if len(file_names) != len(network_names):
        raise BackboneError(
            f"{network_description}: weights_match 'order' needs as many tensors as the network "
            f"has: the file has {len(tensors)}, the network {len(expected)}. These are weights of "
            "another architecture."
        )
    _require_order(
        file_names, network_names, isinstance(tensors, UnorderedTensors), network_description
    )
    for file_name, network_name in zip(file_names, network_names, strict=True):
        if tensors[file_name].shape != expected[network_name].shape:
            raise BackboneError(
                f"{network_description}: in order, the file's {file_name} "
                f"{tuple(tensors[file_name].shape)} meets the network's {network_name} "
                f"{tuple(expected[network_name].shape)}. These are weights of another architecture."
            )
        _require_role(file_name, tensors[file_name], network_name, network_description)
    return {
        network_name: tensors[file_name]
        for file_name, network_name in zip(file_names, network_names, strict=True)
    }


def _require_order(
    file_names: Sequence[str],
    network_names: Sequence[str],
    unordered: bool,
    network_description: str,
) -> None:
    """Raise BackboneError for tensors without an order, or in alphabetical order, which is not the
    network's.
    """
    cure = (
        f"Make a .pth file in the network's order: {HOW_TO_SAVE}; or rename the tensors and leave "
        "weights_match out."
    )
    if unordered:
        raise BackboneError(
            f"{network_description}: weights_match 'order' needs a file that keeps the order of "
            f"its tensors; a .safetensors file sorts them by name. {cure}"
        )
    # Sorted as text, without regard to case, or part by part of the names.
    for sort_key in (str, str.casefold, re.compile(r"[./]").split):
        if (
            len(file_names) > 1
            and _is_sorted(file_names, sort_key)
            and not _is_sorted(network_names, sort_key)
            # w_001, w_002: the order of the tensors, though it is alphabetical too.
            and not _is_numbered(file_names)
        ):
            raise BackboneError(
                f"{network_description}: weights_match 'order' needs the network's order, and the "
                f"file's tensors are sorted by name: {', '.join(file_names[:3])}, … (the network "
                f"begins with {', '.join(network_names[:3])}). Saving through a sorted dictionary, "
                f"JAX or HDF5 does that. {cure}"
            )


def _require_role(
    file_name: str, tensor: Tensor, network_name: str, network_description: str
) -> None:
    """Raise BackboneError if two tensors of one shape have different roles."""
    roles = (_role(file_name), _role(network_name))
    if None not in roles and roles[0] != roles[1]:
        raise BackboneError(
            f"{network_description}: in order, the file's {file_name} (a {roles[0]}) meets the "
            f"network's {network_name} (a {roles[1]}): they are of one shape, and not the same. "
            f"The file's order is not the network's: {HOW_TO_SAVE} makes one that is; or rename "
            "the tensors and leave weights_match out."
        )
    # Names without a role (w_1, b_2, 0017): at least no variance is below zero.
    if roles[1] == "variance" and bool((tensor < 0).any()):
        raise BackboneError(
            f"{network_description}: in order, the file's {file_name} meets the network's "
            f"{network_name}, and has values below zero, which no variance has. The file's order "
            f"is not the network's: {HOW_TO_SAVE} makes one that is."
        )


def _role(name: str) -> str | None:
    match = _ENDING.fullmatch(name)
    return _ROLE_OF[match[1].lower()] if match else None


def _is_sorted(names: Sequence[str], key: Callable[[str], Any]) -> bool:
    return list(names) == sorted(names, key=key)


def _is_numbered(names: Sequence[str]) -> bool:
    """Return whether all names begin with the same word and an increasing number."""
    matches = [re.match(r"(\D*)(\d+)", name) for name in names]
    numbers = [int(match[2]) for match in matches if match is not None]
    prefixes = {match[1] for match in matches if match is not None}
    return None not in matches and len(prefixes) == 1 and all(a < b for a, b in pairwise(numbers))


def _mismatch_message(
    network_description: str,
    missing_names: list[str],
    unexpected_names: list[str],
    shape_mismatches: list[str],
    n_network_tensors: int,
    n_file_tensors: int,
) -> str:
    lines = [
        f"{network_description}: the file does not fit the network "
        f"({count_text(n_file_tensors, 'tensor')} in the file, {n_network_tensors} in the network)."
    ]
    for label, names in (
        ("missing from the file", missing_names),
        ("not in the network", unexpected_names),
        ("other shapes", shape_mismatches),
    ):
        if names:
            lines.append(f"  {label} ({len(names)}): {first_names(names)}")
    if shape_mismatches:
        lines.append(
            "A network of another width, depth or input size needs its own backbone name, "
            "image_size or model: arguments."
        )
    elif n_network_tensors == n_file_tensors and missing_names and unexpected_names:
        lines.append(
            "The counts agree: for another implementation of the same network set weights_match: "
            "order."
        )
    elif not missing_names:
        lines.append(
            "All tensors of the network are there. If the others are of its training (metrics, "
            "losses), save the file without them: torch.save({name: tensor for name, tensor in "
            f"tensors.items() if not name.startswith({unexpected_names[0].partition('.')[0]!r})}}, "
            "'weights.pth'). If they are of the network, it needs model: arguments, such as "
            "reg_tokens or init_values."
        )
    else:
        lines.append(
            "Check that the backbone's name is the architecture that these weights were trained "
            "for, with its model: arguments, such as reg_tokens or init_values."
        )
    return "\n".join(lines)
