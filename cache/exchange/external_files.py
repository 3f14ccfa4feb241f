"""Features and ids read from files of other programs, refusing what is not a feature."""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.columns import (
    FeatureColumns,
    abbreviate_columns,
    choose_columns,
    columns_option,
    forbidden_reason,
    refuse_columns,
)
from headrace.cache.exchange.external_tables import (
    TABLES,
    classify_columns,
    exported_shape,
    read_columns,
    read_list_column,
    read_numeric_columns,
    read_text_table,
    require_plausible_size,
)
from headrace.cache.exchange.leaks import find_row_counters
from headrace.cache.format.hdf5_values import find_data_sets, open_hdf5, read_values
from headrace.cache.text import as_text

_TEXT_KINDS = "OSU"
_CONTENT_HASH = re.compile(r"[0-9a-f]{32}")
_EXACT_INTEGERS = 2.0**53  # float64 holds every integer up to here
_NO_COLUMNS = FeatureColumns()
# Rows checked together for NaN and infinity.
_BLOCK_ROWS = 1 << 14
_STORED_ELSEWHERE = (
    "they are not read: a file that somebody sends could name any file of yours so. Copy them with "
    "h5py: new['x'] = old['x'][:]"
)


@dataclass(frozen=True)
class ExternalFeatures:
    """Features and ids as another program left them."""

    sample_ids: list[str]  # N; unique if there are no content hashes
    features: npt.NDArray[Any]  # (N, *shape), finite
    content_hashes: list[str] | None  # N, or None for a file without them
    feature_columns: FeatureColumns = _NO_COLUMNS
    source_name: str = "the file"


