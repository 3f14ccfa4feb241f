"""Decoding ahead: batches of pixels, made by threads while the network is busy, in the order of the
samples.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from headrace.extract.errors import ImageError
from headrace.extract.images.byte_ranges import read_bytes
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.crops import (
    Crop,
    crop_content,
    cut_crop,
    image_size,
    reaches_outside,
    split_crop,
)
from headrace.extract.images.preprocessing import DecodedImage, Preprocessing, decode_pixels
from headrace.extract.images.views import ViewMethod, render_view
from headrace.extract.spec import Sample

# batches decoded or being decoded beyond the one in use: bounds the memory, however many images
# there are
BATCHES_AHEAD = 2
# Crops of one image that one task renders; other threads share the decoded image.
_CROPS_PER_TASK = 8


@dataclass(frozen=True)
class Rendering:
    """One way to make pixels of an image: a network's preprocessing and a view."""

    preprocessing: Preprocessing
    index: int
    augmentation: ViewMethod


@dataclass(frozen=True)
class PixelBatch:
    """Some consecutive samples, decoded once and rendered in every way asked for."""

    rows: list[int]  # positions of the decoded samples, increasing
    # per rendering: its pixel_dtype, shape (len(rows), H, W, C)
    pixels: list[Tensor]
    # (position, reason): the content is no image
    undecodable: list[tuple[int, str]] = field(default_factory=list)
    # (position, reason): not what was hashed, or not there
    unread: list[tuple[int, str]] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)  # positions of crops that reach outside


def decoded_batches(
    pool: ThreadPoolExecutor,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    *,
    batch_size: int,
    pin_memory: bool = False,
) -> Iterator[PixelBatch]:
    """Batches of at most `batch_size` samples, in order, decoded by the pool at most AHEAD batches
    ahead.

    The first ones are under way when this returns, before anything is asked for.
    """
    batch_starts = deque(range(0, len(samples), batch_size))
    pending_batches: deque[_Pending] = deque()
    last_image: list[_Image] = []

    def submit() -> None:
        while batch_starts and len(pending_batches) < BATCHES_AHEAD:
            batch_start = batch_starts.popleft()
            batch_samples = samples[batch_start : batch_start + batch_size]
            pixel_buffers = [
                empty_pixels(len(batch_samples), rendering.preprocessing, pin_memory=pin_memory)
                for rendering in renderings
            ]
            outcomes: list[Future[list[_Outcome]]] = []
            for start, end, image in _runs_of_one_image(batch_samples, last_image):
                outcomes.append(
                    pool.submit(
                        _decode_into,
                        image,
                        batch_samples[start:end],
                        renderings,
                        pixel_buffers,
                        start,
                    )
                )
            pending_batches.append(_Pending(batch_start, pixel_buffers, outcomes))

    def batches() -> Iterator[PixelBatch]:
        while pending_batches:
            batch = _finish(pending_batches.popleft())
            submit()
            yield batch

    submit()
    return batches()


def empty_pixels(count: int, how: Preprocessing, *, pin_memory: bool = False) -> Tensor:
    """A buffer for renderings of `count` images: uint8 or float32, (count, H, W, C)."""
    return torch.empty(
        (count, *how.pixel_shape), dtype=getattr(torch, how.pixel_dtype), pin_memory=pin_memory
    )


@dataclass(frozen=True)
class _Outcome:
    """What became of one sample: a reason where it has no pixels."""

    reason: str | None = None
    is_content_fault: bool = False
    is_clipped: bool = False


@dataclass(frozen=True)
class _Pending:
    start: int
    pixels: list[Tensor]
    outcomes: list[Future[list[_Outcome]]]


