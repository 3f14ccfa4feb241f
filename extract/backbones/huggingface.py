"""Image towers of the library `transformers`, from the Hugging Face hub or from a folder.

`transformers:ORG/NAME` is a model of the hub, `transformers:FOLDER` one that `save_pretrained`
wrote. Code that comes with a model is not run.
"""

import importlib
import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from headrace.extract.backbones.hub import hub_message
from headrace.extract.backbones.weights import LeftOut, mark_absent
from headrace.extract.errors import BackboneError, nearest_names
from headrace.extract.images.preprocessing import Preprocessing, render_crop

# Numbers of PIL.Image.Resampling, which image processors store.
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Of the values' standard deviation, on average. Pillow's and torchvision's resizing differ by a
# hundredth of it at most, and a resize to 8 pixels more by three hundredths.
_LARGEST_DIFFERENCE = 0.02


def build_transformers(
    model_id: str, revision: str | None, arguments: Mapping[str, Any], *, pretrained: bool
) -> tuple[nn.Module, Preprocessing, LeftOut]:
    """Build the image tower of a model and the preprocessing of its image processor.

    model_id: a folder that `save_pretrained` wrote, or a model of the hub.
    revision: branch, tag or commit of the hub; None: the newest.
    arguments: values that replace those of its configuration (the vision part, if it has one).
    pretrained: True for the model's weights, False for random ones.

    The third value lists tensors that only the weights, or only the network, have.

    Raises BackboneError if transformers is not installed, if the model cannot be read or
    downloaded, if it has no image tower, or if its image processor does what Preprocessing cannot.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise BackboneError(
            f"transformers:{model_id} needs the library transformers. Try: pip install "
            "'headrace[transformers]'"
        ) from error
    previous_verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    loading_report: dict[str, Any] = {}
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, **options)
        _replace_values(config, arguments, model_id)
        processor = transformers.AutoImageProcessor.from_pretrained(model_id, **options)
        if pretrained:
            # float32, because the file's own dtype is often float16, in which a CPU is slow.
            model, loading_report = transformers.AutoModel.from_pretrained(
                model_id, config=config, dtype="float32", output_loading_info=True, **options
            )
        else:
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except BackboneError:  # of `limit_parameters`: too large to be built
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BackboneError(_reason(model_id, error)) from error
    finally:
        transformers.logging.set_verbosity(previous_verbosity)
    tower = _image_tower(model, model_id)
    left_out = _left_out(tower, model, loading_report)
    # transformers gives random values to tensors that the weights lack.
    mark_absent(tower, left_out.absent)
    return tower, _checked_preprocessing(processor, model_id), left_out


def _replace_values(config: Any, arguments: Mapping[str, Any], model_id: str) -> None:
    """Replace values of a configuration, or of its vision part. Raises BackboneError."""
    config = getattr(config, "vision_config", config)
    fields = config.to_dict()
    for name, value in arguments.items():
        if name not in fields:
            raise BackboneError(
                f"transformers:{model_id}: model: {name} is not in its configuration. Nearest: "
                f"{nearest_names(name, fields)}"
            )
        setattr(config, name, value)


def _left_out(tower: nn.Module, model: nn.Module, loading_report: Mapping[str, Any]) -> LeftOut:
    """Return the tensors that only the weights or only the tower have, by transformers' report."""
    tower_prefix = next(
        (f"{name}." for name, child in model.named_children() if child is tower), ""
    )
    absent, surplus = (
        tuple(
            name.removeprefix(tower_prefix)
            for name in sorted(map(str, loading_report.get(key, ())))
            if name.startswith(tower_prefix)
        )
        for key in ("missing_keys", "unexpected_keys")
    )
    return LeftOut(absent, surplus)


def interpolate_positions(module: nn.Module) -> None:
    """Let the network take images of any size: transformers then resamples its position embeddings
    in every forward pass.
    """
    if "interpolate_pos_encoding" in inspect.signature(type(module).forward).parameters:
        # A bound method, which a deep copy of the module binds to the copy; a closure would not be.
        module.forward = types.MethodType(_forward_interpolated, module)


def takes_other_sizes(module: nn.Module) -> bool:
    """Return whether a network of transformers can resample its position embeddings."""
    if not type(module).__module__.startswith("transformers."):
        return False
    embeddings = getattr(module, "embeddings", None)
    return hasattr(embeddings, "interpolate_pos_encoding") or hasattr(module, "rope_embeddings")


def _forward_interpolated(self: nn.Module, pixel_values: Tensor) -> Any:
    return type(self).forward(self, pixel_values, interpolate_pos_encoding=True)


def _image_tower(model: nn.Module, model_id: str) -> nn.Module:
    """Return the part of a model that takes pixels, with timm's attributes for prefix tokens."""
    tower = getattr(model, "vision_model", None)
    if not isinstance(tower, nn.Module):
        tower = model
    if "pixel_values" not in inspect.signature(type(tower).forward).parameters:
        raise BackboneError(
            f"transformers:{model_id} is a {type(model).__name__}: expected a model of images, "
            "which takes pixel_values"
        )
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    has_class_token = bool(names & {"cls_token", "class_embedding"})
    n_registers = int(getattr(tower.config, "num_register_tokens", 0) or 0)
    n_others = n_registers + int("distillation_token" in names)
    vars(tower).update(
        has_class_token=has_class_token, num_prefix_tokens=int(has_class_token) + n_others
    )
    return tower


