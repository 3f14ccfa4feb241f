"""Images at their own depth: the bands of a file as 32-bit floats, neither rounded nor clipped.

Bands are counted from 1, as GDAL and rasterio count them. TIFFs that Pillow does not read at their
full depth are read by tifffile (the extra `tiff`).

`headrace export` copies this module into `preprocess.py`, so that it needs Pillow and NumPy alone
where no such TIFF is read.
"""

import io
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile

from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import (
    ORIENTATIONS,
    PixelRange,
    Samples,
    array_samples,
    array_shape,
    check_size,
    decode_image,
    decoding_reason,
    file_samples,
    open_image,
    orientation_of,
)

_NUMPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_ORIENTATION_TAG = 274
_NODATA_TAG = 42113  # GDAL's text of the value that means none
_MOST_COMPRESSED = 1032  # deflate's bound
_PALETTE_MODES = {"P": "RGB", "1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
# turns that make rows of columns
_SWAPPING = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
)


@dataclass(frozen=True)
class Bands:
    """The bands of one image, upright, in the file's own numbers."""

    values: npt.NDArray[Any]  # (H, W, C), where possible a view of the file
    ranges: tuple[PixelRange, ...]  # black and white of each band
    name: str  # what they are, for a message
    nodata: float | None = None  # the value that the file says to be none; NaN is none in any case

    def crop(self, left: int, top: int, right: int, bottom: int) -> "Bands":
        """The bands of a rectangle that lies in the image."""
        return Bands(self.values[top:bottom, left:right], self.ranges, self.name, self.nodata)

    def missing(self) -> npt.NDArray[np.bool_]:
        """Return which values (H, W, C) are none: NaN, infinite, or the file's own word for it."""
        is_missing = np.zeros(self.values.shape, np.bool_)
        if self.values.dtype.kind == "f":
            is_missing = ~np.isfinite(self.values)
        if self.nodata is not None:
            is_missing |= self.values == self.nodata
        return is_missing

    def floats(self, fill: tuple[float, ...] | None = None) -> npt.NDArray[np.float32]:
        """Return (H, W, C) float32 in which black is 0 and white 255, unrounded and unclipped.

        fill: what each band has where there is no value, in these units; None refuses such images.
        Raises ImageError.
        """
        is_missing = self.missing()
        has_missing = bool(is_missing.any())
        if has_missing and fill is None:
            share = is_missing.any(axis=2).mean()
            raise ImageError(
                f"{self.name}: {share:.1%} of the pixels have no value (NaN, infinity, or the "
                "file's nodata). images.nodata: mean in the recipe gives them the mean of their "
                "band"
            )
        floats = np.empty(self.values.shape, np.float32)
        for band, (black, white) in enumerate(self.ranges):
            # One band at a time, for float64 takes eight times the bytes of a file of 8 bits.
            scaled = (self.values[:, :, band].astype(np.float64) - black) * (255 / (white - black))
            if has_missing and fill is not None:
                scaled[is_missing[:, :, band]] = fill[band]
            floats[:, :, band] = scaled
        return floats


def decode_deep(
    data: bytes,
    bands: tuple[int, ...] | None = None,
    pixel_range: PixelRange | tuple[PixelRange, ...] | None = None,
) -> Image.Image | Bands:
    """The image in `data`, upright: these bands of it as they stand; or, without `bands`, its grey
    values or colours where they have more than 8 bits, else the image of `decode_image`.

    pixel_range: black and white of pixels of more than 8 bits, or a pair for each band. With
    `bands`, alpha is a band like others; palettes are colours. Raises ImageError alone.
    """
    try:
        samples, turn = _read(data, None if bands is None else max(bands))
        if samples is None:
            return decode_image(data)
        values = samples.values[:, :, None] if samples.values.ndim == 2 else samples.values
        check_size(values.shape[1], values.shape[0])
        if bands is None:
            values, ranges = _colours(samples, values, pixel_range)
        else:
            ranges = _ranges(samples, pixel_range, len(bands))
            values = values[:, :, _selection(bands, values.shape[2], samples.name)]
            if samples.white_is_zero:
                ranges = tuple((white, black) for black, white in ranges)
        return Bands(_turned(values, turn), ranges, samples.name, samples.nodata)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(decoding_reason(error, data)) from error


