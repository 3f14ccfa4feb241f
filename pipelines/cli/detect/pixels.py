"""Settings that images of many bands or more than 8 bits need in a recipe."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.cache.count_text import count_text
from headrace.extract.errors import ImageError
from headrace.extract.images.bands import Bands, decode_deep
from headrace.extract.images.decoding import has_deep_pixels
from headrace.extract.images.locators import locator_file, read_bytes
from headrace.extract.images.opening import open_image

_MAX_BANDS = 16  # of a proposal: hundreds, as of a spectrometer, are for a person to choose from
# A value marks pixels without one if it is this many times as far from the others as they are from
# one another.
_FAR = 2.0
_PROPOSED_FOR = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x93NUMPY")  # TIFF and .npy


@dataclass(frozen=True)
class PixelSettings:
    """Lines for a recipe's sections `images` and `backbones`, and notes on how they were found."""

    images: str = ""
    backbone: str = ""
    notes: tuple[str, ...] = ()


def detect_pixels(paths: Sequence[str]) -> PixelSettings:
    """Return settings by a few of the images; none if these are 8-bit grey or colour images, which
    need no settings, or if their bands or types differ.
    """
    band_counts: set[int] = set()
    dtypes: set[np.dtype[np.generic]] = set()
    n_pixels_of: Counter[float] = Counter()  # by value, of the extremes of each image
    n_with_gaps, are_pages = 0, False
    for path in paths:
        bands = _deep_bands(path)
        if bands is None:
            return PixelSettings(notes=_notes_on_pages(paths))
        values = np.asarray(bands.values[:, :, :])
        # NaN, and what the file declares, mark pixels without a value: no black and no white.
        has_value = np.isfinite(values)
        if bands.nodata is not None:
            has_value &= values != bands.nodata
        n_with_gaps += not has_value.all()
        n_pixels_of.update(_extremes(values[has_value]))
        band_counts.add(values.shape[2])
        dtypes.add(values.dtype)
        are_pages |= _are_pages(path, values.shape[2])
    # No one setting fits images of several types, nor grey ones beside those of bands.
    if len(dtypes) != 1 or not n_pixels_of or min(band_counts) == 1 < max(band_counts):
        return PixelSettings(notes=_notes_on_pages(paths))
    (dtype,) = dtypes
    n_bands = min(band_counts)  # which all of them have
    images, notes = "", []
    images_text = count_text(len(paths), "image")
    if len(band_counts) > 1:
        notes.append(
            f"some images have {n_bands} bands and some {max(band_counts)}: the first {n_bands} "
            "alone are read, which all have. Look whether these are the same in all of them"
        )
    if dtype != np.uint8:
        marker = _far_value(n_pixels_of)
        numbers = [value for value in n_pixels_of if value != marker]
        lowest, highest = min(numbers), max(numbers)
        black, white = _black_and_white(dtype, lowest, highest)
        images = (
            f"  pixel_range: [{black:.6g}, {white:.6g}]      # black and white, by {images_text}: "
            "set what the sensor has\n"
            "  pixel_dtype: float32      # pixels keep their depth until they are normalized\n"
        )
        notes.append(
            f"the pixels are {dtype}, {lowest:g} to {highest:g} in {images_text}; {black:.6g} and "
            f"{white:.6g} are taken for black and white (images.pixel_range)"
        )
        if marker is not None:
            notes.append(
                f"some pixels are {marker:g}, far from all others: if that marks pixels without a "
                "value, say so in each file (pip install rasterio; rio edit-info --nodata "
                f"{marker:g} FILE.tif; in an .npy file: NaN), and images.nodata: mean gives them "
                "the mean of their band"
            )
    backbone = ""
    if n_bands not in (1, 3) or are_pages or len(band_counts) > 1:
        band_numbers = list(range(1, min(n_bands, _MAX_BANDS) + 1))
        backbone = (
            f"    bands: {band_numbers}      # of the files, counted from 1; red, green and blue "
            "first, where there are\n"
        )
        notes.append(
            f"the images have {count_text(n_bands, 'band')}; bands: {band_numbers} reads "
            f"{'all' if n_bands <= _MAX_BANDS else 'the first'} of them. Put red, green and blue "
            "first, where there are"
        )
    else:
        notes += _notes_on_pages(paths)
    # Of 8-bit grey and colours, no value is without a meaning.
    if n_with_gaps and (images or backbone):
        images += "  nodata: mean      # pixels without a value get the mean of their band\n"
        notes.append(
            f"{n_with_gaps} of {images_text} that were looked at have pixels without a value, "
            "which get the mean of their band (images.nodata)"
        )
    return PixelSettings(images, backbone, tuple(notes))


