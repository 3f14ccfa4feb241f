"""Prediction from images: each is decoded once, goes through each network once, and every member of
the model predicts from the features.

N images, C outputs.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from headrace.cache.count_text import count_text
from headrace.cache.format.encoding import decode_rows, encode_rows
from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.fused import keep_freed_memory
from headrace.extract.cores import available_cores
from headrace.extract.errors import ImageError
from headrace.extract.images.crops import crop_content, split_crop
from headrace.extract.images.views import Augmentation
from headrace.extract.run.decode_ahead import PixelBatch, decoded_batches, empty_pixels
from headrace.extract.run.device import BatchLimit, check_device, launch_forward
from headrace.extract.run.rendering import Rendering, quiet_decoding, render_into_buffers
from headrace.extract.run.work_unit import (
    ForwardPass,
    PassOptions,
    batch_limit_of,
    find_unstorable_rows,
    make_forward_passes,
)
from headrace.extract.spec import Sample
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import Tap
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.models.from_features import (
    RowColumns,
    predict_from_features,
)
from headrace.pipelines.models.image_input import (
    ImageLike,
    highest_band,
    image_decoder,
    image_name,
    split_images,
)
from headrace.pipelines.recipe.side_columns import encode_side_columns
from headrace.pipelines.recipe.targets import DataError

if TYPE_CHECKING:
    from headrace.pipelines.models.model import Model

# One row for each image: a data frame, lists by name, or a mapping for each image.
SideTable = pd.DataFrame | Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float32]
_BATCH = 32  # images decoded together at least; each pass takes as many as suits its device


@dataclass(frozen=True)
class BatchPrediction:
    """Predictions of some of the images, in order. Rows are positions in all images given."""

    rows: list[int]
    probabilities: Floats  # (len(rows), C)
    failed: list[tuple[int, str]]  # (row, reason)
    # rows among the failed whose file could not be read now, but may be readable later
    unread: frozenset[int] = frozenset()
    # (len(rows),) what each image weighs in its unit's prediction, where units are predicted whole
    weights: Floats | None = None


@dataclass(frozen=True)
class PredictionEngine:
    """A model's networks and heads, ready to predict batches of pixels on a device."""

    model: "Model"
    device: str
    passes: tuple[ForwardPass, ...]
    limits: tuple[BatchLimit, ...]  # of `passes`
    heads: tuple[Callable[[Floats], Floats], ...]  # of the model's members

    @property
    def renderings(self) -> list[Rendering]:
        """The renderings whose pixels a batch holds, in order."""
        return [network_pass.rendering for network_pass in self.passes]


def open_engine(model: "Model", device: str = "cpu") -> PredictionEngine:
    """Load the model's networks onto a device.

    Raises BackboneError if weights are missing, SpecMismatch if they are not those of the features.
    """
    check_device(device)
    if torch.device(device).type == "cpu":
        keep_freed_memory()  # else page faults cost as much as the arithmetic
    passes: list[ForwardPass] = []
    for member in model.members:
        trained_backbone = member.trained_backbone()
        if trained_backbone is not None:
            taps = [Tap(feature.tap, feature.pooling) for feature in member.features]
            forward = make_forward(trained_backbone, taps, device=device)
            view_index, no_augmentation = 0, Augmentation()
            rendering = Rendering(trained_backbone.preprocessing, view_index, no_augmentation)
            passes.append(ForwardPass(rendering, forward, member.features))
    for backbone, features in model.features_by_backbone.items():
        passes += make_forward_passes(backbone, features, PassOptions(device))
    limits = [
        batch_limit_of(
            network_pass.forward, network_pass.rendering.preprocessing.pixel_shape, device, None
        )
        for network_pass in passes
    ]
    return PredictionEngine(
        model,
        device,
        tuple(passes),
        tuple(limits),
        tuple(member.head_function() for member in model.members),
    )


@dataclass(frozen=True)
class _BatchFeatures:
    """Features of the images of a batch, and the images that failed; rows as in BatchPrediction."""

    rows: list[int]
    features: dict[FeatureSpec, Floats]
    failed: list[tuple[int, str]]
    unread: frozenset[int]


