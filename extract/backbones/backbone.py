"""Backbones: frozen pretrained networks with their preprocessing, from a library or a function."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.extract.backbones import library
from headrace.extract.backbones.first_convolution import adapt_channels, has_channels
from headrace.extract.backbones.weights import (
    NOTHING_LEFT_OUT,
    LeftOut,
    converted_by_timm,
    fit_weights,
    names_of_nan,
    own_tensors,
    weights_digest,
)
from headrace.extract.backbones.weights_file import read_weights
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import (
    BackboneSpec,
    check_sizes,
    check_spec,
    is_weights_file,
    weights_path,
    weights_stamp,
)

# Folders of installed packages. These change by their versions, and not from day to day.
_INSTALLED = frozenset(("site-packages", "dist-packages"))


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network in evaluation mode, without gradients, for the bands and image size of its spec."""

    spec: BackboneSpec
    module: nn.Module
    preprocessing: Preprocessing
    weights: str  # digest, as in FeatureSpec.weights
    left_out: LeftOut = NOTHING_LEFT_OUT  # tensors that only the weights file or the network has


def load_backbone(spec: BackboneSpec) -> Backbone:
    """Build the network, load its weights and freeze it.

    A process keeps its last four: the same spec and weights file give the same object.

    Raises BackboneError for unknown names, naming the nearest ones, for weights that do not fit,
    and for a tag that cannot be downloaded.
    """
    check_spec(spec)
    return _load_cached(spec, weights_stamp(spec))


def build_untrained(spec: BackboneSpec) -> tuple[nn.Module, Preprocessing]:
    """Return the network without its weights, in evaluation mode, and its preprocessing.

    Its tensors are on the meta device, without values, if it can be built so. Raises BackboneError.
    """
    tag = spec.weights
    if tag is not None and (tag.startswith("random:") or is_weights_file(tag)):
        tag = None
    try:
        with torch.device("meta"):
            module, preprocessing = library.build_network(spec.name, tag, spec.model_arguments)
    except (NotImplementedError, RuntimeError):
        # Some networks compute with values while they are built.
        module, preprocessing = library.build_network(spec.name, tag, spec.model_arguments)
    _adapt_to_bands(module, preprocessing, spec)
    _apply_image_size(module, preprocessing, spec)
    return module.eval(), override_preprocessing(preprocessing, spec)


def _adapt_to_bands(module: nn.Module, preprocessing: Preprocessing, spec: BackboneSpec) -> None:
    n_channels = spec.model_arguments.get("in_chans", 3)
    if spec.name.startswith("timm:") and spec.bands is None and n_channels != 3:
        bands_text = ", ".join(map(str, range(1, n_channels + 1)))
        raise BackboneError(
            f"{spec.name}: model: in_chans is {n_channels}, and images have three colours unless "
            f"their bands are named: bands: [{bands_text}]"
        )
    if spec.bands is not None and len(spec.bands) != preprocessing.n_channels:
        adapt_channels(module, spec.name, len(spec.bands))


def build_at_size(spec: BackboneSpec) -> nn.Module:
    """Return the network of a spec, at its input size, into which a state dict of it can be loaded.

    Its weights are arbitrary.
    """
    module, preprocessing = library.build_network(spec.name, None, spec.model_arguments)
    _adapt_to_bands(module, preprocessing, spec)
    _apply_image_size(module, preprocessing, spec)
    return module


def _apply_image_size(module: nn.Module, preprocessing: Preprocessing, spec: BackboneSpec) -> None:
    """Give the network the spec's input size if its weights have another."""
    if spec.image_size is not None and spec.image_size != preprocessing.crop[0]:
        library.set_input_size(module, spec.name, spec.image_size)


def override_preprocessing(preprocessing: Preprocessing, spec: BackboneSpec) -> Preprocessing:
    """Return the preprocessing of the weights with the values that the spec gives instead.

    Raises BackboneError for values that make none.
    """
    resize, crop = preprocessing.resize, preprocessing.crop
    if spec.image_size is not None or spec.crop_fraction is not None:
        fraction = spec.crop_fraction if spec.crop_fraction is not None else crop[0] / resize[0]
        if not 0 < fraction <= 1:
            raise BackboneError(
                f"{spec.name}: crop_fraction is {fraction}; expected more than 0 and at most 1"
            )
        size = spec.image_size if spec.image_size is not None else crop[0]
        if size < 1:
            raise BackboneError(f"{spec.name}: image_size is {size}; expected at least 1")
        crop = (size, size)
        # timm rounds down; 1e-6 keeps 224 / (224 / 256), computed as 255.99999, at 256.
        edge = int(size / fraction + 1e-6)
        resize = (edge, edge)
        check_sizes(spec.name, crop, resize)
    bands = spec.bands or preprocessing.bands
    n_channels = preprocessing.n_channels if bands is None else len(bands)
    overrides: dict[str, Any] = {
        name: value
        for name in ("interpolation", "pixel_range", "pixel_dtype", "nodata", "decode")
        if (value := getattr(spec, name)) is not None
    }
    try:
        return dataclasses.replace(
            preprocessing,
            resize=resize,
            crop=crop,
            mode=spec.resize_mode or preprocessing.mode,
            bands=bands,
            mean=spec.mean or _for_channels(preprocessing.mean, n_channels),
            std=spec.std or _for_channels(preprocessing.std, n_channels),
            **overrides,
        )
    except ValueError as error:
        raise BackboneError(f"{spec.name}: {error}") from None


def _for_channels(values: tuple[float, ...], n_channels: int) -> tuple[float, ...]:
    """Return a mean or std for n_channels: for another number of channels its average, as timm
    does it.
    """
    if len(values) == n_channels:
        return values
    return (sum(values) / len(values),) * n_channels


