"""Preprocessing: pixels of any size and depth to the input that a network was trained on.

`headrace export` copies this module, and what it uses of headrace's others, into `preprocess.py`,
so beside those it imports only Pillow and NumPy.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from headrace.extract.errors import ImageError
from headrace.extract.images.bands import Bands, decode_deep, decode_large_tiff
from headrace.extract.images.decoding import (
    COLOUR,
    JPEG_REDUCTIONS,
    DecodeMode,
    check_pixel_range,
    decode_image,
    file_box,
    jpeg_size,
)
from headrace.extract.images.opening import MAX_PIXELS
from headrace.extract.images.raw_pixels import PixelRange

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
PixelDtype = Literal["uint8", "float32"]
# The edge that is resized to `resize`: the shorter one, both, or the longer one, the rest being
# filled with the mean.
ResizeMode = Literal["shortest", "squash", "border"]
# One (black, white), or a pair for each band.
PixelRanges = PixelRange | tuple[PixelRange, ...]
# A decoded image: of 8 bits, or its bands at their own depth.
DecodedImage = Image.Image | Bands

# More than any imaging spectrometer has. The number may come from a stranger's model file.
MAX_BANDS = 1024
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# With decode="scaled", each edge of the decoded JPEG has at least twice the pixels of the resized
# image. The resized pixels then differ from exact ones by 0.2 of 255 levels on average. With 1
# instead of 2 it would be 0.6, and a 12-megapixel photo would take 22 ms instead of 27 (exact: 102;
# a Zen 4 core).
_SCALED_EDGES = 2


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: decoded, resized, cropped, normalized.

    Sizes are (height, width); Pillow's resize antialiases, but for "nearest".

    Raises ValueError for fields with which no image can be read.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    mode: ResizeMode
    interpolation: Interpolation
    mean: tuple[float, ...]  # of each channel of the network's input; white is 1
    std: tuple[float, ...]
    pixel_range: PixelRanges | None = None  # black and white of pixels of more than 8 bits
    # Bands of the file, counted from 1, in the order of the network's channels; None: grey or
    # colours.
    bands: tuple[int, ...] | None = None
    # float32: images of more than 8 bits keep their depth until they are normalized. uint8: they
    # are rounded to 8 bits when they are decoded.
    pixel_dtype: PixelDtype = "uint8"
    nodata: Literal["refuse", "mean"] = "refuse"  # for pixels without a value, in floats and bands
    # "scaled": a large JPEG is decoded with its edges divided by 2, 4 or 8, which is faster.
    decode: DecodeMode = "exact"

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"interpolation {self.interpolation!r} is not one of {', '.join(RESAMPLING)}"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values, and std {len(self.std)}; expected one for each "
                "channel of the network's input"
            )
        if self.bands is not None:
            check_bands(self.bands)
            if len(self.bands) != len(self.mean):
                raise ValueError(
                    f"{len(self.bands)} bands, and mean and std have {len(self.mean)} values; "
                    "expected one for each band"
                )
            object.__setattr__(self, "bands", tuple(self.bands))
            # Chosen bands are read by `decode_deep` only, whatever their depth.
            object.__setattr__(self, "pixel_dtype", "float32")
        elif len(self.mean) != 3:
            raise ValueError(
                f"mean has {len(self.mean)} values, and images have three colours. Say which bands "
                f"of the files are meant: bands={tuple(range(1, len(self.mean) + 1))}"
            )
        if self.pixel_dtype not in ("uint8", "float32"):
            raise ValueError(f"pixel_dtype is {self.pixel_dtype!r}; expected uint8 or float32")
        if self.nodata not in ("refuse", "mean"):
            raise ValueError(f"nodata is {self.nodata!r}; expected refuse or mean")
        if self.decode not in ("exact", "scaled"):
            raise ValueError(f"decode is {self.decode!r}; expected exact or scaled")
        if self.pixel_range is not None:
            # (0, 1) and [0.0, 1.0] are one range, and have one fingerprint.
            pixel_range = plain_pixel_range(self.pixel_range, self.bands)
            object.__setattr__(self, "pixel_range", pixel_range)

    @property
    def n_channels(self) -> int:
        """Number of channels of the network's input."""
        return len(self.mean)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image's pixels."""
        return (*self.crop, self.n_channels)

    def to_json(self) -> str:
        """Return canonical JSON of everything between the decoded file and the network's input."""
        fields = {**dataclasses.asdict(self), "antialias": True, "colour": COLOUR}
        # Fields that were added later are left out at their defaults, so that the fingerprints of
        # older feature sets stay.
        for name in ("bands", "pixel_dtype", "nodata", "decode"):
            if fields[name] == Preprocessing.__dataclass_fields__[name].default:
                del fields[name]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def check_bands(bands: Any) -> None:
    """Raise ValueError unless it is a list of at least one whole number from 1 to MAX_BANDS."""
    if not (
        isinstance(bands, (tuple, list))
        and bands
        and all(
            isinstance(band, int) and not isinstance(band, bool) and 1 <= band <= MAX_BANDS
            for band in bands
        )
    ):
        raise ValueError(
            f"bands is {str(bands)[:60]}; expected whole numbers from 1 to {MAX_BANDS} (the first "
            "band is 1, as in GDAL and rasterio), such as [4, 3, 2]"
        )


