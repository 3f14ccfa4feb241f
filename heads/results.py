"""A bank's results: one HDF5 file, published whole, read by what ranks, predicts and combines.

K heads (spec × fold), N rows, C outputs.

Layout: the root's attributes hold the format's number and one JSON text that is true of the whole
bank; `specs`, `errors` and `metric_names` are UTF-8 texts; `metrics` is (K, metrics), and each
other column of the table one array (K,); `ids`, `content`, `row_fold`, `target` describe the N
rows; `head/<k>/arrays/<name>` and `head/<k>/validation` (n_held_out, C) float32. Nothing in it is a
pickle, which could run code.

The HDF5 user block, the first 4096 bytes, holds the XXH3-128 of all bytes behind it, as a shard's
does.
"""

import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import xxhash

from headrace.cache.checksum import shard_checksum
from headrace.cache.errors import HeadraceError, ShardUnreadable
from headrace.cache.file_stamps import FileStamp, file_stamp
from headrace.cache.format.hdf5_values import open_hdf5
from headrace.cache.format.shard import USER_BLOCK_BYTES
from headrace.heads.arrays import Array, Arrays, Floats, Index
from headrace.heads.data.task import REFIT, Task, TaskKind
from headrace.heads.evaluate.metrics import metric_names
from headrace.heads.kinds import spec_from_json
from headrace.heads.spec import FitResult, HeadSpec, spec_to_json

FORMAT = 3  # 2 had -1 for the fold of heads trained on all rows, 1 no digest
COLUMNS = ("fold", "objective", "gap", "iterations", "seconds")

_HDF5 = b"\x89HDF\r\n\x1a\n"
# The stamp of each file when this process has checked its bytes. A file is checked again only after
# it has changed.
_checked: dict[Path, FileStamp] = {}


class BadResults(HeadraceError, ValueError):
    """The file is not a bank's results, or has no such head."""


class _Unreadable(BadResults):
    """The operating system does not let the file be read; it may be whole."""


def results_bytes(
    task: Task,
    task_digest: str,
    fits: Sequence[FitResult],
    metrics: Sequence[Mapping[str, float]],
    *,
    features: Sequence[Mapping[str, Any]],
    dropped: Sequence[str],
) -> bytes:
    """Return the contents of a bank's results file.

    task: the rows that were trained on, in order. task_digest: of the task as it was given.
    metrics: one mapping per fit, empty if it has no held-out rows. features, dropped: as in
    `BankResult`.
    """
    names = metric_names(task.kind)
    about = {
        "task": task_digest,
        "task_kind": task.kind,
        "classes": task.classes,
        "features": [dict(feature) for feature in features],
        "dropped": list(dropped),
    }
    buffer = io.BytesIO()
    text = h5py.string_dtype("utf-8")
    with h5py.File(buffer, "w", libver="latest", userblock_size=USER_BLOCK_BYTES) as file:
        file.attrs["format"] = FORMAT
        file.attrs["headrace"] = json.dumps(about)
        file["specs"] = np.array([spec_to_json(fit.spec) for fit in fits], dtype=text)
        file["errors"] = np.array([fit.error or "" for fit in fits], dtype=text)
        file["metric_names"] = np.array(names, dtype=text)
        table = [[of_head.get(name, np.nan) for name in names] for of_head in metrics]
        file["metrics"] = np.array(table, np.float64)
        for column in COLUMNS:
            dtype = np.int64 if column in ("fold", "iterations") else np.float64
            file[column] = np.array([getattr(fit, column) for fit in fits], dtype)
        file["ids"] = np.array(task.ids.astype(object), dtype=text)
        file["content"], file["row_fold"], file["target"] = task.content, task.fold, task.target
        stored: dict[int, str] = {}  # {id of an array: its path}
        for head_index, fit in enumerate(fits):
            group = file.create_group(f"head/{head_index}")
            if fit.validation is not None:
                group["validation"] = fit.validation
            for name, array in fit.arrays.items():
                array_path = f"arrays/{name}"
                # A hard link if the array is stored already: neighbour heads share their rows.
                group[array_path] = file[stored[id(array)]] if id(array) in stored else array
                stored.setdefault(id(array), f"{group.name}/{array_path}")
    return sealed(buffer.getbuffer())


def sealed(file: bytes | memoryview) -> bytes:
    """Return an HDF5 file whose user block of 4096 bytes names the digest of the rest."""
    body = memoryview(file)[USER_BLOCK_BYTES:]
    return b"".join((_user_block(xxhash.xxh3_128_hexdigest(body)), body))


