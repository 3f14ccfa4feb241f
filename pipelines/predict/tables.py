"""Tables of predictions: one row per image, in order, also of images that failed.

file         as the user named it
class        the most probable class; multi-label: those of at least 0.5, joined by `;`. Empty
             where there is an error
probability  of that class (single-label only)
p_<class>    one column per class; for regression the predicted values, under the targets' own names
error        why there is no prediction; empty where there is one

No two columns have one name: where the name of a class or target is taken, as by a target called
`file` or `error`, `_` is added to it until it is free (`file_`). JSON lines need none of that:
there the names stand in an object of their own.

All text is UTF-8. A file name that is no UTF-8 is written with an escape (`caf\\xe9.png`) for each
byte that is none.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.heads.data.task import TaskKind
from headrace.pipelines.console import valid_text
from headrace.pipelines.models.base import decide

_MAX_FIRST_LINE = 1 << 24  # bytes; the header of a hundred thousand classes takes some megabytes

FORMATS = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


# Columns of a table in memory by name: (n,) values, None in rows without one.
Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TableBlock:
    """Some rows of the table."""

    files: list[str]
    probabilities: npt.NDArray[np.float32]  # (n, C); nan where there is an error
    errors: list[str | None]


def target_columns(
    targets: Sequence[tuple[npt.NDArray[Any], bool]], task_kind: TaskKind, classes: tuple[str, ...]
) -> Columns:
    """Return the columns of true values: `label` (several labels joined by `;`), or for a
    regression one `true_NAME` for each target.

    targets: blocks of rows as in Task.target, each with whether its targets are known.
    """
    if task_kind == "regression":
        numbers = np.concatenate([target.reshape(-1, len(classes)) for target, _ in targets])
        return {
            f"true_{name}": numbers[:, index].astype(np.float64)
            for index, name in enumerate(classes)
        }
    labels: list[str | None] = []
    for target, is_known in targets:
        if not is_known:
            labels += [None] * len(target)
        elif task_kind == "single":
            labels += [classes[index] for index in target]
        else:
            labels += [";".join(_chosen_labels(row, classes)) for row in target]
    return {"label": np.array(labels, object)}


def outcome_columns(
    columns: Columns,
    probabilities: npt.NDArray[np.float32],
    task_kind: TaskKind,
    classes: tuple[str, ...],
    later_names: Sequence[str] = (),
) -> Columns:
    """Return `columns` followed by those of predictions (n, C), named as by `table_writer`.

    later_names: of columns that are to follow.
    """
    decisions = decide(probabilities, task_kind, classes)
    outcome = dict(columns)
    if task_kind == "single":
        outcome["class"] = decisions.astype(object)
        outcome["probability"] = probabilities.max(1, initial=0)
    elif task_kind == "multi":
        chosen = [";".join(_chosen_labels(row, classes)) for row in decisions]
        outcome["class"] = np.array(chosen, object)
    names = classes if task_kind == "regression" else tuple(f"p_{name}" for name in classes)
    free_names = _free_names(names, taken_names=[*outcome, *later_names])
    return outcome | dict(zip(free_names, probabilities.T, strict=True))


@contextmanager
def table_writer(
    destination: Path | IO[str], table_format: str, task_kind: TaskKind, classes: tuple[str, ...]
) -> Iterator[Callable[[TableBlock], None]]:
    """Write blocks of rows as csv, parquet or jsonl; text formats also to an open stream."""
    classes = tuple(_free_names([valid_text(name) for name in classes]))
    if table_format == "parquet":
        assert isinstance(destination, Path)
        no_rows = _table_columns(_empty_block(len(classes)), task_kind, classes)
        schema = pa.schema(
            [
                (name, pa.string() if values.dtype == object else pa.float32())
                for name, values in no_rows.items()
            ]
        )
        with pq.ParquetWriter(destination, schema) as writer:

            def add_table(block: TableBlock) -> None:
                is_failed = _failed_rows(block)
                columns = _table_columns(block, task_kind, classes).values()
                arrays = [
                    pa.array(values, field.type, None if values.dtype == object else is_failed)
                    for values, field in zip(columns, schema, strict=True)
                ]
                writer.write_table(pa.table(arrays, schema=schema))

            yield add_table
        return
    block_text = csv_text if table_format == "csv" else json_lines
    opened = (
        destination.open("w", encoding="utf-8", newline="")
        if isinstance(destination, Path)
        else nullcontext(destination)  # the caller's, who closes it
    )
    with opened as stream:
        needs_header = True

        def add_text(block: TableBlock) -> None:
            nonlocal needs_header
            stream.write(block_text(block, task_kind, classes, with_header=needs_header))
            needs_header = False

        yield add_text
        if needs_header:
            add_text(_empty_block(len(classes)))
        stream.flush()


def is_predictions(table_path: Path, *, allow_values: bool) -> bool:
    """Return whether a file is empty or, by its columns, a table by `table_writer`.

    allow_values: accept a table of regression, whose columns between `file` and `error` may have
    any names.
    """
    with table_path.open("rb") as file:
        first_line = file.readline(_MAX_FIRST_LINE)
    try:
        if first_line.startswith(b"PAR1"):
            return _has_our_columns(pq.read_schema(table_path).names, allow_values)
        if first_line.startswith(b"{"):
            entry = json.loads(first_line)
            return set(entry) in (
                {"file", "class", "probabilities"},
                {"file", "values"},
                {"file", "error"},
            )
        return not first_line or _has_our_columns(
            next(csv.reader([first_line.decode()])), allow_values
        )
    # A file that no reader understands is none of headrace's, and must not be replaced.
    except (pa.ArrowException, OSError, ValueError, RecursionError, csv.Error):
        return False


def _has_our_columns(column_names: Sequence[str], allow_values: bool) -> bool:
    if len(column_names) < 3 or column_names[0] != "file" or column_names[-1] != "error":
        return False
    first_class = 3 if column_names[2] == "probability" else 2
    has_probabilities = all(name.startswith("p_") for name in column_names[first_class:-1])
    return allow_values or (column_names[1] == "class" and has_probabilities)


def csv_text(
    block: TableBlock, task_kind: TaskKind, classes: tuple[str, ...], *, with_header: bool
) -> str:
    """Return rows as CSV (RFC 4180, line ends of Unix)."""
    columns = _table_columns(block, task_kind, classes)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if with_header:
        writer.writerow(columns)
    is_failed = _failed_rows(block)
    cells = [
        values if values.dtype == object else _float_cells(values, is_failed)
        for values in columns.values()
    ]
    writer.writerows(zip(*cells, strict=True))  # None becomes an empty cell
    return buffer.getvalue()


def json_lines(
    block: TableBlock, task_kind: TaskKind, classes: tuple[str, ...], *, with_header: bool = False
) -> str:
    """Return one JSON object per line: {"file", "class", "probabilities": {class: p}}, {"file",
    "values"}, {"file", "error"}.
    """
    decisions = decide(block.probabilities, task_kind, classes)
    lines = []
    for row, (file_name, error_text) in enumerate(zip(block.files, block.errors, strict=True)):
        entry: dict[str, Any] = {"file": valid_text(file_name)}
        numbers = map(_shortest_float, block.probabilities[row])
        class_values = dict(zip(classes, numbers, strict=True))
        if error_text is not None:
            entry["error"] = valid_text(error_text)
        elif task_kind == "regression":
            entry["values"] = class_values
        else:
            decision = decisions[row]
            is_single = task_kind == "single"
            entry["class"] = str(decision) if is_single else _chosen_labels(decision, classes)
            entry["probabilities"] = class_values
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def _table_columns(
    block: TableBlock, task_kind: TaskKind, classes: tuple[str, ...]
) -> dict[str, npt.NDArray[Any]]:
    """Return the table's columns: texts as objects, None where there is none; else float32."""
    files = np.array([valid_text(name) for name in block.files], object)
    columns = dict(
        outcome_columns({"file": files}, block.probabilities, task_kind, classes, ["error"])
    )
    if task_kind != "regression":
        columns["class"][_failed_rows(block)] = None
    error_texts = [None if error is None else valid_text(error) for error in block.errors]
    return columns | {"error": np.array(error_texts, object)}


