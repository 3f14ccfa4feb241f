"""Preprocessing: pixels of any size to the square that a network was trained on.

`headrace export` copies this module into `preprocess.py`, so that it needs Pillow and NumPy alone.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import COLOUR, MAX_PIXELS, PixelRange, check_pixel_range

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class Preprocessing:
    """The way from an image to a network's input.

    Sizes are (height, width); Pillow's resize always antialiases.

    Raises ValueError for an interpolation that there is not, and for a pixel_range that is none.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    # which edge meets `resize`: the shorter, both, or the longer
    mode: Literal["shortest", "squash", "border"]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixel_range: PixelRange | None = None  # as `decode_image` takes it

    def __post_init__(self) -> None:
        if self.interpolation not in _RESAMPLING:
            raise ValueError(
                f"interpolation {self.interpolation!r} is not one of {', '.join(_RESAMPLING)}"
            )
        if self.pixel_range is not None:
            check_pixel_range(self.pixel_range)
            low, high = self.pixel_range
            # (0, 1) and [0.0, 1.0] are one range, and have one fingerprint.
            object.__setattr__(self, "pixel_range", (float(low), float(high)))

    def to_json(self) -> str:
        """Canonical JSON of everything between the decoded file and the network's input."""
        fields = {**dataclasses.asdict(self), "antialias": True, "colour": COLOUR}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def render_crop(image: Image.Image, how: Preprocessing) -> npt.NDArray[np.uint8]:
    """The evaluation crop of an upright "RGB" or "L" image: uint8, shape (*how.crop, 3).

    Raises ImageError for one so long and narrow that resizing it would take hundreds of MB.
    """
    width, height = image.size
    scaled_height, scaled_width = _resized_extent(height, width, how)
    # The shorter edge of a line of pixels is enlarged a hundredfold, and in mode "shortest" the
    # longer one with it: gigabytes from some kB. Pillow changes the width first, so that a tall
    # line is wide for a moment in every mode.
    limit = _max_resize_pixels(height, width, how)
    if scaled_width * max(scaled_height, height) > limit:
        raise ImageError(
            f"{width} x {height} pixels would be resized to {scaled_width} x {scaled_height} by "
            f"way of {scaled_width} x {height}: more than the limit of {limit} pixels. Cut the "
            "image into pieces, or leave it out"
        )
    if (scaled_height, scaled_width) != (height, width):
        image = image.resize((scaled_width, scaled_height), _RESAMPLING[how.interpolation])
    return rgb_pixels(_centre_crop(image, how))


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8, shape (height, width, 3); a grey image is repeated in a view that costs nothing."""
    values = np.asarray(image)
    return np.broadcast_to(values[:, :, None], (*values.shape, 3)) if values.ndim == 2 else values


def resampling_filter(how: Preprocessing) -> Image.Resampling:
    """Pillow's name of the interpolation."""
    return _RESAMPLING[how.interpolation]


def _max_resize_pixels(height: int, width: int, how: Preprocessing) -> int:
    """Return the most pixels that an image may have while it is resized: never more than
    MAX_PIXELS, and no fewer than it has itself.

    Beyond that 64 times the network's input, and 2^24 (64 MB) in any case: panoramas of 64 : 1, of
    256 : 1 at 256 pixels. A batch is resized by one thread per core, and twice MAX_PIXELS with the
    network took 1.8 GB on two.
    """
    rows, columns = how.resize
    return min(MAX_PIXELS, max(height * width, 64 * rows * columns, 2**24))


def _resized_extent(height: int, width: int, how: Preprocessing) -> tuple[int, int]:
    """(height, width) after the resize.

    The roundings are those of torchvision's and timm's transforms.
    """
    target_height, target_width = how.resize
    if how.mode == "squash":
        return how.resize
    if how.mode == "shortest" and target_height == target_width:
        # torchvision.transforms.Resize(int): the longer edge is truncated
        if width <= height:
            return max(int(target_width * height / width), 1), target_width
        return target_height, max(int(target_height * width / height), 1)
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if how.mode == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _centre_crop(image: Image.Image, how: Preprocessing) -> Image.Image:
    """torchvision's center_crop, which pads with black where the image is smaller; a border has the
    mean's colour.
    """
    width, height = image.size
    crop_height, crop_width = how.crop
    if (height, width) == how.crop:
        return image
    if height < crop_height or width < crop_width:
        above, left = max((crop_height - height) // 2, 0), max((crop_width - width) // 2, 0)
        grey = (0, 0, 0)
        if how.mode == "border":
            grey = (round(255 * how.mean[0]), round(255 * how.mean[1]), round(255 * how.mean[2]))
        canvas = Image.new("RGB", (max(width, crop_width), max(height, crop_height)), grey)
        canvas.paste(image.convert("RGB"), (left, above))
        image, (width, height) = canvas, canvas.size
    # Python's round is to even, as in torchvision
    top, start = round((height - crop_height) / 2.0), round((width - crop_width) / 2.0)
    return image.crop((start, top, start + crop_width, top + crop_height))
