"""CSV, TSV and Parquet tables of other programs: ids exactly as written, features as numbers."""

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
_SNIFFED_ROWS = 1000  # rows of a CSV that tell which columns are numbers
_MAX_COLUMNS = 100_000  # of a CSV
# The most that deflate can reach. Parquet's own encodings shrink constant columns more, which no
# features are.
_MAX_COMPRESSION_RATIO = 1032
_VALUE_BYTES = 4  # of a number, or of a short text


def require_plausible_size(declared_bytes: int, source_path: Path) -> None:
    """Raise ExternalFeaturesInvalid if a file is too small for that many bytes of features."""
    file_bytes = source_path.stat().st_size
    if declared_bytes > _MAX_COMPRESSION_RATIO * file_bytes:
        raise ExternalFeaturesInvalid(
            f"{source_path}: it has {file_bytes:,} bytes, and declares {declared_bytes:,} bytes of "
            "values. Fetch it again"
        )


def classify_columns(source_path: Path, id_name: str) -> tuple[list[str], list[str], list[str]]:
    """Return the names of a table's columns: all, those of lists, and those of numbers.

    Parquet states the types; those of a CSV are judged by its first rows.
    """
    if source_path.suffix.lower() in _TEXT_TABLES:
        sampled_rows = _read_csv(source_path, None, _SNIFFED_ROWS, None)
        # More than half is enough: a column with gaps is then refused with its row, while one that
        # the suggestion leaves out would not be missed.
        is_mostly_numbers = sampled_rows.apply(pd.to_numeric, errors="coerce").notna().mean() > 0.5
        column_names = [str(column) for column in sampled_rows.columns]
        numeric_columns = [
            column
            for column in column_names
            if is_mostly_numbers[column] and column not in (id_name, "content")
        ]
        return column_names, [], numeric_columns
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(source_path)
    types = pa.types
    is_list_type = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    is_number_type = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    list_columns = [
        field.name for field in schema if any(is_type(field.type) for is_type in is_list_type)
    ]
    numeric_columns = [
        field.name
        for field in schema
        if field.name != id_name and any(is_type(field.type) for is_type in is_number_type)
    ]
    return list(schema.names), list_columns, numeric_columns


def read_columns(
    source_path: Path,
    feature_columns: Sequence[str],
    text_columns: Sequence[str],
    column_names: Sequence[str],
) -> pd.DataFrame:
    """Read the feature columns and those of `text_columns` that exist.

    A CSV's texts are not converted: `007` stays text.
    """
    selected_columns = [
        column for column in column_names if column in feature_columns or column in text_columns
    ]
    if source_path.suffix.lower() in _TEXT_TABLES:
        return _read_csv(source_path, selected_columns, None, dict.fromkeys(text_columns, str))
    return _read_parquet(source_path, selected_columns)


def read_text_table(table_path: Path) -> pd.DataFrame:
    """Read the small table of ids beside an array; a CSV's values are not converted."""
    if table_path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(table_path, None)
    return _read_csv(table_path, None, None, str)


def _read_csv(
    table_path: Path, column_names: Sequence[str] | None, max_rows: int | None, dtype: Any
) -> pd.DataFrame:
    separator = "\t" if table_path.suffix.lower() == ".tsv" else ","
    with open(table_path, encoding="utf-8-sig", newline="") as text_stream:
        header_names = next(csv.reader(text_stream, delimiter=separator), [])
    if len(header_names) > _MAX_COLUMNS:
        raise ExternalFeaturesInvalid(
            f"{table_path}: {len(header_names):,} columns; at most {_MAX_COLUMNS:,} are read. Keep "
            "them in .npy, or as lists"
        )
    duplicate_names = sorted(
        name for name, times in Counter(header_names).items() if name and times > 1
    )
    # pandas would rename the second one, and its user would not know which is which.
    if duplicate_names:
        raise ExternalFeaturesInvalid(
            f"{table_path}: the first line has several columns {duplicate_names[0]!r}: give each "
            "its own name"
        )
    data_frame = pd.read_csv(
        table_path,
        sep=separator,
        dtype=dtype,
        usecols=None if column_names is None else list(column_names),
        nrows=max_rows,
        encoding="utf-8-sig",
        # Otherwise the ids None and NA would be missing values, and an empty value a number (NaN).
        keep_default_na=False,
        na_filter=False,
        low_memory=False,
    )
    # Where rows have more values than the header, pandas takes the first ones for row names.
    if not isinstance(data_frame.index, pd.RangeIndex):
        raise ExternalFeaturesInvalid(
            f"{table_path}: the rows have more values than the first line has names "
            f"({len(header_names)})"
        )
    return data_frame