def _failed_rows(block: TableBlock) -> npt.NDArray[np.bool_]:
    return np.array([error is not None for error in block.errors], np.bool_)


def _free_names(names: Sequence[str], taken_names: Iterable[str] = ()) -> list[str]:
    """Return the names, with `_` added to those that are taken. No changed name equals another of
    `names`.
    """
    used_names, free_names = set(taken_names), []
    for name in names:
        free_name = name
        while free_name in used_names or (free_name != name and free_name in names):
            free_name += "_"
        used_names.add(free_name)
        free_names.append(free_name)
    return free_names


def _float_cells(values: npt.NDArray[np.float32], is_failed: npt.NDArray[np.bool_]) -> list[str]:
    """Return each number as the shortest text that reads as this float32; "" if the row failed."""
    cells: list[str] = pa.array(values).cast(pa.string()).to_pylist()
    # Arrow is five times as fast as Python, but writes exponents and whole numbers differently;
    # those are written by Python.
    magnitude = np.abs(values)
    with np.errstate(invalid="ignore"):
        has_exponent = ~((magnitude >= 1e-4) & (magnitude < 1e7))
        differs = has_exponent | (values == np.rint(values))
    for row in np.flatnonzero(differs):
        cells[row] = repr(_shortest_float(values[row]))
    for row in np.flatnonzero(is_failed):
        cells[row] = ""
    return cells


def _shortest_float(value: np.float32) -> float:
    return float(str(value))  # str gives the shortest text that reads as this float32


def _chosen_labels(decision: npt.NDArray[np.uint8], classes: tuple[str, ...]) -> list[str]:
    return [name for name, is_chosen in zip(classes, decision, strict=True) if is_chosen]


def _empty_block(n_outputs: int) -> TableBlock:
    return TableBlock([], np.empty((0, n_outputs), np.float32), [])
