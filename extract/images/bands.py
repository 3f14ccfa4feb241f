"""Images at their own depth: the bands of a file as 32-bit floats, neither rounded nor clipped.

Bands are counted from 1, as GDAL and rasterio count them. TIFFs that Pillow does not read at their
full depth are read by tifffile (the extra `tiff`).

`headrace export` copies this module into `preprocess.py`, so that it needs Pillow and NumPy alone
where no such TIFF is read.
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

from headrace.extract.errors import ImageError
from headrace.extract.images.decoding import ORIENTATIONS, decode_image, orientation_of
from headrace.extract.images.opening import MAX_PIXELS, check_size, decoding_reason, open_image
from headrace.extract.images.samples import (
    PixelRange,
    Samples,
    array_samples,
    array_shape,
    file_samples,
)
from headrace.extract.images.tiff_windows import TiffWindows

_NUMPY_MAGIC = b"\x93NUMPY"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_ORIENTATION_TAG = 274  # the same number as EXIF's
_NODATA_TAG = 42113  # GDAL's text of the value that means none
_MOST_COMPRESSED = 1032  # deflate's bound
_MOST_PAGES = 1000  # of a TIFF: channels may be pages of their own
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

    # (H, W, bands of the file), where possible a view of its bytes; before a crop perhaps
    # TiffWindows
    values: Any
    selection: tuple[int, ...]  # the C bands that are meant, as indices
    ranges: tuple[PixelRange, ...]  # black and white of each of them
    name: str  # what they are, for a message
    nodata: float | None = None  # the value that the file says to be none; NaN is none in any case

    def crop(self, left: int, top: int, right: int, bottom: int) -> "Bands":
        """The bands of a rectangle that lies in the image."""
        return replace(self, values=self.values[top:bottom, left:right])

    def picture(self) -> Image.Image:
        """Return the bands, of 8 bits, as an image of grey or colours. Raises ImageError."""
        values = self.values[:, :, list(self.selection)]
        if values.dtype != np.uint8:
            raise ImageError(
                f"{self.name}, of an image too large to be decoded whole: images.pixel_dtype: "
                "float32 in the recipe reads its tiles"
            )
        pixels = values if values.shape[2] == 3 else values[:, :, 0]
        return Image.fromarray(np.ascontiguousarray(pixels))

    def missing(self, channel: int) -> npt.NDArray[np.bool_] | None:
        """Return which values (H, W) of a band are none: NaN, infinite, or the file's own word for
        it; None where all are values.
        """
        plane = self.values[:, :, self.selection[channel]]
        is_missing = None
        if plane.dtype.kind == "f":
            is_missing = ~np.isfinite(plane)
        if self.nodata is not None:
            is_nodata = plane == self.nodata
            is_missing = is_nodata if is_missing is None else is_missing | is_nodata
        return is_missing if is_missing is not None and is_missing.any() else None

    def plane(self, channel: int, fill: float | None = None) -> npt.NDArray[np.float32]:
        """Return a band (H, W) as float32 in the file's own numbers; `scaled` scales it, after it
        has been resized.

        fill: what pixels without a value have, black being 0 and white 1; None raises ImageError.
        """
        values = self.values[:, :, self.selection[channel]]
        is_missing = self.missing(channel)
        if is_missing is not None and fill is None:
            raise ImageError(
                f"{self.name}: {is_missing.mean():.1%} of the pixels of a band have no value (NaN, "
                "infinity, or the file's nodata). images.nodata: mean in the recipe gives them the "
                "mean of their band"
            )
        if self._is_wide:
            values = values.astype(np.float64) - self.ranges[channel][0]
        plane = np.ascontiguousarray(values, np.float32)
        if is_missing is not None and fill is not None:
            plane = np.where(is_missing, np.float32(self.own_number(channel, fill)), plane)
        return plane

    def own_number(self, channel: int, value: float) -> float:
        """Return what `value`, black being 0 and white 1, is in the numbers of `plane`."""
        black, white = self.ranges[channel]
        return (0 if self._is_wide else black) + value * (white - black)

    def scaled(self, planes: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """Return planes of each band as (H, W, C) in which black is 0 and white 255, unclipped."""
        scaled = np.empty((*planes[0].shape, len(planes)), np.float32)
        for channel, (plane, (black, white)) in enumerate(zip(planes, self.ranges, strict=True)):
            own_black = np.float32(self.own_number(channel, 0))
            scaled[:, :, channel] = (plane - own_black) * np.float32(255 / (white - black))
        return scaled

    def floats(self, fill: float | None = None) -> npt.NDArray[np.float32]:
        """Return (H, W, C) float32 in which black is 0 and white 255. Raises ImageError."""
        return self.scaled([self.plane(channel, fill) for channel in range(len(self.selection))])

    @property
    def _is_wide(self) -> bool:
        """Whether float32 does not hold the numbers, so that black is subtracted before."""
        return bool(self.values.dtype.itemsize > 2 and self.values.dtype != np.float32)


def decode_deep(
    data: bytes,
    bands: tuple[int, ...] | None = None,
    pixel_range: PixelRange | tuple[PixelRange, ...] | None = None,
    *,
    in_parts: bool = False,
) -> Image.Image | Bands:
    """The image in `data`, upright: these bands of it as they stand; or, without `bands`, its grey
    values or colours where they have more than 8 bits, else the image of `decode_image`.

    pixel_range: black and white of pixels of more than 8 bits, or a pair for each band. With
    `bands`, alpha is a band like others; palettes are colours. in_parts: crops of it are all that
    is needed, so that a TIFF may be larger than MAX_PIXELS and is decoded where they are cut.
    Raises ImageError alone.
    """
    try:
        samples, turn = _read(data, None if bands is None else max(bands), in_parts)
        if samples is None:
            return decode_image(data)
        values: Any = samples.values
        if isinstance(values, np.ndarray):
            check_size(values.shape[1], values.shape[0])
            values = values[:, :, None] if values.ndim == 2 else values
            if values.ndim != 3:  # a damaged TIFF, whose axes are not those of its values
                raise ImageError(f"{samples.name} of shape {values.shape}, expected (H, W, bands)")
        if bands is None:
            values, ranges = _colours(samples, values, pixel_range)
            selection = tuple(range(values.shape[2]))
        else:
            ranges = _ranges(samples, pixel_range, len(bands))
            selection = _selection(bands, values.shape[2], samples.name)
            if samples.white_is_zero:
                ranges = tuple((white, black) for black, white in ranges)
        return Bands(_turned(values, turn), selection, ranges, samples.name, samples.nodata)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on malformed input, and a run must go on
        raise ImageError(decoding_reason(error, data)) from error


def _read(
    data: bytes, most_bands: int | None, in_parts: bool
) -> tuple[Samples | None, Image.Transpose | None]:
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
            if image.format == "TIFF" and most_bands is not None and image.mode not in ("P", "1"):
                # Pillow drops the second band of two in silence, and knows no pages of channels.
                return _tifffile_samples(data, in_parts)
            check_size(*image.size)
            samples = file_samples(image, data, None)
            if samples is not None and image.format == "TIFF":
                samples = samples._replace(nodata=_as_number(image.tag_v2.get(_NODATA_TAG)))  # type: ignore[attr-defined]
            elif samples is None and image.format == "TIFF" and _has_other_depth(image):
                return _tifffile_samples(data, False)
            elif samples is None and most_bands is not None:
                mode = image.mode
                image.load()
                plain = image.convert(_PALETTE_MODES[mode]) if mode in _PALETTE_MODES else image
                samples = Samples(
                    np.asarray(plain), f"{mode} values of a {image.format}", (0.0, 255.0)
                )
            return samples, orientation_of(image)
    except (PIL.UnidentifiedImageError, Image.DecompressionBombError):
        if not data.startswith(_TIFF_MAGIC):
            raise
    return _tifffile_samples(data, in_parts)


def _has_other_depth(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow scales the samples of a TIFF to 8 bits, or drops their low bytes."""
    return bool(max(image.tag_v2.get(258, (1,))) > 8)  # type: ignore[attr-defined]