def _user_block(digest: str) -> bytes:
    text = (
        f"headrace bank results\nxxh3_128 {digest}\nof all bytes from {USER_BLOCK_BYTES} on; the "
        "rest is HDF5\n"
    )
    return text.encode().ljust(USER_BLOCK_BYTES - 1, b" ") + b"\n"


@dataclass(frozen=True)
class BankResult:
    """What a results file says."""

    # Opened anew for each large array: without a handle a result can be pickled.
    path: Path
    task_digest: str
    task_kind: TaskKind
    classes: tuple[str, ...]
    # {"fingerprint", "spec": the fields of its FeatureSpec} per feature set
    features: tuple[dict[str, Any], ...]
    dropped: tuple[str, ...]  # ids of rows without features
    ids: npt.NDArray[np.str_]  # (N,)
    content: npt.NDArray[np.bytes_]  # (N,)
    fold: npt.NDArray[np.int16]  # (N,) as in Task.fold
    target: Array  # as in Task.target
    # One row per head: kind, spec (JSON), fold, the metrics, objective, gap, iterations, seconds,
    # error.
    table: pd.DataFrame

    def arrays(self, spec: HeadSpec | str, fold: int = REFIT) -> Arrays:
        """Return the arrays that `predict_head` needs; empty if a head stores none.

        Raises BadResults if there is no such head.
        """
        with _open(self.path) as file:
            group = file[f"head/{self.head_index(spec, fold)}"]
            return {name: array[()] for name, array in group.get("arrays", {}).items()}

    def validation(self, spec: HeadSpec | str, fold: int) -> Floats | None:
        """Return predictions (n_held_out, C) of a fold's rows, in the order of `ids`, or None."""
        with _open(self.path) as file:
            group = file[f"head/{self.head_index(spec, fold)}"]
            return group["validation"][()] if "validation" in group else None

    def rows(self, fold: int) -> Index:
        """Return the positions in `ids` of the rows that are held out in a fold."""
        return np.flatnonzero(self.fold == fold)

    def out_of_fold_predictions(self, spec: HeadSpec | str) -> Floats:
        """Return predictions (N, C), each row by the head that did not train on it.

        They are nan for rows that are never held out, and for those of a fold whose head failed.
        """
        return np.asarray(self.out_of_fold_predictions_of([spec])[0])

    def out_of_fold_predictions_of(self, specs: Sequence[HeadSpec | str]) -> Floats:
        """Return `out_of_fold_predictions` (K, N, C) of many specs, from a file opened once."""
        folds = np.unique(self.fold[self.fold >= 0]).tolist()
        rows_of_folds = [(fold, self.rows(fold)) for fold in folds]
        shape = len(specs), len(self.fold), len(self.classes)
        stack = np.full(shape, np.nan, np.float32)
        with _open(self.path) as file:
            heads = file["head"].id
            for predictions, spec in zip(stack, specs, strict=True):
                for fold, rows in rows_of_folds:
                    # By h5py's low-level interface: through its objects ten thousand heads take
                    # three times as long.
                    group = h5py.h5g.open(heads, str(self.head_index(spec, fold)).encode())
                    if group.links.exists(b"validation"):
                        stored = h5py.h5d.open(group, b"validation")
                        of_fold = np.empty(stored.shape, np.float32)
                        stored.read(h5py.h5s.ALL, h5py.h5s.ALL, of_fold)
                        predictions[rows] = of_fold
        return stack

    def head_index(self, spec: HeadSpec | str, fold: int) -> int:
        """Return a head's row of the table. Raises BadResults, saying which heads there are."""
        text = spec if isinstance(spec, str) else spec_to_json(spec)
        if (text, fold) not in self._head_indices:
            raise BadResults(
                f"{self.path} has no head {text} of fold {fold}: it has "
                f"{self.table['spec'].nunique()} specs, folds "
                f"{sorted(self.table['fold'].unique().tolist())}"
            )
        return self._head_indices[text, fold]

    @cached_property
    def _head_indices(self) -> dict[tuple[str, int], int]:
        keys = zip(self.table["spec"], self.table["fold"].tolist(), strict=True)
        return {key: head_index for head_index, key in enumerate(keys)}


def _kind_of(spec_json: str) -> str:
    # Results of networks are in the same form; their settings are those of pipelines/finetune.
    kind = str(json.loads(spec_json)["kind"])
    return kind if kind == "finetune" else spec_from_json(spec_json).kind


