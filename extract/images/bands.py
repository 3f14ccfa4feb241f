"""Images at full depth: the bands of a file as 32-bit floats, neither rounded nor clipped.

Bands are counted from 1, as GDAL and rasterio count them. TIFFs that Pillow does not read at their
full depth are read by tifffile (the extra `tiff`).

`headrace export` copies this module into `preprocess.py`, so it imports only Pillow and NumPy, and
tifffile where such a TIFF is read.
"""

import io
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageFile

from headrace.cache.count_text import count_text
from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import (
    BELOW_IS_ABOVE,
    ORIENTATIONS,
    RIGHT_IS_LEFT,
    SIDEWAYS,
    decode_image,
    orientation_of,
)
from headrace.extract.images.opening import (
    MAX_DEFLATE_RATIO,
    MAX_FILE_PIXELS,
    MAX_PIXELS,
    check_size,
    decoding_reason,
    open_image,
)
from headrace.extract.images.raw_pixels import (
    PixelRange,
    RawPixels,
    array_shape,
    read_array_pixels,
    read_raw_pixels,
    tiff_bits,
)
from headrace.extract.images.tiff_windows import TiffWindows

_NUMPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_ORIENTATION_TAG = 274  # the same number as EXIF's
_NODATA_TAG = 42113  # GDAL's: the value, as text, of pixels without one
_MAX_PAGES = 1000  # of a TIFF, whose channels may be pages of their own
# Modes of Pillow without plain channels, and those that they are converted to.
_PALETTE_MODES = {"P": "RGB", "1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}


@dataclass(frozen=True)
class Bands:
    """The bands of one image, upright, in the file's own numbers."""

    # (H, W, bands of the file), if possible a view of its bytes; TiffWindows for a large TIFF until
    # it is cropped
    values: Any
    selection: tuple[int, ...]  # indices of the C bands that are used
    ranges: tuple[PixelRange, ...]  # (black, white) of each of them
    name: str  # their type and format, for messages
    nodata: float | None = None  # the file's value of pixels without one, besides NaN

    def crop(self, left: int, top: int, right: int, bottom: int) -> "Bands":
        """Return the bands of a rectangle, which must lie in the image."""
        return replace(self, values=self.values[top:bottom, left:right])

    def picture(self) -> Image.Image:
        """Return 8-bit bands as an image of grey or colours. Raises ImageError for other depths."""
        values = self.values[:, :, list(self.selection)]
        if values.dtype != np.uint8:
            raise ImageError(
                f"{self.name}, of an image too large to be decoded whole: images.pixel_dtype: "
                "float32 in the recipe reads its tiles"
            )
        pixels = values if values.shape[2] == 3 else values[:, :, 0]
        if self.ranges[0][0] > self.ranges[0][1]:  # zero is white
            pixels = 255 - pixels
        return Image.fromarray(np.ascontiguousarray(pixels))

    def missing(self, channel: int) -> npt.NDArray[np.bool_] | None:
        """Return which pixels (H, W) of a band have no value: NaN, infinity or the file's nodata.

        channel: index into `selection`. None if all have one.
        """
        plane = self.values[:, :, self.selection[channel]]
        if plane.dtype.kind != "f" and self.nodata is None:
            return None
        is_missing = ~np.isfinite(plane)
        if self.nodata is not None:
            is_missing |= plane == self.nodata
        return is_missing if is_missing.any() else None

    def plane(self, channel: int, fill: float | None = None) -> npt.NDArray[np.float32]:
        """Return a band (H, W) as float32, to be resized and then `scaled`.

        It is in the file's own numbers, less black if `_exceeds_float32`.

        fill: the value of pixels without one, black being 0 and white 1; None: such pixels raise
        ImageError.
        """
        values = self.values[:, :, self.selection[channel]]
        is_missing = self.missing(channel)
        if is_missing is not None and fill is None:
            raise ImageError(
                f"{self.name}: {is_missing.mean():.1%} of the pixels of a band have no value (NaN, "
                "infinity, or the file's nodata). images.nodata: mean in the recipe gives them the "
                "mean of their band"
            )
        if self._exceeds_float32:
            # Subtracted before the values are rounded to float32, which has 24 bits only.
            values = values.astype(np.float64) - self.ranges[channel][0]
        plane = np.ascontiguousarray(values, np.float32)
        if is_missing is None or fill is None:
            return plane
        return np.where(is_missing, np.float32(self.own_number(channel, fill)), plane)

    def own_number(self, channel: int, value: float) -> float:
        """Return a value, given with black as 0 and white as 1, in the numbers of `plane`."""
        black, white = self.ranges[channel]
        return (0 if self._exceeds_float32 else black) + value * (white - black)

    def scaled(self, planes: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """Return C planes (H, W) as (H, W, C) in which black is 0 and white 255, unclipped."""
        scaled = np.empty((*planes[0].shape, len(planes)), np.float32)
        for channel, (plane, (black, white)) in enumerate(zip(planes, self.ranges, strict=True)):
            own_black = np.float32(self.own_number(channel, 0))
            scaled[:, :, channel] = (plane - own_black) * np.float32(255 / (white - black))
        return scaled

    def floats(self, fill: float | None = None) -> npt.NDArray[np.float32]:
        """Return (H, W, C) float32 in which black is 0 and white 255. Raises ImageError."""
        return self.scaled([self.plane(channel, fill) for channel in range(len(self.selection))])

    @property
    def _exceeds_float32(self) -> bool:
        """Whether float32 may round the numbers, so that black is subtracted in float64 before."""
        return bool(self.values.dtype.itemsize > 2 and self.values.dtype != np.float32)


def decode_deep(
    data: bytes,
    bands: tuple[int, ...] | None = None,
    pixel_range: PixelRange | tuple[PixelRange, ...] | None = None,
    *,
    in_parts: bool = False,
) -> Image.Image | Bands:
    """Decode an image, upright, without loss of depth.

    bands: numbers of the bands to return, counted from 1; alpha is a band like others, and palettes
    are colours. None: grey values or colours as Bands if they have more than 8 bits, else the image
    of `decode_image`.
    pixel_range: black and white of pixels of more than 8 bits, or a pair for each band.
    in_parts: only crops are needed, so a TIFF may have more than MAX_FILE_PIXELS pixels and is
    decoded where they are cut.

    Raises ImageError for whatever is wrong with the bytes.
    """
    try:
        raw, turn = _read(data, None if bands is None else max(bands), in_parts)
        if raw is None:
            return decode_image(data)
        values: Any = raw.values
        if isinstance(values, np.ndarray):
            check_size(values.shape[1], values.shape[0])
            values = values[:, :, None] if values.ndim == 2 else values
            if values.ndim != 3:  # a damaged TIFF, whose axes are not those of its values
                raise ImageError(f"{raw.name} of shape {values.shape}, expected (H, W, bands)")
        if bands is None:
            values, ranges = _colours(raw, values, pixel_range)
            selection = tuple(range(values.shape[2]))
        else:
            ranges = _ranges(raw, pixel_range, len(bands))
            selection = _selection(bands, values.shape[2], raw.name)
            if raw.white_is_zero:
                ranges = tuple((white, black) for black, white in ranges)
        return Bands(_turned(values, turn), selection, ranges, raw.name, raw.nodata)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(decoding_reason(error, data)) from error


def _read(
    data: bytes, highest_band: int | None, in_parts: bool
) -> tuple[RawPixels | None, Image.Transpose | None]:
    """Return the samples of a file, and the turn that makes them upright.

    highest_band: the highest band asked for, None for all colours. Without it, the samples of an
    image of at most 8 bits are None: `decode_image` reads it.
    """
    if not data:
        raise ImageError("the file is empty")
    if data.startswith(_NUMPY_MAGIC):
        array = read_array_pixels(data, highest_band)
        is_deep = array.values.dtype not in (np.uint8, np.bool_)
        return (array if highest_band is not None or is_deep else None), None
    # As in `decode_image`: with True, truncated files decode to grey bars without an error.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with open_image(data) as image:
            if image.format == "TIFF" and highest_band is not None and image.mode not in ("P", "1"):
                # Pillow drops the second of two bands without an error, and reads one page only,
                # where each channel may be a page.
                return _tifffile_pixels(data, in_parts)
            check_size(*image.size)
            raw = read_raw_pixels(image, data, None)
            if raw is not None and image.format == "TIFF":
                raw = raw._replace(nodata=_as_number(image.tag_v2.get(_NODATA_TAG)))  # type: ignore[attr-defined]
            elif raw is None and image.format == "TIFF" and tiff_bits(image) > 8:
                # Pillow scales such samples to 8 bits, or drops their low bytes.
                return _tifffile_pixels(data, False)
            elif raw is None and highest_band is not None:
                mode = image.mode
                image.load()
                plain = image.convert(_PALETTE_MODES[mode]) if mode in _PALETTE_MODES else image
                raw = RawPixels(
                    np.asarray(plain), f"{mode} values of a {image.format}", (0.0, 255.0)
                )
            return raw, orientation_of(image)
    except (PIL.UnidentifiedImageError, Image.DecompressionBombError):
        # Pillow knows few kinds of TIFF, and refuses large images whole; tifffile reads parts.
        if not data.startswith(_TIFF_MAGIC):
            raise
    return _tifffile_pixels(data, in_parts)


def _as_number(text: Any) -> float | None:
    try:
        return float(text)
    except (ValueError, TypeError):
        return None


def _tifffile_pixels(data: bytes, in_parts: bool) -> tuple[RawPixels, Image.Transpose | None]:
    """Return the first image of a TIFF, read by tifffile, and the turn that makes it upright.

    Samples may be interleaved or in planes, in either byte order, of any type of numbers; channels
    may be pages of their own (OME, ImageJ). Raises ImageError.
    """
    try:
        import tifffile
    except ImportError:
        raise ImageError(
            "a TIFF whose bands Pillow does not read (their number, bits or type). The library "
            "tifffile does: pip install 'headrace[tiff]'"
        ) from None
    # tifffile logs oddities; errors are raised. The level is set once only, because that empties
    # the caches of all loggers: 1 ms of an image's 6.
    logger = logging.getLogger("tifffile")
    if logger.level != logging.CRITICAL:
        logger.setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        # Counted before `tiff.series` sorts the pages, which takes time with the square of their
        # number, and never ends where the last page of a damaged file points back to an earlier
        # one.
        pages = itertools.islice(tiff.pages, _MAX_PAGES + 1)
        if sum(1 + len(page.subifds or ()) for page in pages) > _MAX_PAGES:
            raise ImageError(
                f"a TIFF of more than {_MAX_PAGES:,} pages; expected one image. Save one image of "
                "it, as .npy for example"
            )
        series = tiff.series[0]
        page = series.keyframe
        axes = series.axes
        if set(axes) - {"Y", "X", "C", "S"} or axes.count("C") + axes.count("S") > 1:
            raise ImageError(
                f"a TIFF with the axes {axes}; expected rows (Y), columns (X) and bands (S or C). "
                "Save one image of it, as .npy for example"
            )
        orientation = page.tags.get(_TIFF_ORIENTATION_TAG)
        turn = None if orientation is None else ORIENTATIONS.get(orientation.value)
        has_windows = in_parts and "C" not in axes and turn is None
        if not has_windows:
            check_size(page.imagewidth, page.imagelength)
        # Blank chips compress better than by deflate, or have no bytes at all (GDAL's SPARSE_OK).
        # As many bytes as the largest photo has are no danger.
        plausible_bytes = max(3 * MAX_FILE_PIXELS, MAX_DEFLATE_RATIO * len(data))
        if series.size * series.dtype.itemsize > plausible_bytes:
            raise ImageError(
                f"a TIFF of {len(data):,} bytes that declares {series.size:,} values: more than "
                "any compression makes so small"
            )
        values: Any = TiffWindows(page, data) if has_windows else series.asarray()
        nodata_tag = page.tags.get(_NODATA_TAG)
        white_is_zero = page.photometric == 0
        bits = page.bitspersample
    band_axis = next((axis for axis, name in enumerate(axes) if name in "CS"), None)
    if band_axis is not None and not has_windows:
        values = np.moveaxis(values, band_axis, -1)
    if values.dtype.kind not in "buif":
        raise ImageError(f"a TIFF of {values.dtype} values; expected numbers")
    own_range = (0.0, 2.0**bits - 1) if values.dtype.kind in "bu" and bits <= 16 else None
    raw = RawPixels(
        values,
        f"{values.dtype.name} values of a TIFF",
        own_range,
        white_is_zero=white_is_zero,
        nodata=_as_number(nodata_tag.value) if nodata_tag is not None else None,
    )
    return raw, turn


def _ranges(
    raw: RawPixels, pixel_range: PixelRange | tuple[PixelRange, ...] | None, count: int
) -> tuple[PixelRange, ...]:
    """Return (black, white) of each of `count` bands.

    Those of 8 bits keep their own range. Raises ImageError for others without a `pixel_range`.
    """
    has_eight_bits = raw.values.dtype in (np.uint8, np.bool_)
    value_range = raw.own_range if has_eight_bits or pixel_range is None else pixel_range
    if value_range is None:
        raise ImageError(
            f"{raw.name} have no range of their own. Say which value is black and which is "
            "white: images.pixel_range: [0, 10000] in the recipe, or [0, 1] where mean and std are "
            "in the file's own numbers (in Python: pixel_range=(0, 1))"
        )
    return value_range if isinstance(value_range[0], tuple) else (value_range,) * count


def _selection(bands: tuple[int, ...], count: int, name: str) -> tuple[int, ...]:
    if max(bands) > count:
        raise ImageError(
            f"{name}: {count} {'band' if count == 1 else 'bands'}, and band {max(bands)} is asked "
            "for (bands, counted from 1)"
        )
    return tuple(band - 1 for band in bands)


def _colours(
    raw: RawPixels,
    values: npt.NDArray[Any],
    pixel_range: PixelRange | tuple[PixelRange, ...] | None,
) -> tuple[npt.NDArray[Any], tuple[PixelRange, ...]]:
    """Return grey (H, W, 1) or colours (H, W, 3) of deep samples, and their ranges.

    Transparent pixels are blended with white, as `decode_image` does it.
    """
    count = values.shape[2]
    if count > 4:
        raise ImageError(
            f"{raw.name}: {count_text(count, 'band')}, and the network takes colours. Say "
            "which: bands: [4, 3, 2] of the backbone in the recipe (red, green, blue, counted from "
            "1)"
        )
    colours = values[:, :, : count - 1] if count in (2, 4) else values
    (colour_range,) = set(_ranges(raw, pixel_range, 1))
    ranges = (colour_range,) * colours.shape[2]
    if raw.white_is_zero:
        ranges = tuple((white, black) for black, white in ranges)
    if count not in (2, 4) and raw.transparent is None:
        return colours, ranges
    selection = tuple(range(colours.shape[2]))
    floats: npt.NDArray[Any] = Bands(colours, selection, ranges, raw.name).floats()
    if raw.transparent is not None:
        floats[(values == np.asarray(raw.transparent)).all(axis=2)] = 255
    if count in (2, 4):
        alpha_range = raw.alpha_range or colour_range
        alpha = Bands(values, (count - 1,), (alpha_range,), raw.name).floats() / 255
        floats = floats * alpha + 255 * (1 - alpha)
    return floats, ((0.0, 255.0),) * floats.shape[2]


def _turned(values: npt.NDArray[Any], turn: Image.Transpose | None) -> npt.NDArray[Any]:
    """Return values (H, W, C) turned as Pillow's `transpose` turns an image, a view."""
    if turn is None:  # `values` may be windows of a large TIFF, which know no steps
        return values
    # Each turn is an exchange of the axes followed by reversals of rows, columns or both.
    values = values.swapaxes(0, 1) if turn in SIDEWAYS else values
    return values[:: -1 if turn in BELOW_IS_ABOVE else 1, :: -1 if turn in RIGHT_IS_LEFT else 1]


def decode_large_tiff(data: bytes) -> Bands | None:
    """Return the bands of a TIFF of more than MAX_PIXELS pixels, from which crops can be cut.

    None for other files. Raises ImageError.
    """
    if not data.startswith(_TIFF_MAGIC):
        return None
    try:
        width, height = upright_size(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - its decoder, called next, says what is wrong
        return None
    if width * height <= MAX_PIXELS:
        return None
    # (0, 1) for deep pixels, which `Bands.picture` refuses; those of 8 bits have their own range.
    bands = decode_deep(data, (1,), (0, 1), in_parts=True)
    assert isinstance(bands, Bands)
    n_colours = 3 if bands.values.shape[2] >= 3 else 1
    return replace(bands, selection=tuple(range(n_colours)), ranges=bands.ranges * n_colours)


def upright_size(file: IO[bytes]) -> tuple[int, int]:
    """Return (width, height) of an image file, upright, read from its header.

    Raises whatever Pillow or tifffile raise, and ImageError for a header that declares no pixels,
    or more than a file of this size can hold.
    """
    width, height = _declared_size(file)
    max_pixels = max(MAX_PIXELS, MAX_DEFLATE_RATIO * file.seek(0, io.SEEK_END))
    if not 0 < width * height <= max_pixels:
        raise ImageError(f"it declares {width} x {height} pixels: none, or more than it can hold")
    return width, height


def _declared_size(file: IO[bytes]) -> tuple[int, int]:
    head = file.read(8192)
    file.seek(0)
    if head.startswith(_NUMPY_MAGIC):
        shape = array_shape(head)
        # Bands first if the first axis is the shortest, as in `read_array_pixels`.
        height, width = shape[1:] if len(shape) == 3 and shape[0] < shape[2] else shape[:2]
        return width, height
    try:
        # Pillow reads only the header of a TIFF, which may have gigabytes.
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
            page: Any = tiff.pages[0]  # not `tiff.series`, which reads all pages of the file
            tag = page.tags.get(_TIFF_ORIENTATION_TAG)
            width, height = page.imagewidth, page.imagelength
            turn = None if tag is None else ORIENTATIONS.get(tag.value)
    return (height, width) if turn in SIDEWAYS else (width, height)