def read_external_features(
    source_path: Path,
    *,
    ids_path: Path | None = None,
    feature_key: str | None = None,
    id_key: str | None = None,
    column_options: Sequence[str] = (),
    forbidden_names: Mapping[str, str] | None = None,
) -> ExternalFeatures:
    """Read features and ids from a file.

    .npy, .npz: features (N, ...) and a table of ids beside them, `ids_path` or `<stem>.rows.csv`.
    Parquet, CSV, TSV: a column of ids (`id_key`, by default `id`) and either one column of lists
    (`feature_key`) or numeric columns, which `column_options` names as `choose_columns` reads it; a
    single one needs no naming. HDF5: a data set of features (`feature_key`) and one of ids
    (`id_key`), or `ids_path`.

    forbidden_names: {column: reason}, columns that are no features even when named, as the target.

    Raises ExternalFeaturesInvalid, stating what the file holds and what to type: several columns
    and none named, columns that are no features (see `refuse_columns`, `find_row_counters`), values
    that are not finite numbers, rows without an id.
    """
    suffix = source_path.suffix.lower()
    if not source_path.is_file():
        raise ExternalFeaturesInvalid(f"{source_path}: no such file")
    if column_options and suffix not in TABLES:
        raise ExternalFeaturesInvalid(
            f"{source_path}: --columns names columns of a table; found {suffix or 'no suffix'}, "
            "see --key"
        )
    try:
        if suffix in (".npy", ".npz"):
            features = _read_numpy(source_path, feature_key, forbidden_names or {})
            return _join_id_table(source_path, features, ids_path, id_key)
        if suffix in TABLES:
            return _read_table(
                source_path, ids_path, feature_key, id_key, column_options, forbidden_names or {}
            )
        if suffix in (".h5", ".hdf5", ".hdf"):
            return _read_hdf5(source_path, ids_path, feature_key, id_key, forbidden_names or {})
    except (ExternalFeaturesInvalid, MemoryError):
        raise
    # NumPy, zipfile, h5py, PyArrow and pandas raise anything on bytes that are not theirs.
    except Exception as error:
        raise ExternalFeaturesInvalid(
            f"{source_path}: cannot be read as {suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from error
    raise ExternalFeaturesInvalid(
        f"{source_path}: expected .npy, .npz, .parquet, .csv, .tsv, .h5 or .hdf5; found "
        f"{suffix or 'no suffix'}"
    )


def _join_id_table(
    source_path: Path,
    features: npt.NDArray[Any],
    ids_path: Path | None,
    id_key: str | None,
    feature_columns: FeatureColumns = _NO_COLUMNS,
) -> ExternalFeatures:
    """Return the features with the ids of the table beside them."""
    id_table = _read_id_table(source_path, ids_path, id_key)
    id_column = id_key or "id"
    if id_column not in id_table:
        raise ExternalFeaturesInvalid(
            f"the table of ids beside {source_path} has no column {id_column!r} (--id-key); it has "
            f"{abbreviate_columns(list(id_table.columns))}"
        )
    return _validate_features(
        source_path, id_table[id_column], features, id_table.get("content"), feature_columns
    )


def _read_id_table(source_path: Path, ids_path: Path | None, id_key: str | None) -> pd.DataFrame:
    table_path = ids_path or source_path.with_suffix(".rows.csv")
    if not table_path.is_file():
        raise ExternalFeaturesInvalid(
            f"{source_path} holds features and no ids: give a table with one row per row, as in "
            "--ids rows.csv (column id)"
        )
    suffix = table_path.suffix.lower()
    if suffix == ".npy":
        return pd.DataFrame({id_key or "id": _values_per_row(_load_id_array(table_path))})
    if suffix == ".txt":
        # Not splitlines, which also divides at rarer characters that a name may hold, as U+2028.
        id_lines = table_path.read_text(encoding="utf-8-sig").split("\n")
        if not id_lines[-1].strip():
            id_lines.pop()
        return pd.DataFrame({id_key or "id": id_lines}, dtype=object)
    return _restore_row_order(read_text_table(table_path), table_path)


def _load_id_array(ids_path: Path) -> npt.NDArray[Any]:
    try:
        id_array: npt.NDArray[Any] = np.load(ids_path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ExternalFeaturesInvalid(
            f"{ids_path}: cannot be read as ids ({error}). An array of Python objects could run "
            "code: write the ids as text, np.save(FILE, np.array(ids, dtype=str)), or one per "
            "line in a .txt"
        ) from error
    return id_array


def _restore_row_order(id_table: pd.DataFrame, table_path: Path) -> pd.DataFrame:
    """Sort a table of `export_npy` by its column `row`, in case a program has reordered it."""
    if not {"row", "id", "content"} <= set(id_table.columns):
        return id_table
    row_numbers = pd.to_numeric(id_table["row"], errors="coerce")
    if set(row_numbers) != set(range(len(id_table))):
        raise ExternalFeaturesInvalid(
            f"{table_path}: its column `row` does not count the rows of the features from 0 to "
            f"{len(id_table) - 1:,}: rows have been added, removed or renumbered since it was "
            "exported. Take the same rows of both, or export again"
        )
    return id_table.iloc[np.argsort(row_numbers.to_numpy(), kind="stable")].reset_index(drop=True)


def _values_per_row(array: npt.NDArray[Any]) -> pd.Series:
    """Return the N values of an array (N,) or (N, 1), unconverted."""
    if array.ndim > 1 and array.size == len(array):
        array = array.reshape(-1)
    if array.ndim != 1:
        raise ExternalFeaturesInvalid(
            f"the ids have shape {array.shape}; expected one for each row"
        )
    is_text = array.dtype.kind in _TEXT_KINDS
    return pd.Series(array.tolist(), dtype=object) if is_text else pd.Series(array)


def _read_numpy(
    source_path: Path, feature_key: str | None, forbidden_names: Mapping[str, str]
) -> npt.NDArray[Any]:
    if source_path.suffix.lower() == ".npy":
        array: npt.NDArray[Any] = np.load(source_path, mmap_mode="r", allow_pickle=False)
        return array
    with np.load(source_path, allow_pickle=False) as archive:
        _require_complete_arrays(archive.zip, source_path)
        array_names = [feature_key] if feature_key else []
        array_names = array_names or [name for name in archive if archive[name].ndim in (2, 4)]
        if len(array_names) != 1 or array_names[0] not in archive.files:
            raise ExternalFeaturesInvalid(
                f"{source_path}: name the array of features with --key; it has "
                f"{', '.join(archive.files)}"
            )
        refuse_columns(array_names, forbidden_names, array_names, "--key", source_path)
        return np.asarray(archive[array_names[0]])


def _require_complete_arrays(zip_archive: zipfile.ZipFile, source_path: Path) -> None:
    """Raise ExternalFeaturesInvalid for an array that declares more bytes than the archive holds.

    NumPy would allocate the declared bytes first, and a few bytes of header can declare terabytes.
    """
    for member in zip_archive.infolist():
        require_plausible_size(member.file_size, source_path)
        with zip_archive.open(member) as opened:
            if opened.read(6) != np.lib.format.MAGIC_PREFIX:
                continue
            read_header = np.lib.format.read_array_header_2_0
            if tuple(opened.read(2)) == (1, 0):
                read_header = np.lib.format.read_array_header_1_0
            array_shape, _, dtype = read_header(opened)
        if math.prod(array_shape) * dtype.itemsize > member.file_size:
            raise ExternalFeaturesInvalid(
                f"{source_path}: {member.filename} declares an array of shape {array_shape}, and "
                "does not hold it"
            )


def _read_table(
    source_path: Path,
    ids_path: Path | None,
    feature_key: str | None,
    id_key: str | None,
    column_options: Sequence[str],
    forbidden_names: Mapping[str, str],
) -> ExternalFeatures:
    id_name = id_key or "id"
    column_names, list_columns, numeric_columns = classify_columns(source_path, id_name)
    if feature_key is not None and column_options:
        raise ExternalFeaturesInvalid(
            f"{source_path}: --key names a column of lists, --columns numeric columns: give one of "
            "them"
        )
    for column_name, description in (
        (id_name if ids_path is None else None, "of ids (--id-key)"),
        (feature_key, "(--key)"),
    ):
        if column_name is not None and column_name not in column_names:
            raise ExternalFeaturesInvalid(
                f"{source_path} has no column {column_name!r} {description}; it has "
                f"{abbreviate_columns(column_names)}"
            )
    id_columns = {"id": "the column of ids", id_name: "the column of ids"}
    forbidden_names = {**forbidden_names, "content": "the column of content hashes", **id_columns}
    text_columns = [] if ids_path is not None else [id_name, "content"]
    list_column = feature_key
    if feature_key is None and len(list_columns) == 1 and not column_options:
        list_column = list_columns[0]
    if list_column is not None:
        refuse_columns([list_column], forbidden_names, column_names, "--key", source_path)
        data_frame = read_columns(source_path, [list_column], text_columns, column_names)
        features = read_list_column(
            data_frame[list_column], source_path, columns_option(column_names, [list_column])
        )
        row_shape = exported_shape(source_path)
        features = features.reshape(len(data_frame), *row_shape) if row_shape else features
        feature_columns = _NO_COLUMNS
    else:
        if column_options:
            chosen_columns = choose_columns(column_names, column_options, source_path)
        elif len(numeric_columns) == 1 and not list_columns:
            chosen_columns = numeric_columns
        else:
            message = _unnamed_features_message(
                column_names, list_columns, numeric_columns, forbidden_names
            )
            raise ExternalFeaturesInvalid(f"{source_path}: {message}")
        refuse_columns(chosen_columns, forbidden_names, column_names, "--columns", source_path)
        data_frame = read_columns(source_path, chosen_columns, text_columns, column_names)
        features = read_numeric_columns(data_frame, chosen_columns, source_path)
        feature_columns = FeatureColumns(tuple(chosen_columns), tuple(column_names))
    if ids_path is not None:
        return _join_id_table(source_path, features, ids_path, id_key, feature_columns)
    return _validate_features(
        source_path, data_frame[id_name], features, data_frame.get("content"), feature_columns
    )


def _unnamed_features_message(
    column_names: Sequence[str],
    list_columns: Sequence[str],
    numeric_columns: Sequence[str],
    forbidden_names: Mapping[str, str],
) -> str:
    """Return the message for a table whose feature columns nobody has named."""
    if list_columns:
        return (
            f"name the column of features with --key; it has {abbreviate_columns(list_columns)} "
            f"with lists, of {abbreviate_columns(column_names)}"
        )
    if not numeric_columns:
        return f"no column holds numbers, and none lists: it has {abbreviate_columns(column_names)}"
    candidates = [name for name in numeric_columns if not forbidden_reason(name, forbidden_names)]
    option = f": {columns_option(column_names, candidates)}" if candidates else " with --columns"
    return (
        f"{count_text(len(numeric_columns), 'column holds', 'columns hold')} numbers, "
        f"{abbreviate_columns(numeric_columns)}, and not every number is a feature: the target, a "
        f"row's number or an id among them would be learned from. Name the features{option}"
    )


def _read_hdf5(
    source_path: Path,
    ids_path: Path | None,
    feature_key: str | None,
    id_key: str | None,
    forbidden_names: Mapping[str, str],
) -> ExternalFeatures:
    with open_hdf5(source_path) as hdf5_file:
        data_sets = find_data_sets(hdf5_file)
        listed = ", ".join(f"{name} {data_set.shape}" for name, data_set in data_sets.items())
        listed = listed or "no data sets"
        feature_names = [
            name
            for name, data_set in data_sets.items()
            if data_set.ndim in (2, 4) and data_set.dtype.kind == "f"
        ]
        feature_name = feature_key or (feature_names[0] if len(feature_names) == 1 else None)
        if feature_name not in data_sets:
            raise ExternalFeaturesInvalid(
                f"{source_path}: name the data set of features with --key; it has {listed}"
            )
        # A data set in a group is called by its last name: `train/label`.
        last_name = feature_name.rpartition("/")[2]
        refuse_columns([last_name], forbidden_names, list(data_sets), "--key", source_path)
        features = np.asarray(_read_data_set(data_sets[feature_name], source_path))
        if ids_path is not None:
            return _join_id_table(source_path, features, ids_path, id_key)
        text_columns = {
            name: data_set
            for name, data_set in data_sets.items()
            if data_set.ndim == 1 and data_set.dtype.kind in _TEXT_KINDS
        }
        id_name = id_key or ("id" if "id" in text_columns else None)
        if id_name is None and len(text_columns) == 1:
            id_name = next(iter(text_columns))
        if id_name not in data_sets:
            raise ExternalFeaturesInvalid(
                f"{source_path}: name the data set of ids with --id-key, or a table with --ids; it "
                f"has {listed}"
            )
        sample_ids = _values_per_row(_read_data_set(data_sets[id_name], source_path))
        content_hashes = None
        if "content" in text_columns:
            content_hashes = _values_per_row(_read_data_set(text_columns["content"], source_path))
        return _validate_features(source_path, sample_ids, features, content_hashes)


def _read_data_set(data_set: h5py.Dataset, source_path: Path) -> npt.NDArray[Any]:
    """Return all values of a data set.

    Raises ExternalFeaturesInvalid for values stored in other files, and for an array that declares
    more bytes than a file of this size can hold.
    """
    if data_set.external or data_set.is_virtual:
        raise ExternalFeaturesInvalid(
            f"{source_path}: the values of {data_set.name!r} lie in other files; "
            f"{_STORED_ELSEWHERE}"
        )
    require_plausible_size(data_set.nbytes, source_path)
    return read_values(source_path, data_set)


def _validate_features(
    source_path: Path,
    id_column: pd.Series,
    features: npt.NDArray[Any],
    content_column: pd.Series | None,
    feature_columns: FeatureColumns = _NO_COLUMNS,
) -> ExternalFeatures:
    if len(id_column) != len(features):
        raise ExternalFeaturesInvalid(
            f"{source_path}: {count_text(len(features), 'row')} of features and "
            f"{count_text(len(id_column), 'id')}; expected one for each"
        )
    if not len(id_column):
        raise ExternalFeaturesInvalid(f"{source_path}: there are no rows")
    if id_column.dtype.kind == "f" and (id_column.abs() > _EXACT_INTEGERS).any():
        raise ExternalFeaturesInvalid(
            f"{source_path}: the ids are floating-point numbers beyond 2^53, which have lost their "
            "last digits (pandas makes them of integers where it meets a gap). Write them again "
            "as integers or as text"
        )
    sample_ids = as_text(id_column).reset_index(drop=True)
    has_no_id = sample_ids.isna() | (sample_ids == "")
    if has_no_id.any():
        raise ExternalFeaturesInvalid(
            f"{source_path}: {count_text(int(has_no_id.sum()), 'row has', 'rows have')} no id, "
            f"first row {int(has_no_id.to_numpy().argmax()) + 1:,}"
        )
    try:
        "".join(sample_ids).encode()
    except UnicodeEncodeError as error:
        raise ExternalFeaturesInvalid(
            f"{source_path}: ids that are no UTF-8 ({error.reason}): write them again as text"
        ) from None
    content_hashes = None if content_column is None else as_text(content_column).tolist()
    if content_hashes is not None and not all(
        isinstance(value, str) and _CONTENT_HASH.fullmatch(value) for value in content_hashes
    ):
        content_hashes = None  # a column of this name that holds something else
    is_duplicate = sample_ids.duplicated()
    # Content hashes tell rows apart where ids do not: one cache may hold two folders with the same
    # names.
    if content_hashes is None and is_duplicate.any():
        raise ExternalFeaturesInvalid(
            f"{source_path}: {count_text(int(is_duplicate.sum()), 'id occurs', 'ids occur')} more "
            f"than once, first {sample_ids[int(is_duplicate.to_numpy().argmax())]!r}"
        )
    _refuse_non_finite(source_path, sample_ids, features, feature_columns)
    if features.ndim == 2 and (counter_columns := find_row_counters(features)):
        first_values = ", ".join(f"{float(value):g}" for value in features[:3, counter_columns[0]])
        raise ExternalFeaturesInvalid(
            f"{source_path}: {feature_columns.describe(counter_columns[0])} counts the rows "
            f"({first_values}, …): not a feature. {feature_columns.leave_out(counter_columns)}"
        )
    return ExternalFeatures(
        sample_ids.tolist(), features, content_hashes, feature_columns, str(source_path)
    )


def _refuse_non_finite(
    source_path: Path,
    sample_ids: pd.Series,
    features: npt.NDArray[Any],
    feature_columns: FeatureColumns,
) -> None:
    """Raise ExternalFeaturesInvalid naming the first value that is not a finite number."""
    if features.dtype.kind != "f":
        return
    for start_row in range(0, len(features), _BLOCK_ROWS):
        rows = features[start_row : start_row + _BLOCK_ROWS]
        value_block = rows.reshape(len(rows), -1)
        # As float32, the widest storage dtype: a float64 beyond its range would be stored as
        # infinity.
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(value_block.astype(np.float32, copy=False))
        if not is_finite.all():
            block_row, column_index = (int(position) for position in np.argwhere(~is_finite)[0])
            raise ExternalFeaturesInvalid(
                f"{source_path}: {feature_columns.describe(column_index)} is "
                f"{value_block[block_row, column_index]} in row {start_row + block_row + 1:,} (id "
                f"{sample_ids[start_row + block_row]!r}); expected finite numbers, of float32 at "
                "most. Mend or remove the row, or leave the column out"
            )
