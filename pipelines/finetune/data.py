"""Batches that a network trains on: cached maps of the split node, or images.

N rows of a task, n of a batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.cache.feature_set import FeatureSet
from headrace.extract.errors import SourceError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Augmentation, Symmetries, mirror_pixels, parse_view
from headrace.extract.run.decode_ahead import decoded_batches
from headrace.extract.run.rendering import Rendering
from headrace.extract.spec import Sample

Rows = npt.NDArray[np.int64]


class TrainingBatch(NamedTuple):
    """n rows of a task, in host memory."""

    rows: Rows  # (n,) positions in the task
    inputs: Tensor  # (n, …) pixels or maps
    features_below: Tensor | None  # (n, D) features of taps below the split node

    def on_device(self, device: str) -> tuple[Tensor, Tensor | None]:
        """Return the arguments of the network, on a device."""
        below = self.features_below
        return self.inputs.to(device), None if below is None else below.to(device)

    def part(self, start: int, n_rows: int) -> "TrainingBatch":
        """Return `n_rows` rows from position `start` on, or those that are left."""
        rows, below = slice(start, start + n_rows), self.features_below
        return TrainingBatch(
            self.rows[rows], self.inputs[rows], None if below is None else below[rows]
        )


class BatchSource(Protocol):
    """A source of training batches."""

    def batches(
        self,
        row_order: Rows,
        batch_size: int,
        *,
        default_view: int = 0,
        generator: np.random.Generator | None = None,
    ) -> Iterator[TrainingBatch]:
        """Yield the rows in this order, at most `batch_size` at a time, in the default view, or
        with a generator in random ones. Raises SourceError for an image that is gone or has
        changed.
        """


@dataclass(frozen=True)
class MapSource:
    """Cached maps of the split node and cached features of the taps below it, so that nothing below
    the node has to run.
    """

    content: npt.NDArray[np.bytes_]  # (N,)
    maps: Sequence[FeatureSet]  # one per view
    features_below: Sequence[Sequence[FeatureSet]]  # one list per view, in the head's order

    def batches(
        self,
        row_order: Rows,
        batch_size: int,
        *,
        default_view: int = 0,
        generator: np.random.Generator | None = None,
    ) -> Iterator[TrainingBatch]:
        for start in range(0, len(row_order), batch_size):
            rows = row_order[start : start + batch_size]
            view_index = (
                default_view if generator is None else int(generator.integers(len(self.maps)))
            )
            batch_content = self.content[rows]
            inputs = torch.from_numpy(self.maps[view_index].load(batch_content, np.float32))
            below_blocks = [
                feature.load(batch_content, np.float32).reshape(len(rows), -1)
                for feature in self.features_below[view_index]
            ]
            yield TrainingBatch(
                rows,
                inputs,
                torch.from_numpy(np.concatenate(below_blocks, axis=1)) if below_blocks else None,
            )


@dataclass(frozen=True)
class ImageSource:
    """Images, decoded ahead by threads; they allow random views, which no cache can hold."""

    content: npt.NDArray[np.bytes_]  # (N,)
    paths: Sequence[str]  # (N,)
    preprocessing: Preprocessing
    views: Sequence[str] = field(default_factory=lambda: ('{"index":0}',))  # as FeatureSpec.view
    threads: int = 1

    def batches(
        self,
        row_order: Rows,
        batch_size: int,
        *,
        default_view: int = 0,
        generator: np.random.Generator | None = None,
    ) -> Iterator[TrainingBatch]:
        view_index, augmentation = parse_view(self.views[default_view])
        symmetries: npt.NDArray[np.int64] | None = None
        if generator is not None and any(
            isinstance(parse_view(view)[1], Symmetries) for view in self.views
        ):
            # The views are symmetries of one crop: each row draws one, and images are mirrored
            # after decoding.
            symmetries, view_index = generator.integers(len(self.views), size=len(row_order)), 0
        elif generator is not None:
            view_index, augmentation = int(generator.integers(1, 2**31)), Augmentation()
        samples = [
            Sample(self.paths[row], self.paths[row], self.content[row].decode())
            for row in row_order
        ]
        n_done = 0
        with ThreadPoolExecutor(self.threads, "decode") as pool:
            rendering = Rendering(self.preprocessing, view_index, augmentation)
            for batch in decoded_batches(pool, samples, [rendering], batch_size=batch_size):
                for row_in_order, reason in (*batch.unread, *batch.undecodable):
                    raise SourceError(
                        f"{samples[row_in_order].path}: {reason}. Its features were extracted, so "
                        "it could be read then: bring it back, or run again so that it is left out"
                    )
                pixels = batch.pixels[0]
                if symmetries is not None:
                    batch_symmetries = symmetries[n_done : n_done + len(batch.rows)].tolist()
                    mirrored_images = [
                        mirror_pixels(image, symmetry)
                        for image, symmetry in zip(pixels.numpy(), batch_symmetries, strict=True)
                    ]
                    pixels = torch.from_numpy(np.stack(mirrored_images))
                yield TrainingBatch(row_order[n_done : n_done + len(batch.rows)], pixels, None)
                n_done += len(batch.rows)


def sets_by_view(feature_sets: Iterable[FeatureSet]) -> dict[str, list[FeatureSet]]:
    """Return the feature sets grouped by view, each group in the order given."""
    sets_of_view: dict[str, list[FeatureSet]] = {}
    for feature_set in feature_sets:
        sets_of_view.setdefault(feature_set.spec.view, []).append(feature_set)
    return sets_of_view


def random_flips(
    inputs: Tensor, augment: str, generator: np.random.Generator, *, channels_last: bool
) -> Tensor:
    """Mirror each row left-right with probability ½, and for "flips" also upside-down.

    A mirrored map is close to the map of the mirrored image, and equals it only if strides and
    padding are symmetric.
    """
    image_axes = (1, 2) if channels_last else (2, 3)
    for axis in reversed(image_axes if augment == "flips" else image_axes[1:]):
        is_flipped = torch.from_numpy(generator.random(len(inputs)) < 0.5)
        inputs = torch.where(
            is_flipped.view(-1, *[1] * (inputs.ndim - 1)), inputs.flip(axis), inputs
        )
    return inputs
