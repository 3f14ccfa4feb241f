"""From a sample to pixels: read, compare the content hash, decode once, render each view.

It does not import torch, which processes that only decode do not need.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy.typing as npt

from headrace.extract.errors import ImageError
from headrace.extract.images.bands import Bands
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.crops import (
    Crop,
    crop_content,
    cut_crop,
    image_size,
    reaches_outside,
    split_crop,
)
from headrace.extract.images.locators import read_bytes
from headrace.extract.images.preprocessing import DecodedImage, Preprocessing, decode_pixels
from headrace.extract.images.views import ViewMethod, render_view
from headrace.extract.spec import Sample

PixelBuffer = npt.NDArray[Any]  # (slots, H, W, C) of one rendering, in its pixel_dtype


@dataclass(frozen=True)
class Rendering:
    """One way to make pixels of an image: a network's preprocessing and a view."""

    preprocessing: Preprocessing
    view_index: int
    view_method: ViewMethod


@dataclass(frozen=True)
class Outcome:
    """Outcome of rendering one sample."""

    reason: str | None = None  # why it has no pixels; None if it has
    is_content_fault: bool = False  # its bytes are no image; otherwise they could not be read
    is_clipped: bool = False  # a crop that reached beyond the image


class SharedImage:
    """One image for several tasks that cut crops from it: the first reads and decodes it."""

    def __init__(self, path: str, *, in_parts: bool) -> None:
        self.path, self._in_parts = path, in_parts
        self._lock = Lock()
        self._data: bytes | OSError | None = None
        self._content = ""
        self._decoded: dict[Hashable, DecodedImage | ImageError] = {}

    def content(self) -> str:
        """Return the hash of its bytes. Raises OSError if they cannot be read."""
        with self._lock:
            if self._data is None:
                try:
                    self._data = read_bytes(self.path)
                    self._content = hash_bytes(self._data)
                except OSError as error:
                    # Kept like bytes: other renderings of the file must not try to read it again.
                    self._data = error
            if isinstance(self._data, OSError):
                raise self._data
            return self._content

    def decode(self, preprocessing: Preprocessing) -> DecodedImage:
        """Return the whole image; `content` must have been called before. Raises ImageError."""
        assert isinstance(self._data, bytes)
        with self._lock:
            key = decoding_key(preprocessing)
            if key not in self._decoded:
                try:
                    self._decoded[key] = decode_pixels(
                        self._data, preprocessing, in_parts=self._in_parts
                    )
                except ImageError as error:
                    self._decoded[key] = error
        decoded = self._decoded[key]
        if isinstance(decoded, ImageError):
            raise decoded
        return decoded


def runs_of_one_image(
    samples: Sequence[Sample], last_image: list[SharedImage], max_crops: int
) -> Iterator[tuple[int, int, SharedImage]]:
    """Yield (start, end, image) for samples start to end, neighbouring crops of one image.

    At most `max_crops` at a time; a whole image is alone.

    last_image: list of at most one image, that of the last crops, to which the first samples may
    belong too; it is replaced.
    """
    start = 0
    while start < len(samples):
        path, crop = split_crop(samples[start].path)
        end = start + 1
        while (
            crop is not None
            and end < len(samples)
            and end - start < max_crops
            and split_crop(samples[end].path)[0] == path
        ):
            end += 1
        if crop is None or not last_image or last_image[0].path != path:
            last_image[:] = [SharedImage(path, in_parts=crop is not None)]
        yield start, end, last_image[0]
        start = end
    if crop is None:
        last_image.clear()


def render_samples(
    image: SharedImage,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[PixelBuffer],
    first_slot: int,
) -> list[Outcome]:
    """Render samples of one image into the slots from `first_slot` on of every buffer."""
    return [
        _render_one(image, sample, renderings, pixel_buffers, first_slot + offset)
        for offset, sample in enumerate(samples)
    ]


def _render_one(
    image: SharedImage,
    sample: Sample,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[PixelBuffer],
    slot: int,
) -> Outcome:
    _, crop = split_crop(sample.path)
    try:
        content_hash = crop_content(image.content(), crop)
    except OSError as error:
        return Outcome(error.strerror or str(error))
    if sample.content and content_hash != sample.content:
        # Features stored under this hash would be another image's.
        return Outcome("the file has changed since it was hashed")
    try:
        is_clipped = render_into_buffers(
            image.decode, content_hash, renderings, pixel_buffers, slot, crop
        )
    except ImageError as error:
        return Outcome(str(error), is_content_fault=True)
    return Outcome(is_clipped=is_clipped)


def decoding_key(preprocessing: Preprocessing) -> Hashable:
    """Return the fields of a preprocessing on which the decoded image depends."""
    is_exact = preprocessing.decode == "exact"
    scaled_for = None if is_exact else (preprocessing.resize, preprocessing.mode)
    return preprocessing.pixel_range, preprocessing.bands, preprocessing.pixel_dtype, scaled_for


def render_into_buffers(
    decode: Callable[[Preprocessing], DecodedImage],
    content_hash: str,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[PixelBuffer],
    slot: int,
    crop: Crop | None,
) -> bool:
    """Render one image, or a crop of it, into a slot of every buffer; return whether the crop was
    clipped at the image's edge.

    decode: returns the whole image; called once for each `decoding_key`. Raises ImageError.
    """
    decoded: dict[Hashable, DecodedImage] = {}
    is_clipped = False
    for rendering, buffer in zip(renderings, pixel_buffers, strict=True):
        preprocessing = rendering.preprocessing
        if crop is not None:  # its numbers are pixels of the image in full size
            preprocessing = replace(preprocessing, decode="exact")
        key = decoding_key(preprocessing)
        if key not in decoded:
            image = decode(preprocessing)
            if crop is not None:
                is_clipped = reaches_outside(crop, *image_size(image))
                image = cut_crop(image, crop)
                if isinstance(image, Bands) and preprocessing.pixel_dtype == "uint8":
                    image = image.picture()  # of a TIFF too large to be decoded whole
            decoded[key] = image
        buffer[slot] = render_view(
            decoded[key],
            content_hash,
            rendering.view_index,
            rendering.view_method,
            rendering.preprocessing,
        )
    return is_clipped


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Suppress Pillow's warnings of large images and damaged metadata; failures are recorded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
