"""The check that a network gives an image the same features in every pass and in every batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.cache.out_of_memory import is_out_of_memory
from headrace.extract.backbones.backbone import Backbone
from headrace.extract.backbones.fused import Forward
from headrace.extract.backbones.nodes import dtype_hint
from headrace.extract.errors import BackboneError
from headrace.extract.taps.resolve import Tap

# Of the length of a feature vector. Rounding changes up to a hundredth, in half precision; dropout,
# masks and statistics of the batch change tenths.
_LARGEST_CHANGE = 0.05


def random_pixels(backbone: Backbone, n_images: int) -> Tensor:
    """Return random images for a `Forward`, (N, H, W, C) uint8, the same in every call.

    All but the first are dark, so that the statistics of a batch are not those of an image.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (n_images, *backbone.preprocessing.pixel_shape)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    pixels[1:] //= 8
    return pixels


def require_repeatable(
    backbone: Backbone, forward: Forward, taps: Sequence[Tap], device: str
) -> None:
    """Raise BackboneError if an image has other features alone than beside another one.

    So do networks that draw random numbers, or normalize with the statistics of their batch:
    no feature would belong to its image. forward: gives the outputs of `taps`.
    """
    pixels = random_pixels(backbone, 2).to(device)
    try:
        together, alone = forward(pixels), forward(pixels[:1])
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise BackboneError(
            f"{backbone.spec.name} does not run on float32 images{dtype_hint(backbone.module)} "
            f"({str(error)[:200]})"
        ) from error
    changed = [
        index for index, (a, b) in enumerate(zip(together, alone, strict=True)) if _differ(a, b)
    ]
    if not changed:
        return
    first = changed[0]
    if _differ(forward(pixels[:1])[first], alone[first]):
        reason = f"other features in every pass, so they are random{_random_hint(backbone)}"
    else:
        reason = (
            "other features beside other images than alone, so they depend on the batch: in "
            "evaluation mode its normalizations must use stored statistics (track_running_stats)"
        )
    raise BackboneError(f"{backbone.spec.name}: {taps[first]} gives one image {reason}")


def _differ(one: Tensor, other: Tensor) -> bool:
    """Return whether the first image's features differ; what is NaN in both does not."""
    first, second = (outputs[0].float().nan_to_num() for outputs in (one, other))
    return bool((first - second).norm() > _LARGEST_CHANGE * second.norm())


def _random_hint(backbone: Backbone) -> str:
    configuration = getattr(backbone.module, "config", None)
    if getattr(configuration, "mask_ratio", 0):
        return (
            ": it masks patches, as in its training. Give it all of them: model: {mask_ratio: 0.0} "
            "in the recipe's backbone, and no taps of maps, whose order stays random"
        )
    return ": dropout and masks must be off in evaluation mode (self.training is False)"