def _read(data: bytes, most_bands: int | None) -> tuple[Samples | None, Image.Transpose | None]:
    """The samples of a file and the turn that makes them upright; no samples for an image of at
    most 8 bits of which no single bands are asked.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(_NUMPY_MAGIC):
        array = array_samples(data, most_bands)
        is_deep = array.values.dtype not in (np.uint8, np.bool_)
        return (array if most_bands is not None or is_deep else None), None
    # As in `decode_image`: else truncated files decode to grey bars in silence.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with open_image(data) as image:
            check_size(*image.size)
            if image.format == "TIFF" and most_bands is not None and image.mode not in ("P", "1"):
                # Pillow drops the second band of two in silence, and knows no pages of channels.
                return _tifffile_samples(data)
            samples = file_samples(image, data, None)
            if samples is not None and image.format == "TIFF":
                samples = samples._replace(nodata=_as_number(image.tag_v2.get(_NODATA_TAG)))  # type: ignore[attr-defined]
            elif samples is None and image.format == "TIFF" and _has_other_depth(image):
                return _tifffile_samples(data)
            elif samples is None and most_bands is not None:
                mode = image.mode
                image.load()
                plain = image.convert(_PALETTE_MODES[mode]) if mode in _PALETTE_MODES else image
                samples = Samples(
                    np.asarray(plain), f"{mode} values of a {image.format}", (0.0, 255.0)
                )
            return samples, orientation_of(image)
    except PIL.UnidentifiedImageError:
        if not data.startswith(_TIFF_MAGIC):
            raise
    return _tifffile_samples(data)


def _has_other_depth(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow scales the samples of a TIFF to 8 bits, or drops their low bytes."""
    return bool(max(image.tag_v2.get(258, (1,))) > 8)  # type: ignore[attr-defined]


def _as_number(text: Any) -> float | None:
    try:
        return float(text)
    except (ValueError, TypeError):
        return None


def _tifffile_samples(data: bytes) -> tuple[Samples, Image.Transpose | None]:
    """The first image of a TIFF by tifffile, and its turn: samples interleaved or in planes, either
    byte order, any type of numbers, or channels that are pages of their own (OME, ImageJ).

    Raises ImageError.
    """
    try:
        import tifffile
    except ImportError:
        raise ImageError(
            "a TIFF whose bands Pillow does not read (their number, bits or type). The library "
            "tifffile does: pip install 'headrace[tiff]'"
        ) from None
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        axes = series.axes
        if set(axes) - {"Y", "X", "C", "S"} or axes.count("C") + axes.count("S") > 1:
            raise ImageError(
                f"a TIFF with the axes {axes}; expected rows (Y), columns (X) and bands (S or C). "
                "Save one image of it, as .npy for example"
            )
        check_size(page.imagewidth, page.imagelength)
        if series.size * series.dtype.itemsize > _MOST_COMPRESSED * len(data):
            raise ImageError(
                f"a TIFF of {len(data):,} bytes that declares {series.size:,} values: more than "
                "any compression makes so small"
            )
        values = series.asarray()
        nodata_tag = page.tags.get(_NODATA_TAG)
        white_is_zero = page.photometric == 0
        bits = page.bitspersample
        orientation = page.tags.get(_TIFF_ORIENTATION_TAG)
    band_axis = next((axis for axis, name in enumerate(axes) if name in "CS"), None)
    if band_axis is not None:
        values = np.moveaxis(values, band_axis, -1)
    if values.dtype.kind not in "buif":
        raise ImageError(f"a TIFF of {values.dtype} values; expected numbers")
    own_range = (0.0, 2.0**bits - 1) if values.dtype.kind in "bu" and bits <= 16 else None
    samples = Samples(
        values,
        f"{values.dtype.name} values of a TIFF",
        own_range,
        white_is_zero=white_is_zero,
        nodata=_as_number(nodata_tag.value) if nodata_tag is not None else None,
    )
    return samples, None if orientation is None else ORIENTATIONS.get(orientation.value)


