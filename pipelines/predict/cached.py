"""Predictions of images whose features are in a cache, without a network."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import CacheError
from headrace.extract.images.content_hashes import content_hashes, indexed_hashes
from headrace.pipelines.models.cached_model import find_cached_model
from headrace.pipelines.models.from_features import RowColumns
from headrace.pipelines.models.model import Model
from headrace.pipelines.paths import content_index
from headrace.pipelines.predict.parts import FileKey, part_slices

_CACHED_IMAGES = 8192  # features in memory at a time


@dataclass(frozen=True)
class CachedPredictions:
    """Predictions of those of N images whose features are cached."""

    probabilities: npt.NDArray[np.float32]  # (N, C), nan for the other images
    errors: list[str | None]
    is_known: npt.NDArray[np.bool_]  # (N,) predicted, or recorded as failed
    # (N,) what each image weighs in its unit's prediction, nan where units are not predicted whole
    weights: npt.NDArray[np.float32]

    def count(self, rows: Iterable[int]) -> int:
        """Return how many of the images in these rows had features."""
        return sum(bool(self.is_known[row]) and self.errors[row] is None for row in rows)


def predict_cached(
    model: Model,
    keys: Sequence[FileKey],
    cache_root: Path | None,
    rows: npt.NDArray[np.intp],
    row_columns: RowColumns,
) -> CachedPredictions:
    """Predict those images in `rows` that have features in a cache, or a recorded failure.

    row_columns: of all images. Raises CacheError for damaged features.
    """
    # Made again by each call, which takes less time than to store them.
    predictions = CachedPredictions(
        probabilities=np.full((len(keys), len(model.classes)), np.nan, np.float32),
        errors=[None] * len(keys),
        is_known=np.zeros(len(keys), np.bool_),
        weights=np.full(len(keys), np.nan, np.float32),
    )
    if cache_root is None or not len(rows):
        return predictions
    cached_model = find_cached_model(model, cache_root)
    if cached_model is None:
        return predictions
    # The stamps of the files alone, without the digests of what the model reads beside them.
    # `file_keys` adds side columns and units to a file's stamp, behind a "|".
    files = [(keys[row][0], keys[row][1].partition("|")[0]) for row in rows]
    hashes = known_contents(files, cache_root)
    reasons = [cached_model.failures.get(content_hash) for content_hash in hashes.astype(str)]
    has_failed = np.array([reason is not None for reason in reasons], np.bool_)
    has_features = cached_model.has_features(hashes) & ~has_failed
    is_done = has_features | has_failed
    units = None if row_columns.units is None else row_columns.units[rows]
    cached_rows = np.flatnonzero(has_features)
    if units is not None:
        # All images of a unit or none, side by side, so that no block divides a unit.
        is_done &= ~np.isin(units, units[~is_done])
        cached_rows = np.flatnonzero(has_features & is_done)
        cached_rows = cached_rows[np.argsort(units[cached_rows], kind="stable")]
    try:
        for block in part_slices(
            len(cached_rows), _CACHED_IMAGES, None if units is None else units[cached_rows]
        ):
            block_rows = cached_rows[block]
            predicted, block_weights = cached_model.predict(
                hashes[block_rows], row_columns.take(rows[block_rows])
            )
            predictions.probabilities[rows[block_rows]] = predicted
            if block_weights is not None:
                predictions.weights[rows[block_rows]] = block_weights
    except CacheError as error:
        raise CacheError(f"{error}. To predict without the cache: --no-cache") from error
    predictions.is_known[rows[is_done]] = True
    for failed_row in np.flatnonzero(has_failed & is_done):
        predictions.errors[rows[failed_row]] = reasons[failed_row]
    _copy_repeated(keys, rows, predictions)
    return predictions


def _copy_repeated(
    keys: Sequence[FileKey], rows: npt.NDArray[np.intp], predictions: CachedPredictions
) -> None:
    """Copy predictions to images that are listed several times; `rows` has the first of each."""
    if len(rows) == len(keys):
        return
    row_of_key = {keys[row]: row for row in rows if predictions.is_known[row]}
    for row, key in enumerate(keys):
        first_row = row_of_key.get(key)
        if first_row is not None and first_row != row:
            predictions.probabilities[row] = predictions.probabilities[first_row]
            predictions.errors[row] = predictions.errors[first_row]
            predictions.weights[row] = predictions.weights[first_row]
            predictions.is_known[row] = True


def known_contents(files: Sequence[tuple[str, str]], cache_root: Path) -> npt.NDArray[np.bytes_]:
    """Return the content hash (n,) S32 of each image, empty if its file cannot be read.

    files: path and stamp (size and time, as text) of each. A file that the index has by both is not
    opened. Others are read and hashed, and added to the index if the cache can be written to.
    """
    index = content_index(cache_root)
    hashes = indexed_hashes(files, index)
    unknown_rows = [row for row, content_hash in enumerate(hashes) if content_hash is None]
    if unknown_rows:
        paths = [files[row][0] for row in unknown_rows]
        samples = pd.DataFrame({"id": paths, "path": paths})
        new_hashes = content_hashes(samples, index, keep=os.access(cache_root, os.W_OK)).hashes
        for row, content_hash in zip(unknown_rows, new_hashes, strict=True):
            hashes[row] = content_hash
    return np.array([content_hash or "" for content_hash in hashes], "S32")
