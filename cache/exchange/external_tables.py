"""CSV, TSV and Parquet tables that other programs made: ids as they are written, features as
numbers.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.spec import FeatureSpec

_TEXT_TABLES = (".csv", ".tsv")
TABLES = (".parquet", ".pq", *_TEXT_TABLES)
_SNIFFED_ROWS = 1000  # of a CSV, to see which columns are numbers
_MOST_COLUMNS = 100_000  # of a CSV
_MOST_COMPRESSED = 1032  # deflate's bound
_VALUE_BYTES = 4  # of a number, or a short text


def require_plausible_size(declared: int, source: Path) -> None:
    """Raises ExternalFeaturesInvalid for bytes of values that a file of its size cannot hold,
    however well they are compressed.
    """
    size = source.stat().st_size
    if declared > _MOST_COMPRESSED * size:
        raise ExternalFeaturesInvalid(
            f"{source}: it has {size:,} bytes, and declares {declared:,} bytes of values. Fetch it "
            "again"
        )


def kinds_of_columns(source: Path, id_name: str) -> tuple[list[str], list[str], list[str]]:
    """All columns of a table, those of lists, and those of numbers; from the schema, or the first
    rows of a CSV.
    """
    if source.suffix.lower() in _TEXT_TABLES:
        frame = _read_csv(source, None, _SNIFFED_ROWS, None)
        # With gaps too: nobody would miss a column that a suggestion leaves out in silence.
        is_mostly_numbers = frame.apply(pd.to_numeric, errors="coerce").notna().mean() > 0.5
        columns = [str(column) for column in frame.columns]
        numbers = [
            column
            for column in columns
            if is_mostly_numbers[column] and column not in (id_name, "content")
        ]
        return columns, [], numbers
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(source)
    is_list = [
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        for kind in schema.types
    ]
    is_number = [
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        for kind in schema.types
    ]
    columns = list(schema.names)
    lists = [column for column, yes in zip(columns, is_list, strict=True) if yes]
    numbers = [
        column for column, yes in zip(columns, is_number, strict=True) if yes and column != id_name
    ]
    return columns, lists, numbers


def read_columns(
    source: Path, features: Sequence[str], texts: Sequence[str], columns: Sequence[str]
) -> pd.DataFrame:
    """The columns of features, and those of `texts` that there are; of a CSV, these as they are
    written.
    """
    wanted = [column for column in columns if column in features or column in texts]
    if source.suffix.lower() in _TEXT_TABLES:
        return _read_csv(source, wanted, None, dict.fromkeys(texts, str))
    return _read_parquet(source, wanted)


def read_texts(file: Path) -> pd.DataFrame:
    """A small table whose columns are all wanted as they are written: the ids beside an array."""
    return (
        _read_csv(file, None, None, str)
        if file.suffix.lower() not in (".parquet", ".pq")
        else _read_parquet(file, None)
    )


def _read_csv(
    file: Path, columns: Sequence[str] | None, rows: int | None, dtype: Any
) -> pd.DataFrame:
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=separator), [])
    if len(header) > _MOST_COLUMNS:
        raise ExternalFeaturesInvalid(
            f"{file}: {len(header):,} columns; at most {_MOST_COLUMNS:,} are read. Keep them in "
            ".npy, or as lists"
        )
    twice = sorted(name for name, times in Counter(header).items() if name and times > 1)
    if twice:  # pandas would rename the second one, and nobody would know which is which
        raise ExternalFeaturesInvalid(
            f"{file}: the first line has several columns {twice[0]!r}: give each its own name"
        )
    frame = pd.read_csv(
        file,
        sep=separator,
        dtype=dtype,
        usecols=None if columns is None else list(columns),
        nrows=rows,
        encoding="utf-8-sig",
        keep_default_na=False,  # an id may be None or NA, and an empty value is no number
        na_filter=False,
        low_memory=False,
    )
    if not isinstance(
        frame.index, pd.RangeIndex
    ):  # pandas takes the first values for the rows' names
        raise ExternalFeaturesInvalid(
            f"{file}: the rows have more values than the first line has names ({len(header)})"
        )
    return frame


def _read_parquet(file: Path, columns: Sequence[str] | None) -> pd.DataFrame:
    import pyarrow.parquet as pq

    # Without pandas' metadata, which would hide a column of ids that has been the index. Integers
    # with a gap would lose digits as floats.
    require_plausible_size(_VALUE_BYTES * _values_declared(file, columns), file)
    table = pq.read_table(file, columns=None if columns is None else list(columns))
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def _values_declared(file: Path, columns: Sequence[str] | None) -> int:
    """How many values of these columns a Parquet file says that it has, those in lists
    one by one.
    """
    import pyarrow.parquet as pq

    wanted = None if columns is None else set(columns)
    values = 0
    with pq.ParquetFile(file) as opened:
        metadata, paths = opened.metadata, [column.path for column in opened.schema]
        own = [
            number
            for number, path in enumerate(paths)
            # Of a list, `name.list.element`; names may have dots in them.
            if wanted is None
            or path in wanted
            or any(path.startswith(f"{name}.") for name in wanted)
        ]
        for group in range(metadata.num_row_groups):
            # A chunk whose description is damaged ends the process where it is asked for; where it
            # is read, that is an error.
            next(
                opened.iter_batches(
                    batch_size=1, row_groups=[group], columns=[paths[number] for number in own]
                ),
                None,
            )
            values += sum(metadata.row_group(group).column(number).num_values for number in own)
    return values


def number_columns(frame: pd.DataFrame, names: Sequence[str], source: Path) -> npt.NDArray[Any]:
    """(N, D) float32 of columns. Raises ExternalFeaturesInvalid naming the first value that is
    no number.
    """
    features = np.empty((len(frame), len(names)), np.float32)
    for number, name in enumerate(names):
        column = frame[name]
        if column.dtype.kind not in "fiub":
            # Text and decimals; pandas would make numbers of dates too.
            values = pd.to_numeric(
                column if column.dtype.kind == "O" else column.astype(str), errors="coerce"
            )
            if values.isna().any():
                row = int(values.isna().to_numpy().argmax())
                raise ExternalFeaturesInvalid(
                    f"{source}: column {name!r} holds {column.iloc[row]!r} in row {row + 1:,}; "
                    "expected a number. Mend or remove the row, or leave the column out"
                )
            column = values
        with np.errstate(over="ignore"):  # an infinity is told with its row
            features[:, number] = column.to_numpy(np.float64)
    return features


def list_column_values(column: pd.Series, source: Path, option: str) -> npt.NDArray[Any]:
    """(N, D) float32 of a column of N lists.

    Raises ExternalFeaturesInvalid naming the first row that is no such list.
    """
    size: int | None = None
    for row, value in enumerate(column):
        if isinstance(value, str):
            raise ExternalFeaturesInvalid(
                f"{source}: column {column.name!r} holds text in row {row + 1:,}, {value[:30]!r}; "
                "expected a list of numbers. Lists survive in Parquet, not in CSV: "
                "frame.to_parquet(FILE)"
            )
        if not isinstance(value, np.ndarray | list):
            expected = (
                f"; numbers are named with {option}"
                if isinstance(value, int | float | np.number)
                else ""
            )
            raise ExternalFeaturesInvalid(
                f"{source}: column {column.name!r} holds {value!r} in row {row + 1:,}; expected a "
                f"list of numbers{expected}"
            )
        size = len(value) if size is None else size
        if len(value) != size:
            raise ExternalFeaturesInvalid(
                f"{source}: column {column.name!r} holds lists of {size:,} values and, in row "
                f"{row + 1:,}, one of {len(value):,}"
            )
    with np.errstate(over="ignore"):
        return np.stack([np.asarray(value, np.float32) for value in column])


def exported_shape(source: Path) -> tuple[int, ...] | None:
    """Of one row, in a file that `export_parquet` wrote; Parquet lists are flat."""
    if source.suffix.lower() in _TEXT_TABLES:
        return None
    import pyarrow.parquet as pq

    text = (pq.read_schema(source).metadata or {}).get(b"headrace")
    return FeatureSpec.from_json(text.decode()).shape if text else None