def plain_pixel_range(pixel_range: Any, bands: tuple[int, ...] | None) -> PixelRanges:
    """Return (black, white), or a pair for each band, as floats.

    Raises ValueError for anything else, and unless there are as many pairs as bands.
    """
    is_list = isinstance(pixel_range, (tuple, list)) and bool(pixel_range)
    if not is_list or not isinstance(pixel_range[0], (tuple, list)):
        check_pixel_range(pixel_range)
        return float(pixel_range[0]), float(pixel_range[1])
    for band_range in pixel_range:
        check_pixel_range(band_range)
    if bands is None or len(pixel_range) != len(bands):
        raise ValueError(
            f"pixel_range has {len(pixel_range)} pairs, and there are "
            f"{len(bands) if bands else 'no'} bands; expected one pair for all, or a pair for each "
            "of the bands in their order"
        )
    return tuple((float(black), float(white)) for black, white in pixel_range)


def decode_pixels(
    data: bytes, preprocessing: Preprocessing, *, in_parts: bool = False
) -> DecodedImage:
    """Decode an image to the depth and bands that are asked for, upright, not yet resized.

    in_parts: only crops are needed, so a large TIFF is decoded where they are cut.
    Raises ImageError.
    """
    if preprocessing.pixel_dtype == "uint8":
        if in_parts and (large_image := decode_large_tiff(data)) is not None:
            return large_image
        return decode_image(data, preprocessing.pixel_range, jpeg_reduction(data, preprocessing))  # type: ignore[arg-type]
    return decode_deep(data, preprocessing.bands, preprocessing.pixel_range, in_parts=in_parts)


def jpeg_reduction(data: bytes, preprocessing: Preprocessing) -> int:
    """Return the `reduction` for `decode_image`: 1 for exact decoding and for other formats."""
    if preprocessing.decode == "exact" or (size := jpeg_size(data)) is None:
        return 1
    height, width = size
    resized_height, resized_width = _resized_extent(height, width, preprocessing)
    max_reduction = min(height / resized_height, width / resized_width) / _SCALED_EDGES
    return next((reduction for reduction in JPEG_REDUCTIONS if reduction <= max_reduction), 1)