def _ranges(
    samples: Samples, pixel_range: PixelRange | tuple[PixelRange, ...] | None, count: int
) -> tuple[PixelRange, ...]:
    """Black and white of each of `count` bands."""
    has_eight_bits = samples.values.dtype in (np.uint8, np.bool_)
    value_range = samples.own_range if has_eight_bits or pixel_range is None else pixel_range
    if value_range is None:
        raise ImageError(
            f"{samples.name} have no range of their own. Say which value is black and which is "
            "white: images.pixel_range: [0, 10000] in the recipe, or [0, 1] where mean and std are "
            "in the file's own numbers (in Python: pixel_range=(0, 1))"
        )
    return value_range if isinstance(value_range[0], tuple) else (value_range,) * count


def _selection(bands: tuple[int, ...], count: int, name: str) -> list[int]:
    if max(bands) > count:
        raise ImageError(
            f"{name}: {count} {'band' if count == 1 else 'bands'}, and band {max(bands)} is asked "
            "for (bands, counted from 1)"
        )
    return [band - 1 for band in bands]


def _colours(
    samples: Samples,
    values: npt.NDArray[Any],
    pixel_range: PixelRange | tuple[PixelRange, ...] | None,
) -> tuple[npt.NDArray[Any], tuple[PixelRange, ...]]:
    """Grey (H, W, 1) or colours (H, W, 3) of deep samples; over white where they are
    transparent.
    """
    count = values.shape[2]
    if count > 4:
        raise ImageError(
            f"{samples.name}: {count} bands, and the network takes colours. Say which: bands: [4, "
            "3, 2] of the backbone in the recipe (red, green, blue, counted from 1)"
        )
    colours = values[:, :, : count - 1] if count in (2, 4) else values
    (colour_range,) = set(_ranges(samples, pixel_range, 1))
    ranges = (colour_range,) * colours.shape[2]
    if samples.white_is_zero:
        ranges = tuple((white, black) for black, white in ranges)
    if count not in (2, 4) and samples.transparent is None:
        return colours, ranges
    floats: npt.NDArray[Any] = Bands(colours, ranges, samples.name).floats()
    if samples.transparent is not None:
        floats[(values == np.asarray(samples.transparent)).all(axis=2)] = 255
    if count in (2, 4):
        alpha_range = samples.alpha_range or colour_range
        alpha = Bands(values[:, :, count - 1 :], (alpha_range,), samples.name).floats() / 255
        floats = floats * alpha + 255 * (1 - alpha)
    return floats, ((0.0, 255.0),) * floats.shape[2]


def _turned(values: npt.NDArray[Any], turn: Image.Transpose | None) -> npt.NDArray[Any]:
    """(H, W, C) as Pillow's transpose makes it."""
    if turn is None:
        return values
    upside_down = turn in (
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.ROTATE_180,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
    mirrored = turn in (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    )
    values = values.swapaxes(0, 1) if turn in _SWAPPING else values
    return values[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def upright_size(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) of an image file, upright, by its header alone. Raises anything."""
    head = file.read(8192)
    file.seek(0)
    if head.startswith(_NUMPY_MAGIC):
        shape = array_shape(head)
        # as `array_samples` reads images without bands
        height, width = shape[1:] if len(shape) == 3 and shape[0] < shape[2] else shape[:2]
        return width, height
    try:
        # of a TIFF the header is read alone
        image = (
            Image.open(file, formats=["TIFF"])
            if head.startswith(_TIFF_MAGIC)
            else open_image(file.read())
        )
        (width, height), turn = image.size, orientation_of(image)
    except (PIL.UnidentifiedImageError, Image.DecompressionBombError):
        import tifffile

        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            page = tiff.series[0].keyframe
            tag = page.tags.get(_TIFF_ORIENTATION_TAG)
            width, height = page.imagewidth, page.imagelength
            turn = None if tag is None else ORIENTATIONS.get(tag.value)
    return (height, width) if turn in _SWAPPING else (width, height)
