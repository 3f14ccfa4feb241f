"""From the user's columns to targets: labels as text, several labels in a cell, numbers where the
task is one of numbers.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.cache.text import as_text
from headrace.pipelines.recipe.sections import TaskSection

_NAMED = 10  # names in one note


class DataError(HeadraceError, ValueError):
    """The images or their columns cannot serve the task: says what was found and what
    was expected.
    """


def check_targets(
    samples: pd.DataFrame, section: TaskSection
) -> tuple[pd.DataFrame, tuple[str, ...], npt.NDArray[Any]]:
    """The samples that have a target, the classes (or columns), and the targets as in
    `Task.target`.

    Raises DataError for targets that cannot be learned.
    """
    columns = target_columns(section)
    values = samples[columns].apply(empty_as_missing)
    if section.kind != "single" and not (
        section.kind == "multi" and _holds_labels(values, section)
    ):
        values = values.apply(lambda column: _numbers(column, samples["id"], section))
    given = values.notna().all(axis=1)
    labelled = samples[given].reset_index(drop=True)
    if labelled.empty:
        raise DataError(f"no image has a value in {' / '.join(columns)}: there is nothing to learn")
    return labelled, *_encode(values[given].reset_index(drop=True), section)


def empty_as_missing(column: pd.Series) -> pd.Series:
    """An empty text is a missing value, wherever the column comes from."""
    if column.dtype.kind in "biuf":
        return column
    return column.mask(
        column.map(lambda value: isinstance(value, str) and not value.strip()).astype(bool)
    )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | np.ndarray)


def _holds_labels(values: pd.DataFrame, section: TaskSection) -> bool:
    """Whether one column holds several labels in each cell: a list, or text with a separator."""
    column = values.iloc[:, 0]
    return values.shape[1] == 1 and (
        section.separator is not None or bool(column.map(_is_list).any())
    )


def target_columns(section: TaskSection) -> list[str]:
    """The columns that the task predicts."""
    return [section.target] if isinstance(section.target, str) else list(section.target)


def _encode(
    columns: pd.DataFrame, section: TaskSection
) -> tuple[tuple[str, ...], npt.NDArray[Any]]:
    for name in columns.columns:
        if columns[name].dtype.kind == "f" and np.isinf(columns[name]).any():
            raise DataError(
                f"task.target {name!r} is infinite in {int(np.isinf(columns[name]).sum()):,} rows: "
                "mend or empty them"
            )
    if section.kind == "single":
        return _encode_classes(columns, section)
    if section.kind == "multi" and _holds_labels(columns, section):
        return _encode_label_sets(columns.iloc[:, 0], section.separator)
    names = tuple(str(name) for name in columns.columns)
    numbers = columns.to_numpy(dtype=np.float64)
    if section.kind == "regression":
        return names, numbers
    if not np.isin(numbers, (0, 1)).all():
        raise DataError(f"task.kind multi needs 0 or 1 in every column of {', '.join(names)}")
    return names, numbers.astype(np.uint8)


def _encode_classes(
    columns: pd.DataFrame, section: TaskSection
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """One class for each row.

    Labels are text as written: `01` is not `1`, and `None` is a class like others.
    """
    if columns.shape[1] != 1:
        raise DataError(
            "task.target names several columns: set task.kind to multi or regression, or name one"
        )
    name = columns.columns[0]
    if columns.iloc[:, 0].map(lambda value: _is_list(value) or isinstance(value, dict)).any():
        raise DataError(
            f"task.target {name!r} holds lists; expected one label in each row. For several labels "
            "in a row: task.kind: multi"
        )
    labels = as_text(columns.iloc[:, 0])
    classes = tuple(sorted(labels.unique().tolist(), key=_class_order(labels.unique())))
    if len(classes) < 2:
        raise DataError(
            f"task.target {name!r} holds one class only, {classes[0]!r}, in all {len(labels):,} "
            "images; a classifier needs at least two. In a folder, each class is a sub-folder: "
            "FOLDER/cat/1.jpg, FOLDER/dog/2.jpg"
        )
    if len(classes) > max(20, len(labels) // 2):
        raise DataError(
            f"task.target {name!r} has {len(classes):,} different values in {len(labels):,} "
            "images; if it is a number to predict, set task.kind: regression"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    return classes, labels.map(numbers).to_numpy(dtype=np.int64)


def _class_order(labels: Iterable[str]) -> Any:
    """A sort key: numbers sort as numbers where all labels are such, so that class "10" comes after
    class "9".
    """
    try:
        values = {label: float(label) for label in labels}
    except ValueError:
        return lambda label: label
    return lambda label: (values[label], label) if all(map(np.isfinite, values.values())) else label


def _encode_label_sets(
    column: pd.Series, separator: str | None
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    """(classes, (N, classes) 0/1) of a column with several labels in each cell."""

    def labels_of(value: object) -> list[str]:
        if _is_list(value):
            parts = list(value)  # type: ignore[call-overload]
        else:  # beside lists and without a separator, a text is one label, blanks and all
            parts = [value] if separator is None else str(value).split(separator)
        texts = as_text(pd.Series(parts, dtype=object)).dropna().tolist()
        return [text for text in texts if text]

    sets = column.map(labels_of).tolist()
    names = {label for labels in sets for label in labels}
    if len(names) < 2:
        raise DataError(
            f"task.target {column.name!r} holds {len(names)} different labels; several were "
            "expected. Look at task.separator, which stands between the labels of a cell"
        )
    classes = tuple(sorted(names, key=_class_order(names)))
    place = {label: number for number, label in enumerate(classes)}
    target = np.zeros((len(sets), len(classes)), np.uint8)
    for row, labels in enumerate(sets):
        target[row, [place[label] for label in labels]] = 1
    return classes, target


def _numbers(column: pd.Series, ids: pd.Series, section: TaskSection) -> pd.Series:
    """A column as float64; missing stays missing.

    Raises DataError naming the first value that is no number.
    """
    if column.dtype.kind in "biuf":
        return column.astype(np.float64)
    text = as_text(column)
    numbers = pd.to_numeric(text.replace({"True": "1", "False": "0"}), errors="coerce").astype(
        np.float64
    )
    wrong = text.notna() & numbers.isna() & (text.str.lower() != "nan")
    if wrong.any():
        first, name = int(wrong.to_numpy().argmax()), ids.iloc[int(wrong.to_numpy().argmax())]
        cure = ""
        if section.kind == "multi":
            cure = (
                ". For labels by name, say what stands between them in a cell: task.separator: ';'"
            )
        elif str(text.iloc[first]).replace(",", "", 1).lstrip("-").isdigit():
            cure = ". Write decimals with a point"
        raise DataError(
            f"task.kind {section.kind} needs numbers in {column.name}; found {text.iloc[first]!r} "
            f"for {name!r} ({int(wrong.sum()):,} such rows){cure}"
        )
    return numbers


def alike_names(names: Iterable[str], what: str) -> list[str]:
    """A note on names that a person would take for one: they differ in case, blanks, hyphens or
    accents alone.
    """
    folded: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded[_folded(name)].append(name)
    pairs = [" and ".join(map(repr, sorted(alike))) for alike in folded.values() if len(alike) > 1]
    if not pairs:
        return []
    return [
        (
            f"{what} that differ in case, blanks, hyphens or accents alone, and count as "
            f"different: {name_some(pairs)}"
        )
    ]


def _folded(name: str) -> str:
    if any(letter.isdigit() for letter in name) and not any(letter.isalpha() for letter in name):
        return name  # -1 is not 1
    letters = (
        letter
        for letter in unicodedata.normalize("NFKD", name)
        if not unicodedata.combining(letter)
    )
    return "".join(
        letter for letter in letters if not letter.isspace() and letter not in "-_"
    ).casefold()


def name_some(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    rest = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
