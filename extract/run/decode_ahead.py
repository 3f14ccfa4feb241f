"""Decoding ahead: threads or processes make the next batches of pixels while the network runs."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.run.decode_processes import DecodeProcesses
from headrace.extract.run.rendering import (
    Outcome,
    PixelBuffer,
    Rendering,
    SharedImage,
    render_samples,
    runs_of_one_image,
)
from headrace.extract.spec import Sample

# Batches decoded, or being decoded, besides the one in use: they bound the memory, however many
# images there are.
BATCHES_AHEAD = 2
_CROPS_PER_TASK = 8  # of one image; several threads then render from one decoded image


@dataclass(frozen=True)
class PixelBatch:
    """Consecutive samples, decoded once and rendered for each preprocessing and view."""

    rows: list[int]  # positions of the decoded samples, increasing
    pixels: list[Tensor]  # of each rendering, in its pixel_dtype: (len(rows), H, W, C)
    # (position, reason) of samples whose bytes are no image
    undecodable: list[tuple[int, str]] = field(default_factory=list)
    # (position, reason) of samples that cannot be read, or have changed since they were hashed
    unread: list[tuple[int, str]] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)  # positions of crops beyond the image's edge


def decoded_batches(
    pool: ThreadPoolExecutor | DecodeProcesses,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    *,
    batch_size: int,
    pin_memory: bool = False,
) -> Iterator[PixelBatch]:
    """Yield batches of at most `batch_size` samples, in order, decoded by the pool ahead of use.

    Decoding begins at the call, not at the first `next`.
    """
    batch_starts = deque(range(0, len(samples), batch_size))
    # of each: the position of its first sample, its pixels, and the outcomes to come
    pending_batches: deque[tuple[int, list[Tensor], list[Future[list[Outcome]]]]] = deque()
    # At most one, kept from batch to batch: crops of one image may continue in the next batch.
    last_image: list[SharedImage] = []

    def submit() -> None:
        while batch_starts and len(pending_batches) < BATCHES_AHEAD:
            batch_start = batch_starts.popleft()
            batch_samples = samples[batch_start : batch_start + batch_size]
            pixel_buffers = [
                empty_pixels(len(batch_samples), rendering.preprocessing, pin_memory=pin_memory)
                for rendering in renderings
            ]
            arrays = [buffer.numpy() for buffer in pixel_buffers]
            outcomes = (
                pool.submit(batch_samples, renderings, arrays)
                if isinstance(pool, DecodeProcesses)
                else _by_threads(pool, batch_samples, renderings, arrays, last_image)
            )
            pending_batches.append((batch_start, pixel_buffers, outcomes))

    def batches() -> Iterator[PixelBatch]:
        while pending_batches:
            batch = _finish(*pending_batches.popleft())
            submit()  # before the yield: the pool decodes while the caller works on this batch
            yield batch

    submit()
    return batches()


def _by_threads(
    pool: ThreadPoolExecutor,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[PixelBuffer],
    last_image: list[SharedImage],
) -> list[Future[list[Outcome]]]:
    return [
        pool.submit(render_samples, image, samples[start:end], renderings, pixel_buffers, start)
        for start, end, image in runs_of_one_image(samples, last_image, _CROPS_PER_TASK)
    ]


def empty_pixels(count: int, preprocessing: Preprocessing, *, pin_memory: bool = False) -> Tensor:
    """Return a buffer for the pixels of `count` images: uint8 or float32, (count, H, W, C)."""
    return torch.empty(
        (count, *preprocessing.pixel_shape),
        dtype=getattr(torch, preprocessing.pixel_dtype),
        pin_memory=pin_memory,
    )


def _finish(
    start: int, pixel_buffers: list[Tensor], futures: list[Future[list[Outcome]]]
) -> PixelBatch:
    outcomes = [outcome for future in futures for outcome in future.result()]
    decoded_slots = [slot for slot, outcome in enumerate(outcomes) if outcome.reason is None]
    for buffer in pixel_buffers:
        for target_slot, slot in enumerate(decoded_slots):
            # Moved within the buffer, because a new tensor would not be pinned.
            if target_slot < slot:
                buffer[target_slot] = buffer[slot]
    pixels = [buffer[: len(decoded_slots)] for buffer in pixel_buffers]
    rows = range(start, start + len(outcomes))
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
