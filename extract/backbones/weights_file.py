"""Weights files, read without running code: their tensors, and nothing of what lies around them."""

import pickle
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from headrace.extract.errors import BackboneError
from headrace.extract.spec import require_weights_file

# Training scripts wrap the state dict in a dictionary with the optimizer and the epoch. Averaged
# weights (EMA) come first, because the scripts evaluate them.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# The functions of torch._utils that put tensors together.
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
# What pickles of NumPy arrays name. An array is made empty, and gets its shape, dtype and bytes
# afterwards; the bytes are text in Latin-1 where torch.save wrote them.
_NUMPY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.int8),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.int8),  # since NumPy 2
    ("_codecs", "encode"): lambda text, _encoding: str(text).encode("latin-1"),
}
# A small file can name one module many times over.
_MAX_MODULES = 1_000_000
_MODULE_FIELDS = ("_parameters", "_buffers", "_modules")
HOW_TO_SAVE = "torch.save(network.state_dict(), 'weights.pth') where the network itself is at hand"


class UnorderedTensors(dict[str, Tensor]):
    """Tensors of a format that does not keep the network's order: that of the keys says nothing."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or PyTorch file, on the CPU.

    Those of a PyTorch file are in its order. Of a network that was saved whole, its parameters and
    buffers are taken. No code of the file is imported or run. Raises BackboneError.
    """
    require_weights_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            # Its writer sorts tensors by dtype and name.
            loaded: object = UnorderedTensors(load_file(path))
        else:
            loaded = _load_pytorch(path)
        tensors = _state_dict(loaded, path)
    except BackboneError:
        raise
    # torch's unpickler, its zip reader and safetensors raise anything on damaged files.
    except Exception as error:
        raise BackboneError(f"{path}: {_unreadable_reason(path, error)}") from error
    return UnorderedTensors(tensors) if isinstance(loaded, UnorderedTensors) else tensors


def _load_pytorch(path: Path) -> object:
    """Load a file of torch.save; objects that are no tensors or containers become stand-ins."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # with objects of other classes: arguments of the training, metrics, whole networks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the source code of classes
        # This would run a TorchScript program, but that has ended above with a RuntimeError.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE)


class _StandIn(dict[Any, Any]):
    """Takes the place of any class or function that a file names, and runs none of its code.

    A dict, so that objects of dictionary classes keep their items.
    """

    dump_patches = False  # asked for by PyTorch's reader of its oldest format
    state: object = None
    __hash__ = object.__hash__  # type: ignore[assignment]  # objects can be keys

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *_args: Any, **_kwargs: Any) -> "_StandIn":
        return _StandIn()

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, _item: object) -> None:
        """Take the place of a list's method, or of a set's."""

    extend = add = append


class _InertUnpickler(pickle.Unpickler):
    """Unpickles tensors and containers; every other class and function is a stand-in."""

    def find_class(self, module_name: str, name: str) -> Any:
        if (module_name, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name == "torch._utils" and name in _REBUILDERS:
            return getattr(torch._utils, name)
        if module_name == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _NUMPY_NAMES.get((module_name, name), _StandIn)


def _load_inert(file: Any, **options: Any) -> object:
    loaded: object = _InertUnpickler(file, **options).load()
    return loaded


# What torch.load asks of a pickle module.
_INERT_PICKLE: Any = types.SimpleNamespace(
    __name__="inert_pickle", Unpickler=_InertUnpickler, load=_load_inert
)


def _tensors_of(value: object) -> object:
    """Return the state dict of a network that was saved whole, or of one whose tensors were saved
    as NumPy arrays; any other value as it is.
    """
    if isinstance(value, Mapping) and value:
        arrays = {name: array for name, array in value.items() if isinstance(array, np.ndarray)}
        if len(arrays) == len(value):
            return {name: torch.tensor(array) for name, array in arrays.items()}
    if not _is_module(value):
        return value
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, Any]] = [("", value)]
    n_visited = 0
    while pending:
        prefix, module = pending.pop()
        if (n_visited := n_visited + 1) > _MAX_MODULES:
            raise ValueError(f"a network of more than {_MAX_MODULES:,} modules")
        state = module.state
        left_out = state.get("_non_persistent_buffers_set", ())
        for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
            if isinstance(tensor, Tensor) and name not in left_out:
                tensors[f"{prefix}{name}"] = tensor
        # Reversed on the stack, so that modules are visited in the order of a state dict.
        children = [(f"{prefix}{name}.", child) for name, child in state["_modules"].items()]
        pending += [(name, child) for name, child in reversed(children) if _is_module(child)]
    return tensors


def _is_module(value: object) -> bool:
    state = value.state if isinstance(value, _StandIn) else None
    return isinstance(state, Mapping) and all(
        isinstance(state.get(field), Mapping) for field in _MODULE_FIELDS
    )


def _state_dict(file_value: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors among what a file holds. Raises BackboneError."""
    entries = _tensors_of(file_value)
    if not isinstance(entries, Mapping) or _is_object(entries):
        kind = "an object" if _is_object(entries) else type(entries).__name__
        raise BackboneError(
            f"{path}: expected a dictionary of tensors (a state dict) or a network, found {kind}. "
            f"Save it again: {HOW_TO_SAVE}."
        )
    entries = _join_networks(
        _unwrapped({name: _tensors_of(value) for name, value in entries.items()})
    )
    non_tensor_names = [str(name) for name, value in entries.items() if not _is_tensor(value)]
    if non_tensor_names:
        raise BackboneError(
            f"{path}: expected tensors alone, but these entries are not: "
            f"{', '.join(non_tensor_names[:5])}. Save it again: {HOW_TO_SAVE}."
        )
    if not entries:
        raise BackboneError(f"{path}: it holds no tensor. Save it again: {HOW_TO_SAVE}.")
    return {str(name): _plain_tensor(tensor) for name, tensor in entries.items()}


