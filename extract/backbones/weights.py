"""Weights files: read without pickle, fitted to a network by name or by order, and digested."""

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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
    """Tensors of a format that keeps their names alone: the order of this dictionary
    means nothing.
    """


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or PyTorch file, on the CPU; those of a PyTorch file are in
    its order.

    Never unpickles anything but tensors and plain containers. Raises BackboneError.
    """
    require_weights_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            loaded: object = UnorderedTensors(
                load_file(path)
            )  # the writer sorts them by dtype and name
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path}: this file holds Python objects besides tensors, and loading those could run "
            "code from the file. Where it was made, save the tensors alone: "
            "torch.save(model.state_dict(), ...), or use safetensors."
        ) from error
    except (
        Exception
    ) as error:  # torch's unpickler, zip reader and safetensors raise anything on damaged files
        raise BackboneError(
            f"{path}: not a readable weights file ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return _state_dict(loaded, path)


def fit_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], match: WeightsMatch, what: str
) -> None:
    """Load `tensors` into `module` strictly.

    "name": every name and shape must be the network's. "order": the n-th tensor of the file belongs
    to the n-th of the network, whatever they are called, for files from another implementation of
    the same network. Every shape is checked, and what names say of a tensor's role (weight, bias,
    mean, variance); a file without an order, or whose order is that of the alphabet, is refused,
    unless its names are the network's own. Two tensors of one shape and role that the other
    implementation registers in another order are beyond what a file can tell. Raises BackboneError
    listing missing and unexpected names, or the first pair that does not fit.
    """
    expected = module.state_dict()
    named = _by_order(expected, tensors, what) if match == "order" else dict(tensors)
    missing = [name for name in expected if name not in named]
    # Files from before PyTorch 0.4.1 have no batch counters; evaluation does not use them.
    for name in [name for name in missing if name.endswith("num_batches_tracked")]:
        named[name] = expected[name]
        missing.remove(name)
    unexpected = [name for name in named if name not in expected]
    shapes = [
        f"{name}: file {tuple(named[name].shape)}, network {tuple(expected[name].shape)}"
        for name in expected
        if name in named and named[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        raise BackboneError(
            _mismatch_message(what, missing, unexpected, shapes, len(expected), len(tensors))
        )
    module.load_state_dict(named, strict=True)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) over every tensor of the state dict, sorted by name: name, dtype,
    shape, bytes.
    """
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        # memoryview of the bytes: bfloat16 has no NumPy dtype
        hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hasher.hexdigest()


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise BackboneError(
            f"{path}: expected a dictionary of tensors (a state dict), found "
            f"{type(loaded).__name__}."
        )
    odd = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise BackboneError(
            f"{path}: expected tensors alone, but these entries are not: {', '.join(odd[:5])}."
        )
    names = [str(name) for name in loaded]
    # DistributedDataParallel and torch.compile prepend these to every name
    for prefix in ("module.", "_orig_mod."):
        if names and all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    tensors = dict(zip(names, loaded.values(), strict=True))
    return UnorderedTensors(tensors) if isinstance(loaded, UnorderedTensors) else tensors