def _read_parquet(table_path: Path, column_names: Sequence[str] | None) -> pd.DataFrame:
    import pyarrow.parquet as pq

    n_values = _count_declared_values(table_path, column_names)
    require_plausible_size(_VALUE_BYTES * n_values, table_path)
    table = pq.read_table(table_path, columns=None if column_names is None else list(column_names))
    # ignore_metadata: pandas' own would hide a column of ids that has been the index.
    # integer_object_nulls: integers with a gap would otherwise become floats and lose digits.
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def _count_declared_values(table_path: Path, column_names: Sequence[str] | None) -> int:
    """Return how many values a Parquet file declares for these columns; each of a list counts."""
    import pyarrow.parquet as pq

    # The path of a list is `name.list.element`; names may contain dots.
    prefixes = None if column_names is None else tuple(f"{name}." for name in column_names)
    n_values = 0
    with pq.ParquetFile(table_path) as parquet_file:
        metadata = parquet_file.metadata
        path_of_index = {
            index: column.path
            for index, column in enumerate(parquet_file.schema)
            if prefixes is None or f"{column.path}.".startswith(prefixes)
        }
        for row_group in range(metadata.num_row_groups):
            # One row is read first, because `metadata.row_group(i).column(j)` ends the process
            # where the description of a column chunk is damaged; reading it raises an error.
            batches = parquet_file.iter_batches(
                batch_size=1, row_groups=[row_group], columns=list(path_of_index.values())
            )
            next(batches, None)
            group = metadata.row_group(row_group)
            n_values += sum(group.column(index).num_values for index in path_of_index)
    return n_values


def read_numeric_columns(
    data_frame: pd.DataFrame, column_names: Sequence[str], source_path: Path
) -> npt.NDArray[Any]:
    """Return columns as (N, D) float32.

    Raises ExternalFeaturesInvalid naming the first value that is not a number.
    """
    features = np.empty((len(data_frame), len(column_names)), np.float32)
    for column_index, column_name in enumerate(column_names):
        column = data_frame[column_name]
        if column.dtype.kind not in "fiub":
            # Objects are texts or decimals. Other types, such as dates, go through text, because
            # pandas would make numbers of them.
            numeric_values = pd.to_numeric(
                column if column.dtype.kind == "O" else column.astype(str), errors="coerce"
            )
            if numeric_values.isna().any():
                row = int(numeric_values.isna().to_numpy().argmax())
                raise ExternalFeaturesInvalid(
                    f"{source_path}: column {column_name!r} holds {column.iloc[row]!r} in row "
                    f"{row + 1:,}; expected a number. Mend or remove the row, or leave the column "
                    "out"
                )
            column = numeric_values
        # A value beyond float32 becomes infinity, which the caller reports with its row
        # (`_refuse_non_finite` in external_files.py).
        with np.errstate(over="ignore"):
            features[:, column_index] = column.to_numpy(np.float64)
    return features


def read_list_column(
    list_column: pd.Series, source_path: Path, suggested_option: str
) -> npt.NDArray[Any]:
    """Return a column of N lists as (N, D) float32.

    suggested_option: the option for columns of numbers, which a message names.

    Raises ExternalFeaturesInvalid naming the first row that is not a list of that length.
    """
    list_length: int | None = None
    for row, value in enumerate(list_column):
        if isinstance(value, str):
            raise ExternalFeaturesInvalid(
                f"{source_path}: column {list_column.name!r} holds text in row {row + 1:,}, "
                f"{value[:30]!r}; expected a list of numbers. Lists survive in Parquet, not in "
                "CSV: frame.to_parquet(FILE)"
            )
        if not isinstance(value, np.ndarray | list):
            expected_hint = (
                f"; numbers are named with {suggested_option}"
                if isinstance(value, int | float | np.number)
                else ""
            )
            raise ExternalFeaturesInvalid(
                f"{source_path}: column {list_column.name!r} holds {value!r} in row {row + 1:,}; "
                f"expected a list of numbers{expected_hint}"
            )
        list_length = len(value) if list_length is None else list_length
        if len(value) != list_length:
            raise ExternalFeaturesInvalid(
                f"{source_path}: column {list_column.name!r} holds lists of {list_length:,} values "
                f"and, in row {row + 1:,}, one of {len(value):,}"
            )
    # A number too large for float32 becomes infinite, and is refused with the other values.
    with np.errstate(over="ignore"):
        return np.stack([np.asarray(value, np.float32) for value in list_column])


def exported_shape(source_path: Path) -> tuple[int, ...] | None:
    """Return the shape of one row of a file that `export_parquet` wrote, None for other files.

    The lists of such a file are flat; its metadata have the shape. Raises SpecMismatch or
    ValueError for metadata that this version does not read.
    """
    if source_path.suffix.lower() in _TEXT_TABLES:
        return None
    import pyarrow.parquet as pq

    spec_json = (pq.read_schema(source_path).metadata or {}).get(b"headrace")
    return FeatureSpec.from_json(spec_json.decode()).shape if spec_json else None