def _batch_features(engine: PredictionEngine, batch: PixelBatch) -> _BatchFeatures:
    failed_rows = [*batch.undecodable, *batch.unread]
    unread_rows = frozenset(row for row, _ in batch.unread)
    if not batch.rows:
        return _BatchFeatures([], {}, sorted(failed_rows), unread_rows)
    # All are launched before the first result is waited for, so that an accelerator is never idle.
    launched_passes = [
        launch_forward(network_pass.forward, pixels, engine.device, batch_limit)
        for network_pass, pixels, batch_limit in zip(
            engine.passes, batch.pixels, engine.limits, strict=True
        )
    ]
    outputs: dict[FeatureSpec, npt.NDArray[Any]] = {}
    for network_pass, pass_result in zip(engine.passes, launched_passes, strict=True):
        outputs |= zip(network_pass.specs, pass_result(), strict=True)
    reason_by_slot: dict[int, str] = {}
    for spec, output in outputs.items():
        reason_by_slot |= find_unstorable_rows(output, spec)
    failed_rows += [(batch.rows[slot], reason) for slot, reason in reason_by_slot.items()]
    good_slots = [slot for slot in range(len(batch.rows)) if slot not in reason_by_slot]
    features = {
        # As the cache stores them, because heads were trained on these.
        spec: as_stored(output[good_slots], spec.dtype)
        for spec, output in outputs.items()
        if good_slots
    }
    good_rows = [batch.rows[slot] for slot in good_slots]
    return _BatchFeatures(good_rows, features, sorted(failed_rows), unread_rows)


def _joined(batches: Sequence[_BatchFeatures]) -> _BatchFeatures:
    """Return all batches as one."""
    filled = [batch for batch in batches if batch.rows]
    return _BatchFeatures(
        [row for batch in filled for row in batch.rows],
        {
            feature_spec: np.concatenate([batch.features[feature_spec] for batch in filled])
            for feature_spec in (filled[0].features if filled else ())
        },
        sorted(failure for batch in batches for failure in batch.failed),
        frozenset[int]().union(*(batch.unread for batch in batches)),
    )


def _predict_features(
    engine: PredictionEngine, batch: _BatchFeatures, row_columns: RowColumns
) -> BatchPrediction:
    if not batch.rows:
        no_predictions = np.empty((0, len(engine.model.classes)), np.float32)
        return BatchPrediction([], no_predictions, batch.failed, batch.unread)
    predicted, weights = predict_from_features(
        engine.model, engine.heads, batch.features, row_columns.take(batch.rows)
    )
    return BatchPrediction(batch.rows, predicted, batch.failed, batch.unread, weights)


def predict_samples(
    engine: PredictionEngine,
    samples: Sequence[Sample],
    n_threads: int,
    row_columns: RowColumns,
) -> Iterator[BatchPrediction]:
    """Decode the samples and yield `predict_batches` of them; the next batches are decoded while
    the network works.
    """
    batch_size = max(_BATCH, *(batch_limit.images for batch_limit in engine.limits))
    with ThreadPoolExecutor(n_threads, "decode") as decode_pool, quiet_decoding():
        batches = decoded_batches(
            decode_pool,
            samples,
            engine.renderings,
            batch_size=batch_size,
            pin_memory=torch.device(engine.device).type != "cpu",
        )
        yield from predict_batches(engine, batches, row_columns)


def predict_batches(
    engine: PredictionEngine, batches: Iterable[PixelBatch], row_columns: RowColumns
) -> Iterator[BatchPrediction]:
    """Yield predictions in order, batch by batch; if units are predicted together, all at once, in
    the end.
    """
    features: Iterable[_BatchFeatures] = (_batch_features(engine, batch) for batch in batches)
    if row_columns.units is not None:
        # A unit is predicted from all its images at once, which may be in several batches.
        features = [_joined(list(features))]
    for batch_features in features:
        yield _predict_features(engine, batch_features, row_columns)


