"""Weights files: read without pickle, fitted to a network by name or by order, and digested."""

import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headrace.extract.backbones.checkpoint_names import (
    is_head_name,
    network_prefix,
    owner_module,
    without_chunks,
    without_wrappers,
)
from headrace.extract.errors import BackboneError
from headrace.extract.spec import WeightsMatch, require_weights_file

# Training scripts wrap the state dict in a dictionary with the optimiser and the epoch.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")

# What the end of a tensor's name says about its part in a layer, in PyTorch, TensorFlow, Keras,
# Flax, MXNet and Paddle. The tensors of a normalisation are all of one shape, so that shapes cannot
# tell them apart.
_ROLES = {
    "weight": ("weight", "weights", "kernel", "gamma", "scale"),
    "bias": ("bias", "biases", "beta"),
    "mean": ("running_mean", "moving_mean", "mean"),
    "variance": ("running_var", "moving_variance", "moving_var", "variance", "var"),
    "batch counter": ("num_batches_tracked",),
}
_ROLE_OF = {ending: role for role, endings in _ROLES.items() for ending in endings}
_ENDING = re.compile(rf"(?:.*[./_])?({'|'.join(_ROLE_OF)})(?::0)?", re.IGNORECASE | re.DOTALL)
_HOW_TO_SAVE = "torch.save(network.state_dict(), 'weights.pth') where the network itself is at hand"


