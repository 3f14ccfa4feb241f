"""From the user's columns to targets: classes, several labels in a cell, 0/1 columns, numbers."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.text import as_numbers, as_text

if TYPE_CHECKING:
    from headrace.pipelines.recipe.sections import TaskSection

_NAMES_IN_NOTE = 10  # the others are counted
_USUAL_CLASSES = 20  # up to this many different values are classes, whatever they are


class DataError(HeadraceError, ValueError):
    """The images or their columns do not suit the task; the message says what was expected."""


def check_targets(
    samples: pd.DataFrame, section: "TaskSection"
) -> tuple[pd.DataFrame, tuple[str, ...], npt.NDArray[Any]]:
    """Return the samples that have a target, the classes (or columns), and `Task.target`.

    Raises DataError for targets that cannot be learned.
    """
    column_names = target_columns(section)
    # Rows without a target are predicted in the end, and so are those with a blank one.
    target_values = samples[column_names].apply(empty_as_missing)
    holds_names = _holds_names(target_values, section)
    if section.relabel and not _holds_labels(target_values, section):
        target_values = target_values.apply(_relabelled, args=(section.relabel, not holds_names))
    if not holds_names:
        target_values = target_values.apply(lambda column: _numbers(column, samples["id"], section))
    has_target = target_values.notna().all(axis=1)
    labelled_samples = samples[has_target].reset_index(drop=True)
    if labelled_samples.empty:
        raise DataError(
            f"no image has a value in {' / '.join(column_names)}: there is nothing to learn"
        )
    return labelled_samples, *_encode(target_values[has_target].reset_index(drop=True), section)


def empty_as_missing(column: pd.Series) -> pd.Series:
    """Return a column with empty and blank texts as missing values."""
    if column.dtype.kind in "biuf":
        return column
    return column.mask(
        column.map(lambda value: isinstance(value, str) and not value.strip()).astype(bool)
    )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | np.ndarray)


def _holds_names(target_values: pd.DataFrame, section: "TaskSection") -> bool:
    """Return whether targets stay text. All others are numbers, also the 0 and 1 of labels and
    one-hot classes.
    """
    return (section.kind == "single" and target_values.shape[1] == 1) or (
        section.kind == "multi" and _holds_labels(target_values, section)
    )


def _holds_labels(target_values: pd.DataFrame, section: "TaskSection") -> bool:
    """Return whether the target is one column with several labels in a cell: lists, or text with a
    separator.
    """
    column = target_values.iloc[:, 0]
    return target_values.shape[1] == 1 and (
        section.separator is not None or bool(column.map(_is_list).any())
    )


def _relabelled(
    column: pd.Series, relabel: Mapping[str, str | None], are_numbers: bool
) -> pd.Series:
    """Return a column as text in which the values that `task.relabel` names are replaced.

    are_numbers: whether `-1` also names a cell that holds `-1.0`.
    """
    texts = as_text(column)
    relabelled = texts.astype(object)
    for value, new_value in relabel.items():
        relabelled[_has_value(texts, value, are_numbers)] = new_value
    return relabelled


def _has_value(texts: pd.Series, value: str, are_numbers: bool) -> pd.Series:
    if value == "":
        return texts.isna()
    if are_numbers and np.isfinite(number := as_numbers(pd.Series([value])).iloc[0]):
        return as_numbers(texts).eq(number)
    return texts.eq(value)


def unused_relabels(samples: pd.DataFrame, section: "TaskSection") -> list[str]:
    """Return a note on the values of `task.relabel` that no image has; else []."""
    if not section.relabel:
        return []
    target_values = samples[target_columns(section)].apply(empty_as_missing)
    if _holds_labels(target_values, section):
        label_sets = target_values.iloc[:, 0].map(lambda cell: _labels_of(cell, section.separator))
        texts = pd.Series([label for labels in label_sets for label in labels], dtype=object)
    else:
        texts = pd.concat([as_text(target_values[name]) for name in target_values])
    are_numbers = not _holds_names(target_values, section)
    unused = [
        repr(value) for value in section.relabel if not _has_value(texts, value, are_numbers).any()
    ]
    if not unused:
        return []
    return [f"task.relabel: no image has {name_some(unused)}, for which it gives another value"]


def target_columns(section: "TaskSection") -> list[str]:
    """Return the columns that the task predicts."""
    return [section.target] if isinstance(section.target, str) else list(section.target)


def _encode(
    target_values: pd.DataFrame, section: "TaskSection"
) -> tuple[tuple[str, ...], npt.NDArray[Any]]:
    for column_name, column in target_values.items():
        n_infinite = int(np.isinf(column).sum()) if column.dtype.kind == "f" else 0
        if n_infinite:
            raise DataError(
                f"task.target {column_name!r} is infinite in {count_text(n_infinite, 'row')}: mend "
                "or empty them"
            )
    if section.kind == "single":
        return _encode_classes(target_values, section)
    if section.kind == "multi" and _holds_labels(target_values, section):
        return _encode_label_sets(target_values.iloc[:, 0], section)
    column_names = tuple(str(column_name) for column_name in target_values.columns)
    numbers = target_values.to_numpy(dtype=np.float64)
    if section.kind == "regression":
        return column_names, numbers
    other_numbers = np.setdiff1d(numbers, (0, 1))
    if len(other_numbers):
        found_texts = [f"{number:g}" for number in other_numbers]
        raise DataError(
            f"task.kind multi needs 0 or 1 in every column of {', '.join(column_names)}; found "
            f"{name_some(found_texts)}. To say what a value counts as: task.relabel: "
            f"{{{found_texts[0]}: 0}}, or null for no value"
        )
    return column_names, numbers.astype(np.uint8)


def _encode_classes(
    target_values: pd.DataFrame, section: "TaskSection"
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the classes and the class index of each row, (N,).

    Labels are text as written: `01` is not `1`, and `None` is a class like others.
    """
    if target_values.shape[1] != 1:
        return _encode_one_hot(target_values)
    column_name = target_values.columns[0]
    if target_values.iloc[:, 0].map(lambda value: _is_list(value) or isinstance(value, dict)).any():
        raise DataError(
            f"task.target {column_name!r} holds lists; expected one label in each row. For several "
            "labels in a row: task.kind: multi"
        )
    labels = as_text(target_values.iloc[:, 0])
    classes = tuple(sorted(labels.unique().tolist(), key=_class_order(labels.unique())))
    if len(classes) < 2:
        raise DataError(
            f"task.target {column_name!r} holds one class only, {classes[0]!r}, in all "
            f"{count_text(len(labels), 'image')}; a classifier needs at least two. In a folder, "
            "each class is a sub-folder: FOLDER/cat/1.jpg, FOLDER/dog/2.jpg"
        )
    if len(classes) > _max_classes(len(labels)):
        raise DataError(
            f"task.target {column_name!r} has {len(classes):,} different values in "
            f"{len(labels):,} images; if it is a number to predict, set task.kind: regression"
        )
    class_index = {label: index for index, label in enumerate(classes)}
    return classes, labels.map(class_index).to_numpy(dtype=np.int64)


