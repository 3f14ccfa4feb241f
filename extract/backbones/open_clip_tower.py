"""Image towers of the library open_clip: `open_clip:ViT-B-32` with a tag as weights,
`open_clip:hf-hub:ORG/NAME`, or `open_clip:local-dir:FOLDER`.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from headrace.extract.backbones.hub import hub_message
from headrace.extract.errors import BackboneError, nearest_names
from headrace.extract.images.preprocessing import Preprocessing

_SCHEMAS = ("hf-hub:", "local-dir:")


def build_open_clip(
    name: str, tag: str | None, arguments: Mapping[str, Any], *, pretrained: bool = False
) -> tuple[nn.Module, Preprocessing]:
    """Build the image tower of an open_clip model and its preprocessing.

    name: an architecture of open_clip, or a model of the hub or of a folder.
    tag: the pretrained weights of an architecture; None: its first ones.
    arguments: of open_clip.create_model, those that begin with `force_`.
    pretrained: True for the tag's weights, False for random ones.

    Raises BackboneError if open_clip is not installed, for unknown names, tags, folders and
    arguments, and for a preprocessing that headrace does not have.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BackboneError(
            f"open_clip:{name} needs the library open_clip. Try: pip install 'headrace[open-clip]'"
        ) from error
    for argument in arguments:
        if not argument.startswith("force_"):
            raise BackboneError(
                f"open_clip:{name}: model: {argument} is not known; open_clip takes "
                "force_quick_gelu, force_image_size and force_patch_dropout"
            )
    weights = _weights_tag(name, tag, arguments) if pretrained or tag is not None else None
    try:
        with _quiet():
            model = open_clip.create_model(
                name,
                # Given a tag, open_clip downloads its weights even where it does not load them.
                pretrained=weights if pretrained else None,
                load_weights=pretrained,
                # "meta" where only shapes are asked for.
                device=torch.get_default_device(),
                # Otherwise a folder without weights would give a random network.
                require_pretrained=pretrained,
                **arguments,
            )
    except BackboneError:  # of `limit_parameters`: too large to be built
        raise
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        if name.startswith("hf-hub:") and (
            message := hub_message(f"open_clip:{name}", name.removeprefix("hf-hub:"), error)
        ):
            raise BackboneError(message) from error
        raise BackboneError(
            f"open_clip:{name} with weights {tag or '(default)'} cannot be had ({reason}).\n"
            "Fetch it where there is a network, or name its folder: open_clip:local-dir:FOLDER, or "
            "try without: weights: random:0"
        ) from error
    tower = model.visual
    tower.has_class_token = hasattr(tower, "class_embedding")
    tower.num_prefix_tokens = getattr(
        getattr(tower, "trunk", tower), "num_prefix_tokens", int(tower.has_class_token)
    )
    tag_config = {} if weights is None else open_clip.get_pretrained_cfg(name, weights)
    config = open_clip.transform.merge_preprocess_dict(tower.preprocess_cfg, tag_config)
    return tower, _preprocessing_of(config, name)


def resample_positions(tower: Any, size: int) -> None:
    """Resample the position embeddings of an open_clip transformer for images of `size` pixels."""
    from open_clip.model import resize_pos_embed

    # `resize_pos_embed` changes a state dict to fit a whole model, whose image tower is `visual`.
    positions = {"visual.positional_embedding": tower.positional_embedding.detach()}
    grid = (size // tower.patch_size[0], size // tower.patch_size[1])
    tower.grid_size, tower.image_size = grid, (size, size)
    holder = nn.Module()
    holder.visual = tower
    resize_pos_embed(positions, holder)
    tower.positional_embedding = nn.Parameter(positions["visual.positional_embedding"])


def _weights_tag(name: str, tag: str | None, arguments: Mapping[str, Any]) -> str | None:
    """Return the tag of the pretrained weights, by default the first that fits the architecture;
    None for a model of the hub or of a folder. Raises BackboneError.
    """
    import open_clip

    if name.startswith(_SCHEMAS):
        if tag is not None:
            raise BackboneError(
                f"open_clip:{name} holds its own weights; leave `weights` out, or name a file"
            )
        return None
    if name not in open_clip.list_models():
        raise BackboneError(
            f"open_clip has no model {name!r}. Nearest: "
            f"{nearest_names(name, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags or (tag is not None and tag not in tags):
        raise BackboneError(
            f"open_clip:{name} has no weights {tag or '(default)'}. It has: "
            f"{', '.join(tags) or 'none'}"
        )
    # OpenAI's networks and some others were trained with x * sigmoid(1.702 x) in place of GELU.
    # open_clip loads such weights into either network, and the wrong one gives other features.
    is_quick = bool(
        arguments.get("force_quick_gelu") or open_clip.get_model_config(name).get("quick_gelu")
    )
    fitting_tags = [
        each
        for each in tags
        if bool(open_clip.get_pretrained_cfg(name, each).get("quick_gelu")) == is_quick
    ]
    if tag in fitting_tags or (tag is None and fitting_tags):
        return tag or fitting_tags[0]
    other_name = name.removesuffix("-quickgelu") if is_quick else f"{name}-quickgelu"
    # The tags of an architecture with one activation alone, as roberta-ViT-B-32, do not say it.
    has_other = other_name != name and other_name in open_clip.list_models()
    if not has_other and not arguments.get("force_quick_gelu"):
        return tag or str(tags[0])
    computed, trained = ("QuickGELU", "GELU") if is_quick else ("GELU", "QuickGELU")
    raise BackboneError(
        f"open_clip:{name} computes {computed}, and its weights {tag or tags[0]} were trained with "
        f"{trained}: name open_clip:{other_name}"
    )


def _preprocessing_of(config: dict[str, Any], name: str) -> Preprocessing:
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    modes = {"shortest": "shortest", "longest": "border", "squash": "squash"}
    if config["resize_mode"] not in modes or len(config["mean"]) != 3:
        raise BackboneError(
            f"open_clip:{name} preprocesses images as {config}: write a python: backbone for it"
        )
    return Preprocessing(
        resize=size,
        crop=size,
        mode=modes[config["resize_mode"]],  # type: ignore[arg-type]
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logging, in the whole process, up to errors: open_clip warns on the root logger of
    weights that are random or absent.
    """
    previous_level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous_level)