def predict_images(
    model: "Model",
    images: ImageLike | Iterable[ImageLike],
    *,
    side_table: SideTable | None = None,
    units: Sequence[Any] | None = None,
    device: str = "cpu",
) -> Floats:
    """Return (N, C) predictions; see ImagePredictor.predict_proba."""
    engine = open_engine(model, device)
    image_list = split_images(images, highest_band(engine.renderings))
    row_columns = RowColumns(
        _side_inputs(model, side_table, len(image_list)),
        _unit_labels(model, units, len(image_list)),
    )
    probabilities = np.empty((len(image_list), len(model.classes)), np.float32)
    with ThreadPoolExecutor(available_cores(), "decode") as decode_pool, quiet_decoding():
        batches = _rendered_batches(decode_pool, image_list, engine.renderings)
        for predicted in predict_batches(engine, batches, row_columns):
            if predicted.failed:
                row, failure_reason = predicted.failed[0]
                raise InvalidInput(f"{image_name(image_list[row], row)}: {failure_reason}")
            probabilities[predicted.rows] = predicted.probabilities
    return probabilities


def _rendered_batches(
    decode_pool: ThreadPoolExecutor,
    image_list: Sequence[ImageLike],
    renderings: Sequence[Rendering],
) -> Iterator[PixelBatch]:
    """Yield the pixels of images in memory, _BATCH at a time. Raises InvalidInput for the first
    that cannot be decoded.
    """
    for batch_start in range(0, len(image_list), _BATCH):
        rows = list(range(batch_start, min(batch_start + _BATCH, len(image_list))))
        pixels = [empty_pixels(len(rows), rendering.preprocessing) for rendering in renderings]
        decode_jobs = [
            decode_pool.submit(_render_into, image_list[row], row, renderings, pixels, slot)
            for slot, row in enumerate(rows)
        ]
        for decode_job in decode_jobs:
            decode_job.result()
        yield PixelBatch(rows, pixels)


def _unit_labels(
    model: "Model", units: Sequence[Any] | None, n_images: int
) -> npt.NDArray[Any] | None:
    """Return the unit (N,) of each image, None for a model that does not predict units."""
    if not model.takes_units:
        return None
    if units is None or len(units) != n_images:
        given = "none" if units is None else f"{len(units):,}"
        raise InvalidInput(
            f"{model.path}: the model predicts units of several images (a head of kind bags). Give "
            f"the unit of each of the {count_text(n_images, 'image')}, units=[...]; found {given}"
        )
    return np.asarray([str(unit) for unit in units])


def _side_inputs(model: "Model", side_table: SideTable | None, n_images: int) -> Floats | None:
    """Return (N, R) the encoded side columns of N images; None for a model without any."""
    if not model.side_columns:
        return None
    table = pd.DataFrame(index=range(n_images))
    if side_table is not None:
        table = pd.DataFrame(side_table).reset_index(drop=True)
    if len(table) != n_images:
        raise DataError(
            f"side_columns has {count_text(len(table), 'row')} for "
            f"{count_text(n_images, 'image')}: give one row for each image, in the same order"
        )
    # Notes name images by `file`; images in memory have their numbers.
    side, notes = encode_side_columns(table.assign(file=range(n_images)), model.side_columns)
    for note in notes:
        warnings.warn(note, stacklevel=4)  # at the user's call of predict_proba
    return side.as_inputs()


def as_stored(features: npt.NDArray[Any], dtype: str) -> Floats:
    """Return features (n, ...) rounded as the cache stores them."""
    if dtype == "uint8":  # its scale depends on the rows that happen to be stored together
        return np.asarray(features, np.float32)
    no_ids = [""] * len(features)  # for error messages, which `find_unstorable_rows` has prevented
    encoded_features = encode_rows(features, no_ids, dtype)
    return np.asarray(decode_rows(encoded_features.stored, dtype), np.float32)


def _render_into(
    image: ImageLike,
    image_index: int,
    renderings: Sequence[Rendering],
    pixel_buffers: Sequence[torch.Tensor],
    slot: int,
) -> None:
    try:
        crop = split_crop(image)[1] if isinstance(image, str) else None
        decode, content_hash = image_decoder(image, highest_band(renderings))
        content_hash = crop_content(content_hash, crop)
        arrays = [buffer.numpy() for buffer in pixel_buffers]
        render_into_buffers(decode, content_hash, renderings, arrays, slot, crop)
    except (ImageError, OSError) as error:
        failure_reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{image_name(image, image_index)}: {failure_reason}") from error