def _preprocessing_of(processor: Any, model_id: str) -> Preprocessing:
    subject = f"transformers:{model_id}: its image processor"
    fields = processor.to_dict()
    size = _edges(fields.get("size"))
    processor_crop = _edges(fields.get("crop_size"))
    resample = fields.get("resample", 2)
    if not (isinstance(resample, int) and 0 <= resample < len(_INTERPOLATIONS)):
        raise BackboneError(f"{subject} has resample {resample!r}, which is none of Pillow's")
    if "height" in size:
        resize, mode = (size["height"], size["width"]), "squash"
        crop_size = resize
    elif set(size) == {"shortest_edge"}:
        edge = size["shortest_edge"]
        crop_size = (edge, edge)
        fraction = fields.get("crop_pct")
        # ConvNeXT's processor: below 384 pixels a centre crop, from 384 on the whole image.
        if fraction and edge < 384:
            resize, mode = (int(edge / fraction),) * 2, "shortest"
        elif fraction:
            resize, mode = crop_size, "squash"
        else:
            resize, mode = crop_size, "shortest"
    else:
        raise BackboneError(
            f"{subject} resizes to {fields.get('size')}, which gives images of several sizes: "
            "expected height and width, or shortest_edge. Write a python: backbone for it"
        )
    if fields.get("do_center_crop") and "height" in processor_crop:
        crop_size = (processor_crop["height"], processor_crop["width"])
    # Its pixels after rescaling, relative to ours, which are from 0 to 1. Factors other than 1 go
    # into mean and std.
    scale = 255 * (fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1)
    is_normalized = fields.get("do_normalize", True)
    mean = fields["image_mean"] if is_normalized else (0.0, 0.0, 0.0)
    std = fields["image_std"] if is_normalized else (1.0, 1.0, 1.0)
    if len(mean) != 3:
        raise BackboneError(f"{subject} normalizes {len(mean)} channels; images here have 3")
    # 255 * (1 / 255) differs from 1 by rounding only, and would change mean and std in their last
    # digits, and with them the fingerprint.
    if abs(scale - 1) > 1e-6:
        mean, std = [value / scale for value in mean], [value / scale for value in std]
    return Preprocessing(
        resize=resize,
        crop=crop_size,
        mode=mode,  # type: ignore[arg-type]
        interpolation=_INTERPOLATIONS[resample],  # type: ignore[arg-type]
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
    )


def _checked_preprocessing(processor: Any, model_id: str) -> Preprocessing:
    """Return the preprocessing of an image processor.

    Raises BackboneError unless the two make the same of an image: some classes do more than their
    fields say. MobileViT's swaps red and blue, EfficientNet's divides twice, LeViT's resizes to 8/7
    of its size.
    """
    # Smooth, so that kinds of interpolation hardly differ, and other along each axis and in each
    # channel.
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3)) // (1, 2, 3)
    image = Image.fromarray(coarse.astype(np.uint8)).resize((640, 400), Image.Resampling.BICUBIC)
    try:
        preprocessing = _preprocessing_of(processor, model_id)
        pixels = render_crop(image, preprocessing).astype(np.float64) / 255
        ours = ((pixels - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1)
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float64)
        is_equal = (
            ours.shape == theirs.shape
            and np.abs(ours - theirs).mean() <= _LARGEST_DIFFERENCE * theirs.std()
        )
    except BackboneError:
        raise
    except Exception:  # noqa: BLE001 - processors of other kinds of images raise anything
        is_equal = False
    if not is_equal:
        raise BackboneError(
            f"transformers:{model_id}: its image processor, {type(processor).__name__}, makes "
            "other pixels than one that resizes, crops and normalizes: take the network from timm "
            "if that has it, or write a python: backbone for it"
        )
    return preprocessing


def _edges(size: Any) -> dict[str, int]:
    """Return {edge: pixels} of an image processor's size, which is a number or such a mapping."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {str(edge): int(length) for edge, length in dict(size or {}).items() if length}


def _reason(model_id: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if model_id.startswith(("/", "./", "../", "~")) and not Path(model_id).is_dir():
        return f"transformers:{model_id}: no such folder"
    if Path(model_id).is_dir():
        return (
            f"transformers:{model_id}: the folder is not a model that save_pretrained wrote with "
            f"its image processor ({text[:200]})"
        )
    if message := hub_message(f"transformers:{model_id}", model_id, error):
        return message
    if "model_type" in text:  # its config.json is absent, or another library's
        return (
            f"transformers:{model_id}: the hub's {model_id} lacks a file that this library needs: "
            "it is a model of another library (timm:hf-hub:, transformers: and open_clip:hf-hub: "
            "differ)"
        )
    return (
        f"transformers:{model_id} is not on this machine and cannot be downloaded "
        f"({text[:200]}).\nFetch it where there is a network (hf download {model_id}), or name its "
        "folder: transformers:/path/to/folder"
    )
