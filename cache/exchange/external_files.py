"""Features and ids from files that other programs made, checked for what is no feature."""

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

from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.columns import (
    FeatureColumns,
    choose_columns,
    columns_option,
    forbidden_or_unnamed,
    refuse_columns,
    shown,
)
from headrace.cache.exchange.external_tables import (
    TABLES,
    exported_shape,
    kinds_of_columns,
    list_column_values,
    number_columns,
    read_columns,
    read_texts,
    require_plausible_size,
)
from headrace.cache.exchange.leaks import find_row_counters
from headrace.cache.text import as_text

_TEXT_KINDS = "OSU"
_HASH = re.compile(r"[0-9a-f]{32}")
_EXACT_INTEGERS = 2.0**53
_NO_COLUMNS = FeatureColumns()
_FINITE_ROWS = 1 << 14  # looked at together for values that are no numbers
_ELSEWHERE = (
    "they are not read: a file that somebody sends could name any file of yours so. Copy them with "
    "h5py: new['x'] = old['x'][:]"
)


@dataclass(frozen=True)
class ExternalFeatures:
    """Features as another program left them."""

    ids: list[str]  # N; unique where there are no content hashes
    features: npt.NDArray[Any]  # (N, *shape), finite
    content: list[str] | None  # N content hashes, where the file has them
    columns: FeatureColumns = _NO_COLUMNS
    source: str = "the file"


def read_external_features(
    source: Path,
    *,
    ids: Path | None = None,
    key: str | None = None,
    id_key: str | None = None,
    columns: Sequence[str] = (),
    forbidden: Mapping[str, str] | None = None,
) -> ExternalFeatures:
    """Read features and ids.

    .npy, .npz: features (N, ...) and a table of ids beside them, `ids` or `<stem>.rows.csv`.
    Parquet, CSV, TSV: a column of ids (`id_key`, by default `id`) and either one column of lists
    (`key`) or numeric columns, which `columns` names as `choose_columns` reads it; a single one
    needs no naming. HDF5: a data set of features (`key`) and one of ids (`id_key`), or `ids`.

    forbidden: {column: what it is}, columns that are no features even when they are named, such as
    the target. Raises ExternalFeaturesInvalid, saying what the file holds and what to type: several
    columns and none named, columns that are no features (see `refuse_columns`,
    `find_row_counters`), values that are no finite numbers, rows without an id.
    """
    suffix = source.suffix.lower()
    if not source.is_file():
        raise ExternalFeaturesInvalid(f"{source}: no such file")
    if columns and suffix not in TABLES:
        raise ExternalFeaturesInvalid(
            f"{source}: --columns names columns of a table; found {suffix or 'no suffix'}, see "
            "--key"
        )
    try:
        if suffix in (".npy", ".npz"):
            return _with_table(
                _numpy(source, key, forbidden or {}), _id_table(source, ids, id_key), source, id_key
            )
        if suffix in TABLES:
            return _table(source, ids, key, id_key, columns, forbidden or {})
        if suffix in (".h5", ".hdf5", ".hdf"):
            return _hdf5(source, ids, key, id_key, forbidden or {})
    except (ExternalFeaturesInvalid, MemoryError):
        raise
    # NumPy, zipfile, h5py, PyArrow and pandas raise anything on bytes that are not theirs.
    except Exception as error:
        raise ExternalFeaturesInvalid(
            f"{source}: cannot be read as {suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from error
    raise ExternalFeaturesInvalid(
        f"{source}: expected .npy, .npz, .parquet, .csv, .tsv, .h5 or .hdf5; found "
        f"{suffix or 'no suffix'}"
    )


def _with_table(
    features: npt.NDArray[Any],
    table: pd.DataFrame,
    source: Path,
    id_key: str | None,
    columns: FeatureColumns = _NO_COLUMNS,
) -> ExternalFeatures:
    name = id_key or "id"
    if name not in table:
        raise ExternalFeaturesInvalid(
            f"the table of ids beside {source} has no column {name!r} (--id-key); it has "
            f"{shown(list(table.columns))}"
        )
    return _checked(source, table[name], features, table.get("content"), columns)


def _id_table(source: Path, ids: Path | None, id_key: str | None) -> pd.DataFrame:
    file = ids or source.with_suffix(".rows.csv")
    if not file.is_file():
        raise ExternalFeaturesInvalid(
            f"{source} holds features and no ids: give a table with one row per row, as in --ids "
            "rows.csv (column id)"
        )
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return pd.DataFrame({id_key or "id": _values(_load_ids(file))})
    if suffix == ".txt":
        # Not splitlines: a name may hold one of its rarer line ends.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        return pd.DataFrame(
            {id_key or "id": lines[:-1] if not lines[-1].strip() else lines}, dtype=object
        )
    return _in_row_order(read_texts(file), file)


