"""Grey copies of images, 16 x 16 pixels, by which copies of one image are found whatever was done
to its file.
"""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays
from headrace.extract.errors import ImageError
from headrace.extract.images.byte_ranges import read_bytes
from headrace.extract.images.decoding import PixelRange, decode_image, open_image

SIGNATURE = 16  # pixels
_THREADS = 4


def signatures(
    paths: Mapping[str, str],
    contents: Sequence[str],
    stored: Path,
    pixel_range: PixelRange | None = None,
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """(n, 256) grey copies of 16 x 16 pixels, and which positions of `contents` they are of: images
    that are gone have none.

    stored: the signatures of an earlier call with this pixel_range, by content hash; those that are
    new are added.
    """
    ends = np.array(pixel_range or (np.nan, np.nan))
    known = _load(stored, ends)
    missing = [content for content in contents if content not in known]
    with ThreadPoolExecutor(_THREADS) as pool:  # decoders release the GIL
        made = pool.map(lambda name: _signature(paths.get(name, ""), pixel_range), missing)
        for content, grey in zip(missing, made, strict=True):
            if grey is not None:
                known[content] = grey
    if missing and known:
        names = sorted(known)
        grey = np.stack([known[name] for name in names])
        data = sealed_arrays({"content": np.array(names, "S32"), "grey": grey, "pixel_range": ends})
        with contextlib.suppress(
            OSError
        ):  # they only save time; somebody else's run can be reported on too
            publish_replace(stored, data)
    there = [number for number, content in enumerate(contents) if content in known]
    empty = np.empty((0, SIGNATURE**2), np.uint8)
    return np.stack([known[contents[number]] for number in there]) if there else empty, there


def _signature(path: str, pixel_range: PixelRange | None) -> npt.NDArray[np.uint8] | None:
    try:
        return grey_signature(read_bytes(path), pixel_range)
    except (OSError, ImageError):
        return None


def grey_signature(data: bytes, pixel_range: PixelRange | None = None) -> npt.NDArray[np.uint8]:
    """(256,) a grey copy of 16 x 16 pixels of an image file. Raises ImageError."""
    return np.asarray(_small_grey(data, pixel_range), np.uint8).ravel()


def _small_grey(data: bytes, pixel_range: PixelRange | None) -> Image.Image:
    size = (SIGNATURE, SIGNATURE)
    if data.startswith(
        b"\xff\xd8"
    ):  # a JPEG decodes at an eighth of its size in a fraction of the time
        try:
            with open_image(data) as image:
                image.draft("L", (8 * SIGNATURE, 8 * SIGNATURE))
                return (
                    ImageOps.exif_transpose(image).convert("L").resize(size, Image.Resampling.BOX)
                )
        except Exception:  # noqa: BLE001 - decoders raise anything; the careful decoder has the last word
            pass
    return decode_image(data, pixel_range).convert("L").resize(size, Image.Resampling.BOX)


def _load(stored: Path, ends: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.uint8]]:
    try:
        found = read_sealed_arrays(stored.read_bytes())
        names, grey = found["content"].astype("U32").tolist(), found["grey"]
        same = np.array_equal(found["pixel_range"], ends, equal_nan=True)
        if not same or grey.shape != (len(names), SIGNATURE**2):
            return {}
        return dict(zip(names, grey, strict=True))
    except (OSError, ValueError, KeyError):
        return {}  # absent or damaged: it only saves time
