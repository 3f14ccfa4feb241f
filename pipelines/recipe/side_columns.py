"""From the user's tabular columns to side columns, as numbers or categories, with notes on what
looks wrong in them.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import as_numbers, as_text
from headrace.heads.data.side_columns import SideColumn, SideColumns
from headrace.pipelines.recipe.targets import DataError, alike_names, empty_as_missing, name_some

if TYPE_CHECKING:
    from headrace.pipelines.recipe.sections import TaskSection

ColumnKind = Literal["auto", "number", "category"]

_DECIMAL_COMMA = r"[+-]?\d+,\d+"
_DATE = r"\d{4}-\d{1,2}-\d{1,2}([T ].*)?|\d{1,2}[./]\d{1,2}[./](\d{2}|\d{4})|\d{1,2}:\d{2}(:\d{2})?"
_NUMBER_AND_WORD = r"[<>~$€£]?[+-]?\d+(\.\d+)?\s*[^\d\s,.:/_-]{0,5}"
_MAX_NUMBER = 1e30  # heads read numbers as float32
# Numbers that stand for a missing one in many tables, if they are far from all others.
_MISSING_CODES = (-9, -99, -999, -9999, -99999, 99, 999, 9999, 99999)
# A category column with more than _MANY_LEVELS levels, and fewer than _ROWS_PER_LEVEL rows for
# each, names rows instead of describing them.
_MANY_LEVELS, _ROWS_PER_LEVEL = 20, 4
# Up to this many different values such as "2 mm" are settings, and a category; more are
# measurements.
_FEW_AMOUNTS = 8


def make_side_columns(
    samples: pd.DataFrame,
    target: npt.NDArray[Any],
    is_training: npt.NDArray[np.bool_],
    section: "TaskSection",
) -> tuple[SideColumns | None, list[str]]:
    """Return the side columns of all samples, and notes.

    Levels, means and spreads come from the training rows alone. Raises DataError for a column that
    cannot be an input: with dates, with one value for each row, with numbers and words mixed.
    """
    if not section.side_columns:
        return None, []
    kinds: dict[str, ColumnKind] = (
        dict(section.side_columns)
        if isinstance(section.side_columns, dict)
        else dict.fromkeys(section.side_columns, "auto")
    )
    columns: list[SideColumn] = []
    notes: list[str] = []
    for name, kind in kinds.items():
        texts = _texts(samples[name])
        described = (
            _number_column(name, texts, samples["id"], is_training)
            if _is_number(name, kind, texts, samples["id"])
            else _category_column(name, texts, is_training)
        )
        columns.append(described)
        notes += _cautions(described, texts, target, is_training, section)
    side, unknown = encode_side_columns(samples, columns)
    return side, notes + unknown


def encode_side_columns(
    samples: pd.DataFrame, columns: Sequence[SideColumn]
) -> tuple[SideColumns, list[str]]:
    """Return the side columns of samples in the encoding of `columns`, and notes that count values
    that no training row has.

    samples: have column `id` or `file`, the rows' names. Raises DataError for an absent column, and
    for text in a column of numbers.
    """
    require_columns(samples, [column.name for column in columns])
    row_names = samples["file" if "file" in samples else "id"]
    values = np.empty((len(samples), len(columns)), np.float64)
    notes: list[str] = []
    for position, column in enumerate(columns):
        texts = _texts(samples[column.name])
        if column.levels is None:
            values[:, position] = _numbers(column.name, texts, row_names)
            continue
        codes = pd.Index(column.levels).get_indexer(pd.Index(texts.fillna(""), dtype=object))
        values[:, position] = np.where(codes < 0, np.nan, codes)
        if (codes < 0).any():
            unknown = sorted(set(texts[codes < 0].fillna("(empty)")))
            notes.append(
                f"{count_text(int((codes < 0).sum()), 'image has', 'images have')} a {column.name} "
                f"that no training image has, and count as none of its values: {name_some(unknown)}"
            )
    return SideColumns(tuple(columns), values), notes


def require_columns(samples: pd.DataFrame, names: Sequence[str], place: str = "") -> None:
    """Raise DataError if a column that the model reads is absent. place: begins the message."""
    absent = [name for name in names if name not in samples]
    if absent:
        present = [str(name) for name in samples.columns if name not in ("path", "file", "content")]
        raise DataError(
            f"{place}the model reads {name_some(names)} beside each image, and there is no column "
            f"{name_some(absent)}. Give a table with a column of paths and "
            f"{'this one' if len(absent) == 1 else 'these'} beside it. There are: "
            f"{name_some(present) or 'none'}"
        )


def _texts(column: pd.Series) -> pd.Series:
    return as_text(empty_as_missing(column))


def _is_missing(texts: pd.Series) -> npt.NDArray[np.bool_]:
    return np.asarray(texts.isna() | (texts.str.lower() == "nan"), np.bool_)


def _is_number(name: str, kind: ColumnKind, texts: pd.Series, row_names: pd.Series) -> bool:
    """Return whether a column holds numbers. Raises DataError if that is not clear."""
    if kind != "auto":
        return kind == "number"
    present = texts[~_is_missing(texts)]
    is_number = as_numbers(present).notna()
    if is_number.all():
        return True
    words = present[~is_number]
    if words.str.fullmatch(_DECIMAL_COMMA).all() or (is_number.any() and len(words)):
        _numbers(name, texts, row_names)  # raises, and says what is wrong
    if words.str.fullmatch(_DATE).mean() > 0.9:
        raise DataError(
            f"task.side_columns: {name!r} holds dates or times, such as {words.iloc[0]!r}. Give a "
            "number, such as the days since the first one, the month or the hour; or, for a few "
            f"that come again, side_columns: {{{name}: category}}"
        )
    if words.nunique() > _FEW_AMOUNTS and words.str.fullmatch(_NUMBER_AND_WORD).mean() > 0.9:
        raise DataError(
            f"task.side_columns: {name!r} holds numbers with words, such as {words.iloc[0]!r}. "
            f"Write the numbers alone; or, for names, side_columns: {{{name}: category}}"
        )
    return False


def _numbers(name: str, texts: pd.Series, row_names: pd.Series) -> npt.NDArray[np.float64]:
    """Return (N,) numbers, nan if missing. Raises DataError, which names the first non-number."""
    numbers = as_numbers(texts)
    is_wrong = (numbers.isna() & ~_is_missing(texts)) | (numbers.abs() > _MAX_NUMBER)
    if is_wrong.any():
        row = int(is_wrong.to_numpy().argmax())
        cell_text = str(texts.iloc[row])
        advice = (
            "write decimals with a point, and thousands without a comma"
            if re.fullmatch(_DECIMAL_COMMA, cell_text)
            else "empty the cell where the number is not known; for names that are not numbers, "
            f"side_columns: {{{name}: category}}"
        )
        raise DataError(
            f"side column {name!r} holds numbers, and {cell_text!r} for {row_names.iloc[row]!r} "
            f"({count_text(int(is_wrong.sum()), 'such row')}): {advice}"
        )
    return numbers.to_numpy()


def _number_column(
    name: str, texts: pd.Series, row_names: pd.Series, is_training: npt.NDArray[np.bool_]
) -> SideColumn:
    numbers = _numbers(name, texts, row_names)[is_training]
    present = numbers[~np.isnan(numbers)]
    if not len(present):
        raise DataError(
            f"task.side_columns: {name!r} is empty for every training image: leave it out"
        )
    spread = float(present.std())
    return SideColumn(
        name,
        has_missing=len(present) < len(numbers),
        center=float(present.mean()),
        # A constant column has no spread to be divided by.
        spread=spread if spread > 0 and np.isfinite(spread) else 1.0,
    )


def _category_column(name: str, texts: pd.Series, is_training: npt.NDArray[np.bool_]) -> SideColumn:
    values = texts[is_training].fillna("")
    levels = tuple(sorted(values.unique().tolist()))
    if len(levels) > max(_MANY_LEVELS, len(values) // _ROWS_PER_LEVEL):
        raise DataError(
            f"task.side_columns: {name!r} has {len(levels):,} different values in "
            f"{len(values):,} training images, such as {levels[-1]!r}: it names images "
            "rather than describing them, and a new image would have a value that nobody has seen. "
            "Leave it out, or put rare values together"
        )
    return SideColumn(name, levels)


def _cautions(
    column: SideColumn,
    texts: pd.Series,
    target: npt.NDArray[Any],
    is_training: npt.NDArray[np.bool_],
    section: "TaskSection",
) -> list[str]:
    """Return notes on a column that cannot help, or that gives the target away."""
    values = texts[is_training].fillna("")
    n_values = values.nunique()
    if n_values == 1:
        return [
            f"side column {column.name!r} has one value in all training images: it says nothing"
        ]
    notes = _written_in_two_ways(column, as_numbers(texts[is_training]))
    targets = target[is_training].reshape(len(values), -1)
    if column.levels is None and section.kind == "regression":
        numbers = as_numbers(texts)[is_training].to_numpy()
        is_given = ~np.isnan(numbers)
        # The correlation with a constant is nan, about which NumPy warns; a note would be the wrong
        # one.
        with np.errstate(invalid="ignore", divide="ignore"):
            correlations = [
                abs(np.corrcoef(numbers[is_given], values_of_target[is_given])[0, 1])
                for values_of_target in targets.T
            ]
        # Not exactly 1: a copy of the target in another unit may be rounded.
        gives_away = bool(np.nanmax([*correlations, 0]) > 0.9999)
    else:
        # Each value comes with one target, and on enough rows that this is not chance.
        n_targets_by_value = pd.DataFrame(targets).groupby(values.to_numpy()).nunique()
        gives_away = n_values <= len(values) // _ROWS_PER_LEVEL and bool(
            (n_targets_by_value <= 1).all(axis=0).any()
        )
    if not gives_away:
        return notes
    return [
        *notes,
        f"side column {column.name!r} gives the target away: each of its values comes with one "
        "answer. Is it known when a new image is predicted? If not, leave it out",
    ]


def _written_in_two_ways(column: SideColumn, numbers: pd.Series) -> list[str]:
    """Return notes on levels that look alike, and on numbers that probably mean "missing".

    numbers: of the training rows, nan for cells without one.
    """
    if column.levels is not None:
        return alike_names(column.levels, f"values of {column.name!r}")
    notes = []
    for code in _MISSING_CODES:
        other_numbers = numbers[numbers != code].dropna()
        n_codes = int((numbers == code).sum())
        if n_codes < 2 or len(other_numbers) < 2:
            continue
        low, high = other_numbers.min(), other_numbers.max()
        if min(abs(code - low), abs(code - high)) > 2 * (high - low) and not low <= code <= high:
            notes.append(
                f"side column {column.name!r} is {code} for {count_text(n_codes, 'image')}, far "
                "from all other numbers: if that stands for a missing number, empty these cells"
            )
    return notes