def _max_classes(n_images: int) -> int:
    # Of more different values most have one image, which no fold could be trained and tested on.
    return max(_USUAL_CLASSES, n_images // 2)


def are_quantities(labels: pd.Series) -> bool:
    """Return whether a column holds numbers to predict rather than numbers of classes: too many
    different ones for classes, or many with fractions.
    """
    numbers = as_numbers(labels.dropna())
    n_values = numbers.nunique()
    if numbers.isna().any():
        return False
    return n_values > _max_classes(len(numbers)) or bool(
        n_values > _USUAL_CLASSES and (numbers % 1 != 0).any()
    )


def _encode_one_hot(target_values: pd.DataFrame) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the columns that hold a 1 as classes, and the class index of each row, (N,)."""
    numbers = target_values.to_numpy(np.float64)
    is_one_hot = np.isin(numbers, (0, 1)).all(axis=1) & (numbers.sum(axis=1) == 1)
    if not is_one_hot.all():
        raise DataError(
            f"task.target names several columns, and {int((~is_one_hot).sum()):,} of "
            f"{count_text(len(numbers), 'image has', 'images have')} not exactly one 1 among zeros "
            "in them, which task.kind: single needs. Set task.kind to multi (several labels) or "
            "regression, or name one column"
        )
    # A class without an image could not be trained or tested.
    used_columns = np.flatnonzero(numbers.any(axis=0)).tolist()
    if len(used_columns) < 2:
        raise DataError("task.target: all images have their 1 in the same column")
    classes = tuple(str(target_values.columns[index]) for index in used_columns)
    return classes, numbers[:, used_columns].argmax(axis=1).astype(np.int64)


def _class_order(labels: Iterable[str]) -> Any:
    """Return a sort key by which classes that are all numbers sort as numbers, "9" before "10"."""
    try:
        label_values = {label: float(label) for label in labels}
    # One name that is no number is enough: then all are sorted as text.
    except ValueError:
        return lambda label: label
    return lambda label: (
        (label_values[label], label) if all(map(np.isfinite, label_values.values())) else label
    )


def _encode_label_sets(
    column: pd.Series, section: "TaskSection"
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    """Return the classes and (N, classes) 0/1 of a column with several labels in each cell."""
    label_sets = [
        [
            new_label
            for label in _labels_of(cell, section.separator)
            if (new_label := section.relabel.get(label, label)) is not None
        ]
        for cell in column
    ]
    label_names = {label for labels in label_sets for label in labels}
    if len(label_names) < 2:
        raise DataError(
            f"task.target {column.name!r} holds {count_text(len(label_names), 'different label')}; "
            "several were expected. Look at task.separator, which stands between the labels of a "
            "cell"
        )
    classes = tuple(sorted(label_names, key=_class_order(label_names)))
    class_index = {label: index for index, label in enumerate(classes)}
    target = np.zeros((len(label_sets), len(classes)), np.uint8)
    for row_index, labels in enumerate(label_sets):
        target[row_index, [class_index[label] for label in labels]] = 1
    return classes, target


def _labels_of(cell: object, separator: str | None) -> list[str]:
    """Return the labels of a cell that holds several."""
    if _is_list(cell):
        cell_parts = list(cell)  # type: ignore[call-overload]
    else:  # in a column of lists without a separator, a text is one label
        cell_parts = [cell] if separator is None else str(cell).split(separator)
    label_texts = as_text(pd.Series(cell_parts, dtype=object)).dropna().tolist()
    # A separator at the end of a cell is no label more.
    return [text for text in label_texts if text]


def _numbers(column: pd.Series, ids: pd.Series, section: "TaskSection") -> pd.Series:
    """Return a column as float64, missing as nan. Raises DataError, which names the first
    non-number.
    """
    if column.dtype.kind in "biuf":
        return column.astype(np.float64)
    cell_text = as_text(column)
    # A Boolean column of a CSV comes as text.
    numbers = as_numbers(cell_text.replace({"True": "1", "False": "0"}))
    is_wrong = cell_text.notna() & numbers.isna() & (cell_text.str.lower() != "nan")
    if is_wrong.any():
        first_row = int(is_wrong.to_numpy().argmax())
        advice = ""
        if section.kind == "multi":
            advice = (
                ". For labels by name, say what stands between them in a cell: task.separator: ';'"
            )
        elif str(cell_text.iloc[first_row]).replace(",", "", 1).lstrip("-").isdigit():
            advice = ". Write decimals with a point, and thousands without a comma"
        raise DataError(
            f"task.kind {section.kind} needs numbers in {column.name}; found "
            f"{cell_text.iloc[first_row]!r} for {ids.iloc[first_row]!r} "
            f"({count_text(int(is_wrong.sum()), 'such row')}){advice}"
        )
    return numbers


def alike_names(names: Iterable[str], names_of: str) -> list[str]:
    """Return a note on names that differ only in case, blanks, hyphens, accents or zeros."""
    if not (alike_groups := _alike_groups(names)):
        return []
    pair_texts = [" and ".join(map(repr, alike_group)) for alike_group in alike_groups]
    return [
        f"{names_of} that differ in case, blanks, hyphens, accents or zeros alone, and count as "
        f"different: {name_some(pair_texts)}"
    ]


def alike_classes(classes: Iterable[str]) -> list[str]:
    """Return a note on classes with such names, with the recipe's line that makes them one."""
    class_names = list(classes)
    if not (alike_groups := _alike_groups(class_names)):
        return []
    new_names = {name: names[-1] for names in alike_groups for name in names[:-1]}
    relabel_text = yaml.safe_dump(
        new_names, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False
    ).strip()
    (note,) = alike_names(class_names, "classes")
    return [f"{note}. To make them one: task.relabel: {relabel_text}"]


def _alike_groups(names: Iterable[str]) -> list[list[str]]:
    names_by_folded: dict[str, list[str]] = defaultdict(list)
    for name in names:
        names_by_folded[_folded(name)].append(name)
    return [sorted(group) for group in names_by_folded.values() if len(group) > 1]


def _folded(name: str) -> str:
    """Return a name without what is easily overlooked: case, blanks, hyphens, accents, and zeros
    that do not change a number.
    """
    if any(letter.isdigit() for letter in name) and not any(letter.isalpha() for letter in name):
        digits = re.fullmatch(r"(-?)0*(\d+)(\.0+)?", name)
        # 07 and 7.0 are 7, but -1 is not 1, nor version 1.10 version 1.1
        return name if digits is None else digits[1] + digits[2]
    letters = (
        letter
        # NFKD writes an accent as a letter of its own.
        for letter in unicodedata.normalize("NFKD", name)
        if not (unicodedata.combining(letter) or letter.isspace() or letter in "-_")
    )
    return "".join(letters).casefold()


def name_some(names: Sequence[str]) -> str:
    """Return the first names as a text, and how many more there are."""
    more_text = f" and {len(names) - _NAMES_IN_NOTE:,} more" if len(names) > _NAMES_IN_NOTE else ""
    return ", ".join(names[:_NAMES_IN_NOTE]) + more_text
