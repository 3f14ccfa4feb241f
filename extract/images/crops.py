"""Crops: rows that are a rectangle of an image, a box of an object or a tile of a large image.

A crop is the end of a locator, `IMAGE::crop:LEFT,TOP,WIDTH,HEIGHT` in pixels of the upright image;
IMAGE is a file, or a locator itself. With `;fraction` behind it the numbers are shares of the
image's width and height. With `;white:0.9` the crop is refused if a larger share of it is white
background.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from headrace.extract.errors import ImageError
from headrace.extract.images.bands import Bands, decode_deep
from headrace.extract.images.decoding import JPEG_REDUCTIONS, decode_image, jpeg_size
from headrace.extract.images.preprocessing import DecodedImage
from headrace.extract.images.raw_pixels import PixelRange

Background = Literal["white", "black", "nodata"]

_NUMBER = r"-?[0-9.]+(?:e[-+]?[0-9]+)?"
_CROP = re.compile(
    rf"(?P<image>.+)::crop:(?P<numbers>{_NUMBER}(?:,{_NUMBER}){{3}})(?P<fraction>;fraction)?"
    rf"(?:;(?P<background>white|black|nodata):(?P<share>{_NUMBER}))?",
    re.DOTALL,
)
EMPTY_TILE = "an empty tile"  # begins the reason for which a tile is refused
# Of 255, in every channel: paper and glass slides are at least _WHITE, and black after JPEG
# compression at most _BLACK.
_WHITE, _BLACK = 220, 8


@dataclass(frozen=True)
class Crop:
    """A rectangle of an upright image."""

    left: float
    top: float
    width: float
    height: float
    unit: Literal["pixels", "fraction"] = "pixels"
    background: Background | None = None  # kind of background that makes a tile empty
    max_background: float = 1.0  # the crop is refused if a larger share of it is background

    def __str__(self) -> str:
        numbers = (self.left, self.top, self.width, self.height)
        unit = ";fraction" if self.unit == "fraction" else ""
        background = f";{self.background}:{self.max_background:.10g}" if self.background else ""
        return ",".join(f"{number:.10g}" for number in numbers) + unit + background

    def locator(self, image_path: str) -> str:
        """Return the locator of this crop of an image."""
        return f"{image_path}::crop:{self}"


def split_crop(path: str) -> tuple[str, Crop | None]:
    """Return the image that a path or locator names, and the crop of it; None for all of it."""
    match = _CROP.fullmatch(path) if "::crop:" in path else None
    if match is None:
        return path, None
    left, top, width, height = map(float, match["numbers"].split(","))
    background: Any = match["background"]
    return match["image"], Crop(
        *(left, top, width, height),
        unit="fraction" if match["fraction"] else "pixels",
        background=background,
        max_background=float(match["share"] or 1.0),
    )


def crop_content(image_content: str, crop: Crop | None) -> str:
    """Return the content hash of a crop, derived from that of its image."""
    if crop is None:
        return image_content
    return hashlib.sha256(f"{image_content} {crop}".encode()).hexdigest()[: len(image_content)]


def pixel_box(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in whole pixels, each edge rounded, clipped to the image.

    Raises ImageError if the crop and the image share no pixel.
    """
    edges = _edges(crop, width, height)
    left, top, right, bottom = (math.floor(edge + 0.5) for edge in edges)
    box = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ImageError(
            f"the box (x {crop.left:g}, y {crop.top:g}, width {crop.width:g}, height "
            f"{crop.height:g}; {crop.unit}) holds no pixel of the image of {width} x {height}"
        )
    return box


def reaches_outside(crop: Crop, width: int, height: int) -> bool:
    """Return whether a crop reaches beyond the image by a pixel or more, and is clipped."""
    left, top, right, bottom = _edges(crop, width, height)
    return left <= -1 or top <= -1 or right >= width + 1 or bottom >= height + 1


def _edges(crop: Crop, width: int, height: int) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels, neither rounded nor clipped."""
    scale_x, scale_y = (width, height) if crop.unit == "fraction" else (1, 1)
    right, bottom = (crop.left + crop.width) * scale_x, (crop.top + crop.height) * scale_y
    return crop.left * scale_x, crop.top * scale_y, right, bottom


def image_size(image: DecodedImage) -> tuple[int, int]:
    """Return (width, height)."""
    if isinstance(image, Bands):
        return int(image.values.shape[1]), int(image.values.shape[0])
    return image.size


def cut_crop(image: DecodedImage, crop: Crop) -> DecodedImage:
    """Cut a crop out of an upright image.

    Raises ImageError if it shares no pixel with the image, or has too much background.
    """
    box = pixel_box(crop, *image_size(image))
    region = image.crop(*box) if isinstance(image, Bands) else image.crop(box)
    if crop.background is not None:
        share = float(_is_background(region, crop.background).mean())
        if share > crop.max_background:
            raise ImageError(
                f"{EMPTY_TILE}: {share:.1%} of its pixels are {crop.background} "
                f"(images.tiles.max_background is {crop.max_background:g})"
            )
    return region


def _is_background(region: DecodedImage, background: Background) -> npt.NDArray[np.bool_]:
    """Return which pixels (H, W) are background in all channels; "nodata": 0 or without a value."""
    if isinstance(region, Bands):
        if background == "nodata":
            is_empty = region.values[:, :, list(region.selection)] == 0
            for channel in range(len(region.selection)):
                if (is_missing := region.missing(channel)) is not None:
                    is_empty[:, :, channel] |= is_missing
            return np.asarray(is_empty.all(axis=2))
        pixels: npt.NDArray[Any] = region.floats(0.0)
    else:
        pixels = np.asarray(region)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if background == "white":
        return np.asarray((pixels >= _WHITE).all(axis=2))
    return np.asarray((pixels <= (_BLACK if background == "black" else 0)).all(axis=2))


def decode_picture(
    path: str, data: bytes, pixel_range: PixelRange | None, least_side: int | None = None
) -> Image.Image:
    """Return the image, or crop, of a sample in 8 bits, for people to look at.

    data: the bytes of the path (`read_bytes`). Of images of many bands the first is shown, as grey.
    least_side: a whole JPEG may be decoded at a smaller size, both sides at least this long, which
    takes a fraction of the time. None: every image has its full size.
    Raises ImageError.
    """
    _, crop = split_crop(path)
    reduction = 1
    if least_side is not None and crop is None and (size := jpeg_size(data)) is not None:
        most = min(size) // least_side
        reduction = next((divisor for divisor in JPEG_REDUCTIONS if divisor <= most), 1)
    try:
        image = decode_image(data, pixel_range, reduction)
    except ImageError:
        bands = decode_deep(data, (1,), pixel_range)
        assert isinstance(bands, Bands)
        grey = bands.floats(0.0)[:, :, 0].clip(0, 255)
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    return image if crop is None else image.crop(pixel_box(crop, *image.size))