def read_bank(path: Path | str) -> BankResult:
    """Open a bank's results: reads the table and the rows now, arrays and predictions on demand.

    Raises BadResults for a file that holds no results, FileNotFoundError if there is none.
    """
    path = Path(path)
    with _open(path) as file:
        about = json.loads(file.attrs["headrace"])
        specs = [text.decode() for text in file["specs"][()]]
        # Parsed once for each spec, which occurs once per fold.
        kinds = {text: _kind_of(text) for text in set(specs)}
        columns: dict[str, Any] = {
            "kind": [kinds[text] for text in specs],
            "spec": specs,
            "fold": file["fold"][()],
        }
        metrics = file["metrics"][()].reshape(len(specs), -1)
        for metric_index, name in enumerate(file["metric_names"][()]):
            columns[name.decode()] = metrics[:, metric_index]
        for name in COLUMNS[1:]:
            columns[name] = file[name][()]
        columns["error"] = [text.decode() or None for text in file["errors"][()]]
        return BankResult(
            path=path,
            task_digest=about["task"],
            task_kind=cast(TaskKind, about["task_kind"]),
            classes=tuple(about["classes"]),
            features=tuple(about["features"]),
            dropped=tuple(about["dropped"]),
            ids=np.array([text.decode() for text in file["ids"][()]], np.str_),
            content=file["content"][()],
            fold=file["row_fold"][()],
            target=file["target"][()],
            table=pd.DataFrame(columns),
        )


def remove_damaged(path: Path | str) -> bool:
    """Remove a results file whose bytes are not those that were written; return whether it was one.

    For where the file only saves time.
    """
    try:
        _check(Path(path))
    except FileNotFoundError:
        return False  # nor removed: another process may have published it by now
    except _Unreadable:
        raise  # perhaps whole, on a disk that cannot be read now
    except BadResults:
        Path(path).unlink(missing_ok=True)
        return True
    return False


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open the file, checked to be whole and self-contained; raises BadResults for any other."""
    while True:
        stamp = _check(path)
        try:
            file = open_hdf5(path)
        except OSError as error:
            if error.errno is not None:  # of the operating system, not of the file
                raise _Unreadable(f"{path} cannot be opened now: {error}") from error
            raise BadResults(
                f"{path} is not an HDF5 file ({error}): {_removal_advice(path)}"
            ) from error
        if _stamp(path) == stamp:  # else another process has replaced it since the check
            break
        file.close()
    with file:
        try:
            if (stored_format := int(file.attrs.get("format", 0))) != FORMAT:
                raise BadResults(
                    f"{path} has format {stored_format}, this version of headrace reads {FORMAT}: "
                    f"{_removal_advice(path)}"
                )
            if _checked.get(path) != stamp:
                _refuse_links(file, path)
                _checked[path] = stamp
            yield file
        except BadResults:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
            raise BadResults(
                f"{path} is not a bank's results of this version ({error}): {_removal_advice(path)}"
            ) from error


def _check(path: Path) -> FileStamp:
    """Return the file's stamp, after checking that its bytes are those that were written.

    Reads it whole unless this process has done so for this stamp.
    """
    stamp = _stamp(path)
    if _checked.get(path) == stamp:
        return stamp
    try:
        _, digest, block = shard_checksum(path)
    except ShardUnreadable as error:
        raise _Unreadable(str(error)) from error
    if block.startswith(_HDF5):
        raise BadResults(
            f"{path} has no digest: it is of format 1 or not a bank's results, this version of "
            f"headrace reads format {FORMAT}: {_removal_advice(path)}"
        )
    if block != _user_block(digest):
        raise BadResults(
            f"{path} is not a bank's results, or its bytes have changed since they were written "
            f"(their digest is {digest}): {_removal_advice(path)}"
        )
    return stamp


def _removal_advice(path: Path) -> str:
    return (
        f"type `rm {shlex.quote(str(path))}`, and the next `headrace run RECIPE` trains that bank "
        "again"
    )


def _stamp(path: Path) -> FileStamp:
    try:
        return file_stamp(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: train the bank first") from error


def _refuse_links(file: h5py.File, path: Path) -> None:
    """Raise BadResults for links out of the file, and for data that is stored in another file."""

    # HDF5's own walk along hard links: through h5py's objects ten thousand heads take ten times as
    # long.
    def is_soft_link(name: bytes, info: Any) -> str | None:
        return None if info.type == h5py.h5l.TYPE_HARD else name.decode(errors="replace")

    def is_external(name: bytes, info: Any) -> str | None:
        if info.type != h5py.h5o.TYPE_DATASET:
            return None
        layout = h5py.h5d.open(file.id, name).get_create_plist()
        outside = layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count()
        return name.decode(errors="replace") if outside else None

    if soft_link := file.id.links.visit(is_soft_link, info=True):
        raise BadResults(
            f"{path}: /{soft_link} is a link out of the file, which headrace never writes: nothing "
            "was read"
        )
    if external := h5py.h5o.visit(file.id, is_external, info=True):
        raise BadResults(
            f"{path}: /{external} is stored in another file, which headrace never writes: nothing "
            "was read"
        )
