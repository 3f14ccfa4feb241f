"""Weights files: read without pickle, fitted to a network by name or by order, and digested."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from headrace.extract.errors import BackboneError
from headrace.extract.spec import WeightsMatch, require_file

# Training scripts wrap the state dict in a dictionary with the optimiser and the epoch.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or PyTorch file, on the CPU, in the file's order.

    Never unpickles anything but tensors and plain containers. Raises BackboneError.
    """
    require_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            loaded: object = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path}: this file holds Python objects besides tensors, and loading those could run code from the file. "
            "Where it was made, save the tensors alone: torch.save(model.state_dict(), ...), or use safetensors."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BackboneError(
            f"{path}: not a readable weights file ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return _state_dict(loaded, path)


def fit_weights(module: nn.Module, tensors: Mapping[str, Tensor], match: WeightsMatch, what: str) -> None:
    """Load `tensors` into `module` strictly.

    "name": every name and shape must be the network's. "order": the n-th tensor of the file belongs to the n-th of the
    network, whatever they are called, and every shape is checked; for files from another implementation of the same
    network. Raises BackboneError listing missing and unexpected names, or the first shape that differs.
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
        raise BackboneError(_mismatch(what, missing, unexpected, shapes, len(expected), len(tensors)))
    module.load_state_dict(named, strict=True)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 (hex) over every tensor of the state dict, sorted by name: name, dtype, shape, bytes."""
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
        raise BackboneError(f"{path}: expected a dictionary of tensors (a state dict), found {type(loaded).__name__}.")
    odd = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if odd:
        raise BackboneError(f"{path}: expected tensors alone, but these entries are not: {', '.join(odd[:5])}.")
    names = [str(name) for name in loaded]
    # DistributedDataParallel and torch.compile prepend these to every name
    for prefix in ("module.", "_orig_mod."):
        if names and all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, loaded.values(), strict=True))


def _by_order(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    theirs, ours = list(tensors), list(expected)
    if len(theirs) != len(ours):
        theirs = [name for name in theirs if not name.endswith("num_batches_tracked")]
        ours = [name for name in ours if not name.endswith("num_batches_tracked")]
    if len(theirs) != len(ours):
        raise BackboneError(
            f"{what}: weights_match 'order' needs as many tensors as the network has: "
            f"the file has {len(tensors)}, the network {len(expected)}. These are weights of another architecture."
        )
    for theirs_name, ours_name in zip(theirs, ours, strict=True):
        if tensors[theirs_name].shape != expected[ours_name].shape:
            raise BackboneError(
                f"{what}: in order, the file's {theirs_name} {tuple(tensors[theirs_name].shape)} meets the network's "
                f"{ours_name} {tuple(expected[ours_name].shape)}. These are weights of another architecture."
            )
    return {ours_name: tensors[theirs_name] for theirs_name, ours_name in zip(theirs, ours, strict=True)}


def _mismatch(what: str, missing: list[str], unexpected: list[str], shapes: list[str], ours: int, theirs: int) -> str:
    lines = [f"{what}: the file does not fit the network ({theirs} tensors in the file, {ours} in the network)."]
    for label, names in (
        ("missing from the file", missing),
        ("not in the network", unexpected),
        ("other shapes", shapes),
    ):
        if names:
            more = f", and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  {label} ({len(names)}): {', '.join(names[:4])}{more}")
    if shapes:
        lines.append("A network with another number of classes or another width needs its own backbone name.")
    elif ours == theirs and missing and unexpected:
        lines.append("The counts agree: for another implementation of the same network set weights_match: order.")
    else:
        lines.append("Check that the backbone's name is the architecture that these weights were trained for.")
    return "\n".join(lines)