class _Image:
    """One image that several tasks cut crops from: read and decoded by the first that asks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = Lock()
        self._data: bytes | OSError | None = None
        self._content = ""
        self._decoded: dict[Hashable, DecodedImage | ImageError] = {}

    def content(self) -> str:
        """The hash of its bytes. Raises OSError where they cannot be read."""
        with self._lock:
            if self._data is None:
                try:
                    self._data = read_bytes(self.path)
                    self._content = hash_bytes(self._data)
                except OSError as error:
                    self._data = error
            if isinstance(self._data, OSError):
                raise self._data
            return self._content

    def decode(self, how: Preprocessing) -> DecodedImage:
        """The whole image, after `content` was asked for. Raises ImageError."""
        assert isinstance(self._data, bytes)
        with self._lock:
            key = decoding_key(how)
            if key not in self._decoded:
                try:
                    self._decoded[key] = decode_pixels(self._data, how)
                except ImageError as error:
                    self._decoded[key] = error
        decoded = self._decoded[key]
        if isinstance(decoded, ImageError):
            raise decoded
        return decoded


def _runs_of_one_image(
    samples: Sequence[Sample], last_image: list[_Image]
) -> Iterator[tuple[int, int, _Image]]:
    """(start, end, image): neighbouring crops of one image, at most _CROPS_PER_TASK at a time.

    last_image: of the batch before, which the first crops may be of; it is replaced.
    """
    start = 0
    while start < len(samples):
        path, crop = split_crop(samples[start].path)
        end = start + 1
        while (
            crop is not None
            and end < len(samples)
            and end - start < _CROPS_PER_TASK
            and split_crop(samples[end].path)[0] == path
        ):
            end += 1
        if crop is None or not last_image or last_image[0].path != path:
            last_image[:] = [_Image(path)]
        yield start, end, last_image[0]
        start = end
    if crop is None:
        last_image.clear()


def _decode_into(
    image: _Image,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[Tensor],
    first_slot: int,
) -> list[_Outcome]:
    """Fill the slots of every buffer with samples of one image."""
    return [
        _decode_one(image, sample, renderings, pixel_buffers, first_slot + offset)
        for offset, sample in enumerate(samples)
    ]


def _decode_one(
    image: _Image,
    sample: Sample,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[Tensor],
    slot: int,
) -> _Outcome:
    _, crop = split_crop(sample.path)
    try:
        content_hash = crop_content(image.content(), crop)
    except OSError as error:
        return _Outcome(error.strerror or str(error))
    if sample.content and content_hash != sample.content:
        # Features stored under this hash would be another image's.
        return _Outcome("the file has changed since it was hashed")
    try:
        is_clipped = render_into_buffers(
            image.decode, content_hash, renderings, pixel_buffers, slot, crop
        )
    except ImageError as error:
        return _Outcome(str(error), is_content_fault=True)
    return _Outcome(is_clipped=is_clipped)


def decoding_key(how: Preprocessing) -> Hashable:
    """The fields of a preprocessing that its decoded images depend on."""
    return how.pixel_range, how.bands, how.pixel_dtype


def render_into_buffers(
    decode: Callable[[Preprocessing], DecodedImage],
    content_hash: str,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[Tensor],
    slot: int,
    crop: Crop | None = None,
) -> bool:
    """Fill a slot of every buffer with its rendering of one image, or of a crop of it, decoded once
    for each way of decoding. Return whether the crop reaches outside, and was clipped.

    Raises ImageError.
    """
    decoded: dict[Hashable, DecodedImage] = {}
    is_clipped = False
    for rendering, buffer in zip(renderings, pixel_buffers, strict=True):
        key = decoding_key(rendering.preprocessing)
        if key not in decoded:
            image = decode(rendering.preprocessing)
            if crop is not None:
                is_clipped = reaches_outside(crop, *image_size(image))
                image = cut_crop(image, crop)
            decoded[key] = image
        buffer.numpy()[slot] = render_view(
            decoded[key],
            content_hash,
            rendering.index,
            rendering.augmentation,
            rendering.preprocessing,
        )
    return is_clipped


def _finish(pending_batch: _Pending) -> PixelBatch:
    outcomes = [outcome for future in pending_batch.outcomes for outcome in future.result()]
    decoded_slots = [slot for slot, outcome in enumerate(outcomes) if outcome.reason is None]
    pixels = (
        pending_batch.pixels
        if len(decoded_slots) == len(outcomes)
        else [buffer[decoded_slots] for buffer in pending_batch.pixels]
    )
    rows = range(pending_batch.start, pending_batch.start + len(outcomes))
    failed = [
        (row, outcome.reason, outcome.is_content_fault)
        for row, outcome in zip(rows, outcomes, strict=True)
        if outcome.reason is not None
    ]
    return PixelBatch(
        rows=[rows[slot] for slot in decoded_slots],
        pixels=pixels,
        undecodable=[(row, reason) for row, reason, is_content in failed if is_content],
        unread=[(row, reason) for row, reason, is_content in failed if not is_content],
        clipped=[row for row, outcome in zip(rows, outcomes, strict=True) if outcome.is_clipped],
    )
