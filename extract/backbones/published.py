"""Published facts about pretrained weights: input size, licence, accuracy.

They come from tables of the libraries: no network is built, nothing is downloaded.
"""

from dataclasses import dataclass
from typing import Any

from headrace.extract.backbones.library import backbone_tags


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of a library. None: the library does not say."""

    tag: str
    image_size: int | None  # shorter edge of the crop, pixels
    classes: int | None  # count of classes that they were trained on; 0: without labels
    licence: str | None
    imagenet_accuracy: float | None  # top 1 on ImageNet-1k, 0 to 1


def published_weights(name: str) -> list[PublishedWeights]:
    """Return the pretrained weights of a torchvision or timm network, the default ones first.

    [] for other networks.
    """
    kind, _, rest = name.partition(":")
    describe = {"torchvision": _of_torchvision, "timm": _of_timm}.get(kind)
    return [] if describe is None else [describe(rest, tag) for tag in backbone_tags(name)]


def _of_torchvision(name: str, tag: str) -> PublishedWeights:
    import torchvision.models

    weights: Any = torchvision.models.get_model_weights(name)[tag]
    categories = weights.meta["categories"]  # None for weights without the last layer
    accuracy = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return PublishedWeights(
        tag=tag,
        image_size=min(weights.transforms().crop_size),
        classes=len(categories) if categories else None,
        licence=None,
        imagenet_accuracy=None if accuracy is None else accuracy / 100,
    )


def _of_timm(name: str, tag: str) -> PublishedWeights:
    import timm

    config: Any = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    return PublishedWeights(
        tag=tag,
        image_size=min(config.input_size[1:]),
        classes=config.num_classes,
        licence=config.license,
        imagenet_accuracy=None,
    )
