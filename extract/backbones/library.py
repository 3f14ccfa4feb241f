"""Networks of the libraries, ONNX files and Python functions, built with their preprocessing."""

import contextlib
import dataclasses
import importlib
import math
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from headrace.cache.home import expand_home
from headrace.extract.backbones.arguments import explain_build_errors, with_layers_of_timm
from headrace.extract.backbones.hub import hub_message, require_hub_name
from headrace.extract.backbones.huggingface import (
    build_transformers,
    interpolate_positions,
    takes_other_sizes,
)
from headrace.extract.backbones.onnx_network import OnnxNetwork, build_onnx
from headrace.extract.backbones.open_clip_tower import build_open_clip, resample_positions
from headrace.extract.backbones.weights import NOTHING_LEFT_OUT, LeftOut
from headrace.extract.errors import BackboneError, nearest_names
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.spec import backbone_path, unknown_prefix_message

# For one request: without a network, the libraries retry for most of a minute before they say so.
_NETWORK_TIMEOUT_S = 4
_TIMM_SOURCES = ("hf-hub:", "local-dir:")


def build_network(
    name: str, tag: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    """Build the network `name` with random weights, and the preprocessing of a tag's weights
    (for open_clip, of the architecture).

    tag: None for the default one.
    arguments: of the library's builder, BackboneSpec.model_arguments.

    Raises BackboneError.
    """
    kind, _, rest = name.partition(":")
    with explain_build_errors(name, arguments):
        if kind == "torchvision":
            return _build_torchvision(rest, tag, arguments)
        if kind == "timm":
            return _create_timm(_timm_name(rest, tag), rest, arguments, pretrained=False)
        if kind == "python" and ":" in rest:
            return _build_python(rest, arguments)
        if kind == "transformers":
            return build_transformers(rest, tag, arguments, pretrained=False)[:2]
        if kind == "open_clip":
            return build_open_clip(rest, tag, arguments)
        if kind == "onnx":
            return build_onnx(expand_home(rest))
    raise BackboneError(unknown_prefix_message(name))


def build_pretrained(
    name: str, tag: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing, LeftOut]:
    """Build the network `name` with the library's weights of a tag (None: the default one).

    The third value lists tensors that only the weights, or only the network, have.

    Raises BackboneError, also if the weights are not on this machine and cannot be downloaded.
    """
    kind, _, rest = name.partition(":")
    if kind in ("onnx", "python"):
        if tag is not None:
            reason = (
                "the file holds its weights; leave `weights` out"
                if kind == "onnx"
                else f"weights {tag!r}: a Python function knows no tags; name a file or nothing."
            )
            raise BackboneError(f"{name}: {reason}")
        return *build_network(name, None, arguments), NOTHING_LEFT_OUT
    with explain_build_errors(name, arguments):
        if kind == "torchvision":
            return *_torchvision_pretrained(rest, tag, arguments), NOTHING_LEFT_OUT
        if kind == "timm":
            return *_timm_pretrained(rest, tag, arguments), NOTHING_LEFT_OUT
        if kind == "transformers":
            _require_hub(name, rest)
            return build_transformers(rest, tag, arguments, pretrained=True)
        if kind == "open_clip":
            if rest.startswith("hf-hub:"):
                _require_hub(name, rest.removeprefix("hf-hub:"))
            return *build_open_clip(rest, tag, arguments, pretrained=True), NOTHING_LEFT_OUT
    raise BackboneError(unknown_prefix_message(name))


@contextlib.contextmanager
def limit_parameters(max_parameters: int, name: str, reason: str) -> Iterator[None]:
    """Raise BackboneError when a network built within has more than `max_parameters`.

    reason: the end of the message.
    """
    thread, total = threading.get_ident(), 0

    def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        # The hook is the whole process's: other threads may build networks of their own.
        if (
            parameter is None
            or threading.get_ident() != thread
            or isinstance(parameter, nn.UninitializedParameter)
        ):
            return
        total += parameter.numel()
        if total > max_parameters:
            raise BackboneError(
                f"{name}: the network has more than {max_parameters:,} parameters, {reason}"
            )

    # Not for the caller's own code, which is trusted, and may build more than it returns.
    if name.startswith("python:"):
        yield
        return
    # Counted while it is built, before all parameters take memory: a stranger's model file may name
    # any network of a library, and the largest have billions.
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def limit_parameters_to_file(
    tensors: Mapping[str, Tensor], name: str
) -> contextlib.AbstractContextManager[None]:
    """Limit the parameters of a network to about the size of its weights file."""
    # Four times as many and 2^24 more: position embeddings may be of another image size, and a file
    # of another network gets a better message when its names are compared.
    n_values = sum(tensor.numel() for tensor in tensors.values())
    reason = f"and its weights file holds {n_values:,} numbers: they are another one's"
    return limit_parameters(4 * n_values + (1 << 24), name, reason)


def backbone_names() -> list[str]:
    """Return all classification models of torchvision and models of timm, sorted, with prefixes."""
    import timm
    import torchvision.models

    vision = torchvision.models.list_models(module=torchvision.models)
    names = [f"torchvision:{name}" for name in vision]
    return sorted(names + [f"timm:{name}" for name in timm.list_models()])


def backbone_tags(name: str) -> list[str]:
    """Return the pretrained tags of a torchvision or timm model, the default first; else []."""
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        enum = _torchvision_weights(rest)
        default = enum.DEFAULT.name
        return [default, *(entry.name for entry in enum if entry.name != default)]
    if kind == "timm":
        import timm

        tags = [tag.removeprefix(rest).lstrip(".") for tag in timm.list_pretrained(f"{rest}.*")]
        default_config = timm.get_pretrained_cfg(rest)
        default = default_config.tag if default_config else None
        return sorted(tags, key=lambda tag: tag != default)  # stable: the others stay by name
    return []


def _torchvision_weights(name: str) -> Any:
    import torchvision.models

    model_names = torchvision.models.list_models(module=torchvision.models)
    if name not in model_names:
        raise BackboneError(
            f"torchvision has no classification model {name!r}. Nearest: "
            f"{nearest_names(name, model_names)}. Search with: headrace backbones {name[:6]}"
        )
    return torchvision.models.get_model_weights(name)


def _torchvision_entry(name: str, tag: str | None) -> Any:
    enum = _torchvision_weights(name)
    if tag is None:
        return enum.DEFAULT
    if tag not in enum.__members__:
        raise BackboneError(
            f"torchvision:{name} has no weights {tag!r}. It has: {', '.join(enum.__members__)}."
        )
    return enum[tag]


def _build_torchvision(
    name: str, tag: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    import torchvision.models

    entry = _torchvision_entry(name, tag)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # transform_input and aux_logits as for their pretrained weights; init_weights, because
        # torchvision otherwise warns, and draws random weights slowly.
        options = {"init_weights": False, "transform_input": True, "aux_logits": True}
    preprocessing = _preprocessing_of_torchvision(entry.transforms())
    if name.startswith("vit_"):
        # Their position embedding is built for one image size: that of the weights.
        options["image_size"] = preprocessing.crop[0]
    options |= arguments
    module = torchvision.models.get_model(name, weights=None, **options)
    return module, _resized(preprocessing, arguments.get("image_size"))


def _torchvision_pretrained(
    name: str, tag: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    import torchvision.models

    entry = _torchvision_entry(name, tag)
    target = torch.hub.get_dir() + "/checkpoints/" + entry.url.rsplit("/", 1)[-1]
    _require_network(f"torchvision:{name}", entry.name, entry.url, target)
    try:
        module = torchvision.models.get_model(name, weights=entry, **arguments)
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            _offline_message(f"torchvision:{name}", entry.name, entry.url, target, str(error))
        ) from error
    return module, _preprocessing_of_torchvision(entry.transforms())


def _preprocessing_of_torchvision(transforms: Any) -> Preprocessing:
    edge, crop = transforms.resize_size[0], transforms.crop_size[0]
    return Preprocessing(
        resize=(edge, edge),
        crop=(crop, crop),
        mode="shortest",
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _create_timm(
    full: str, name: str, arguments: Mapping[str, Any], *, pretrained: bool
) -> tuple[nn.Module, Preprocessing]:
    """Build a network of timm, of the hub or of a folder, at the input size of its arguments.

    full: timm's name, with tag or source. name: as the user gave it. Raises BackboneError.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    options = with_layers_of_timm(name, arguments)
    try:
        module = timm.create_model(full, pretrained=pretrained, **options)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        # Files of a user or of the hub may hold anything; an error for timm's own networks is one
        # of the arguments, which callers explain.
        if not full.startswith(_TIMM_SOURCES) or isinstance(error, BackboneError):
            raise
        model_id = full.partition(":")[2]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BackboneError(
            (full.startswith("hf-hub:") and hub_message(f"timm:{full}", model_id, error))
            or f"timm:{full} is not a model that timm saved, or does not fit its model: arguments "
            f"({reason})"
        ) from error
    config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    return module, _resized(_preprocessing_of_timm(config), arguments.get("img_size"))


def _resized(preprocessing: Preprocessing, size: object) -> Preprocessing:
    """Return the preprocessing at the input size that an argument gives, with its share of crop in
    resize.
    """
    if not isinstance(size, int):
        return preprocessing
    # A quotient that is a whole number may be rounded to a little less.
    edge = math.floor(size * preprocessing.resize[0] / preprocessing.crop[0] + 1e-6)
    return dataclasses.replace(preprocessing, crop=(size, size), resize=(edge, edge))


def _timm_name(name: str, tag: str | None) -> str:
    import timm

    if name.startswith(_TIMM_SOURCES):
        source, _, model_id = name.partition(":")
        if tag is not None:
            raise BackboneError(
                f"timm:{name} holds its own weights, and has no tag {tag!r}; leave `weights` out, "
                "or name a file"
            )
        if source == "hf-hub":
            require_hub_name(f"timm:{name}", model_id)
            return name
        return f"{source}:{expand_home(model_id)}"
    model_name = name.partition(".")[0]
    if not timm.is_model(model_name):
        raise BackboneError(
            f"timm has no model {name!r}. Nearest: "
            f"{nearest_names(model_name, timm.list_models())}. Search with: headrace backbones "
            f"{model_name[:6]}"
        )
    tagged_name = name if tag is None else f"{model_name}.{tag}"
    if "." in tagged_name and tagged_name not in timm.list_pretrained(f"{model_name}.*"):
        known_tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{model_name}.*")]
        raise BackboneError(
            f"timm:{model_name} has no weights {tagged_name.partition('.')[2]!r}. It has: "
            f"{', '.join(known_tags) or 'none'}."
        )
    return tagged_name


def _timm_pretrained(
    name: str, tag: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    import timm
    from huggingface_hub import constants, errors, try_to_load_from_cache

    if "num_classes" in arguments:
        # timm would then load weights without comparing names, and leave out others unnoticed.
        raise BackboneError(
            f"timm:{name}: model: num_classes changes the head alone, and taps lie below it; leave "
            "it out"
        )
    full = _timm_name(name, tag)
    if full.startswith(_TIMM_SOURCES):
        if full.startswith("hf-hub:"):
            _require_hub(f"timm:{full}", full.removeprefix("hf-hub:"))
        return _create_timm(full, name, arguments, pretrained=True)
    config = timm.get_pretrained_cfg(full)
    if config is None or not config.has_weights:
        raise BackboneError(
            f"timm:{full} has no pretrained weights. Name a weights file, or weights: random:0."
        )
    hub = config.hf_hub_id
    if hub:
        files = ("model.safetensors", "pytorch_model.bin")
        cached = any(isinstance(try_to_load_from_cache(hub, file), str) for file in files)
        if not cached:
            _require_network(f"timm:{full}", full, f"{constants.ENDPOINT}/{hub}", "")
    try:
        return _create_timm(full, name, arguments, pretrained=True)
    except (OSError, RuntimeError, ValueError, errors.HfHubHTTPError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(
            (hub and hub_message(f"timm:{full}", str(hub), error))
            or _offline_message(f"timm:{full}", full, str(hub or config.url), "", str(error))
        ) from error


def set_input_size(module: nn.Module, name: str, size: int) -> None:
    """Give a network a new input size, in place, by resampling its position embeddings or tables.

    Each library's own function does it. Networks that take any size are not changed.

    size: pixels of each edge. Raises BackboneError for a size that the network cannot take.
    """
    if isinstance(module, OnnxNetwork):
        module.require_size(size, name)
    resample: Any = getattr(module, "set_input_size", None)
    patch_embed = getattr(module, "patch_embed", None)
    patch = getattr(patch_embed, "patch_size", None)
    interpolates = takes_other_sizes(module)
    if interpolates:  # models of transformers that resample their position embeddings
        configuration: Any = module.config
        patch = (configuration.patch_size,) * 2
    elif type(module).__module__.startswith("open_clip."):
        patch = getattr(module, "patch_size", None)
    if isinstance(patch, int):  # timm's XCiT
        patch = (patch, patch)
    # Pixels beyond the last whole patch would be cut off.
    if patch is not None and not getattr(patch_embed, "dynamic_img_pad", False) and size % patch[0]:
        smaller_size = size // patch[0] * patch[0]
        valid_sizes = [str(edge) for edge in (smaller_size, smaller_size + patch[0]) if edge]
        raise BackboneError(
            f"{name}: image_size is {size}, and its patches are {patch[0]} x {patch[1]} pixels: "
            f"take a multiple, such as {' or '.join(valid_sizes)}"
        )
    try:
        if resample is not None:  # timm's vision transformers, Swin, BEiT, MaxViT and others
            with warnings.catch_warnings():  # timm's, about the memory layout of its own tables
                warnings.simplefilter("ignore", UserWarning)
                resample(img_size=(size, size))
        elif type(module).__module__ == "torchvision.models.vision_transformer":
            _resample_torchvision(module, size)
        elif interpolates:
            interpolate_positions(module)
        elif patch is not None and hasattr(module, "positional_embedding"):
            resample_positions(module, size)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(
            f"{name} cannot be given images of {size} x {size} pixels ({type(error).__name__}: "
            f"{str(error)[:200]}): leave image_size out for the weights' own size"
        ) from error


def _resample_torchvision(module: Any, size: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = interpolate_embeddings(size, module.patch_size, module.state_dict())
    positions = nn.Parameter(state["encoder.pos_embedding"])
    module.image_size, module.seq_length = size, positions.shape[1]
    module.encoder.pos_embedding = positions


def _preprocessing_of_timm(config: dict[str, Any]) -> Preprocessing:
    if config["input_size"][0] != 3:
        raise BackboneError(
            f"the network takes {config['input_size'][0]} channels, and images have three colours: "
            "leave its number of channels out, and name the bands of the files (bands: [1, 2, 3, "
            "4]), to which the network is adapted"
        )
    height, width = config["input_size"][1:]
    fraction = config["crop_pct"]
    modes = {"center": "shortest", "squash": "squash", "border": "border"}
    return Preprocessing(
        resize=(math.floor(height / fraction), math.floor(width / fraction)),
        crop=(height, width),
        mode=modes[config["crop_mode"]],  # type: ignore[arg-type]
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _build_python(path: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing]:
    returned_value = import_network_function(path)(**arguments)
    if not (
        isinstance(returned_value, tuple)
        and len(returned_value) == 2
        and isinstance(returned_value[0], nn.Module)
    ):
        raise BackboneError(
            f"python:{path} returned {type(returned_value).__name__}; expected (torch.nn.Module, "
            "headrace.Preprocessing)."
        )
    module, preprocessing = returned_value
    if not isinstance(preprocessing, Preprocessing):
        raise BackboneError(
            f"python:{path}: the second value is {type(preprocessing).__name__}; expected "
            "headrace.Preprocessing, whose fields are part of every fingerprint."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise BackboneError(
            f"python:{path} returned a TorchScript program, whose layers cannot be tapped: return "
            "the network that it was made from, or export that to ONNX (onnx:FILE)"
        )
    if any(isinstance(tensor, nn.UninitializedParameter) for tensor in module.parameters()):
        raise BackboneError(
            f"python:{path} returned a network with lazy layers that no image has passed: run it "
            "once in the function, on torch.zeros(1, 3, HEIGHT, WIDTH)"
        )
    return module, preprocessing


def import_network_function(path: str) -> Callable[..., Any]:
    """Import the function "module:function". Raises BackboneError saying which half is wrong."""
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BackboneError(
            f"python:{path}: cannot import {module_name!r} ({error}). It must be importable: "
            "installed, or on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BackboneError(f"python:{path}: {module_name} has no function {function_name!r}.")
    return function  # type: ignore[no-any-return]


def _require_hub(name: str, model_id: str) -> None:
    """Raise BackboneError for a model that is not on this machine while the hub is out of reach."""
    from huggingface_hub import constants, try_to_load_from_cache

    if backbone_path(name) is not None:
        return
    require_hub_name(name, model_id)
    repository, _, revision = model_id.partition("@")
    cached = (
        try_to_load_from_cache(repository, config_name, revision=revision or None)
        for config_name in ("config.json", "open_clip_config.json")
    )
    if not any(isinstance(path, str) for path in cached):
        _require_network(name, "of the hub", f"{constants.ENDPOINT}/{repository}", "")


def _require_network(name: str, tag: str, url: str, target: str) -> None:
    """Raise BackboneError if `target`, the downloaded file, is absent and `url` is out of reach."""
    if target and Path(target).is_file():
        return
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=_NETWORK_TIMEOUT_S
        ):
            return
    except urllib.error.HTTPError:
        return  # a server answered, so there is a network; the library says what is wrong
    except (OSError, ValueError) as error:
        raise BackboneError(_offline_message(name, tag, url, target, str(error))) from error


def _offline_message(name: str, tag: str, url: str, target: str, error: str) -> str:
    keep = f" and save it as {target}" if target else ""
    return (
        f"{name}: the pretrained weights {tag} are not on this machine and cannot be downloaded "
        f"({error[:200]}).\nEither fetch {url} where there is a network{keep},\n"
        "or name a local file: weights: PATH.pth or PATH.safetensors (a state dict of this "
        "network; weights_match: order if a PATH.pth has other names),\nor try without: weights: "
        "random:0."
    )