def render_crop(image: DecodedImage, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Return the evaluation crop of an upright image.

    uint8 of shape (*crop, 3) for an "RGB" or "L" image; float32 of shape (*crop, n_channels), white
    being 255, for Bands.

    Raises ImageError for an image so long and narrow that resizing it would take hundreds of MB.
    """
    if isinstance(image, Bands):
        bands = image

        def fit(plane: Image.Image, channel: int) -> Image.Image:
            border = preprocessing.mean[channel] if preprocessing.mode == "border" else 0.0
            return _fit(plane, preprocessing, bands.own_number(channel, border))

        return render_bands(bands, preprocessing, fit)
    return rgb_pixels(_fit(image, preprocessing))


def render_bands(
    bands: Bands, preprocessing: Preprocessing, change: Callable[[Image.Image, int], Image.Image]
) -> npt.NDArray[np.float32]:
    """Return the bands after `change`: (h, w, preprocessing.n_channels) float32, white being 255.

    change: function of a band, as an image of 32-bit floats, and its channel; it resizes the band.

    Raises ImageError.
    """
    # Grey is repeated for a network that takes colours.
    if len(bands.selection) < preprocessing.n_channels:
        n_channels = preprocessing.n_channels
        bands = replace(
            bands, selection=bands.selection * n_channels, ranges=bands.ranges * n_channels
        )
    planes: list[npt.NDArray[np.float32]] = []
    for channel in range(preprocessing.n_channels):
        fill = preprocessing.mean[channel] if preprocessing.nodata == "mean" else None
        equals_first_plane = (
            channel > 0
            and bands.selection[channel] == bands.selection[0]
            and bands.ranges[channel] == bands.ranges[0]
            # Borders and missing pixels get the mean of their own channel.
            and preprocessing.mode != "border"
            and fill is None
        )
        if equals_first_plane:
            planes.append(planes[0])
            continue
        planes.append(np.asarray(change(Image.fromarray(bands.plane(channel, fill)), channel)))
    # Scaled after the resize, when there are fewer pixels; the result is the same, as both are
    # linear.
    return bands.scaled(planes)


def _fit(
    image: Image.Image, preprocessing: Preprocessing, border: float | None = None
) -> Image.Image:
    """Resize and crop an image, or one band in mode "F", whose padding is `border`."""
    box = file_box(image)
    width, height = image.size
    scaled_height, scaled_width = _resized_extent(box[3] - box[1], box[2] - box[0], preprocessing)
    # For an image of a few pixels' width, mode "shortest" enlarges both edges a hundredfold:
    # gigabytes from some kB. The limit is the largest of the image's own pixels; 64 times the
    # network's input, which is enough for panoramas of 64 : 1; and 2^24 (64 MB), for 256 : 1 at 256
    # pixels. But never above MAX_PIXELS, because a batch is resized by one thread per core: twice
    # MAX_PIXELS with the network took 1.8 GB on two cores.
    limit = min(MAX_PIXELS, max(height * width, 64 * math.prod(preprocessing.resize), 2**24))
    # Pillow resizes the width first, so a tall image is as wide as the result, and still as tall as
    # before, for a moment in every mode.
    if scaled_width * max(scaled_height, height) > limit:
        raise ImageError(
            f"{width} x {height} pixels would be resized to {scaled_width} x {scaled_height} by "
            f"way of {scaled_width} x {height}: more than the limit of {limit} pixels. Cut the "
            "image into pieces, or leave it out"
        )
    if (scaled_height, scaled_width) != (height, width):
        image = image.resize(
            (scaled_width, scaled_height), RESAMPLING[preprocessing.interpolation], box
        )
    return _centre_crop(image, preprocessing, border)


def rgb_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an "RGB" or "L" image, uint8 (height, width, 3)."""
    values = np.asarray(image)
    # Grey is repeated in a view, which takes no memory.
    return np.broadcast_to(values[:, :, None], (*values.shape, 3)) if values.ndim == 2 else values


def _resized_extent(height: float, width: float, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return (height, width) after the resize, rounded as torchvision and timm round."""
    target_height, target_width = preprocessing.resize
    if preprocessing.mode == "squash":
        return preprocessing.resize
    if preprocessing.mode == "shortest" and target_height == target_width:
        # torchvision.transforms.Resize(int) truncates the longer edge.
        if width <= height:
            return max(int(target_width * height / width), 1), target_width
        return target_height, max(int(target_height * width / height), 1)
    ratios = (height / target_height, width / target_width)
    ratio = max(ratios) if preprocessing.mode == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _centre_crop(
    image: Image.Image, preprocessing: Preprocessing, border: float | None
) -> Image.Image:
    """Crop as torchvision's center_crop, which pads smaller images with black.

    border: padding of a band, in the numbers of `Bands.plane`. Mode "border" pads with the mean.
    """
    width, height = image.size
    crop_height, crop_width = preprocessing.crop
    if (height, width) == preprocessing.crop:
        return image
    if height < crop_height or width < crop_width:
        above, left = max((crop_height - height) // 2, 0), max((crop_width - width) // 2, 0)
        colour: tuple[int, ...] | float = (0, 0, 0)
        if border is not None:
            colour = border
        elif preprocessing.mode == "border":
            colour = tuple(round(255 * mean) for mean in preprocessing.mean)
        mode = "RGB" if border is None else "F"
        canvas = Image.new(mode, (max(width, crop_width), max(height, crop_height)), colour)
        canvas.paste(image.convert(mode), (left, above))
        image, (width, height) = canvas, canvas.size
    # Python's round, to even at .5, as in torchvision.
    top, left = round((height - crop_height) / 2.0), round((width - crop_width) / 2.0)
    return image.crop((left, top, left + crop_width, top + crop_height))