class UnorderedTensors(dict[str, Tensor]):
    """Tensors of a format that keeps names alone: this dictionary's order means nothing."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or PyTorch file, on the CPU; of PyTorch's, in its order.

    Never unpickles anything but tensors and plain containers. Raises BackboneError.
    """
    require_weights_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            # the writer sorts them by dtype and name
            loaded: object = UnorderedTensors(load_file(path))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path}: this file holds Python objects besides tensors, and loading those could run "
            "code from the file. Where it was made, save the tensors alone: "
            "torch.save(model.state_dict(), ...), or use safetensors."
        ) from error
    except Exception as error:
        # torch's unpickler, zip reader and safetensors raise anything on damaged files
        raise BackboneError(
            f"{path}: not a readable weights file ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return _state_dict(loaded, path)


@dataclass(frozen=True)
class LeftOut:
    """What a checkpoint and the network that it was loaded into do not have in common."""

    # of the network: not in the file, or of another shape there. They are NaN, so that nothing
    # that depends on them is taken for a number
    absent: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()  # of the file: the network has no place for them
    others: tuple[str, ...] = ()  # of the file, outside of `prefix`: other networks
    prefix: str = ""  # what the network's names follow in the file

    def __bool__(self) -> bool:
        return bool(self.absent or self.surplus or self.others)

    def describe(self) -> str:
        """Return what was taken and what was left out, in one line."""
        parts = [
            f"{label} ({len(names)}): {first_names(names)}"
            for label, names in (
                ("not in the file, or of another shape there", self.absent),
                ("not in the network", self.surplus),
                ("of other networks", self.others),
            )
            if names
        ]
        taken = f"taken from {self.prefix}*; " if self.prefix else ""
        return f"{taken}left out: {'; '.join(parts)}"


NOTHING_LEFT_OUT = LeftOut()


def fit_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    weights_match: WeightsMatch,
    network_description: str,
) -> LeftOut:
    """Load `tensors` into `module`; what the two do not have in common is left out, and returned.

    "name": tensors are the network's by their names (see `own_tensors`). Those that the file lacks
    or has in another shape become NaN: a head that is not there, or has other classes, lies above
    every tap, and `require_loaded` refuses the taps above the rest. "order": the n-th tensor of the
    file belongs to the n-th of the network, whatever they are called, for files from another
    implementation of the same network. Every shape is checked, and what names say of a tensor's
    role (weight, bias, mean, variance); a file without an order, or whose order is that of the
    alphabet, is refused, unless its names are the network's own. Two tensors of one shape and role
    that the other implementation registers in another order are beyond what a file can tell.

    Raises BackboneError listing missing and unexpected names where less than half of the network
    fits, or the file has tensors at the network's own level that are no head; or the first pair
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
    """The tensors of a file that stand under a prefix of the network's names, without it, and what
    stands outside of it.

    prefix: None finds it, see `network_prefix`. Raises BackboneError.
    """
    expected = module.state_dict()
    tensors = without_chunks(without_wrappers(tensors), expected)
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
    """The tensors under timm's names, where timm knows the file's: those that DINOv2, Swin or DeiT
    were published with, for example. Unchanged where that gives the network no more of its names.
    """
    network_code = sys.modules.get(type(module).__module__)
    convert = getattr(network_code, "checkpoint_filter_fn", None)
    if not type(module).__module__.startswith("timm.") or convert is None:
        return dict(tensors)
    try:
        converted: dict[str, Tensor] = convert(dict(tensors), module)
    except Exception:  # noqa: BLE001 (whatever its code says of a file that it does not know)
        return dict(tensors)
    expected = module.state_dict().keys()
    gained = len(expected & converted.keys()) > len(expected & tensors.keys())
    return converted if gained else dict(tensors)


def mark_absent(module: nn.Module, names: Collection[str]) -> None:
    """Fill tensors that no file has given with NaN; whole numbers, which code computes, stay."""
    state = module.state_dict()
    for name in names:
        if state[name].is_floating_point():
            state[name].fill_(torch.nan)


def first_names(names: Sequence[str]) -> str:
    """ "a, b, c, d, and 7 more": the beginning of a list, for messages."""
    rest = f", and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) of a state dict: each tensor's name, dtype, shape and bytes, by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        # memoryview of the bytes: bfloat16 has no NumPy dtype
        hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hasher.hexdigest()


def _state_dict(file_value: object, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(file_value, Mapping) and isinstance(file_value.get(key), Mapping):
            file_value = file_value[key]
            break
    if isinstance(file_value, Mapping) and not any(
        isinstance(value, Tensor) for value in file_value.values()
    ):
        # several networks, such as DINO's {"student": …, "teacher": …, "epoch": 99}
        networks = {
            f"{key}.": value
            for key, value in file_value.items()
            if isinstance(value, Mapping)
            and value
            and all(isinstance(tensor, Tensor) for tensor in value.values())
        }
        file_value = {
            f"{key}{name}": value
            for key, tensors in networks.items()
            for name, value in tensors.items()
        } or file_value
    if not isinstance(file_value, Mapping):
        raise BackboneError(
            f"{path}: expected a dictionary of tensors (a state dict), found "
            f"{type(file_value).__name__}."
        )
    non_tensor_names = [
        str(name) for name, value in file_value.items() if not isinstance(value, Tensor)
    ]
    if non_tensor_names:
        raise BackboneError(
            f"{path}: expected tensors alone, but these entries are not: "
            f"{', '.join(non_tensor_names[:5])}."
        )
    tensors = {str(name): value for name, value in file_value.items()}
    return UnorderedTensors(tensors) if isinstance(file_value, UnorderedTensors) else tensors


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
        return dict(tensors)  # under its own names each tensor is sure of its place
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
    """Raise BackboneError for tensors that lie in no order, or in that of the alphabet where the
    network's is another.
    """
    cure = (
        f"Make a .pth file in the network's order: {_HOW_TO_SAVE}; or rename the tensors and leave "
        "weights_match out."
    )
    if unordered:
        raise BackboneError(
            f"{network_description}: weights_match 'order' needs a file that keeps the order of "
            f"its tensors; a .safetensors file sorts them by name. {cure}"
        )
    for sort_key in (str, str.casefold, re.compile(r"[./]").split):
        if (
            len(file_names) > 1
            and _is_sorted(file_names, sort_key)
            and not _is_sorted(network_names, sort_key)
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
    """Raise BackboneError where two tensors of one shape do not mean the same."""
    roles = (_role(file_name), _role(network_name))
    if None not in roles and roles[0] != roles[1]:
        raise BackboneError(
            f"{network_description}: in order, the file's {file_name} (a {roles[0]}) meets the "
            f"network's {network_name} (a {roles[1]}): they are of one shape, and not the same. "
            f"The file's order is not the network's: {_HOW_TO_SAVE} makes one that is; or rename "
            "the tensors and leave weights_match out."
        )
    # Names that say nothing (w_1, b_2, 0017) leave the values: no variance is below zero.
    if roles[1] == "variance" and bool((tensor < 0).any()):
        raise BackboneError(
            f"{network_description}: in order, the file's {file_name} meets the network's "
            f"{network_name}, and has values below zero, which no variance has. The file's order "
            f"is not the network's: {_HOW_TO_SAVE} makes one that is."
        )


def _role(name: str) -> str | None:
    match = _ENDING.fullmatch(name)
    return _ROLE_OF[match[1].lower()] if match else None


def _is_sorted(names: Sequence[str], key: Callable[[str], Any]) -> bool:
    return list(names) == sorted(names, key=key)


def _is_numbered(names: Sequence[str]) -> bool:
    """Return whether every name begins with one word and a number that counts the tensors: an order
    that the alphabet keeps.
    """
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
        (
            f"{network_description}: the file does not fit the network ({n_file_tensors} tensors "
            f"in the file, {n_network_tensors} in the network)."
        )
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
    else:
        lines.append(
            "Check that the backbone's name is the architecture that these weights were trained "
            "for, with its model: arguments, such as reg_tokens or init_values."
        )
    return "\n".join(lines)
