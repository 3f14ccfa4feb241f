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
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
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

from headrace.cache.atomic_io import PARTIAL_SUFFIX, publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import (
    SEAL,
    UNSEALED,
    check_seal,
    read_sealed_json,
    seal,
    sealed_json,
)
from headrace.extract.images.byte_ranges import locator_file
from headrace.extract.images.file_stamps import FileStamp, file_stamps, wait_until_settled
from headrace.extract.spec import Sample
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.progress import show_progress
from headrace.pipelines.cluster.submit import run_tasks
from headrace.pipelines.environment import available_cores
from headrace.pipelines.models.model import Model, load_model
from headrace.pipelines.predict.tables import Block, is_predictions, table_writer

PART_IMAGES = 256  # some seconds of a small network on one core: little is lost to a kill
# Starting worker processes takes some seconds each; fewer images than this are done sooner in this
# process.
_WORTH_WORKERS = 1024
_BLOCK = 4096  # rows of the table written at a time

_Key = tuple[
    str, str
]  # path, and the stamp of the file that was predicted; "" where there is no file


class PredictionsThere(HeadraceError, FileExistsError):
    """The table is there already, and of something else."""


class PredictIncomplete(HeadraceError):
    """Some parts failed; the others are kept."""


@dataclass(frozen=True)
class PartJob:
    """Predict these images and publish one part."""

    model: str
    digest: str  # of the model, so that no worker uses another one
    samples: tuple[Sample, ...]
    keys: tuple[_Key, ...]
    part: str
    device: str = "cpu"
    threads: int = 1
    trust_code: tuple[str, ...] = ()  # as the caller's


@dataclass(frozen=True)
class Summary:
    """What a call ended with."""

    images: int
    new: int  # predicted in this call
    failed: int
    counts: dict[str, int]  # images per predicted class; of a multi-label task, per label


def predict_table(
    model: Model,
    images: pd.DataFrame,
    out: Path,
    kind: str,
    *,
    force: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    console: Console,
) -> Summary:
    """Predict what is left of `images` (columns `file`, `path`) and write the table `out` as csv,
    parquet or jsonl.

    Every image has one row, in the order given; one that cannot be decoded has its reason in it.
    Raises PredictionsThere for a table of other images or another model, unless `force` is on, and
    for whatever `headrace predict` has not written there.
    """
    about = out.with_name(f"{out.name}.json")
    parts = out.with_name(f"{out.name}.parts")
    _require_ours(out, about, parts)
    paths = images["path"].tolist()
    keys = file_keys(paths)
    record = {
        "model": str(model.path),
        "model_digest": model.digest,
        "images": len(images),
        "listing": hashlib.sha256(json.dumps([images["file"].tolist(), keys]).encode()).hexdigest()[
            :24
        ],
        "format": kind,
        "headrace": importlib.metadata.version("headrace"),
    }
    if out.exists() and not force and not parts.exists():
        if (before := _read_record(about)) is not None and {**before, **record} == before:
            return Summary(len(images), 0, before["failed"], before["counts"])
        raise PredictionsThere(
            f"{out} is there, and of other images, another model or another version. Give another "
            "name with --out, or --force to replace it"
        )
    parts.mkdir(parents=True, exist_ok=True)
    done = _known(parts, model, final=False)
    left = list(dict.fromkeys(key for key in keys if key not in done))
    _predict(model, left, parts, workers=workers, device=device, console=console)
    summary = _assemble(
        model, images["file"].tolist(), keys, parts, parts / "table.partial", kind, new=len(left)
    )
    os.replace(parts / "table.partial", out)
    record |= {"failed": summary.failed, "counts": summary.counts}
    # By way of the folder of parts, with which the temporary of a killed call goes too.
    publish_replace(parts / "record.partial", sealed_json(record, indent=2))
    os.replace(parts / "record.partial", about)
    _remove_parts(parts)
    return summary


def _require_ours(out: Path, about: Path, parts: Path) -> None:
    """Raises PredictionsThere unless what is at `out` and `about` is nothing, or of `headrace
    predict`: a name is soon mistyped.
    """
    recorded = (
        about.is_file() and b'"model_digest"' in about.read_bytes()
    )  # also one that is damaged
    elsewhere = (
        "It is not replaced, with --force neither. Give another name with --out, such as "
        f"{_free_name(out)}, or move it away"
    )
    if out.exists() and not out.is_file():
        raise PredictionsThere(f"{out} is neither a table nor a name that is free. {elsewhere}")
    if about.exists() and not recorded:
        raise PredictionsThere(
            f"{about} is there, where headrace predict keeps what it knows of {out.name}, and is "
            f"not as it writes it. {elsewhere}"
        )
    # Where a call was killed as it ended, the table is there, and its record not yet.
    if out.exists() and not is_predictions(out, values=recorded or any(parts.glob("*.parquet"))):
        raise PredictionsThere(
            f"{out} is there, and is no table of predictions: headrace predict did not write it. "
            f"{elsewhere}"
        )


