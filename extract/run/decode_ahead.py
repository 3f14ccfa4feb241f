"""Decoding ahead: batches of pixels, made by threads while the network is busy, in the order of the
samples.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from headrace.extract.errors import ImageError
from headrace.extract.images.byte_ranges import read_bytes
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.decoding import PixelRange, decode_image
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import ViewMethod, render_view
from headrace.extract.spec import Sample

# batches decoded or being decoded beyond the one in use: bounds the memory, however many images
# there are
BATCHES_AHEAD = 2


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
    pixels: list[Tensor]  # per rendering: uint8, shape (len(rows), H, W, 3)
    # (position, reason): the content is no image
    undecodable: list[tuple[int, str]] = field(default_factory=list)
    # (position, reason): not what was hashed, or not there
    unread: list[tuple[int, str]] = field(default_factory=list)


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

    def submit() -> None:
        while batch_starts and len(pending_batches) < BATCHES_AHEAD:
            batch_start = batch_starts.popleft()
            pending_batches.append(
                _submit(
                    pool,
                    samples,
                    batch_start,
                    min(batch_start + batch_size, len(samples)),
                    renderings,
                    pin_memory,
                )
            )

    def batches() -> Iterator[PixelBatch]:
        while pending_batches:
            batch = _finish(pending_batches.popleft())
            submit()
            yield batch

    submit()
    return batches()


@dataclass(frozen=True)
class _Pending:
    start: int
    pixels: list[Tensor]
    outcomes: list[Future[tuple[bool, str] | None]]


def _submit(
    pool: ThreadPoolExecutor,
    samples: Sequence[Sample],
    first_row: int,
    end_row: int,
    renderings: Sequence[Rendering],
    pin_memory: bool,
) -> _Pending:
    pixel_buffers = [
        torch.empty(
            (end_row - first_row, *rendering.preprocessing.crop, 3),
            dtype=torch.uint8,
            pin_memory=pin_memory,
        )
        for rendering in renderings
    ]
    outcomes = [
        pool.submit(_decode_into, samples[first_row + slot], renderings, pixel_buffers, slot)
        for slot in range(end_row - first_row)
    ]
    return _Pending(first_row, pixel_buffers, outcomes)


def _decode_into(
    sample: Sample, renderings: Sequence[Rendering], pixel_buffers: Sequence[Tensor], slot: int
) -> tuple[bool, str] | None:
    """Fill the sample's slot of every buffer; or return (whether it is the content's fault,
    reason).
    """
    try:
        image_bytes = read_bytes(sample.path)
    except OSError as error:
        return False, error.strerror or str(error)
    content_hash = hash_bytes(image_bytes)
    if sample.content and content_hash != sample.content:
        # Features stored under this hash would be another image's.
        return False, "the file has changed since it was hashed"
    try:
        render_into_buffers(
            lambda pixel_range: decode_image(image_bytes, pixel_range),
            content_hash,
            renderings,
            pixel_buffers,
            slot,
        )
    except ImageError as error:
        return True, str(error)
    return None


def render_into_buffers(
    decode: Callable[[PixelRange | None], Image.Image],
    content_hash: str,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[Tensor],
    slot: int,
) -> None:
    """Fill a slot of every buffer with its rendering of one image, decoded once for each
    pixel_range. Raises ImageError.
    """
    image_by_range: dict[PixelRange | None, Image.Image] = {}
    for rendering, buffer in zip(renderings, pixel_buffers, strict=True):
        preprocessing = rendering.preprocessing
        if preprocessing.pixel_range not in image_by_range:
            image_by_range[preprocessing.pixel_range] = decode(preprocessing.pixel_range)
        rendered_pixels = render_view(
            image_by_range[preprocessing.pixel_range],
            content_hash,
            rendering.index,
            rendering.augmentation,
            preprocessing,
        )
        buffer.numpy()[slot] = rendered_pixels


def _finish(pending_batch: _Pending) -> PixelBatch:
    outcomes = [future.result() for future in pending_batch.outcomes]
    decoded_slots = [slot for slot, outcome in enumerate(outcomes) if outcome is None]
    pixels = (
        pending_batch.pixels
        if len(decoded_slots) == len(outcomes)
        else [buffer[decoded_slots] for buffer in pending_batch.pixels]
    )
    failed_rows = [
        (pending_batch.start + slot, *outcome)
        for slot, outcome in enumerate(outcomes)
        if outcome is not None
    ]
    return PixelBatch(
        rows=[pending_batch.start + slot for slot in decoded_slots],
        pixels=pixels,
        undecodable=[
            (row, reason) for row, is_content_fault, reason in failed_rows if is_content_fault
        ],
        unread=[
            (row, reason) for row, is_content_fault, reason in failed_rows if not is_content_fault
        ],
    )
