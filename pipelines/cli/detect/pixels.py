"""Settings that images of many bands or more than 8 bits need in a recipe."""

import contextlib
from collections.abc import Sequence
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
    lows: list[float] = []
    highs: list[float] = []
    dtypes: set[np.dtype[np.generic]] = set()
    for path in paths:
        values = _deep_values(path)
        if values is None:
            return PixelSettings(notes=_notes_on_pages(paths))
        # nan is how many sensors mark a pixel without a value.
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
        band_counts.add(values.shape[2])
        dtypes.add(values.dtype)
    # No one setting fits images of several kinds.
    if len(band_counts) != 1 or len(dtypes) != 1 or not lows:
        return PixelSettings(notes=_notes_on_pages(paths))
    (n_bands,), (dtype,) = band_counts, dtypes
    images, notes = "", []
    if dtype != np.uint8:
        black, white = _black_and_white(dtype, min(lows), max(highs))
        images = (
            f"  pixel_range: [{black:.6g}, {white:.6g}]      # black and white, by "
            f"{count_text(len(paths), 'image')}: set what the sensor has\n"
            "  pixel_dtype: float32      # pixels keep their depth until they are normalized\n"
        )
        notes.append(
            f"the pixels are {dtype}, {min(lows):g} to {max(highs):g} in "
            f"{count_text(len(paths), 'image')}; {black:.6g} and {white:.6g} are taken for black "
            "and white (images.pixel_range)"
        )
    backbone = ""
    if n_bands not in (1, 3):
        bands = list(range(1, min(n_bands, _MAX_BANDS) + 1))
        backbone = (
            f"    bands: {bands}      # of the files, counted from 1; red, green and blue first, "
            "where there are\n"
        )
        notes.append(
            f"the images have {count_text(n_bands, 'band')}; bands: {bands} reads "
            f"{'all' if n_bands <= _MAX_BANDS else 'the first'} of them. Put red, green and blue "
            "first, where there are"
        )
    else:
        notes += _notes_on_pages(paths)
    return PixelSettings(images, backbone, tuple(notes))


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


def _deep_values(path: str) -> np.ndarray[Any, Any] | None:
    """Return an image's values as (H, W, bands); None for an 8-bit grey or colour image, and for
    one that cannot be read: the run reports it.
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
        return np.asarray(image.values[:, :, :]) if isinstance(image, Bands) else None
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
