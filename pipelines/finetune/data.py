"""What a network trains on: maps of a cut, or images, batch by batch, tied to rows by content hash.

N rows of a task, n of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.extract.errors import SourceError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Augmentation, Symmetries, mirror_pixels, parse_view
from headrace.extract.run.decode_ahead import Rendering, decoded_batches
from headrace.extract.spec import Sample

Rows = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """n rows: their positions in the task, inputs (n, …) on the host, features of taps below the
    cut (n, D) or None.
    """

    rows: Rows
    inputs: Tensor
    features_below: Tensor | None


class Source(Protocol):
    """Where batches come from."""

    def batches(
        self, order: Rows, size: int, *, view: int = 0, draw: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        """The rows in this order, at most `size` at a time, as they look in a view, or, with
        `draw`, in a random one.
        """


@dataclass(frozen=True)
class MapSource:
    """Cached maps of the cut, and cached features of the taps below it, view by view.

    Nothing below the cut runs.
    """

    content: npt.NDArray[np.bytes_]  # (N,)
    maps: Sequence[FeatureSet]  # one per view
    features_below: Sequence[Sequence[FeatureSet]]  # one list per view, in the head's order

    def batches(
        self, order: Rows, size: int, *, view: int = 0, draw: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            number = view if draw is None else int(draw.integers(len(self.maps)))
            content = self.content[rows]
            inputs = torch.from_numpy(self.maps[number].load(content, np.float32))
            held = [
                feature.load(content, np.float32).reshape(len(rows), -1)
                for feature in self.features_below[number]
            ]
            yield Batch(
                rows, inputs, torch.from_numpy(np.concatenate(held, axis=1)) if held else None
            )


@dataclass(frozen=True)
class ImageSource:
    """The images themselves, decoded ahead by threads; a random view is one that nobody
    has cached.
    """

    content: npt.NDArray[np.bytes_]  # (N,)
    paths: Sequence[str]  # (N,)
    preprocessing: Preprocessing
    views: Sequence[str] = field(default_factory=lambda: ('{"index":0}',))  # as FeatureSpec.view
    threads: int = 1

    def batches(
        self, order: Rows, size: int, *, view: int = 0, draw: np.random.Generator | None = None
    ) -> Iterator[Batch]:
        index, augmentation = parse_view(self.views[view])
        turns: npt.NDArray[np.int64] | None = None
        if draw is not None and any(
            isinstance(parse_view(each)[1], Symmetries) for each in self.views
        ):
            # A symmetry is the same for every image, and so each row draws its own.
            turns, index = draw.integers(len(self.views), size=len(order)), 0
        elif draw is not None:
            index, augmentation = int(draw.integers(1, 2**31)), Augmentation()
        samples = [
            Sample(self.paths[row], self.paths[row], self.content[row].decode()) for row in order
        ]
        done = 0
        with ThreadPoolExecutor(max(self.threads, 1), "decode") as pool:
            rendering = Rendering(self.preprocessing, index, augmentation)
            for batch in decoded_batches(pool, samples, [rendering], batch_size=size):
                for place, reason in (*batch.unread, *batch.undecodable):
                    raise SourceError(
                        f"{samples[place].path}: {reason}. Its features were extracted, so it "
                        "could be read then: bring it back, or run again so that it is left out"
                    )
                pixels = batch.pixels[0]
                if turns is not None:
                    own = turns[done : done + len(batch.rows)].tolist()
                    turned = [
                        mirror_pixels(image, turn)
                        for image, turn in zip(pixels.numpy(), own, strict=True)
                    ]
                    pixels = torch.from_numpy(np.stack(turned))
                yield Batch(order[done : done + len(batch.rows)], pixels, None)
                done += len(batch.rows)


def by_view(features: Sequence[FeatureSet]) -> dict[str, list[FeatureSet]]:
    """Feature sets grouped by view, each group in the order given."""
    groups: dict[str, list[FeatureSet]] = {}
    for feature in features:
        groups.setdefault(feature.spec.view, []).append(feature)
    return groups


def random_flips(inputs: Tensor, how: str, draw: np.random.Generator, *, pixels: bool) -> Tensor:
    """Each row mirrored left-right with probability ½, and for "flips" upside-down too.

    A map flipped is close to the map of the flipped image; equal only where strides and padding are
    symmetric.
    """
    upright = (1, 2) if pixels else (2, 3)
    for axis in reversed(upright if how == "flips" else upright[1:]):
        chosen = torch.from_numpy(draw.random(len(inputs)) < 0.5)
        inputs = torch.where(chosen.view(-1, *[1] * (inputs.ndim - 1)), inputs.flip(axis), inputs)
    return inputs


def open_all(directories: Sequence[str | Path]) -> list[FeatureSet]:
    """Open feature sets."""
    return [open_feature_set(directory) for directory in directories]


def decoding_threads(threads: int, device: str) -> int:
    """As many as the network uses, or on another device than the CPU every core there is."""
    return threads if device == "cpu" else max(threads, len(os.sched_getaffinity(0)))
