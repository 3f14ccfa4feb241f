"""Predictions of many images, published part by part, so that the next call continues a killed one.

Work in progress is in OUT.parts/ beside the table OUT: one Parquet file per part, complete or
absent, with the predictions of some images and keys that tell whether these are still the same
files. When every image has its prediction, OUT is assembled in the order of the images, its record
OUT.json is written, and the parts are removed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from headrace.cache.atomic_io import lease, publish_replace
from headrace.cache.format.sealed import read_sealed_json, sealed_json
from headrace.cache.text import as_text
from headrace.extract.cores import available_cores
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.console import make_console
from headrace.pipelines.errors import OutputExists
from headrace.pipelines.models.from_features import RowColumns
from headrace.pipelines.models.model import Model
from headrace.pipelines.predict.cached import CachedPredictions, predict_cached
from headrace.pipelines.predict.parts import (
    FileKey,
    file_keys,
    known_parts,
    missing_rows,
    path_samples,
    predict_missing,
    read_part,
    remove_parts,
)
from headrace.pipelines.predict.tables import TableBlock, is_predictions, table_writer
from headrace.pipelines.predict.units import (
    UnitNames,
    is_unit_table,
    unit_table,
    units_path,
    weight_table,
    weights_path,
    write_unit_table,
)
from headrace.pipelines.recipe.side_columns import encode_side_columns
from headrace.pipelines.recipe.targets import DataError, empty_as_missing

_BLOCK = 4096  # rows of the table written at a time
_OPEN_PARTS = 64  # parts whose predictions are kept in memory


@dataclass(frozen=True)
class PredictionSummary:
    """Counts of a finished table."""

    images: int
    new: int  # predicted in this call
    failed: int
    counts: dict[str, int]  # images per predicted class, or per label of a multi-label task
    cached: int = 0  # of `new`, those predicted from cached features without a network


def predict_table(
    model: Model,
    images: pd.DataFrame,
    table_path: Path,
    table_format: str,
    *,
    force: bool = False,
    n_workers: int | None = None,
    device: str = "cpu",
    cache_root: Path | None = None,
    unit_names: UnitNames | None = None,
    console: Console,
) -> PredictionSummary:
    """Predict the images that have no prediction yet and write the table `table_path` as csv,
    parquet or jsonl.

    Every image has one row, in the order given; the row of one that cannot be decoded has the
    reason.

    images: columns `file` (its name in the table), `path`, and side columns and units if the model
    reads them.
    cache_root: a cache; images that have features in it need no network.
    unit_names: each image's unit; a table of units is written beside (`units_path`) and, for a
    model that predicts units whole, a table of image weights (`weights_path`).

    Raises OutputExists for a table of other images or another model, unless `force` is on, and
    for a file that `headrace predict` did not write.
    """
    parts_folder = _parts_folder(table_path)
    _require_ours(table_path, _record_path(table_path), parts_folder)
    # Each is assembled in the folder of parts under the key's name, and then moved to its path.
    tables_beside = {} if unit_names is None else {"units.partial": units_path(table_path)}
    tables_beside |= {"weights.partial": weights_path(table_path)} if model.takes_units else {}
    for table_beside in tables_beside.values():
        _require_our_units(table_beside)
    row_columns = RowColumns(_side_inputs(model, images, console), _units(model, images))
    keys = file_keys(images["path"].tolist(), row_columns)
    listing = json.dumps([images["file"].tolist(), keys])
    record = {
        "model": str(model.path),
        "model_digest": model.digest,
        "images": len(images),
        "listing": hashlib.sha256(listing.encode()).hexdigest()[:24],
        "format": table_format,
        "headrace": importlib.metadata.version("headrace"),
    }
    if unit_names is not None:
        record["units"] = unit_names.digest

    def earlier_summary() -> PredictionSummary | None:
        if force or not all(path.exists() for path in tables_beside.values()):
            return None
        return _summary_of_finished(table_path, record)

    # A lock beside a finished table belongs to a killed call; `_only_writer` waits and removes it.
    if (summary := earlier_summary()) is not None and not _lock_path(table_path).exists():
        return summary
    with _only_writer(table_path, console):
        # Another call may have finished it while this one waited.
        if (summary := earlier_summary()) is not None:
            return summary
        parts_folder.mkdir(parents=True, exist_ok=True)
        known_keys = known_parts(parts_folder, model, is_final=False).keys()
        rows = missing_rows(keys, known_keys, row_columns.units)
        cached = predict_cached(model, keys, cache_root, np.array(rows, np.intp), row_columns)
        uncached_rows = [row for row in rows if not cached.is_known[row]]
        predict_missing(
            model,
            [keys[row] for row in uncached_rows],
            row_columns.take(uncached_rows),
            parts_folder,
            n_workers=n_workers,
            device=device,
            console=console,
        )
        summary = _assemble_table(
            model, images, row_columns.units, keys, parts_folder, table_format, cached, unit_names
        )
        summary = replace(summary, new=len(rows), cached=cached.count(rows))
        record |= {"failed": summary.failed, "counts": summary.counts}
        _publish(table_path, tables_beside, record)
        return summary


def _publish(table_path: Path, tables_beside: Mapping[str, Path], record: dict[str, Any]) -> None:
    """Move the assembled tables to their places, write the record, and remove the parts."""
    parts_folder = _parts_folder(table_path)
    for partial_name, table_beside in tables_beside.items():
        os.replace(parts_folder / partial_name, table_beside)
    os.replace(parts_folder / "table.partial", table_path)
    # The record says that the table is complete, and so comes after it. Through the folder of
    # parts, so that a killed call's temporary file is removed with it.
    publish_replace(parts_folder / "record.partial", sealed_json(record, indent=2))
    os.replace(parts_folder / "record.partial", _record_path(table_path))
    remove_parts(parts_folder)


def _summary_of_finished(table_path: Path, record: Mapping[str, Any]) -> PredictionSummary | None:
    """Return the counts of a table that an earlier call has finished, None if there is none.

    Raises OutputExists for a table of other images or another model.
    """
    if not table_path.exists() or _parts_folder(table_path).exists():
        return None
    earlier_record = _read_record(_record_path(table_path))
    # The earlier record has its counts beside these fields.
    if earlier_record is not None and {**earlier_record, **record} == earlier_record:
        return PredictionSummary(
            record["images"], 0, earlier_record["failed"], earlier_record["counts"]
        )
    raise OutputExists(
        f"{table_path} is there, and of other images, another model or another version. Give "
        "another name with --out, or --force to replace it"
    )


def _record_path(table_path: Path) -> Path:
    return table_path.with_name(f"{table_path.name}.json")


def _parts_folder(table_path: Path) -> Path:
    return table_path.with_name(f"{table_path.name}.parts")


def _lock_path(table_path: Path) -> Path:
    return table_path.with_name(f".{table_path.name}.lock")


@contextlib.contextmanager
def _only_writer(table_path: Path, console: Console) -> Iterator[None]:
    table_path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = _lock_path(table_path)
    if lock_path.exists():
        text = f"note: waiting for the call that writes {table_path}, unless it was killed"
        console.print(text, soft_wrap=True)
    # No two calls write one table: the first to finish removes the parts.
    with lease(lock_path):
        yield


def _require_ours(table_path: Path, record_path: Path, parts_folder: Path) -> None:
    """Raise OutputExists if a file that `headrace predict` did not write is at `table_path` or
    `record_path`.
    """
    # A mistyped --out must cost nobody a file. By its text and not by its checksum: a damaged
    # record is ours too.
    has_our_record = record_path.is_file() and b'"model_digest"' in record_path.read_bytes()
    advice = (
        "It is not replaced, not even with --force. Give another name with --out, such as "
        f"{_free_name(table_path)}, or move it away"
    )
    if table_path.exists() and not table_path.is_file():
        raise OutputExists(f"{table_path} is neither a table nor a name that is free. {advice}")
    if record_path.exists() and not has_our_record:
        raise OutputExists(
            f"{record_path} is there, where headrace predict keeps what it knows of "
            f"{table_path.name}, and is not as it writes it. {advice}"
        )
    # A call that was killed in its last step leaves the table without a record.
    if table_path.exists() and not is_predictions(
        table_path, allow_values=has_our_record or any(parts_folder.glob("*.parquet"))
    ):
        raise OutputExists(
            f"{table_path} is there, and is no table of predictions: headrace predict did not "
            f"write it. {advice}"
        )


def _require_our_units(unit_table_path: Path) -> None:
    """Raise OutputExists for a file that is not a table of units or of image weights."""
    if unit_table_path.exists() and not (
        unit_table_path.is_file() and is_unit_table(unit_table_path)
    ):
        raise OutputExists(
            f"{unit_table_path} is there, where the predictions of units go, and is no such table: "
            "it is not replaced. Give another name with --out, or move it away"
        )


def _free_name(table_path: Path) -> Path:
    suffix = table_path.suffix or ".csv"
    candidates = (table_path.with_name(f"predictions{index or ''}{suffix}") for index in count())
    return next(path for path in candidates if not path.exists())


def predict_stream(
    model: Model,
    images: pd.DataFrame,
    stream: IO[str],
    table_format: str,
    *,
    device: str = "cpu",
    cache_root: Path | None = None,
    console: Console,
) -> PredictionSummary:
    """Write predictions to an open text stream, batch by batch. Nothing is kept, so that nothing
    can be resumed. Arguments are those of `predict_table`.
    """
    file_names, image_paths = images["file"].tolist(), images["path"].tolist()
    # Notes go to the standard error: the standard output is the table.
    side_inputs = _side_inputs(model, images, make_console(stderr=True))
    row_columns = RowColumns(side_inputs, _units(model, images))
    # Without a cache no stamps are needed, and no files are waited for.
    keys = (
        [(path, "") for path in image_paths]
        if cache_root is None
        else file_keys(image_paths, row_columns)
    )
    cached = predict_cached(model, keys, cache_root, np.arange(len(keys)), row_columns)
    probabilities, error_texts = cached.probabilities, cached.errors
    missing = np.flatnonzero(~cached.is_known)
    n_failed, class_counts, n_written = 0, np.zeros(len(model.classes), np.int64), 0
    with (
        table_writer(stream, table_format, model.task_kind, model.classes) as write,
        show_progress(console, "predict", len(file_names), "images") as advance,
    ):
        for n_predicted in _predict_rows(
            model, image_paths, missing, cached, row_columns.take(missing), device
        ):
            # `missing` ascends, so all rows before the first unpredicted one are ready.
            n_ready = missing[n_predicted] if n_predicted < len(missing) else len(file_names)
            for start in range(n_written, n_ready, _BLOCK):
                ready = slice(start, min(start + _BLOCK, n_ready))
                write(TableBlock(file_names[ready], probabilities[ready], error_texts[ready]))
                is_good = [error is None for error in error_texts[ready]]
                class_counts += _count_classes(probabilities[ready][is_good], model)
                n_failed += is_good.count(False)
                advance(len(is_good))
            n_written = int(n_ready)
    counts = _named_counts(class_counts, model)
    n_images = len(file_names)
    n_cached = cached.count(np.arange(n_images))
    return PredictionSummary(n_images, n_images, n_failed, counts, n_cached)


def _predict_rows(
    model: Model,
    image_paths: Sequence[str],
    rows: npt.NDArray[np.intp],
    predictions: CachedPredictions,
    row_columns: RowColumns,
    device: str,
) -> Iterator[int]:
    """Predict the images of these rows into `predictions`; yield after each batch how many rows are
    done. row_columns: of these rows.
    """
    if not len(rows):
        yield 0
        return
    # Imports torch, which a table of cached images does not need.
    from headrace.pipelines.models.images import open_engine, predict_samples

    samples = path_samples(image_paths[row] for row in rows)
    n_done = 0
    engine, n_threads = open_engine(model, device), available_cores()
    for predicted in predict_samples(engine, samples, n_threads, row_columns):
        predictions.probabilities[rows[predicted.rows]] = predicted.probabilities
        for row, reason in predicted.failed:
            predictions.errors[rows[row]] = reason
        n_done += len(predicted.rows) + len(predicted.failed)
        yield n_done


def _side_inputs(
    model: Model, images: pd.DataFrame, console: Console
) -> npt.NDArray[np.float32] | None:
    """Return (N, R) the encoded side columns of the images; None for a model without any."""
    if not model.side_columns:
        return None
    side, notes = encode_side_columns(images, model.side_columns)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    return side.as_inputs()


def _units(model: Model, images: pd.DataFrame) -> npt.NDArray[np.str_] | None:
    """Return the unit (N,) of each image; None for a model that predicts each alone."""
    column = unit_column(model)
    if column is None:
        return None
    units = as_text(empty_as_missing(images[column]))
    if units.isna().any():
        raise DataError(
            f"column {column!r} is empty for {images.loc[units.isna(), 'file'].iloc[0]!r}: the "
            "model predicts units of several images, and every image needs its own"
        )
    return units.to_numpy(dtype=np.str_)


def unit_column(model: Model) -> str | None:
    """Return the column of units, for a model that predicts units whole; None for others."""
    rule = model.unit_rule if model.takes_units else None
    return None if rule is None else rule.column


def _assemble_table(
    model: Model,
    images: pd.DataFrame,
    units: npt.NDArray[np.str_] | None,
    keys: list[FileKey],
    parts_folder: Path,
    table_format: str,
    cached: CachedPredictions,
    unit_names: UnitNames | None,
) -> PredictionSummary:
    """Assemble the table at `table.partial` in the folder of parts, and there the tables of units,
    `units.partial`, and of image weights, `weights.partial`.

    units: of each image; None if the model predicts images one by one.
    """
    file_names = images["file"].tolist()
    all_probabilities = []  # needed for units alone
    part_of_key = known_parts(parts_folder, model, is_final=True)
    # The oldest can go: images are read in about the order in which they were predicted.
    open_part = lru_cache(maxsize=_OPEN_PARTS)(read_part)
    n_failed, class_counts = 0, np.zeros(len(model.classes), np.int64)
    with table_writer(
        parts_folder / "table.partial", table_format, model.task_kind, model.classes
    ) as write:
        for block_start in range(0, len(file_names), _BLOCK):
            block = slice(block_start, block_start + _BLOCK)
            probabilities, error_texts = cached.probabilities[block], cached.errors[block]
            for block_row in np.flatnonzero(~cached.is_known[block]):
                part_path, part_row = part_of_key[keys[block_start + block_row]]
                part = open_part(part_path, len(model.classes))
                probabilities[block_row] = part.probabilities[part_row]
                error_texts[block_row] = part.errors[part_row]
                cached.weights[block_start + block_row] = part.weights[part_row]
            write(TableBlock(file_names[block], probabilities, error_texts))
            class_counts += _count_classes(
                probabilities[[error is None for error in error_texts]], model
            )
            n_failed += sum(error is not None for error in error_texts)
            if unit_names is not None:
                all_probabilities.append(probabilities)
    if unit_names is not None:
        joined = np.concatenate([np.empty((0, len(model.classes)), np.float32), *all_probabilities])
        table = unit_table(unit_names, joined, model.task_kind, model.classes)
        write_unit_table(table, parts_folder / "units.partial", table_format)
    if units is not None:
        table = weight_table(images, units, cached.weights)
        write_unit_table(table, parts_folder / "weights.partial", table_format)
    return PredictionSummary(len(file_names), 0, n_failed, _named_counts(class_counts, model))


def _count_classes(probabilities: npt.NDArray[np.float32], model: Model) -> npt.NDArray[np.int64]:
    if model.task_kind == "single":
        return np.bincount(probabilities.argmax(1), minlength=len(model.classes))
    if model.task_kind == "multi":
        return np.asarray((probabilities >= 0.5).sum(0), np.int64)
    return np.zeros(len(model.classes), np.int64)


def _named_counts(class_counts: npt.NDArray[np.int64], model: Model) -> dict[str, int]:
    if model.task_kind == "regression":
        return {}
    return dict(zip(model.classes, class_counts.tolist(), strict=True))


def _read_record(record_path: Path) -> dict[str, Any] | None:
    try:
        record = read_sealed_json(record_path.read_bytes())
        return record if {"failed", "counts"} <= set(record) else None
    # The record only saves work: without it, the images are predicted again.
    except (OSError, ValueError):
        return None