@functools.lru_cache(maxsize=4)
def _load_cached(spec: BackboneSpec, stamp: tuple[int, ...] | None) -> Backbone:
    arguments, left_out = spec.model_arguments, NOTHING_LEFT_OUT
    if spec.weights is not None and spec.weights.startswith("random:"):
        with _in_memory(spec.name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(spec.weights.removeprefix("random:")))
            module, preprocessing = library.build_network(spec.name, None, arguments)
    elif spec.weights is not None and is_weights_file(spec.weights):
        module, preprocessing, left_out = _build_from_file(spec, spec.weights)
    else:
        with _in_memory(spec.name):
            module, preprocessing, left_out = library.build_pretrained(
                spec.name, spec.weights, arguments
            )
    not_numbers = tuple(name for name in names_of_nan(module) if name not in left_out.absent)
    left_out = dataclasses.replace(left_out, not_numbers=not_numbers)
    # Bands and image size change nothing where a weights file has needed them already.
    _adapt_to_bands(module, preprocessing, spec)
    # The digest before position embeddings are resampled to another image size, which other
    # machines may round differently; the size is in the preprocessing.
    digest = weights_digest(module)
    _apply_image_size(module, preprocessing, spec)
    module.eval().requires_grad_(False)
    # Name and weights identify a library's network. The code of the user's own may have changed, or
    # the configuration of one from a hub or a folder; arguments and prefix tokens can change the
    # output for the same tensors. All of these enter the digest.
    configuration_text = (
        _own_source(spec.name, module)
        if spec.name.startswith("python:")
        else _configuration(module)
    )
    configuration_text += spec.model if isinstance(spec.model, str) else ""
    if spec.prefix_tokens is not None:
        configuration_text += f"prefix_tokens: {spec.prefix_tokens}"
    if configuration_text:
        digest = hashlib.sha256((digest + configuration_text).encode()).hexdigest()
    return Backbone(spec, module, override_preprocessing(preprocessing, spec), digest, left_out)


def _build_from_file(spec: BackboneSpec, weights: str) -> tuple[nn.Module, Preprocessing, LeftOut]:
    """Build the network with the tensors of its weights file, in the bands and size of the file."""
    description = _describe(spec)
    # Before the network is built, which takes seconds: a wrong path fails at once.
    tensors = read_weights(weights_path(weights))
    with library.limit_parameters_to_file(tensors, spec.name):
        module, preprocessing = library.build_network(spec.name, None, spec.model_arguments)
    left_out = NOTHING_LEFT_OUT
    if spec.weights_match == "name":
        tensors, left_out = own_tensors(module, tensors, spec.weights_prefix, description)
        tensors = converted_by_timm(module, tensors)
    if spec.bands is not None and has_channels(module, tensors, len(spec.bands)):
        _adapt_to_bands(module, preprocessing, spec)
    # A file that was exported at `image_size` fits only a network of that size.
    if spec.weights_match == "name" and not _fits_unchanged(module, tensors):
        _apply_image_size(module, preprocessing, spec)
    fitted = fit_weights(module, tensors, spec.weights_match, description)
    if spec.weights_match == "name":
        left_out = dataclasses.replace(left_out, absent=fitted.absent, surplus=fitted.surplus)
    return module, preprocessing, left_out


def _describe(spec: BackboneSpec) -> str:
    arguments = f", model {spec.model}" if spec.model else ""
    return f"{spec.name}{arguments} with weights {spec.weights or '(default)'}"


def _in_memory(name: str) -> contextlib.AbstractContextManager[None]:
    """Limit the parameters of a network without a weights file to what this machine can hold."""
    max_parameters = _memory_bytes() // 4  # of float32
    reason = f"and the memory of this machine holds {max_parameters:,}. Take a smaller network"
    return library.limit_parameters(max_parameters, name, reason)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _fits_unchanged(module: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors have the shapes that the network is built with."""
    return all(
        tensors[name].shape == value.shape
        for name, value in module.state_dict().items()
        if name in tensors
    )


def _configuration(module: nn.Module) -> str:
    """Return the configuration of a network of transformers, or of timm from a hub or a folder, as
    JSON; "" for others.
    """
    if type(module).__module__.startswith("timm."):
        saved: dict[str, Any] = getattr(module, "pretrained_cfg", {})
        if saved.get("source") not in ("hf-hub", "local-dir"):
            return ""
        built = [saved.get("architecture"), getattr(module, "pretrained_model_args", {})]
        return json.dumps(built, sort_keys=True, default=str)
    if not type(module).__module__.startswith("transformers."):
        return ""
    fields: dict[str, Any] = module.config.to_dict()  # type: ignore[operator, union-attr]
    # Fields that say where it was read from, by which version and in which dtype.
    incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    kept = {name: value for name, value in fields.items() if name not in incidental}
    return json.dumps(kept, sort_keys=True, default=str)


def _own_source(name: str, network: nn.Module) -> str:
    """Return the source of the module of a "python:module:function" backbone, and of others of the
    user's own that define the layers of its network; "" for what has none.
    """
    own_module = name.split(":")[1]
    others = {type(layer).__module__ for layer in network.modules()} - {own_module}
    sources = []
    for module_name in (own_module, *sorted(others)):
        # Not imported, without a source file, or built into Python.
        with contextlib.suppress(KeyError, OSError, TypeError):
            module = sys.modules[module_name]
            is_installed = not _INSTALLED.isdisjoint(Path(inspect.getfile(module)).parts)
            if module_name == own_module or not is_installed:
                sources.append(inspect.getsource(module))
    return "\n".join(sources)
