"""Views of an image: view 0 is the evaluation crop; views 1, 2, … are augmentations of the image,
or the crop mirrored and turned.

Augmentations are random but reproducible: they are drawn from the image's content hash and the
view's number, not from its id or position. A renamed image keeps its features, and no order of
work, worker or batch changes a pixel.
"""

import dataclasses
import hashlib
import json
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from headrace.cache.errors import SpecMismatch
from headrace.extract.images.bands import Bands
from headrace.extract.images.preprocessing import (
    RESAMPLING,
    DecodedImage,
    Preprocessing,
    render_bands,
    render_crop,
    rgb_pixels,
)


@dataclass(frozen=True)
class Augmentation:
    """The random crops, flips and colours of views 1, 2, …."""

    seed: int = 0
    area: tuple[float, float] = (0.35, 1.0)  # of the image that the crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    brightness: float = 0.2  # factors are drawn from 1 - x to 1 + x
    contrast: float = 0.2
    saturation: float = 0.2


@dataclass(frozen=True)
class Symmetries:
    """Views 1 to 7 are the evaluation crop's other symmetries.

    They are for images without an up or a left: cells, tissue, land. The bits of the view's number
    say which: bit 4, first, exchanges rows and columns, which needs a square crop; bit 1 mirrors
    left-right, and bit 2 upside-down. Four views are all mirror images (3 is half a turn), eight
    all symmetries of the square.
    """


ViewMethod = Augmentation | Symmetries  # how views 1, 2, … are made


def view_json(view_index: int, method: ViewMethod) -> str:
    """Return FeatureSpec.view: canonical JSON of everything that makes the view."""
    view_fields: dict[str, Any] = {}
    if view_index and isinstance(method, Symmetries):
        view_fields = {"symmetry": True}
    elif view_index:
        view_fields = {"augmentation": dataclasses.asdict(method)}
    return json.dumps({"index": view_index, **view_fields}, sort_keys=True, separators=(",", ":"))


def parse_view(text: str) -> tuple[int, ViewMethod]:
    """Return the number and method of a view from its `view_json`.

    Raises SpecMismatch for another text.
    """
    try:
        view_values = json.loads(text)
        view_index = view_values["index"]
        if not isinstance(view_index, int) or view_index < 0:
            raise ValueError("its index is no number of a view")
        if view_values.get("symmetry"):
            return view_index, Symmetries()
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in view_values.get("augmentation", {}).items()
        }
        for value in fields.values():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError("its augmentation is not of numbers")
        return view_index, Augmentation(**fields)
    # A text of another version or a stranger: any JSON, with any values.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SpecMismatch(
            f"the view {text[:80]!r} is none that this version makes ({error})"
        ) from error


def render_view(
    image: DecodedImage,
    content_hash: str,
    index: int,
    method: ViewMethod,
    preprocessing: Preprocessing,
) -> npt.NDArray[Any]:
    """Return view `index` of an upright image with this content hash, as `render_crop` does."""
    if index == 0:
        return render_crop(image, preprocessing)
    if isinstance(method, Symmetries):
        return mirror_pixels(render_crop(image, preprocessing), index)
    digest = hashlib.sha256(f"{method.seed}|{index}|{content_hash}".encode()).digest()
    # Python's generator, because its random() is the same in every version of Python.
    random_draw = random.Random(int.from_bytes(digest, "big"))
    width, height = image.values.shape[1::-1] if isinstance(image, Bands) else image.size
    crop_box = _crop(width, height, random_draw, method)
    crop_height, crop_width = preprocessing.crop

    def resize(plane: Image.Image) -> Image.Image:
        resampling = RESAMPLING[preprocessing.interpolation]
        return plane.resize((crop_width, crop_height), resampling, box=crop_box)

    if isinstance(image, Bands):
        floats = render_bands(image, preprocessing, lambda plane, _channel: resize(plane))
        is_mirrored = random_draw.random() < method.flip
        return _jitter(floats[:, ::-1] if is_mirrored else floats, random_draw, method)
    resized_image = resize(image)
    if random_draw.random() < method.flip:
        resized_image = resized_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhancer, strength in (
        (ImageEnhance.Brightness, method.brightness),
        (ImageEnhance.Contrast, method.contrast),
        (ImageEnhance.Color, method.saturation),
    ):
        factor = 1 + strength * (2 * random_draw.random() - 1)
        if strength:
            resized_image = enhancer(resized_image).enhance(factor)
    return rgb_pixels(resized_image)


def _jitter(
    floats: npt.NDArray[np.float32], random_draw: random.Random, augmentation: Augmentation
) -> npt.NDArray[np.float32]:
    """Vary brightness and contrast of each band of (H, W, C), not clipped.

    Of three bands also the saturation, the distance to their mean.
    """
    brightness, contrast, saturation = (
        np.float32(1 + strength * (2 * random_draw.random() - 1))
        for strength in (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    )
    floats = floats * brightness
    band_means = floats.mean(axis=(0, 1))
    floats = band_means + contrast * (floats - band_means)
    if floats.shape[2] == 3:
        grey = floats.mean(axis=2, keepdims=True)
        floats = grey + saturation * (floats - grey)
    return floats


def is_exact_view(text: str) -> bool:
    """Return whether a view (FeatureSpec.view) is the evaluation crop or a symmetry of it."""
    view_index, method = parse_view(text)
    return view_index == 0 or isinstance(method, Symmetries)


def mirror_pixels(image: npt.NDArray[Any], index: int) -> npt.NDArray[Any]:
    """Return symmetry `index` (see `Symmetries`) of an image (H, W, ...), a view."""
    swapped_image = image.swapaxes(0, 1) if index & 4 else image
    return swapped_image[:: -1 if index & 2 else 1, :: -1 if index & 1 else 1]


def _crop(
    width: int, height: int, random_draw: random.Random, augmentation: Augmentation
) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a random crop, drawn as torchvision draws it.

    If ten draws do not fit into the image, the largest crop of a ratio within the limits.
    """
    low_area, high_area = augmentation.area
    low_log, high_log = (math.log(bound) for bound in augmentation.ratio)
    for _ in range(10):
        crop_area = width * height * (low_area + (high_area - low_area) * random_draw.random())
        crop_ratio = math.exp(low_log + (high_log - low_log) * random_draw.random())
        box_width, box_height = math.sqrt(crop_area * crop_ratio), math.sqrt(crop_area / crop_ratio)
        if box_width <= width and box_height <= height:
            break
    else:
        crop_ratio = min(max(width / height, augmentation.ratio[0]), augmentation.ratio[1])
        box_width, box_height = min(width, height * crop_ratio), min(height, width / crop_ratio)
    left = (width - box_width) * random_draw.random()
    top = (height - box_height) * random_draw.random()
    return left, top, min(left + box_width, width), min(top + box_height, height)