def _load_ids(file: Path) -> npt.NDArray[Any]:
    try:
        loaded: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ExternalFeaturesInvalid(
            f"{file}: cannot be read as ids ({error}). An array of Python objects could run code: "
            "write the ids as text, np.save(FILE, np.array(ids, dtype=str)), or one per line in a "
            ".txt"
        ) from error
    return loaded


def _in_row_order(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The table that `export_npy` wrote in the order of its column `row`, in whatever order it is
    now.
    """
    if not {"row", "id", "content"} <= set(table.columns):
        return table
    row = pd.to_numeric(table["row"], errors="coerce")
    if set(row) != set(range(len(table))):
        raise ExternalFeaturesInvalid(
            f"{file}: its column `row` does not count the rows of the features from 0 to "
            f"{len(table) - 1:,}: rows have been added, removed or renumbered since it was "
            "exported. Take the same rows of both, or export again"
        )
    return table.iloc[np.argsort(row.to_numpy(), kind="stable")].reset_index(drop=True)


def _values(array: npt.NDArray[Any]) -> pd.Series:
    """One value per row of an array (N,) or (N, 1), as they are."""
    if array.ndim > 1 and array.size == len(array):
        array = array.reshape(-1)
    if array.ndim != 1:
        raise ExternalFeaturesInvalid(
            f"the ids have shape {array.shape}; expected one for each row"
        )
    return (
        pd.Series(array.tolist(), dtype=object)
        if array.dtype.kind in _TEXT_KINDS
        else pd.Series(array)
    )


def _numpy(source: Path, key: str | None, forbidden: Mapping[str, str]) -> npt.NDArray[Any]:
    if source.suffix.lower() == ".npy":
        array: npt.NDArray[Any] = np.load(source, mmap_mode="r", allow_pickle=False)
        return array
    with np.load(source, allow_pickle=False) as archive:
        _require_whole(archive.zip, source)
        names = [key] if key else [name for name in archive.files if archive[name].ndim in (2, 4)]
        if len(names) != 1 or names[0] not in archive.files:
            raise ExternalFeaturesInvalid(
                f"{source}: name the array of features with --key; it has "
                f"{', '.join(archive.files)}"
            )
        refuse_columns(names, forbidden, names, "--key", source)
        return np.asarray(archive[names[0]])


def _require_whole(archive: zipfile.ZipFile, source: Path) -> None:
    """Raises ExternalFeaturesInvalid for arrays that declare more than is there, before memory is
    asked for.
    """
    for member in archive.infolist():
        require_plausible_size(member.file_size, source)
        with archive.open(member) as opened:
            if opened.read(6) != np.lib.format.MAGIC_PREFIX:
                continue
            version = tuple(opened.read(2))
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(opened)
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise ExternalFeaturesInvalid(
                f"{source}: {member.filename} declares an array of shape {shape}, and does not "
                "hold it"
            )


def _table(
    source: Path,
    ids: Path | None,
    key: str | None,
    id_key: str | None,
    options: Sequence[str],
    forbidden: Mapping[str, str],
) -> ExternalFeatures:
    id_name = id_key or "id"
    columns, lists, numbers = kinds_of_columns(source, id_name)
    if ids is None and id_name not in columns:
        raise ExternalFeaturesInvalid(
            f"{source} has no column {id_name!r} of ids (--id-key); it has {shown(columns)}"
        )
    if key is not None and options:
        raise ExternalFeaturesInvalid(
            f"{source}: --key names a column of lists, --columns numeric columns: give one of them"
        )
    if key is not None and key not in columns:
        raise ExternalFeaturesInvalid(
            f"{source} has no column {key!r} (--key); it has {shown(columns)}"
        )
    own = {
        "content": "the column of content hashes",
        "id": "the column of ids",
        id_name: "the column of ids",
    }
    forbidden = {**forbidden, **own}
    texts = [] if ids is not None else [id_name, "content"]
    list_column = key or (lists[0] if len(lists) == 1 and not options else None)
    if list_column is not None:
        refuse_columns([list_column], forbidden, columns, "--key", source)
        frame = read_columns(source, [list_column], texts, columns)
        features = list_column_values(
            frame[list_column], source, columns_option(columns, [list_column])
        )
        shape = exported_shape(source)
        features = features.reshape(len(frame), *shape) if shape else features
        named = _NO_COLUMNS
    else:
        if options:
            chosen = choose_columns(columns, options, source)
        elif len(numbers) == 1 and not lists:
            chosen = numbers
        else:
            possible = [
                column
                for column in numbers
                if column not in forbidden_or_unnamed(numbers, forbidden)
            ]
            raise ExternalFeaturesInvalid(
                _unnamed_features(source, columns, lists, numbers, possible)
            )
        refuse_columns(chosen, forbidden, columns, "--columns", source)
        frame = read_columns(source, chosen, texts, columns)
        features = number_columns(frame, chosen, source)
        named = FeatureColumns(tuple(chosen), tuple(columns))
    if ids is not None:
        return _with_table(features, _id_table(source, ids, id_key), source, id_key, named)
    return _checked(source, frame[id_name], features, frame.get("content"), named)


def _unnamed_features(
    source: Path,
    columns: Sequence[str],
    lists: Sequence[str],
    numbers: Sequence[str],
    possible: Sequence[str],
) -> str:
    """The message for a table whose features nobody has named."""
    if lists:
        return (
            f"{source}: name the column of features with --key; it has {shown(lists)} with lists, "
            f"of {shown(columns)}"
        )
    if not numbers:
        return f"{source}: no column holds numbers, and none lists: it has {shown(columns)}"
    message = (
        f"{source}: {len(numbers):,} columns hold numbers, {shown(numbers)}, and not every number "
        "is a feature: the target, a row's number or an id among them would be learned from. Name "
        "the features"
    )
    return (
        f"{message}: {columns_option(columns, possible)}"
        if possible
        else f"{message} with --columns"
    )


def _hdf5(
    source: Path,
    ids: Path | None,
    key: str | None,
    id_key: str | None,
    forbidden: Mapping[str, str],
) -> ExternalFeatures:
    with h5py.File(source, "r") as file:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(
            lambda name, item: (
                found.update({name: item}) if isinstance(item, h5py.Dataset) else None
            )
        )
        listed = ", ".join(f"{name} {item.shape}" for name, item in found.items()) or "no data sets"
        numbers = [
            name for name, item in found.items() if item.ndim in (2, 4) and item.dtype.kind == "f"
        ]
        chosen = key or (numbers[0] if len(numbers) == 1 else None)
        if chosen not in found:
            raise ExternalFeaturesInvalid(
                f"{source}: name the data set of features with --key; it has {listed}"
            )
        # A data set in a group is called by its last name: `train/label`.
        refuse_columns([chosen.rpartition("/")[2]], forbidden, list(found), "--key", source)
        features = np.asarray(_own_values(found[chosen], source))
        if ids is not None:
            return _with_table(features, _id_table(source, ids, id_key), source, id_key)
        texts = [
            name
            for name, item in found.items()
            if item.ndim == 1 and item.dtype.kind in _TEXT_KINDS
        ]
        named = id_key or ("id" if "id" in texts else texts[0] if len(texts) == 1 else None)
        if named not in found:
            raise ExternalFeaturesInvalid(
                f"{source}: name the data set of ids with --id-key, or a table with --ids; it has "
                f"{listed}"
            )
        content = _values(_own_values(found["content"], source)) if "content" in texts else None
        return _checked(source, _values(_own_values(found[named], source)), features, content)


def _own_values(item: h5py.Dataset, source: Path) -> npt.NDArray[Any]:
    """All values of a data set.

    Raises ExternalFeaturesInvalid for those that lie in other files, and for more than this one can
    hold.
    """
    if item.external or item.is_virtual:
        raise ExternalFeaturesInvalid(
            f"{source}: the values of {item.name!r} lie in other files; {_ELSEWHERE}"
        )
    require_plausible_size(item.nbytes, source)
    values: npt.NDArray[Any] = item[()]
    return values


def _checked(
    source: Path,
    ids: pd.Series,
    features: npt.NDArray[Any],
    content: pd.Series | None,
    columns: FeatureColumns = _NO_COLUMNS,
) -> ExternalFeatures:
    if len(ids) != len(features):
        raise ExternalFeaturesInvalid(
            f"{source}: {len(features):,} rows of features and {len(ids):,} ids; expected one for "
            "each"
        )
    if not len(ids):
        raise ExternalFeaturesInvalid(f"{source}: there are no rows")
    if ids.dtype.kind == "f" and (ids.abs() > _EXACT_INTEGERS).any():
        raise ExternalFeaturesInvalid(
            f"{source}: the ids are floating-point numbers beyond 2^53, which have lost their last "
            "digits (pandas makes them of integers where it meets a gap). Write them again as "
            "integers or as text"
        )
    names = as_text(ids).reset_index(drop=True)
    nameless = names.isna() | (names == "")
    if nameless.any():
        raise ExternalFeaturesInvalid(
            f"{source}: {int(nameless.sum()):,} rows have no id, first row "
            f"{int(nameless.to_numpy().argmax()) + 1:,}"
        )
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise ExternalFeaturesInvalid(
            f"{source}: ids that are no UTF-8 ({error.reason}): write them again as text"
        ) from None
    hashes = None if content is None else as_text(content).tolist()
    if hashes is not None and not all(
        isinstance(value, str) and _HASH.fullmatch(value) for value in hashes
    ):
        hashes = None  # some other column of this name
    twice = names.duplicated()
    # Content hashes tell rows apart where ids do not: one cache may hold two folders with the same
    # names.
    if hashes is None and twice.any():
        raise ExternalFeaturesInvalid(
            f"{source}: {int(twice.sum()):,} ids occur more than once, first "
            f"{names[int(twice.to_numpy().argmax())]!r}"
        )
    _refuse_infinite(source, names, features, columns)
    if features.ndim == 2 and (counting := find_row_counters(features)):
        first = ", ".join(f"{float(value):g}" for value in features[:3, counting[0]])
        raise ExternalFeaturesInvalid(
            f"{source}: {columns.describe(counting[0])} counts the rows ({first}, …): not a "
            f"feature. {columns.leave_out(counting)}"
        )
    return ExternalFeatures(names.tolist(), features, hashes, columns, str(source))


def _refuse_infinite(
    source: Path, ids: pd.Series, features: npt.NDArray[Any], columns: FeatureColumns
) -> None:
    """Raises ExternalFeaturesInvalid naming the first value that is no finite number."""
    if features.dtype.kind != "f":
        return
    for start in range(0, len(features), _FINITE_ROWS):
        block = features[start : start + _FINITE_ROWS].reshape(
            min(_FINITE_ROWS, len(features) - start), -1
        )
        with np.errstate(over="ignore"):  # rows are kept as float32 at most
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if not finite.all():
            row, value = (int(place) for place in np.argwhere(~finite)[0])
            raise ExternalFeaturesInvalid(
                f"{source}: {columns.describe(value)} is {block[row, value]} in row "
                f"{start + row + 1:,} (id {ids[start + row]!r}); expected finite numbers, of "
                "float32 at most. Mend or remove the row, or leave the column out"
            )