def _extremes(values: np.ndarray[Any, Any]) -> dict[float, int]:
    """Return {value: how many pixels have it} of the two lowest and the two highest values."""
    extremes: dict[float, int] = {}
    for is_beyond, extreme in ((np.greater, np.min), (np.less, np.max)):
        rest = values
        for _ in range(2):
            if rest.size:
                value = extreme(rest)
                inner = rest[is_beyond(rest, value)]
                extremes[float(value)] = rest.size - inner.size
                rest = inner
    return extremes


def _far_value(n_pixels_of: Mapping[float, int]) -> float | None:
    """Return the lowest or highest value if several pixels have it and it is far from all others,
    as the numbers are that mark pixels without a value in files that do not declare them.
    """
    numbers = sorted(n_pixels_of)
    for marker, nearest, furthest in ((0, 1, -1), (-1, -2, 0)):
        if len(numbers) < 3 or n_pixels_of[numbers[marker]] < 2:
            continue
        spread = abs(numbers[furthest] - numbers[nearest])
        if abs(numbers[marker] - numbers[nearest]) > _FAR * spread > 0:
            return numbers[marker]
    return None


def _are_pages(path: str, n_bands: int) -> bool:
    """Return whether the bands of an image are pages of its file, of which Pillow reads the first
    alone (OME, ImageJ).
    """
    with contextlib.suppress(Exception):  # an array, which has no pages
        image = open_image(read_bytes(path))
        return image.mode != "P" and len(image.getbands()) < n_bands
    return False


def _notes_on_pages(paths: Sequence[str]) -> tuple[str, ...]:
    """Return a note if some images are stacks or animations; () if none is."""
    stacks = [path for path in paths if _has_pages(path)]
    if not stacks:
        return ()
    return (
        f"{len(stacks)} of {count_text(len(paths), 'image')} that were looked at have several "
        f"pages, of which the first alone is read, such as {Path(locator_file(stacks[0])).name}. "
        "Where the others matter, write each as an image of its own, with the file's name in a "
        "column: task.unit scores the file by all of them",
    )


def _has_pages(path: str) -> bool:
    with contextlib.suppress(Exception):  # the run reports an image that cannot be opened, and why
        return bool(getattr(open_image(read_bytes(path)), "is_animated", False))
    return False


def _deep_bands(path: str) -> Bands | None:
    """Return all bands of an image; None for an 8-bit grey or colour image, and for one that cannot
    be read: the run reports it.
    """
    try:
        data = read_bytes(path)
        if not (data.startswith(_PROPOSED_FOR) or has_deep_pixels(data)):
            return None
        try:
            image = decode_deep(data, (1,))
        except ImageError as error:
            if "pixel_range" not in str(error):
                return None
            # The file does not say its range. Any will do: only the unscaled values are read here.
            image = decode_deep(data, (1,), (0.0, 1.0))
        return image if isinstance(image, Bands) else None
    except (ImageError, OSError, MemoryError):
        return None


def _black_and_white(
    dtype: np.dtype[np.generic], lowest: float, highest: float
) -> tuple[float, float]:
    """Return the values of black and white.

    For unsigned pixels these are 0 and the largest number with as many bits as the brightest pixel
    has, which is 4095 for a 12-bit sensor whose images never get quite white.
    """
    if dtype.kind == "u":
        return 0.0, float(2 ** max(int(highest).bit_length(), 8) - 1)
    if lowest >= 0 and highest <= 1:
        return 0.0, 1.0
    # A range of length 0 would divide by zero.
    return lowest, highest if highest > lowest else lowest + 1
