"""Small copies of images for the map, and their size, light, contrast, sharpness.

Each image is read once, at a small size where its format allows that.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat

import numpy as np

from headrace.extract.errors import ImageError
from headrace.extract.images.content_hashes import read_unchanged
from headrace.extract.images.crops import decode_picture, split_crop
from headrace.extract.images.decoding import jpeg_size
from headrace.extract.images.raw_pixels import PixelRange

SIDE = 72  # longest side of a small copy, in pixels
MEASURED_SIDE = 128  # longest side where it is measured: one for all, as sharpness depends on it
_MAX_BYTES = 2_000_000_000  # of files that are read
_THREADS = 4
_CHUNK = 64  # images between two looks at the bytes read


@dataclass(frozen=True)
class SmallCopy:
    """One image: a small WebP file of it, and what it measures."""

    webp: bytes
    width: int
    height: int
    brightness: float  # mean of grey, 0 to 1
    contrast: float  # standard deviation of grey, 0 to 0.5
    sharpness: float  # standard deviation of the Laplacian of grey; small where it is blurred


@dataclass(frozen=True)
class SmallCopies:
    """Copies by content hash, and how many images have none."""

    by_content: Mapping[str, SmallCopy]
    unreadable: int  # gone, changed, or not decodable
    not_read: int  # because 2 GB of files had been read before them


def make_small_copies(
    image_paths: Mapping[str, str],
    content_hashes: Sequence[str],
    pixel_range: PixelRange | None = None,
) -> SmallCopies:
    """Return copies of these images, in their order until 2 GB of files have been read."""
    copies: dict[str, SmallCopy] = {}
    n_bytes = unreadable = n_read = 0
    with ThreadPoolExecutor(_THREADS) as pool:  # decoders release the GIL
        for start in range(0, len(content_hashes), _CHUNK):
            # Large images on a slow disk would take longer than all the rest of the page.
            if n_bytes > _MAX_BYTES:
                break
            chunk = content_hashes[start : start + _CHUNK]
            n_read += len(chunk)
            chunk_paths = [image_paths.get(content, "") for content in chunk]
            read = pool.map(_read_copy, chunk_paths, chunk, repeat(pixel_range))
            for content, (n_file_bytes, copy) in zip(chunk, read, strict=True):
                n_bytes += n_file_bytes
                unreadable += copy is None
                if copy is not None:
                    copies[content] = copy
    return SmallCopies(copies, unreadable, len(content_hashes) - n_read)


def _read_copy(
    path: str, content: str, pixel_range: PixelRange | None
) -> tuple[int, SmallCopy | None]:
    """Return the size of the file in bytes, and the copy; None if the image cannot be decoded or is
    no longer the one with this content hash.
    """
    try:
        data = read_unchanged(path, content)
        return len(data), measure_image(path, data, pixel_range)
    except (OSError, ImageError):
        return 0, None


def measure_image(path: str, data: bytes, pixel_range: PixelRange | None = None) -> SmallCopy:
    """Return the small copy of an image. data: the bytes of its file. Raises ImageError."""
    image = decode_picture(path, data, pixel_range, 2 * MEASURED_SIDE)
    whole_size = jpeg_size(data) if split_crop(path)[1] is None else None
    height, width = whole_size or (image.height, image.width)
    # Measured before it is made smaller still: at 72 pixels blur can hardly be seen.
    image.thumbnail((MEASURED_SIDE, MEASURED_SIDE))
    grey = np.asarray(image.convert("L"), np.float32) / 255
    padded = np.pad(grey, 1, mode="edge")
    laplacian = (
        padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * grey
    )
    image.thumbnail((SIDE, SIDE))
    webp_file = BytesIO()
    image.save(webp_file, "WEBP", quality=55, method=4)
    return SmallCopy(
        webp_file.getvalue(),
        width,
        height,
        float(grey.mean()),
        float(grey.std()),
        float(laplacian.std()),
    )