def _free_name(out: Path) -> Path:
    names = (
        out.with_name(f"predictions{number or ''}{out.suffix or '.csv'}") for number in count()
    )
    return next(name for name in names if not name.exists())


def _remove_parts(parts: Path) -> None:
    """Remove what calls of predict have written there, and the folder if nothing of anybody else is
    in it.
    """
    for file in parts.iterdir():
        if re.fullmatch(
            rf"[0-9a-f]{{24}}\.parquet|(table|record)\.partial|\..*{re.escape(PARTIAL_SUFFIX)}",
            file.name,
        ):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        parts.rmdir()


def predict_stream(
    model: Model,
    images: pd.DataFrame,
    stream: IO[str],
    kind: str,
    *,
    device: str = "cpu",
    console: Console,
) -> Summary:
    """As `predict_table`, to an open text stream, a batch at a time; nothing is kept, nothing can
    be resumed.
    """
    from headrace.pipelines.models.images import open_engine, predict_samples

    files = images["file"].tolist()
    failures, counts = 0, np.zeros(len(model.classes), np.int64)
    start = 0
    with (
        table_writer(stream, kind, model.task_kind, model.classes) as write,
        show_progress(console, "predict", len(files), "images") as advance,
    ):
        threads = available_cores()
        for predicted in predict_samples(
            open_engine(model, device), _samples(images["path"]), threads
        ):
            errors = dict(predicted.failed)
            rows = sorted([*predicted.rows, *errors])
            block = np.full((len(rows), len(model.classes)), np.nan, np.float32)
            place = {row: number for number, row in enumerate(rows)}
            block[[place[row] for row in predicted.rows]] = predicted.probabilities
            assert rows == list(range(start, start + len(rows)))  # batches come in order and whole
            start += len(rows)
            write(Block([files[row] for row in rows], block, [errors.get(row) for row in rows]))
            counts += _count(predicted.probabilities, model)
            failures += len(errors)
            advance(len(rows))
    return Summary(len(files), len(files), failures, _named(counts, model))


def predict_part(job: PartJob) -> int:
    """Predict the images of a part and publish it; returns how many failed. What a worker runs."""
    from headrace.pipelines.models.images import predict_samples

    _set_threads(job.threads)
    engine = _engine(job.model, job.digest, job.device, job.trust_code)
    found = np.full((len(job.samples), len(engine.model.classes)), np.nan, np.float32)
    errors: list[str | None] = [None] * len(job.samples)
    unread = np.zeros(len(job.samples), np.bool_)
    for predicted in predict_samples(engine, job.samples, job.threads):
        found[predicted.rows] = predicted.probabilities
        for row, reason in predicted.failed:
            errors[row] = reason
        unread[list(predicted.unread)] = True
    publish_replace(Path(job.part), _part_bytes(job, found, errors, unread))
    return sum(error is not None for error in errors)


def _part_bytes(
    job: PartJob,
    found: npt.NDArray[np.float32],
    errors: list[str | None],
    unread: npt.NDArray[np.bool_],
) -> bytes:
    """A part as a Parquet file with a seal:

    Parquet's pages have no checksum, and one digit would be believed.
    """
    table = pa.table(
        {
            "path": pa.array([_path_bytes(path) for path, _ in job.keys], pa.binary()),
            "stamp": [stamp for _, stamp in job.keys],
            "error": pa.array(errors, pa.string()),
            "unread": unread,
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(found.reshape(-1)), found.shape[1]
            ),
        }
    ).replace_schema_metadata({"headrace": job.digest, SEAL: UNSEALED})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return seal(buffer.getvalue())


def file_keys(paths: Sequence[str]) -> list[_Key]:
    """What tells whether a file is still the one that was predicted: its path and its stamp (see
    FileStamp).

    Files written a moment ago are waited for, some seconds at most, so that a change after this
    call has another stamp.
    """
    stamps = file_stamps(map(locator_file, paths))
    wait_until_settled(stamp for stamp in stamps if isinstance(stamp, FileStamp))
    texts = (stamp.text if isinstance(stamp, FileStamp) else "" for stamp in stamps)
    return list(zip(paths, texts, strict=True))


def _path_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")  # names of files need not be UTF-8


