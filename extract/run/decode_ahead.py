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
from headrace.extract.images.views import Drawing, render_view
from headrace.extract.spec import Sample

# batches decoded or being decoded beyond the one in use: bounds the memory, however many images
# there are
AHEAD = 2


@dataclass(frozen=True)
class Rendering:
    """One way to make pixels of an image: a network's preprocessing and a view."""

    preprocessing: Preprocessing
    index: int
    augmentation: Drawing


@dataclass(frozen=True)
class Batch:
    """Some consecutive samples, decoded once and rendered in every way asked for."""

    rows: list[int]  # positions of the decoded samples, increasing
    pixels: list[Tensor]  # per rendering: uint8, shape (len(rows), H, W, 3)
    undecodable: list[tuple[int, str]] = field(
        default_factory=list
    )  # (position, reason): the content is no image
    unread: list[tuple[int, str]] = field(
        default_factory=list
    )  # (position, reason): not what was hashed, or not there


def decoded_batches(
    pool: ThreadPoolExecutor,
    samples: Sequence[Sample],
    renderings: Sequence[Rendering],
    *,
    batch_size: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches of at most `batch_size` samples, in order, decoded by the pool at most AHEAD batches
    ahead.

    The first ones are under way when this returns, before anything is asked for.
    """
    waiting = deque(range(0, len(samples), batch_size))
    pending: deque[_Pending] = deque()

    def submit() -> None:
        while waiting and len(pending) < AHEAD:
            start = waiting.popleft()
            pending.append(
                _submit(
                    pool, samples, start, min(start + batch_size, len(samples)), renderings, pin
                )
            )

    def batches() -> Iterator[Batch]:
        while pending:
            batch = _finish(pending.popleft())
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
    start: int,
    stop: int,
    renderings: Sequence[Rendering],
    pin: bool,
) -> _Pending:
    buffers = [
        torch.empty(
            (stop - start, *rendering.preprocessing.crop, 3), dtype=torch.uint8, pin_memory=pin
        )
        for rendering in renderings
    ]
    outcomes = [
        pool.submit(_decode_into, samples[start + slot], renderings, buffers, slot)
        for slot in range(stop - start)
    ]
    return _Pending(start, buffers, outcomes)


def _decode_into(
    sample: Sample, renderings: Sequence[Rendering], buffers: Sequence[Tensor], slot: int
) -> tuple[bool, str] | None:
    """Fill the sample's slot of every buffer; or return (whether it is the content's fault,
    reason).
    """
    try:
        data = read_bytes(sample.path)
    except OSError as error:
        return False, error.strerror or str(error)
    content = hash_bytes(data)
    if sample.content and content != sample.content:
        # Features stored under this hash would be another image's.
        return False, "the file has changed since it was hashed"
    try:
        render_into(
            lambda pixel_range: decode_image(data, pixel_range), content, renderings, buffers, slot
        )
    except ImageError as error:
        return True, str(error)
    return None


def render_into(
    decode: Callable[[PixelRange | None], Image.Image],
    content: str,
    renderings: Sequence[Rendering],
    buffers: Sequence[Tensor],
    slot: int,
) -> None:
    """Fill a slot of every buffer with its rendering of one image, decoded once for each
    pixel_range. Raises ImageError.
    """
    images: dict[PixelRange | None, Image.Image] = {}
    for rendering, buffer in zip(renderings, buffers, strict=True):
        how = rendering.preprocessing
        if how.pixel_range not in images:
            images[how.pixel_range] = decode(how.pixel_range)
        view = render_view(
            images[how.pixel_range], content, rendering.index, rendering.augmentation, how
        )
        buffer.numpy()[slot] = view


def _finish(pending: _Pending) -> Batch:
    outcomes = [future.result() for future in pending.outcomes]
    good = [slot for slot, outcome in enumerate(outcomes) if outcome is None]
    pixels = (
        pending.pixels
        if len(good) == len(outcomes)
        else [buffer[good] for buffer in pending.pixels]
    )
    bad = [
        (pending.start + slot, *outcome)
        for slot, outcome in enumerate(outcomes)
        if outcome is not None
    ]
    return Batch(
        rows=[pending.start + slot for slot in good],
        pixels=pixels,
        undecodable=[(row, reason) for row, of_content, reason in bad if of_content],
        unread=[(row, reason) for row, of_content, reason in bad if not of_content],
    )