def _as_number(text: Any) -> float | None:
    try:
        return float(text)
    except (ValueError, TypeError):
        return None


def _tifffile_samples(data: bytes, in_parts: bool) -> tuple[Samples, Image.Transpose | None]:
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
    # It logs what it finds odd; what matters is raised. Setting a level empties the caches
    # of all loggers: 1 ms of an image's 6.
    logger = logging.getLogger("tifffile")
    if logger.level != logging.CRITICAL:
        logger.setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        # Before its pages are sorted, which takes time with their square, and has no end where the
        # last one points back to an earlier one.
        pages = itertools.islice(tiff.pages, _MOST_PAGES + 1)
        if sum(1 + len(page.subifds or ()) for page in pages) > _MOST_PAGES:
            raise ImageError(
                f"a TIFF of more than {_MOST_PAGES:,} pages; expected one image. Save one image of "
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
        if series.size * series.dtype.itemsize > _MOST_COMPRESSED * len(data):
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
    samples = Samples(
        values,
        f"{values.dtype.name} values of a TIFF",
        own_range,
        white_is_zero=white_is_zero,
        nodata=_as_number(nodata_tag.value) if nodata_tag is not None else None,
    )
    return samples, turn


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


def _selection(bands: tuple[int, ...], count: int, name: str) -> tuple[int, ...]:
    if max(bands) > count:
        raise ImageError(
            f"{name}: {count} {'band' if count == 1 else 'bands'}, and band {max(bands)} is asked "
            "for (bands, counted from 1)"
        )
    return tuple(band - 1 for band in bands)


def _colours(
    samples: Samples,
    values: npt.NDArray[Any],
    pixel_range: PixelRange | tuple[PixelRange, ...] | None,
) -> tuple[npt.NDArray[Any], tuple[PixelRange, ...]]:
    """Grey (H, W, 1) or colours (H, W, 3) of deep samples; over white where transparent."""
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
    selection = tuple(range(colours.shape[2]))
    floats: npt.NDArray[Any] = Bands(colours, selection, ranges, samples.name).floats()
    if samples.transparent is not None:
        floats[(values == np.asarray(samples.transparent)).all(axis=2)] = 255
    if count in (2, 4):
        alpha_range = samples.alpha_range or colour_range
        alpha = Bands(values, (count - 1,), (alpha_range,), samples.name).floats() / 255
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


def decode_large_tiff(data: bytes) -> Bands | None:
    """The grey values or colours of a TIFF of more than MAX_PIXELS, to be cut in parts; None for
    other files. Raises ImageError.
    """
    if not data.startswith(_TIFF_MAGIC):
        return None
    try:
        width, height = upright_size(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - whoever decodes it says what is wrong
        return None
    if width * height <= MAX_PIXELS:
        return None
    bands = decode_deep(data, (1,), (0, 1), in_parts=True)
    assert isinstance(bands, Bands)
    n_colours = 3 if bands.values.shape[2] >= 3 else 1
    return replace(bands, selection=tuple(range(n_colours)), ranges=bands.ranges * n_colours)


def upright_size(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) of an image file, upright, by its header alone. Raises anything, also for a
    header that declares no pixels, or more than a file of this size can hold.
    """
    width, height = _declared_size(file)
    most_pixels = max(MAX_PIXELS, _MOST_COMPRESSED * file.seek(0, io.SEEK_END))
    if not 0 < width * height <= most_pixels:
        raise ImageError(f"it declares {width} x {height} pixels: none, or more than it can hold")
    return width, height


def _declared_size(file: IO[bytes]) -> tuple[int, int]:
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
            page: Any = tiff.pages[0]  # series are looked for through all pages of a damaged file
            tag = page.tags.get(_TIFF_ORIENTATION_TAG)
            width, height = page.imagewidth, page.imagelength
            turn = None if tag is None else ORIENTATIONS.get(tag.value)
    return (height, width) if turn in _SWAPPING else (width, height)