def _predict(
    model: Model,
    left: Sequence[_Key],
    parts: Path,
    *,
    workers: int | None,
    device: str,
    console: Console,
) -> None:
    if not left:
        return
    cores = workers or available_cores()
    shared = device == "cpu" and cores > 1 and len(left) >= _WORTH_WORKERS
    # Every worker has something to do, and the last part is not waited for long.
    size = min(PART_IMAGES, max(16, -(-len(left) // (2 * cores)))) if shared else PART_IMAGES
    jobs = []
    for start in range(0, len(left), size):
        keys = tuple(left[start : start + size])
        name = hashlib.sha256(json.dumps([model.digest, keys]).encode()).hexdigest()[:24]
        part = str((parts / f"{name}.parquet").absolute())
        threads = 1 if shared else cores
        place = str(model.path.absolute())
        samples = tuple(_samples(key[0] for key in keys))
        jobs.append(
            PartJob(place, model.digest, samples, keys, part, device, threads, model.trust_code)
        )
    with show_progress(console, "predict", len(left), "images") as advance:
        if not shared:
            for job in jobs:
                failed = predict_part(job)
                advance(len(job.samples), {"failed": failed})
            return
        reasons = []
        with ExitStack() as stack:
            client = stack.enter_context(
                local_client(min(cores, len(jobs)), module_names=[__name__])
            )
            keyed = ((f"predict-{Path(job.part).stem}", job) for job in jobs)
            outcomes = stack.enter_context(closing(run_tasks(client, predict_part, keyed)))
            for outcome in outcomes:
                reasons += [outcome.error] if outcome.error else []
                advance(len(outcome.job.samples), {"failed": outcome.result or 0})
    if reasons:
        raise PredictIncomplete(
            f"{len(reasons):,} of {len(jobs):,} parts failed; the others are kept, and the same "
            f"command tries these again. The first reason: {reasons[0]}"
        )


def _known(parts: Path, model: Model, *, final: bool) -> dict[_Key, tuple[Path, int]]:
    """Where the prediction of each file is.

    A file that could not be read is tried again, unless this is the end.
    """
    known: dict[_Key, tuple[Path, int]] = {}
    for part in sorted(parts.glob("*.parquet")):
        try:
            data = part.read_bytes()
            check_seal(data)
            file = pq.ParquetFile(io.BytesIO(data))
            if (file.schema_arrow.metadata or {}).get(b"headrace") != model.digest.encode():
                continue  # of another model
            table = file.read(["path", "stamp", "unread"])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            continue  # damaged: its images are predicted again
        columns = (table[name].to_pylist() for name in table.column_names)
        for row, (path, stamp, unread) in enumerate(zip(*columns, strict=True)):
            key = (path.decode("utf-8", "surrogatepass"), stamp)
            if not unread or (final and key not in known):
                known[key] = (part, row)
    return known


def _assemble(
    model: Model,
    files: list[str],
    keys: list[_Key],
    parts: Path,
    target: Path,
    kind: str,
    *,
    new: int,
) -> Summary:
    places = _known(parts, model, final=True)
    opened: OrderedDict[Path, tuple[npt.NDArray[np.float32], list[str | None]]] = OrderedDict()
    failures, counts = 0, np.zeros(len(model.classes), np.int64)
    with table_writer(target, kind, model.task_kind, model.classes) as write:
        for start in range(0, len(files), _BLOCK):
            found = np.empty((len(files[start : start + _BLOCK]), len(model.classes)), np.float32)
            errors: list[str | None] = []
            for slot, key in enumerate(keys[start : start + _BLOCK]):
                part, row = places[key]
                probabilities, reasons = _open_part(opened, part, len(model.classes))
                found[slot] = probabilities[row]
                errors.append(reasons[row])
            write(Block(files[start : start + _BLOCK], found, errors))
            counts += _count(found[[error is None for error in errors]], model)
            failures += sum(error is not None for error in errors)
    return Summary(len(files), new, failures, _named(counts, model))


def _open_part(
    opened: "OrderedDict[Path, tuple[npt.NDArray[np.float32], list[str | None]]]",
    part: Path,
    outputs: int,
) -> tuple[npt.NDArray[np.float32], list[str | None]]:
    if part not in opened:
        table = pq.read_table(part, columns=["probabilities", "error"])
        numbers = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        opened[part] = (numbers.reshape(-1, outputs), table["error"].to_pylist())
        if len(opened) > 64:  # images come in the order in which they were predicted, or nearly so
            opened.popitem(last=False)
    return opened[part]


def _count(probabilities: npt.NDArray[np.float32], model: Model) -> npt.NDArray[np.int64]:
    if model.task_kind == "single":
        return np.bincount(probabilities.argmax(1), minlength=len(model.classes))
    if model.task_kind == "multi":
        return np.asarray((probabilities >= 0.5).sum(0), np.int64)
    return np.zeros(len(model.classes), np.int64)


def _named(counts: npt.NDArray[np.int64], model: Model) -> dict[str, int]:
    if model.task_kind == "regression":
        return {}
    return dict(zip(model.classes, counts.tolist(), strict=True))


def _samples(paths: Iterable[str]) -> list[Sample]:
    return [Sample(path, path, "") for path in paths]


@lru_cache(maxsize=1)
def _engine(path: str, digest: str, device: str, trust_code: tuple[str, ...]) -> Any:
    from headrace.pipelines.models.images import open_engine

    model = load_model(path, trust_code=trust_code)
    if model.digest != digest:
        raise PredictIncomplete(f"{path} has changed since this call began: call again")
    return open_engine(model, device)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        found = read_sealed_json(path.read_bytes())
        return found if {"failed", "counts"} <= set(found) else None
    except (OSError, ValueError):
        return None
