"""Parts of a bulk prediction, in files that are complete or absent.

A worker predicts the images of one part and publishes it; the next call reads which images have a
prediction and are still the same files.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from headrace.cache.atomic_io import PARTIAL_SUFFIX, publish_replace
from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.file_stamps import FileStamp, file_stamps, wait_until_settled
from headrace.cache.format.sealed import SEAL, UNSEALED, check_seal, seal
from headrace.extract.cores import available_cores
from headrace.extract.images.locators import locator_file
from headrace.extract.spec import Sample
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.models.from_features import RowColumns
from headrace.pipelines.models.model import Model, load_model

# Some seconds of a small network on one core, so that a kill loses little.
PART_IMAGES = 256
# Worker processes take some seconds to start; fewer images than this are done sooner in this
# process.
WORTH_WORKERS = 1024

# path, and stamp of the file that was predicted ("" if there is no file); see `file_keys`
FileKey = tuple[str, str]


@dataclass(frozen=True)
class PartJob:
    """The images of one part, and what a worker needs to predict them."""

    model: str  # path of its directory
    digest: str  # of the model, so that a worker refuses another one
    samples: tuple[Sample, ...]
    keys: tuple[FileKey, ...]  # of `samples`
    part_path: str  # the file to publish
    device: str = "cpu"
    threads: int = 1
    trust_code: tuple[str, ...] = ()
    row_columns: RowColumns = field(default_factory=RowColumns)  # of these images


class PartContents(NamedTuple):
    """The contents of a part with n images."""

    probabilities: npt.NDArray[np.float32]  # (n, C)
    errors: list[str | None]
    weights: npt.NDArray[np.float32]  # (n,) in the predictions of units, nan where there are none


def file_keys(
    image_paths: Sequence[str],
    row_columns: RowColumns,
) -> list[FileKey]:
    """Return for each image its path and a stamp, by which a later call knows whether a prediction
    is still of the same file.

    The stamp is that of the file (see FileStamp), and a digest of what the model reads beside it:
    its side columns, and all images of its unit. Waits some seconds for files that were written a
    moment ago.
    """
    # A content hash would be safer, but every image of a finished part would be read again; a stamp
    # costs one stat.
    stamps_of_files = file_stamps(map(locator_file, image_paths))
    # So that a change after this call gives another stamp.
    wait_until_settled(stamp for stamp in stamps_of_files if isinstance(stamp, FileStamp))
    stamp_texts = [stamp.text if isinstance(stamp, FileStamp) else "" for stamp in stamps_of_files]
    if row_columns.side_inputs is not None:
        stamp_texts = [
            f"{stamp}|{hashlib.sha256(row.tobytes()).hexdigest()[:16]}"
            for stamp, row in zip(stamp_texts, row_columns.side_inputs, strict=True)
        ]
    keys = list(zip(image_paths, stamp_texts, strict=True))
    if row_columns.units is None:
        return keys
    units = row_columns.units.tolist()
    members: dict[str, list[FileKey]] = {}
    for unit, key in zip(units, keys, strict=True):
        members.setdefault(unit, []).append(key)
    digest_of_unit = {
        unit: hashlib.sha256(json.dumps([unit, sorted(unit_keys)]).encode()).hexdigest()[:16]
        for unit, unit_keys in members.items()
    }
    return [
        (path, f"{stamp}|{digest_of_unit[unit]}")
        for (path, stamp), unit in zip(keys, units, strict=True)
    ]


def missing_rows(
    keys: Sequence[FileKey], known_keys: Collection[FileKey], units: npt.NDArray[Any] | None
) -> list[int]:
    """Return the rows to predict, each key once; rows of a unit all or none, side by side."""
    first_row: dict[Any, int] = {}
    for row, key in enumerate(keys):
        first_row.setdefault(key if units is None else (key, units[row]), row)
    if units is None:
        return [row for key, row in first_row.items() if key not in known_keys]
    # A unit is predicted from all its images, and so in one part.
    missing_units = dict.fromkeys(
        units[row] for (key, _), row in first_row.items() if key not in known_keys
    )
    unit_position = {unit: position for position, unit in enumerate(missing_units)}
    rows = [row for row in first_row.values() if units[row] in unit_position]
    return sorted(rows, key=lambda row: unit_position[units[row]])


def predict_missing(
    model: Model,
    missing_keys: Sequence[FileKey],
    row_columns: RowColumns,
    parts_folder: Path,
    *,
    n_workers: int | None,
    device: str,
    console: Console,
) -> None:
    """Predict the images of these keys, on workers if they are many, and publish parts.

    row_columns: of the keys. Raises HeadraceError if a part failed.
    """
    if not missing_keys:
        return
    n_cores = n_workers or available_cores()
    uses_workers = device == "cpu" and n_cores > 1 and len(missing_keys) >= WORTH_WORKERS
    part_size = PART_IMAGES
    if uses_workers:
        # At least two parts for each worker, so that none waits long for the last part.
        part_size = min(PART_IMAGES, max(16, ceil(len(missing_keys) / (2 * n_cores))))
    jobs = []
    for rows in part_slices(len(missing_keys), part_size, row_columns.units):
        keys = tuple(missing_keys[rows])
        part_name = hashlib.sha256(json.dumps([model.digest, keys]).encode()).hexdigest()[:24]
        jobs.append(
            PartJob(
                # Absolute, because workers have a working directory of their own.
                model=str(model.path.absolute()),
                digest=model.digest,
                samples=tuple(path_samples(path for path, _ in keys)),
                keys=keys,
                part_path=str((parts_folder / f"{part_name}.parquet").absolute()),
                device=device,
                # On a CPU one process per core with one thread each is fastest.
                threads=1 if uses_workers else n_cores,
                trust_code=model.trust_code,
                row_columns=row_columns.take(rows),
            )
        )
    with show_progress(console, "predict", len(missing_keys), "images") as advance:
        if not uses_workers:
            for job in jobs:
                n_failed = predict_part(job)
                advance(len(job.samples), {"failed": n_failed})
            return
        # Imported here, because they import Dask, which prediction from a cache does not need.
        from headrace.pipelines.cluster.clients import local_client
        from headrace.pipelines.cluster.submit import run_tasks

        failure_reasons = []
        with ExitStack() as stack:
            client = stack.enter_context(
                local_client(min(n_cores, len(jobs)), module_names=[__name__])
            )
            keyed_jobs = ((f"predict-{Path(job.part_path).stem}", job) for job in jobs)
            outcomes = stack.enter_context(closing(run_tasks(client, predict_part, keyed_jobs)))
            for outcome in outcomes:
                failure_reasons += [outcome.error] if outcome.error else []
                advance(len(outcome.job.samples), {"failed": outcome.result or 0})
    if failure_reasons:
        raise HeadraceError(
            f"{len(failure_reasons):,} of {count_text(len(jobs), 'part')} failed; the others are "
            f"kept, and the same command tries these again. The first reason: {failure_reasons[0]}"
        )


def part_slices(n_rows: int, part_size: int, units: npt.NDArray[Any] | None) -> Iterator[slice]:
    """Yield slices of 0 to n_rows of about part_size rows, none of which divides a unit.

    units: (n_rows,) equal values next to one another; None: single rows.
    """
    ends = np.arange(1, n_rows + 1)
    if units is not None:
        ends = np.append(np.flatnonzero(units[1:] != units[:-1]) + 1, n_rows)
    start = 0
    while start < n_rows:
        end_index = min(int(np.searchsorted(ends, start + part_size)), len(ends) - 1)
        stop = int(ends[end_index])
        yield slice(start, stop)
        start = stop


def predict_part(job: PartJob) -> int:
    """Predict the images of a part and publish it; return how many failed. Workers run this."""
    import torch

    from headrace.pipelines.models.images import predict_samples

    torch.set_num_threads(job.threads)
    engine = _open_model_engine(job.model, job.digest, job.device, job.trust_code)
    probabilities = np.full((len(job.samples), len(engine.model.classes)), np.nan, np.float32)
    error_texts: list[str | None] = [None] * len(job.samples)
    is_unread = np.zeros(len(job.samples), np.bool_)
    weights = np.full(len(job.samples), np.nan, np.float32)
    for predicted in predict_samples(engine, job.samples, job.threads, job.row_columns):
        probabilities[predicted.rows] = predicted.probabilities
        if predicted.weights is not None:
            weights[predicted.rows] = predicted.weights
        for row, reason in predicted.failed:
            error_texts[row] = reason
        is_unread[list(predicted.unread)] = True
    publish_replace(
        Path(job.part_path), _part_bytes(job, probabilities, weights, error_texts, is_unread)
    )
    return sum(error is not None for error in error_texts)


def _part_bytes(
    job: PartJob,
    probabilities: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    error_texts: list[str | None],
    is_unread: npt.NDArray[np.bool_],
) -> bytes:
    table = pa.table(
        {
            # As bytes, because names of files need not be UTF-8.
            "path": pa.array(
                [path.encode("utf-8", "surrogatepass") for path, _ in job.keys], pa.binary()
            ),
            "stamp": [stamp for _, stamp in job.keys],
            "error": pa.array(error_texts, pa.string()),
            "unread": is_unread,
            "weight": weights,
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(probabilities.reshape(-1)), probabilities.shape[1]
            ),
        }
    ).replace_schema_metadata({"headrace": job.digest, SEAL: UNSEALED})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    # Parquet's own pages have no checksum here.
    return seal(buffer.getvalue())


def known_parts(
    parts_folder: Path, model: Model, *, is_final: bool
) -> dict[FileKey, tuple[Path, int]]:
    """Return the part and the row in it with the prediction of each file; of files that could not
    be read only if `is_final`.
    """
    part_of_key: dict[FileKey, tuple[Path, int]] = {}
    for part_path in sorted(parts_folder.glob("*.parquet")):
        try:
            data = part_path.read_bytes()
            check_seal(data)
            parquet_file = pq.ParquetFile(io.BytesIO(data))
            if (parquet_file.schema_arrow.metadata or {}).get(b"headrace") != model.digest.encode():
                continue  # of another model
            if "weight" not in parquet_file.schema_arrow.names:
                continue  # of an earlier version
            table = parquet_file.read(["path", "stamp", "unread"])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            continue  # damaged: its images are predicted again
        columns = (column.to_pylist() for column in table.columns)
        for row, (path, stamp, unread) in enumerate(zip(*columns, strict=True)):
            key = (path.decode("utf-8", "surrogatepass"), stamp)
            # A file that could not be read is tried again by the next call.
            if not unread or (is_final and key not in part_of_key):
                part_of_key[key] = (part_path, row)
    return part_of_key


def read_part(part_path: Path, n_outputs: int) -> PartContents:
    """Return the contents of a part."""
    table = pq.read_table(part_path, columns=["probabilities", "error", "weight"])
    values = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    errors, weights = table["error"].to_pylist(), table["weight"].to_numpy()
    return PartContents(values.reshape(-1, n_outputs), errors, weights)


def remove_parts(parts_folder: Path) -> None:
    """Remove what calls of predict wrote there, and the folder if nothing else is in it."""
    for part_file in parts_folder.iterdir():
        if re.fullmatch(
            rf"[0-9a-f]{{24}}\.parquet|(table|record|units|weights)\.partial|\..*{re.escape(PARTIAL_SUFFIX)}",
            part_file.name,
        ):
            part_file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        parts_folder.rmdir()


def path_samples(paths: Iterable[str]) -> list[Sample]:
    return [Sample(path, path, "") for path in paths]


# Once for all parts that a worker process predicts.
@lru_cache(maxsize=1)
def _open_model_engine(path: str, digest: str, device: str, trust_code: tuple[str, ...]) -> Any:
    from headrace.pipelines.models.images import open_engine

    model = load_model(path, trust_code=trust_code)
    # The parts of two models must not be joined in one table.
    if model.digest != digest:
        raise HeadraceError(f"{path} has changed since this call began: call again")
    return open_engine(model, device)
