"""Predictions as a table: one row per image, in the order of the images, also for those that
failed.

file         as the user named it class        the most probable class; multi-label: those of at
least 0.5, joined by `;`. Empty where there is an error probability  of that class (single-label
only) p_<class>    one column per class; for regression the predicted values, under the targets' own
names error        why there is no prediction; empty where there is one

No two columns have one name: where the name of a class or target is taken, as by a target called
`file` or `error`, `_` is added to it until it is free (`file_`). JSON lines need none of that:
there the names stand in an object of their own.

All text is UTF-8. A file name that is no UTF-8 is written with an escape (`caf\\xe9.png`) for each
byte that is none.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.heads.data.task import TaskKind
from headrace.pipelines.console import valid_text
from headrace.pipelines.models.base import decide

_FIRST_LINE = 1 << 24  # bytes; a hundred thousand classes have a line of some megabytes

FORMATS = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


@dataclass(frozen=True)
class Block:
    """Some rows of the table."""

    files: list[str]
    probabilities: npt.NDArray[np.float32]  # (n, C); nan where there is an error
    errors: list[str | None]


class Write(Protocol):
    """Adds rows to a table."""

    def __call__(self, block: Block) -> None: ...


@contextmanager
def table_writer(
    target: Path | IO[str], kind: str, task_kind: TaskKind, classes: tuple[str, ...]
) -> Iterator[Write]:
    """Write blocks of rows as `kind` (csv, parquet, jsonl); text formats also to an open stream."""
    classes = tuple(_free_names([valid_text(name) for name in classes]))
    if kind == "parquet":
        assert isinstance(target, Path)
        schema = pa.schema(
            [(name, type_) for name, type_, _ in _columns(_empty(len(classes)), task_kind, classes)]
        )
        with pq.ParquetWriter(target, schema) as writer:

            def add(block: Block) -> None:
                columns = _columns(block, task_kind, classes)
                writer.write_table(
                    pa.table(
                        [pa.array(values, type_) for _, type_, values in columns], schema=schema
                    )
                )

            yield add
        return
    text = csv_text if kind == "csv" else json_lines
    stream = target.open("w", encoding="utf-8", newline="") if isinstance(target, Path) else target
    try:
        first = True

        def add_text(block: Block) -> None:
            nonlocal first
            stream.write(text(block, task_kind, classes, header=first))
            first = False

        yield add_text
        if first:
            add_text(_empty(len(classes)))
        stream.flush()
    finally:
        if isinstance(target, Path):
            stream.close()


def is_predictions(path: Path, *, values: bool) -> bool:
    """Whether a file is a table as `table_writer` writes one, by its columns, or is empty.

    values: whether a table of regression counts, whose columns between `file` and `error` may have
    any names.
    """
    with path.open("rb") as file:
        first = file.readline(_FIRST_LINE)
    try:
        if first.startswith(b"PAR1"):
            return _has_our_columns(pq.read_schema(path).names, values)
        if first.startswith(b"{"):
            entry = json.loads(first)
            return set(entry) in (
                {"file", "class", "probabilities"},
                {"file", "values"},
                {"file", "error"},
            )
        return not first or _has_our_columns(next(csv.reader([first.decode()])), values)
    except (pa.ArrowException, OSError, ValueError, RecursionError, csv.Error):
        return False


def _has_our_columns(names: Sequence[str], values: bool) -> bool:
    if len(names) < 3 or names[0] != "file" or names[-1] != "error":
        return False
    return values or (names[1] == "class" and _all_probabilities(names))


def _all_probabilities(names: Sequence[str]) -> bool:
    return all(name.startswith("p_") for name in names[3 if names[2] == "probability" else 2 : -1])


def csv_text(block: Block, task_kind: TaskKind, classes: tuple[str, ...], *, header: bool) -> str:
    """Rows as CSV (RFC 4180, line ends of Unix)."""
    columns = _columns(block, task_kind, classes)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow([name for name, _, _ in columns])
    writer.writerows(
        zip(*([_cell(value) for value in values] for _, _, values in columns), strict=True)
    )
    return buffer.getvalue()


def json_lines(
    block: Block, task_kind: TaskKind, classes: tuple[str, ...], *, header: bool = False
) -> str:
    """One JSON object per line: {"file", "class", "probabilities": {class: p}}, {"file", "values"},
    {"file", "error"}.
    """
    decided = decide(block.probabilities, task_kind, classes)
    lines = []
    for row, (file, error) in enumerate(zip(block.files, block.errors, strict=True)):
        entry: dict[str, Any] = {"file": valid_text(file)}
        numbers = {
            name: _number(value)
            for name, value in zip(classes, block.probabilities[row], strict=True)
        }
        if error is not None:
            entry["error"] = valid_text(error)
        elif task_kind == "regression":
            entry["values"] = numbers
        else:
            chosen = decided[row]
            entry["class"] = str(chosen) if task_kind == "single" else _labels(chosen, classes)
            entry["probabilities"] = numbers
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def _columns(
    block: Block, task_kind: TaskKind, classes: tuple[str, ...]
) -> list[tuple[str, pa.DataType, Iterable[Any]]]:
    failed = [error is not None for error in block.errors]
    columns: list[tuple[str, pa.DataType, Iterable[Any]]] = [
        ("file", pa.string(), map(valid_text, block.files))
    ]
    if task_kind != "regression":
        decided = decide(block.probabilities, task_kind, classes)
        labels = [
            None
            if bad
            else str(chosen)
            if task_kind == "single"
            else ";".join(_labels(chosen, classes))
            for bad, chosen in zip(failed, decided, strict=True)
        ]
        columns.append(("class", pa.string(), labels))
        if task_kind == "single":
            columns.append(
                (
                    "probability",
                    pa.float32(),
                    _blanked(block.probabilities.max(1, initial=0), failed),
                )
            )
    names = classes if task_kind == "regression" else tuple(f"p_{name}" for name in classes)
    columns += [
        (name, pa.float32(), _blanked(block.probabilities[:, place], failed))
        for place, name in enumerate(
            _free_names(names, taken=("error", *(name for name, _, _ in columns)))
        )
    ]
    columns.append(
        (
            "error",
            pa.string(),
            [None if error is None else valid_text(error) for error in block.errors],
        )
    )
    return columns


def _free_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, those with `_` after them that are taken already; a name that is free is never
    given to another.
    """
    used, free = set(taken), []
    for name in names:
        chosen = name
        while chosen in used or (chosen != name and chosen in names):
            chosen += "_"
        used.add(chosen)
        free.append(chosen)
    return free


def _blanked(values: npt.NDArray[np.float32], failed: list[bool]) -> list[float | None]:
    return [None if bad else _number(value) for value, bad in zip(values, failed, strict=True)]


def _number(value: np.float32) -> float:
    return float(str(value))  # the shortest text that is this float32


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _labels(chosen: npt.NDArray[np.uint8], classes: tuple[str, ...]) -> list[str]:
    return [name for name, yes in zip(classes, chosen, strict=True) if yes]


def _empty(outputs: int) -> Block:
    return Block([], np.empty((0, outputs), np.float32), [])
