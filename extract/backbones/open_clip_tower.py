"""Image towers of the library open_clip: `open_clip:ViT-B-32` with a tag as weights,
`open_clip:hf-hub:ORG/NAME`, or `open_clip:local-dir:FOLDER`.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

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
    weights = _weights_tag(name, tag) if pretrained else None
    try:
        with _quiet():
            model = open_clip.create_model(
                name,
                pretrained=weights,
                load_weights=pretrained,
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
    return tower, _preprocessing_of(tower.preprocess_cfg, name)


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


def _weights_tag(name: str, tag: str | None) -> str | None:
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
    return tag or str(tags[0])


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