def _unwrapped(entries: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the state dict that a training script has wrapped; without one, the entries."""
    for key in _WRAPPERS:
        wrapped = entries.get(key)
        if isinstance(wrapped, Mapping) and any(map(_is_tensor, wrapped.values())):
            return wrapped
    return entries


def _join_networks(entries: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the tensors of several networks, such as DINO's {"student": …, "teacher": …,
    "epoch": 99}, under names with the network's first; without networks, the entries.
    """
    if any(map(_is_tensor, entries.values())):
        return entries
    return {
        f"{key}.{name}": tensor
        for key, tensors in entries.items()
        if isinstance(tensors, Mapping) and all(map(_is_tensor, tensors.values()))
        for name, tensor in tensors.items()
    } or entries


def _is_object(value: object) -> bool:
    """Return whether a stand-in takes the place of an object, or of a dictionary without items."""
    return isinstance(value, _StandIn) and not value


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _plain_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor with values that a network can be given. Raises ValueError."""
    if tensor.is_meta:
        raise ValueError("its tensors have shapes and no values (device meta)")
    return tensor.dequantize() if tensor.is_quantized else tensor


def _unreadable_reason(path: Path, error: Exception) -> str:
    """Return why a file cannot be read, and what to do, for the kinds of files that people have."""
    with path.open("rb") as file:
        beginning = file.read(64).lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself. Fetch it: git lfs pull"
    if beginning.startswith((b"<!doctype", b"<html")):
        return "a web page and not weights: the address gave a page. Download the file again"
    if "TorchScript" in str(error) and zipfile.is_zipfile(path):
        return (
            "a TorchScript program, and loading it would run it. If you trust it, save its "
            f"weights: python -c \"import torch; torch.save(torch.jit.load('{path}', "
            "map_location='cpu').state_dict(), 'weights.pth')\""
        )
    return f"not a readable weights file ({type(error).__name__}: {str(error)[:200]})"
