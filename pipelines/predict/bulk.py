"""Predictions of many images, published part by part: a call that was killed is continued by the
next one.

Beside the table OUT stands OUT.parts/ while work is under way: one Parquet file per part, each
whole or not there, with the predictions of some images and what tells whether they are still the
same files. When every image has its prediction, OUT is put together in the order of the images,
OUT.json says what made it, and the parts go.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from headrace.cache.atomic_io import PARTIAL_SUFFIX, lease, publish_replace
from headrace.cache.errors import CacheError, HeadraceError
from headrace.cache.format.sealed import (
    SEAL,
    UNSEALED,
    check_seal,
    read_sealed_json,
    seal,
    sealed_json,
)
from headrace.cache.text import as_text
from headrace.extract.images.byte_ranges import locator_file
from headrace.extract.images.file_stamps import FileStamp, file_stamps, wait_until_settled
from headrace.extract.spec import Sample
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.console import make_console
from headrace.pipelines.environment import available_cores
from headrace.pipelines.models.cached_model import find_cached_model
from headrace.pipelines.models.from_features import Beside
from headrace.pipelines.models.model import Model, load_model
from headrace.pipelines.predict.known import known_contents
from headrace.pipelines.predict.tables import TableBlock, is_predictions, table_writer
from headrace.pipelines.predict.units import (
    UnitNames,
    is_unit_table,
    unit_table,
    units_path,
    write_unit_table,
)
from headrace.pipelines.recipe.side_columns import encode_side_columns
from headrace.pipelines.recipe.targets import DataError, empty_as_missing

# some seconds of a small network on one core: little is lost to a kill
PART_IMAGES = 256
# Starting worker processes takes some seconds each; fewer images than this are done sooner in this
# process.
_WORTH_WORKERS = 1024
_BLOCK = 4096  # rows of the table written at a time
_CACHED_IMAGES = 8192  # that need no network: features in memory at a time

# path, and the stamp of the file that was predicted; "" where there is no file
_Key = tuple[str, str]


class PredictionsThere(HeadraceError, FileExistsError):
    """The table is there already, and of something else."""


class PredictIncomplete(HeadraceError):
    """Some parts failed; the others are kept."""


@dataclass(frozen=True)
class PartJob:
    """Predict these images and publish one part."""

    model: str
    # The model's digest, so that no worker uses another one.
    digest: str
    samples: tuple[Sample, ...]
    keys: tuple[_Key, ...]
    part: str
    device: str = "cpu"
    threads: int = 1
    trust_code: tuple[str, ...] = ()  # as the caller's
    # (n, R) the side columns, and (n,) the units, that the model reads beside the images
    side_inputs: npt.NDArray[np.float32] | None = None
    units: npt.NDArray[np.str_] | None = None


@dataclass(frozen=True)
class PredictionSummary:
    """The counts that a call ends with."""

    images: int
    new: int  # predicted in this call
    failed: int
    # images per predicted class; of a multi-label task, per label
    counts: dict[str, int]
    cached: int = 0  # of `new`, those whose features were in the cache: no network ran


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
    """Predict what is left of `images` (columns `file`, `path`) and write the table `table_path` as
    csv, parquet or jsonl.

    cache_root: a cache in which images may have features; of these no network runs. unit_names: of
    the images, for a table of units beside that of the images (`units_path`).

    Every image has one row, in the order given; one that cannot be decoded has its reason in it.
    Raises PredictionsThere for a table of other images or another model, unless `force` is on, and
    for whatever `headrace predict` has not written there.
    """
    record_path = table_path.with_name(f"{table_path.name}.json")
    parts_folder = table_path.with_name(f"{table_path.name}.parts")
    _require_ours(table_path, record_path, parts_folder)
    unit_table_path = None if unit_names is None else units_path(table_path)
    if unit_table_path is not None:
        _require_our_units(unit_table_path)
    image_paths = images["path"].tolist()
    side_inputs, units = _side_inputs(model, images, console), _units(model, images)
    file_keys_in_order = file_keys(image_paths, side_inputs, units)
    record = {
        "model": str(model.path),
        "model_digest": model.digest,
        "images": len(images),
        "listing": hashlib.sha256(
            json.dumps([images["file"].tolist(), file_keys_in_order]).encode()
        ).hexdigest()[:24],
        "format": table_format,
        "headrace": importlib.metadata.version("headrace"),
    }
    if unit_names is not None:
        record["units"] = unit_names.digest
    is_whole = unit_table_path is None or unit_table_path.exists()
    if is_whole and not force and (done := _finished(table_path, record)) is not None:
        return done
    with _only_writer(table_path, console):
        # Another call may have written it meanwhile.
        is_whole = unit_table_path is None or unit_table_path.exists()
        if is_whole and not force and (done := _finished(table_path, record)) is not None:
            return done
        parts_folder.mkdir(parents=True, exist_ok=True)
        known_parts = _known_parts(parts_folder, model, is_final=False)
        rows = _missing_rows(file_keys_in_order, set(known_parts), units)
        beside = Beside(side_inputs, units)
        cached = _predict_cached(
            model, file_keys_in_order, cache_root, np.array(rows, np.intp), beside
        )
        left = [row for row in rows if not cached.is_known[row]]
        _predict_missing(
            model,
            [file_keys_in_order[row] for row in left],
            None if side_inputs is None else side_inputs[left],
            None if units is None else units[left],
            parts_folder,
            n_workers=n_workers,
            device=device,
            console=console,
        )
        summary = _assemble_table(
            model,
            images["file"].tolist(),
            file_keys_in_order,
            parts_folder,
            parts_folder / "table.partial",
            table_format,
            cached,
            unit_names,
        )
        summary = replace(summary, new=len(rows), cached=cached.count(rows))
        if unit_table_path is not None:
            os.replace(parts_folder / "units.partial", unit_table_path)
        os.replace(parts_folder / "table.partial", table_path)
        record |= {"failed": summary.failed, "counts": summary.counts}
        # By way of the folder of parts, with which the temporary of a killed call goes too.
        publish_replace(parts_folder / "record.partial", sealed_json(record, indent=2))
        os.replace(parts_folder / "record.partial", record_path)
        _remove_parts(parts_folder)
        return summary


def _finished(table_path: Path, record: Mapping[str, Any]) -> PredictionSummary | None:
    """Return the counts of a table that an earlier call has finished, None where there is none.

    Raises PredictionsThere for one of other images or another model.
    """
    parts_folder = table_path.with_name(f"{table_path.name}.parts")
    if not table_path.exists() or parts_folder.exists():
        return None
    earlier_record = _read_record(table_path.with_name(f"{table_path.name}.json"))
    if earlier_record is not None and {**earlier_record, **record} == earlier_record:
        return PredictionSummary(
            record["images"], 0, earlier_record["failed"], earlier_record["counts"]
        )
    raise PredictionsThere(
        f"{table_path} is there, and of other images, another model or another version. Give "
        "another name with --out, or --force to replace it"
    )


@contextlib.contextmanager
def _only_writer(table_path: Path, console: Console) -> Iterator[None]:
    """Keep other calls from a table for a while: two would write it over each other."""
    table_path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = table_path.with_name(f".{table_path.name}.lock")
    if lock_path.exists():
        text = f"note: waiting for the call that writes {table_path}, unless it was killed"
        console.print(text, soft_wrap=True)
    with lease(lock_path):
        yield


def _require_ours(table_path: Path, record_path: Path, parts_folder: Path) -> None:
    """Raise PredictionsThere unless what is at `table_path` and `record_path` is nothing, or of
    `headrace predict`: a name is soon mistyped.
    """
    # A damaged record counts too.
    has_our_record = record_path.is_file() and b'"model_digest"' in record_path.read_bytes()
    advice = (
        "It is not replaced, with --force neither. Give another name with --out, such as "
        f"{_free_name(table_path)}, or move it away"
    )
    if table_path.exists() and not table_path.is_file():
        raise PredictionsThere(f"{table_path} is neither a table nor a name that is free. {advice}")
    if record_path.exists() and not has_our_record:
        raise PredictionsThere(
            f"{record_path} is there, where headrace predict keeps what it knows of "
            f"{table_path.name}, and is not as it writes it. {advice}"
        )
    # Where a call was killed as it ended, the table is there, and its record not yet.
    if table_path.exists() and not is_predictions(
        table_path, allow_values=has_our_record or any(parts_folder.glob("*.parquet"))
    ):
        raise PredictionsThere(
            f"{table_path} is there, and is no table of predictions: headrace predict did not "
            f"write it. {advice}"
        )


def _require_our_units(unit_table_path: Path) -> None:
    if unit_table_path.exists() and not (
        unit_table_path.is_file() and is_unit_table(unit_table_path)
    ):
        raise PredictionsThere(
            f"{unit_table_path} is there, where the predictions of units go, and is no such table: "
            "it is not replaced. Give another name with --out, or move it away"
        )


def _free_name(table_path: Path) -> Path:
    candidate_paths = (
        table_path.with_name(f"predictions{number or ''}{table_path.suffix or '.csv'}")
        for number in count()
    )
    return next(candidate_path for candidate_path in candidate_paths if not candidate_path.exists())


def _remove_parts(parts_folder: Path) -> None:
    """Remove what calls of predict have written there, and the folder if nothing of anybody else is
    in it.
    """
    for part_file in parts_folder.iterdir():
        if re.fullmatch(
            rf"[0-9a-f]{{24}}\.parquet|(table|record|units)\.partial|\..*{re.escape(PARTIAL_SUFFIX)}",
            part_file.name,
        ):
            part_file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        parts_folder.rmdir()


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
    """Write predictions as `predict_table` does, to an open text stream, a batch at a time; nothing
    is kept, nothing can be resumed.
    """
    file_names, image_paths = images["file"].tolist(), images["path"].tolist()
    side_inputs = _side_inputs(model, images, make_console(stderr=True))
    beside = Beside(side_inputs, _units(model, images))
    keys = [(path, "") for path in image_paths] if cache_root is None else file_keys(image_paths)
    cached = _predict_cached(model, keys, cache_root, np.arange(len(keys)), beside)
    probabilities, error_texts = cached.probabilities, cached.errors
    missing = np.flatnonzero(~cached.is_known)
    n_failed, class_counts, n_written = 0, np.zeros(len(model.classes), np.int64), 0
    with (
        table_writer(stream, table_format, model.task_kind, model.classes) as write,
        show_progress(console, "predict", len(file_names), "images") as advance,
    ):
        for n_predicted in _predict_rows(
            model, image_paths, missing, probabilities, error_texts, beside.take(missing), device
        ):
            # Rows before the first one that is still missing are ready.
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
    probabilities: npt.NDArray[np.float32],
    error_texts: list[str | None],
    beside: Beside,
    device: str,
) -> Iterator[int]:
    """Predict images by their rows, and fill these in; yield how many rows are done, batch by
    batch. beside: of these rows.
    """
    if not len(rows):
        yield 0
        return
    from headrace.pipelines.models.images import open_engine, predict_samples

    samples = _path_samples(image_paths[row] for row in rows)
    n_done = 0
    engine, n_threads = open_engine(model, device), available_cores()
    for predicted in predict_samples(engine, samples, n_threads, beside):
        probabilities[rows[predicted.rows]] = predicted.probabilities
        for row, reason in predicted.failed:
            error_texts[rows[row]] = reason
        # Batches come in order and whole.
        n_done += len(predicted.rows) + len(predicted.failed)
        yield n_done


def predict_part(job: PartJob) -> int:
    """Predict the images of a part and publish it; returns how many failed. What a worker runs."""
    from headrace.pipelines.models.images import predict_samples

    _set_threads(job.threads)
    engine = _open_model_engine(job.model, job.digest, job.device, job.trust_code)
    probabilities = np.full((len(job.samples), len(engine.model.classes)), np.nan, np.float32)
    error_texts: list[str | None] = [None] * len(job.samples)
    is_unread = np.zeros(len(job.samples), np.bool_)
    beside = Beside(job.side_inputs, job.units)
    for predicted in predict_samples(engine, job.samples, job.threads, beside):
        probabilities[predicted.rows] = predicted.probabilities
        for row, reason in predicted.failed:
            error_texts[row] = reason
        is_unread[list(predicted.unread)] = True
    publish_replace(Path(job.part), _part_bytes(job, probabilities, error_texts, is_unread))
    return sum(error is not None for error in error_texts)


def _part_bytes(
    job: PartJob,
    probabilities: npt.NDArray[np.float32],
    error_texts: list[str | None],
    is_unread: npt.NDArray[np.bool_],
) -> bytes:
    """Return a part as a Parquet file with a seal: Parquet's pages have no checksum, and one digit
    would be believed.
    """
    table = pa.table(
        {
            "path": pa.array([_path_bytes(path) for path, _ in job.keys], pa.binary()),
            "stamp": [stamp for _, stamp in job.keys],
            "error": pa.array(error_texts, pa.string()),
            "unread": is_unread,
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(probabilities.reshape(-1)), probabilities.shape[1]
            ),
        }
    ).replace_schema_metadata({"headrace": job.digest, SEAL: UNSEALED})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return seal(buffer.getvalue())


def _side_inputs(
    model: Model, images: pd.DataFrame, console: Console
) -> npt.NDArray[np.float32] | None:
    """Return (N, R) what the model reads beside the images; None where it reads them alone."""
    if not model.side_columns:
        return None
    side, notes = encode_side_columns(images, model.side_columns)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    return side.as_inputs()


def _units(model: Model, images: pd.DataFrame) -> npt.NDArray[np.str_] | None:
    """Return the unit (N,) of each image, where the model predicts them together, else None."""
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
    """Return the column with the units of images, where the model predicts them together."""
    rule = model.unit_rule if model.takes_units else None
    return None if rule is None else rule.column


def _missing_rows(
    keys: Sequence[_Key], known: Collection[_Key], units: npt.NDArray[np.str_] | None
) -> list[int]:
    """Return the rows to predict, each key once; of a unit all or none, next to one another."""
    first_row: dict[Any, int] = {}
    for row, key in enumerate(keys):
        first_row.setdefault(key if units is None else (key, units[row]), row)
    if units is None:
        return [row for key, row in first_row.items() if key not in known]
    missing_units = dict.fromkeys(
        units[row] for (key, _), row in first_row.items() if key not in known
    )
    place = {unit: number for number, unit in enumerate(missing_units)}
    rows = [row for row in first_row.values() if units[row] in place]
    return sorted(rows, key=lambda row: place[units[row]])


def file_keys(
    image_paths: Sequence[str],
    side_inputs: npt.NDArray[np.float32] | None = None,
    units: npt.NDArray[np.str_] | None = None,
) -> list[_Key]:
    """Return what tells whether a file is still the one that was predicted: its path, and its stamp
    (see FileStamp) with a digest of what the model reads beside it: its side columns, and all
    images of its unit.

    Files written a moment ago are waited for, some seconds at most, so that a change after this
    call has another stamp.
    """
    # Not the content hash: it would read every image of a finished part again, a stamp costs a
    # stat.
    stamps_of_files = file_stamps(map(locator_file, image_paths))
    wait_until_settled(stamp for stamp in stamps_of_files if isinstance(stamp, FileStamp))
    stamp_texts = [stamp.text if isinstance(stamp, FileStamp) else "" for stamp in stamps_of_files]
    if side_inputs is not None:
        digests = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in side_inputs]
        stamp_texts = [
            f"{stamp}|{digest}" for stamp, digest in zip(stamp_texts, digests, strict=True)
        ]
    keys = list(zip(image_paths, stamp_texts, strict=True))
    if units is None:
        return keys
    members: dict[str, list[_Key]] = {}
    for unit, key in zip(units.tolist(), keys, strict=True):
        members.setdefault(unit, []).append(key)
    digest_of_unit = {
        unit: hashlib.sha256(json.dumps([unit, sorted(unit_keys)]).encode()).hexdigest()[:16]
        for unit, unit_keys in members.items()
    }
    return [
        (path, f"{stamp}|{digest_of_unit[unit]}")
        for (path, stamp), unit in zip(keys, units.tolist(), strict=True)
    ]


def _path_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")  # names of files need not be UTF-8


@dataclass(frozen=True)
class _FromCache:
    """Predictions of N images, of those whose features are cached: cheap enough to make again."""

    probabilities: npt.NDArray[np.float32]  # (N, C), nan elsewhere
    errors: list[str | None]
    is_known: npt.NDArray[np.bool_]  # (N,) predicted, or recorded as failed

    def count(self, rows: Iterable[int]) -> int:
        """Return how many of some images had features."""
        return sum(bool(self.is_known[row]) and self.errors[row] is None for row in rows)


def _predict_cached(
    model: Model,
    keys: Sequence[_Key],
    cache_root: Path | None,
    rows: npt.NDArray[np.intp],
    beside: Beside,
) -> _FromCache:
    """Predict those of some rows that have features in a cache, or are recorded there as failed; of
    a unit that is predicted as a whole, all or none. beside: of all rows.
    """
    probabilities = np.full((len(keys), len(model.classes)), np.nan, np.float32)
    error_texts: list[str | None] = [None] * len(keys)
    is_known = np.zeros(len(keys), np.bool_)
    predictions = _FromCache(probabilities, error_texts, is_known)
    if cache_root is None or not len(rows):
        return predictions
    cached_model = find_cached_model(model, cache_root)
    if cached_model is None:
        return predictions
    files = [(keys[row][0], keys[row][1].partition("|")[0]) for row in rows]
    hashes = known_contents(files, cache_root)
    reasons = [cached_model.failures.get(content_hash) for content_hash in hashes.astype(str)]
    has_failed = np.array([reason is not None for reason in reasons], np.bool_)
    has_features = cached_model.has_features(hashes) & ~has_failed
    is_done = has_features | has_failed
    units = None if beside.units is None else beside.units[rows]
    if units is not None:
        is_done &= ~np.isin(units, units[~is_done])
    found = np.flatnonzero(has_features & is_done)
    if units is not None:
        found = found[np.argsort(units[found], kind="stable")]
    try:
        for block in part_slices(
            len(found), _CACHED_IMAGES, None if units is None else units[found]
        ):
            some = found[block]
            probabilities[rows[some]] = cached_model.predict(hashes[some], beside.take(rows[some]))
    except CacheError as error:
        raise CacheError(f"{error}. To predict without the cache: --no-cache") from error
    is_known[rows[is_done]] = True
    for place in np.flatnonzero(has_failed & is_done):
        error_texts[rows[place]] = reasons[place]
    _copy_repeated(keys, rows, predictions)
    return predictions


def _copy_repeated(
    keys: Sequence[_Key], rows: npt.NDArray[np.intp], predictions: _FromCache
) -> None:
    """Give images that are named several times, of which `rows` holds the first, its prediction."""
    if len(rows) == len(keys):
        return
    row_of_key = {keys[row]: row for row in rows if predictions.is_known[row]}
    for row, key in enumerate(keys):
        first_row = row_of_key.get(key)
        if first_row is not None and first_row != row:
            predictions.probabilities[row] = predictions.probabilities[first_row]
            predictions.errors[row] = predictions.errors[first_row]
            predictions.is_known[row] = True


def _predict_missing(
    model: Model,
    missing_keys: Sequence[_Key],
    side_inputs: npt.NDArray[np.float32] | None,
    units: npt.NDArray[np.str_] | None,
    parts_folder: Path,
    *,
    n_workers: int | None,
    device: str,
    console: Console,
) -> None:
    if not missing_keys:
        return
    n_cores = n_workers or available_cores()
    uses_workers = device == "cpu" and n_cores > 1 and len(missing_keys) >= _WORTH_WORKERS
    # Every worker has something to do, and the last part is not waited for long.
    part_size = (
        min(PART_IMAGES, max(16, -(-len(missing_keys) // (2 * n_cores))))
        if uses_workers
        else PART_IMAGES
    )
    jobs = []
    for part in part_slices(len(missing_keys), part_size, units):
        keys = tuple(missing_keys[part])
        part_name = hashlib.sha256(json.dumps([model.digest, keys]).encode()).hexdigest()[:24]
        part_path = str((parts_folder / f"{part_name}.parquet").absolute())
        n_threads = 1 if uses_workers else n_cores
        model_path = str(model.path.absolute())
        samples = tuple(_path_samples(key[0] for key in keys))
        jobs.append(
            PartJob(
                model_path,
                model.digest,
                samples,
                keys,
                part_path,
                device,
                n_threads,
                model.trust_code,
                None if side_inputs is None else side_inputs[part],
                None if units is None else units[part],
            )
        )
    with show_progress(console, "predict", len(missing_keys), "images") as advance:
        if not uses_workers:
            for job in jobs:
                n_failed = predict_part(job)
                advance(len(job.samples), {"failed": n_failed})
            return
        # imports Dask, which predicting from a cache does without
        from headrace.pipelines.cluster.clients import local_client
        from headrace.pipelines.cluster.submit import run_tasks

        failure_reasons = []
        with ExitStack() as stack:
            client = stack.enter_context(
                local_client(min(n_cores, len(jobs)), module_names=[__name__])
            )
            keyed_jobs = ((f"predict-{Path(job.part).stem}", job) for job in jobs)
            outcomes = stack.enter_context(closing(run_tasks(client, predict_part, keyed_jobs)))
            for outcome in outcomes:
                failure_reasons += [outcome.error] if outcome.error else []
                advance(len(outcome.job.samples), {"failed": outcome.result or 0})
    if failure_reasons:
        raise PredictIncomplete(
            f"{len(failure_reasons):,} of {len(jobs):,} parts failed; the others are kept, and the "
            f"same command tries these again. The first reason: {failure_reasons[0]}"
        )


def part_slices(n_rows: int, part_size: int, units: npt.NDArray[np.str_] | None) -> Iterator[slice]:
    """Yield stretches of rows, each a part: of about so many, and no unit in two of them."""
    ends = np.arange(1, n_rows + 1)
    if units is not None:
        ends = np.append(np.flatnonzero(units[1:] != units[:-1]) + 1, n_rows)
    start = 0
    while start < n_rows:
        end = min(int(np.searchsorted(ends, start + part_size)), len(ends) - 1)
        stop = int(ends[end])
        yield slice(start, stop)
        start = stop


def _known_parts(
    parts_folder: Path, model: Model, *, is_final: bool
) -> dict[_Key, tuple[Path, int]]:
    """Return the part and the row that hold the prediction of each file.

    A file that could not be read is tried again, unless `is_final`.
    """
    part_of_key: dict[_Key, tuple[Path, int]] = {}
    for part_path in sorted(parts_folder.glob("*.parquet")):
        try:
            data = part_path.read_bytes()
            check_seal(data)
            parquet_file = pq.ParquetFile(io.BytesIO(data))
            if (parquet_file.schema_arrow.metadata or {}).get(b"headrace") != model.digest.encode():
                continue  # of another model
            table = parquet_file.read(["path", "stamp", "unread"])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            continue  # damaged: its images are predicted again
        table_columns = (table[name].to_pylist() for name in table.column_names)
        for row, (path, stamp, unread) in enumerate(zip(*table_columns, strict=True)):
            key = (path.decode("utf-8", "surrogatepass"), stamp)
            if not unread or (is_final and key not in part_of_key):
                part_of_key[key] = (part_path, row)
    return part_of_key


def _assemble_table(
    model: Model,
    file_names: list[str],
    file_keys: list[_Key],
    parts_folder: Path,
    table_path: Path,
    table_format: str,
    cached: _FromCache,
    unit_names: UnitNames | None,
) -> PredictionSummary:
    """Put the table together at `table_path`, and beside it the table of units, `units.partial`."""
    all_probabilities = []  # for the units alone
    part_of_key = _known_parts(parts_folder, model, is_final=True)
    open_parts: OrderedDict[Path, tuple[npt.NDArray[np.float32], list[str | None]]] = OrderedDict()
    n_failed, class_counts = 0, np.zeros(len(model.classes), np.int64)
    with table_writer(table_path, table_format, model.task_kind, model.classes) as write:
        for block_start in range(0, len(file_names), _BLOCK):
            block = slice(block_start, block_start + _BLOCK)
            probabilities, error_texts = cached.probabilities[block], cached.errors[block]
            for block_row in np.flatnonzero(~cached.is_known[block]):
                part_path, part_row = part_of_key[file_keys[block_start + block_row]]
                part_probabilities, part_errors = _open_part(
                    open_parts, part_path, len(model.classes)
                )
                probabilities[block_row] = part_probabilities[part_row]
                error_texts[block_row] = part_errors[part_row]
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
        write_unit_table(table, table_path.with_name("units.partial"), table_format)
    return PredictionSummary(len(file_names), 0, n_failed, _named_counts(class_counts, model))


def _open_part(
    open_parts: "OrderedDict[Path, tuple[npt.NDArray[np.float32], list[str | None]]]",
    part_path: Path,
    n_outputs: int,
) -> tuple[npt.NDArray[np.float32], list[str | None]]:
    if part_path not in open_parts:
        table = pq.read_table(part_path, columns=["probabilities", "error"])
        flat_values = (
            table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        )
        open_parts[part_path] = (flat_values.reshape(-1, n_outputs), table["error"].to_pylist())
        # Images come in the order in which they were predicted, or nearly so.
        if len(open_parts) > 64:
            open_parts.popitem(last=False)
    return open_parts[part_path]


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


def _path_samples(paths: Iterable[str]) -> list[Sample]:
    return [Sample(path, path, "") for path in paths]


@lru_cache(maxsize=1)
def _open_model_engine(path: str, digest: str, device: str, trust_code: tuple[str, ...]) -> Any:
    from headrace.pipelines.models.images import open_engine

    model = load_model(path, trust_code=trust_code)
    if model.digest != digest:
        raise PredictIncomplete(f"{path} has changed since this call began: call again")
    return open_engine(model, device)


def _set_threads(n_threads: int) -> None:
    import torch

    torch.set_num_threads(n_threads)


def _read_record(record_path: Path) -> dict[str, Any] | None:
    try:
        record = read_sealed_json(record_path.read_bytes())
        return record if {"failed", "counts"} <= set(record) else None
    except (OSError, ValueError):
        return None