def _by_order(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    theirs, ours = list(tensors), list(expected)
    if len(theirs) != len(ours):
        theirs = [name for name in theirs if not name.endswith("num_batches_tracked")]
        ours = [name for name in ours if not name.endswith("num_batches_tracked")]
    if set(theirs) == set(ours) and all(
        tensors[name].shape == expected[name].shape for name in ours
    ):
        return dict(tensors)  # under its own names each tensor is sure of its place
    if len(theirs) != len(ours):
        raise BackboneError(
            f"{what}: weights_match 'order' needs as many tensors as the network has: the file has "
            f"{len(tensors)}, the network {len(expected)}. These are weights of another "
            "architecture."
        )
    _require_order(theirs, ours, isinstance(tensors, UnorderedTensors), what)
    for theirs_name, ours_name in zip(theirs, ours, strict=True):
        if tensors[theirs_name].shape != expected[ours_name].shape:
            raise BackboneError(
                f"{what}: in order, the file's {theirs_name} {tuple(tensors[theirs_name].shape)} "
                f"meets the network's {ours_name} {tuple(expected[ours_name].shape)}. These are "
                "weights of another architecture."
            )
        _require_role(theirs_name, tensors[theirs_name], ours_name, what)
    return {
        ours_name: tensors[theirs_name] for theirs_name, ours_name in zip(theirs, ours, strict=True)
    }


def _require_order(theirs: Sequence[str], ours: Sequence[str], unordered: bool, what: str) -> None:
    """Raises BackboneError for tensors that lie in no order, or in that of the alphabet where the
    network's is another.
    """
    cure = (
        f"Make a .pth file in the network's order: {_HOW_TO_SAVE}; or rename the tensors and leave "
        "weights_match out."
    )
    if unordered:
        raise BackboneError(
            f"{what}: weights_match 'order' needs a file that keeps the order of its tensors; a "
            f".safetensors file sorts them by name. {cure}"
        )
    for sort_key in (str, str.casefold, _name_parts):
        if (
            len(theirs) > 1
            and _is_sorted(theirs, sort_key)
            and not _is_sorted(ours, sort_key)
            and not _is_numbered(theirs)
        ):
            raise BackboneError(
                f"{what}: weights_match 'order' needs the network's order, and the file's tensors "
                f"are sorted by name: {', '.join(theirs[:3])}, … (the network begins with "
                f"{', '.join(ours[:3])}). Saving through a sorted dictionary, JAX or HDF5 does "
                f"that. {cure}"
            )


def _require_role(theirs: str, tensor: Tensor, ours: str, what: str) -> None:
    """Raises BackboneError where two tensors of one shape do not mean the same."""
    roles = (_role(theirs), _role(ours))
    if None not in roles and roles[0] != roles[1]:
        raise BackboneError(
            f"{what}: in order, the file's {theirs} (a {roles[0]}) meets the network's {ours} (a "
            f"{roles[1]}): they are of one shape, and not the same. The file's order is not the "
            f"network's: {_HOW_TO_SAVE} makes one that is; or rename the tensors and leave "
            "weights_match "
            "out."
        )
    # Names that say nothing (w_1, b_2, 0017) leave the values: no variance is below zero.
    if roles[1] == "variance" and bool((tensor < 0).any()):
        raise BackboneError(
            f"{what}: in order, the file's {theirs} meets the network's {ours}, and has values "
            "below zero, which no variance has. The file's order is not the network's: "
            f"{_HOW_TO_SAVE} "
            "makes one that is."
        )


def _role(name: str) -> str | None:
    match = _ENDING.fullmatch(name)
    return _ROLE_OF[match[1].lower()] if match else None


def _name_parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _is_sorted(names: Sequence[str], key: Callable[[str], Any]) -> bool:
    return list(names) == sorted(names, key=key)


def _is_numbered(names: Sequence[str]) -> bool:
    """Whether every name begins with one word and a number that counts the tensors: an order that
    the alphabet keeps.
    """
    matches = [re.match(r"(\D*)(\d+)", name) for name in names]
    numbers = [int(match[2]) for match in matches if match is not None]
    prefixes = {match[1] for match in matches if match is not None}
    return None not in matches and len(prefixes) == 1 and all(a < b for a, b in pairwise(numbers))


def _mismatch_message(
    what: str, missing: list[str], unexpected: list[str], shapes: list[str], ours: int, theirs: int
) -> str:
    lines = [
        (
            f"{what}: the file does not fit the network ({theirs} tensors in the file, {ours} in "
            "the network)."
        )
    ]
    for label, names in (
        ("missing from the file", missing),
        ("not in the network", unexpected),
        ("other shapes", shapes),
    ):
        if names:
            more = f", and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  {label} ({len(names)}): {', '.join(names[:4])}{more}")
    if shapes:
        lines.append(
            "A network with another number of classes or another width needs its own backbone name."
        )
    elif ours == theirs and missing and unexpected:
        lines.append(
            "The counts agree: for another implementation of the same network set weights_match: "
            "order."
        )
    else:
        lines.append(
            "Check that the backbone's name is the architecture that these weights were trained "
            "for."
        )
    return "\n".join(lines)
