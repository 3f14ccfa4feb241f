"""Signatures of images: grey copies of 16 x 16 pixels, which recognize re-encoded copies."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import read_sealed_arrays, sealed_arrays
from headrace.extract.errors import ImageError
from headrace.extract.images.content_hashes import read_unchanged
from headrace.extract.images.crops import decode_picture
from headrace.extract.images.raw_pixels import PixelRange
from headrace.heads.arrays import Doubles

SIGNATURE = 16  # side in pixels
_THREADS = 4  # decoders release the GIL


def signatures(
    image_paths: Mapping[str, str],
    content_hashes: Sequence[str],
    signatures_path: Path,
    pixel_range: PixelRange | None = None,
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Return grey copies (n, 256) of images, and their n positions in `content_hashes`; images that
    are gone or have changed have no copy.

    image_paths: by content hash. signatures_path: a file that keeps the signatures of one
    pixel_range by content hash; new ones are added to it.
    """
    pixel_ends = np.array(pixel_range or (np.nan, np.nan))
    known = _load(signatures_path, pixel_ends)
    missing = [content_hash for content_hash in content_hashes if content_hash not in known]
    paths = [image_paths.get(content_hash, "") for content_hash in missing]
    with ThreadPoolExecutor(_THREADS) as pool:
        new_signatures = pool.map(grey_of_file, paths, missing, itertools.repeat(pixel_range))
        for content_hash, grey in zip(missing, new_signatures, strict=True):
            if grey is not None:
                known[content_hash] = grey
    if missing and known:
        contents = sorted(known)
        sealed = sealed_arrays(
            {
                "content": np.array(contents, "S32"),
                "grey": np.stack([known[content_hash] for content_hash in contents]),
                "pixel_range": pixel_ends,
            }
        )
        # The file only saves time, and a run in a read-only directory can be reported on too.
        with contextlib.suppress(OSError):
            publish_replace(signatures_path, sealed)
    positions = [index for index, content in enumerate(content_hashes) if content in known]
    grey_copies = [known[content_hashes[index]] for index in positions]
    return np.array(grey_copies, np.uint8).reshape(len(positions), SIGNATURE**2), positions


def grey_of_file(
    image_path: str, content_hash: str, pixel_range: PixelRange | None
) -> npt.NDArray[np.uint8] | None:
    """Return `grey_signature` of a file; None if it is gone, has another content hash, or is no
    image.
    """
    try:
        return grey_signature(image_path, read_unchanged(image_path, content_hash), pixel_range)
    # Without it, the image is compared with no other; that it cannot be read is told elsewhere.
    except (OSError, ImageError):
        return None


def grey_signature(
    image_path: str, data: bytes, pixel_range: PixelRange | None = None
) -> npt.NDArray[np.uint8]:
    """Return a grey copy (256,) of 16 x 16 pixels of an image. data: the bytes of its file.

    Raises ImageError if it cannot be decoded.
    """
    picture = decode_picture(image_path, data, pixel_range, 8 * SIGNATURE)
    small = picture.convert("L").resize((SIGNATURE, SIGNATURE), Image.Resampling.BOX)
    return np.asarray(small, np.uint8).ravel()


def _load(signatures_path: Path, pixel_ends: Doubles) -> dict[str, npt.NDArray[np.uint8]]:
    try:
        arrays = read_sealed_arrays(signatures_path.read_bytes())
        content_hashes, grey = arrays["content"].astype("U32").tolist(), arrays["grey"]
        same_range = np.array_equal(arrays["pixel_range"], pixel_ends, equal_nan=True)
        if not same_range or grey.shape != (len(content_hashes), SIGNATURE**2):
            return {}
        return dict(zip(content_hashes, grey, strict=True))
    except (OSError, ValueError, KeyError):
        return {}  # absent or damaged: the copies are made again
