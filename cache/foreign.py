"""Features that other programs made: `.npy`, `.npz`, tables or HDF5 with ids, kept as a feature set like our own.

Rows of the cache belong to the bytes of images, and so every id needs the content hash of its image: from a column
`content` (files that `headrace cache export` wrote have one) or from the caller, who knows where the images are. Ids are
compared as text, in the form of `as_text`.
"""

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.columns import (
    FeatureColumns,
    choose_columns,
    columns_option,
    forbidden_or_unnamed,
    refuse_columns,
    shown,
)
from headrace.cache.errors import ForeignFeatures
from headrace.cache.feature_set import FeatureSet, feature_set_directories, open_feature_set
from headrace.cache.leaks import row_numbers, target_columns
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec
from headrace.cache.text import as_text

PREFIX = "imported:"  # of `FeatureSpec.backbone`: no network of ours made these
_SHARD_ROWS = 4096
_TEXT_KINDS = "OSU"
_TABLES = (".parquet", ".pq", ".csv", ".tsv")
_HASH = re.compile(r"[0-9a-f]{32}")
_SNIFFED_ROWS = 1000  # of a CSV, to see which columns are numbers
_NO_COLUMNS = FeatureColumns()
_FINITE_ROWS = 1 << 14  # looked at together for values that are no numbers


@dataclass(frozen=True)
class Foreign:
    """Features as another program left them."""

    ids: list[str]  # N; unique where there are no content hashes
    features: npt.NDArray[Any]  # (N, *shape), finite
    content: list[str] | None  # N content hashes, where the file has them
    columns: FeatureColumns = _NO_COLUMNS
    source: str = "the file"


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    features: FeatureSet
    rows: int  # kept
    unknown: int  # rows whose id belongs to no image
    copies: int  # rows of images that are copies of one another: one row is kept


def read_foreign(
    source: Path,
    *,
    ids: Path | None = None,
    key: str | None = None,
    id_key: str | None = None,
    columns: Sequence[str] = (),
    forbidden: Mapping[str, str] | None = None,
) -> Foreign:
    """Read features and ids.

    .npy, .npz: features (N, ...) and a table of ids beside them, `ids` or `<stem>.rows.csv`. Parquet, CSV, TSV: a column
    of ids (`id_key`, by default `id`) and either one column of lists (`key`) or numeric columns, which `columns` names as
    `choose_columns` reads it; a single one needs no naming. HDF5: a data set of features (`key`) and one of ids
    (`id_key`), or `ids`.

    forbidden: {column: what it is}, columns that are no features even when they are named, such as the target.
    Raises ForeignFeatures, saying what the file holds and what to type: several columns and none named, columns that are
    no features (see `refuse_columns`, `row_numbers`), values that are no finite numbers, rows without an id.
    """
    suffix = source.suffix.lower()
    if not source.is_file():
        raise ForeignFeatures(f"{source}: no such file")
    if columns and suffix not in _TABLES:
        raise ForeignFeatures(f"{source}: --columns names columns of a table; found {suffix or 'no suffix'}, see --key")
    try:
        if suffix in (".npy", ".npz"):
            return _with_table(_numpy(source, key), _id_table(source, ids, id_key), source, id_key)
        if suffix in _TABLES:
            return _table(source, ids, key, id_key, columns, forbidden or {})
        if suffix in (".h5", ".hdf5", ".hdf"):
            return _hdf5(source, ids, key, id_key)
    except ForeignFeatures:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ForeignFeatures(
            f"{source}: cannot be read as {suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from error
    raise ForeignFeatures(
        f"{source}: expected .npy, .npz, .parquet, .csv, .tsv, .h5 or .hdf5; found {suffix or 'no suffix'}"
    )


def import_features(
    cache_root: Path,
    name: str,
    foreign: Foreign,
    known: Mapping[str, str] | None = None,
    *,
    dtype: str = "float32",
    targets: pd.DataFrame | None = None,
) -> Imported:
    """Keep features under a name; `known` is {id: content hash} of the images, for a file without hashes.

    targets: what is to be predicted, one or more columns, indexed by content hash: features that say it are refused.
    Doing it twice changes nothing. Raises ForeignFeatures when another import has the name, when no id belongs to an image
    or one to several, for features that are the target (see `target_columns`), and for values that cannot be stored.
    """
    if not name or any(letter in name for letter in "/:\\ ") or name.startswith("."):
        raise ForeignFeatures(f"the name {name!r}: expected a word without blanks, colons and slashes, such as dino")
    if dtype not in STORAGE_DTYPES or dtype == "uint8":
        raise ForeignFeatures(f"dtype {dtype!r}: expected float32, float16 or bfloat16")
    features = foreign.features
    if features.ndim not in (2, 4) or features.dtype.kind not in "fiub":
        raise ForeignFeatures(
            f"the features are {features.dtype} of shape {features.shape}; expected numbers (rows, values), or maps (rows, "
            "channels, height, width)"
        )
    content = _contents(foreign, known)
    rows, copies = _first_of_each(content)
    unknown = sum(value is None for value in content)
    if not len(rows):
        raise ForeignFeatures(
            f"none of the {len(foreign.ids):,} ids is that of an image, the first is {foreign.ids[0]!r}"
            + (f"; those of the images look like {next(iter(known))!r}" if known else "")
        )
    if targets is not None:
        _refuse_targets(foreign, content, targets)
    spec = _spec(name, foreign, content, rows, dtype)
    for other in imported_sets(cache_root, name):
        if other.spec != spec:
            raise ForeignFeatures(
                f"{name!r} is imported already, with {other.n_rows:,} rows of shape {other.spec.shape}. Another name, or first: "
                f"headrace cache rm {other.spec.fingerprint}"
            )
    directory = create_feature_set(cache_root, spec)
    for start in range(0, len(rows), _SHARD_ROWS):
        chosen = rows[start : start + _SHARD_ROWS]
        hashes = [str(content[row]) for row in chosen]
        publish_shard(
            directory,
            hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16],
            features=np.asarray(features[chosen], np.float32),
            ids=[foreign.ids[row] for row in chosen],
            content=hashes,
            failures=[],
        )
    return Imported(open_feature_set(directory), len(rows), unknown, copies)


def imported_sets(cache_root: Path, name: str | None = None) -> list[FeatureSet]:
    """The feature sets of a cache that were imported, under this name or any."""
    found = [open_feature_set(path) for path in feature_set_directories(cache_root)]
    wanted = PREFIX + (name or "")
    return [
        each for each in found if each.spec.backbone.startswith(wanted) and (not name or each.spec.backbone == wanted)
    ]


def _spec(
    name: str, foreign: Foreign, content: Sequence[str | None], rows: npt.NDArray[np.int64], dtype: str
) -> FeatureSpec:
    hasher = hashlib.sha256()
    for row in rows:  # whole rows, whatever order they came in
        hasher.update(f"{content[row]}|".encode())
        hasher.update(np.ascontiguousarray(foreign.features[row], np.float32).tobytes())
    shape = foreign.features.shape[1:]
    return FeatureSpec(
        backbone=PREFIX + name,
        weights=hasher.hexdigest(),
        tap=name,
        reduction="vector" if len(shape) == 1 else "map",
        preprocessing="{}",
        view=json.dumps({"index": 0}, separators=(",", ":")),
        decoder="imported",
        compute_dtype="float32",
        dtype=dtype,
        shape=shape,
    )


def _contents(foreign: Foreign, known: Mapping[str, str] | None) -> list[str | None]:
    if foreign.content is not None:
        if known and not set(known.values()) & set(foreign.content):
            raise ForeignFeatures(
                f"{foreign.source}: none of its content hashes is that of an image of the recipe: the features are of other "
                "images, or of these before they were changed. If `content` holds something else (an MD5, say), rename the "
                "column, and the ids count"
            )
        return list(foreign.content)
    if known is None:
        raise ForeignFeatures(
            "the file has ids and no content hashes: name the images that the ids belong to, with --recipe recipe.yaml"
        )
    images = pd.DataFrame({"id": as_text(pd.Series(list(known), dtype=object)), "content": list(known.values())})
    images = images.drop_duplicates()
    twice = images["id"][images["id"].duplicated()]
    wanted = twice[twice.isin(foreign.ids)]
    if len(wanted):
        raise ForeignFeatures(
            f"{foreign.source}: the id {wanted.iloc[0]!r} stands for several images of the recipe, whose names differ in "
            "blanks or in the form of their accents alone. Rename one of them"
        )
    content_of = dict(zip(images["id"], images["content"], strict=True))
    return [content_of.get(name) for name in foreign.ids]


def _refuse_targets(foreign: Foreign, content: Sequence[str | None], targets: pd.DataFrame) -> None:
    """Raises ForeignFeatures naming the first feature that says a target."""
    if foreign.features.ndim != 2:
        return
    by_content = targets[~targets.index.duplicated() & targets.index.notna()]
    for name in by_content.columns:
        target = by_content[name].reindex(pd.Index(list(content), dtype=object)).reset_index(drop=True)
        if found := target_columns(foreign.features, target):
            raise ForeignFeatures(
                f"{foreign.source}: {foreign.columns.describe(found[0])} is the target {str(name)!r} under another name: "
                f"each of its values stands for the target's. {foreign.columns.leave_out(found)}"
            )


def _first_of_each(content: Sequence[str | None]) -> tuple[npt.NDArray[np.int64], int]:
    """Rows with a content hash in the order of the hashes, each once; and how many were copies."""
    first: dict[str, int] = {}
    copies = 0
    for row, value in enumerate(content):
        if value is not None:
            copies += value in first
            first.setdefault(value, row)
    return np.array([first[value] for value in sorted(first)], np.int64), copies


def _with_table(
    features: npt.NDArray[Any],
    table: pd.DataFrame,
    source: Path,
    id_key: str | None,
    columns: FeatureColumns = _NO_COLUMNS,
) -> Foreign:
    name = id_key or "id"
    if name not in table:
        raise ForeignFeatures(
            f"the table of ids beside {source} has no column {name!r} (--id-key); it has {shown(list(table.columns))}"
        )
    return _checked(source, table[name], features, table.get("content"), columns)


def _id_table(source: Path, ids: Path | None, id_key: str | None) -> pd.DataFrame:
    file = ids or source.with_suffix(".rows.csv")
    if not file.is_file():
        raise ForeignFeatures(
            f"{source} holds features and no ids: give a table with one row per row, as in --ids rows.csv (column id)"
        )
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return pd.DataFrame({id_key or "id": _values(np.load(file, allow_pickle=False))})
    if suffix == ".txt":
        # Not splitlines: a name may hold one of its rarer line ends.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        return pd.DataFrame({id_key or "id": lines[:-1] if not lines[-1].strip() else lines}, dtype=object)
    if suffix in (".parquet", ".pq"):
        return _in_row_order(_read_parquet(file, None), file)
    return _in_row_order(_read_text_table(file, None), file)


def _in_row_order(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The table that `export_npy` wrote in the order of its column `row`, in whatever order it is now."""
    if not {"row", "id", "content"} <= set(table.columns):
        return table
    row = pd.to_numeric(table["row"], errors="coerce")
    if set(row) != set(range(len(table))):
        raise ForeignFeatures(
            f"{file}: its column `row` does not count the rows of the features from 0 to {len(table) - 1:,}: rows have been "
            "added, removed or renumbered since it was exported. Take the same rows of both, or export again"
        )
    return table.iloc[np.argsort(row.to_numpy(), kind="stable")].reset_index(drop=True)


def _values(array: npt.NDArray[Any]) -> pd.Series:
    """One value per row of an array (N,) or (N, 1), as they are."""
    if array.ndim > 1 and array.size == len(array):
        array = array.reshape(-1)
    if array.ndim != 1:
        raise ForeignFeatures(f"the ids have shape {array.shape}; expected one for each row")
    return pd.Series(array.tolist(), dtype=object) if array.dtype.kind in _TEXT_KINDS else pd.Series(array)


def _read_text_table(file: Path, columns: Sequence[str] | None, rows: int | None = None) -> pd.DataFrame:
    """These columns of a CSV or TSV (None: all) as text; see `_read_numbers` for those that hold numbers."""
    return _read_csv(file, columns, rows, dtype=str)


def _read_csv(file: Path, columns: Sequence[str] | None, rows: int | None, dtype: Any) -> pd.DataFrame:
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=separator), [])
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:  # pandas would rename the second one, and nobody would know which is which
        raise ForeignFeatures(f"{file}: the first line has several columns {twice[0]!r}: give each its own name")
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
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first values for the rows' names
        raise ForeignFeatures(f"{file}: the rows have more values than the first line has names ({len(header)})")
    return frame


def _read_parquet(file: Path, columns: Sequence[str] | None) -> pd.DataFrame:
    import pyarrow.parquet as pq

    # Without pandas' metadata, which would hide a column of ids that has been the index. Integers with a gap would lose
    # digits as floats.
    table = pq.read_table(file, columns=None if columns is None else list(columns))
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def _numpy(source: Path, key: str | None) -> npt.NDArray[Any]:
    if source.suffix.lower() == ".npy":
        array: npt.NDArray[Any] = np.load(source, mmap_mode="r", allow_pickle=False)
        return array
    with np.load(source, allow_pickle=False) as archive:
        names = [key] if key else [name for name in archive.files if archive[name].ndim in (2, 4)]
        if len(names) != 1 or names[0] not in archive.files:
            raise ForeignFeatures(f"{source}: name the array of features with --key; it has {', '.join(archive.files)}")
        return np.asarray(archive[names[0]])


def _table(
    source: Path,
    ids: Path | None,
    key: str | None,
    id_key: str | None,
    options: Sequence[str],
    forbidden: Mapping[str, str],
) -> Foreign:
    id_name = id_key or "id"
    columns, lists, numbers = _kinds_of_columns(source, id_name)
    if ids is None and id_name not in columns:
        raise ForeignFeatures(f"{source} has no column {id_name!r} of ids (--id-key); it has {shown(columns)}")
    if key is not None and options:
        raise ForeignFeatures(f"{source}: --key names a column of lists, --columns numeric columns: give one of them")
    if key is not None and key not in columns:
        raise ForeignFeatures(f"{source} has no column {key!r} (--key); it has {shown(columns)}")
    own = {"content": "the column of content hashes", "id": "the column of ids", id_name: "the column of ids"}
    forbidden = {**forbidden, **own}
    texts = [] if ids is not None else [id_name, "content"]
    list_column = key or (lists[0] if len(lists) == 1 and not options else None)
    if list_column is not None:
        refuse_columns([list_column], forbidden, columns, "--key", source)
        frame = _read_columns(source, [list_column], texts, columns)
        features = _stacked(frame[list_column], source, columns_option(columns, [list_column]))
        shape = _exported_shape(source)
        features = features.reshape(len(frame), *shape) if shape else features
        named = _NO_COLUMNS
    else:
        if options:
            chosen = choose_columns(columns, options, source)
        elif len(numbers) == 1 and not lists:
            chosen = numbers
        else:
            possible = [column for column in numbers if column not in forbidden_or_unnamed(numbers, forbidden)]
            raise ForeignFeatures(_unnamed_features(source, columns, lists, numbers, possible))
        refuse_columns(chosen, forbidden, columns, "--columns", source)
        frame = _read_columns(source, chosen, texts, columns)
        features = _numbers(frame, chosen, source)
        named = FeatureColumns(tuple(chosen), tuple(columns))
    if ids is not None:
        return _with_table(features, _id_table(source, ids, id_key), source, id_key, named)
    return _checked(source, frame[id_name], features, frame.get("content"), named)


def _unnamed_features(
    source: Path, columns: Sequence[str], lists: Sequence[str], numbers: Sequence[str], possible: Sequence[str]
) -> str:
    """The message for a table whose features nobody has named."""
    if lists:
        return (
            f"{source}: name the column of features with --key; it has {shown(lists)} with lists, of {shown(columns)}"
        )
    if not numbers:
        return f"{source}: no column holds numbers, and none lists: it has {shown(columns)}"
    message = (
        f"{source}: {len(numbers):,} columns hold numbers, {shown(numbers)}, and not every number is a feature: the target, a "
        "row's number or an id among them would be learned from. Name the features"
    )
    return f"{message}: {columns_option(columns, possible)}" if possible else f"{message} with --columns"


def _kinds_of_columns(source: Path, id_name: str) -> tuple[list[str], list[str], list[str]]:
    """All columns of a table, those of lists, and those of numbers; from the schema, or the first rows of a CSV."""
    if source.suffix.lower() in (".csv", ".tsv"):
        frame = _read_csv(source, None, _SNIFFED_ROWS, None)
        # With gaps too: nobody would miss a column that a suggestion leaves out in silence.
        is_mostly_numbers = frame.apply(pd.to_numeric, errors="coerce").notna().mean() > 0.5
        columns = [str(column) for column in frame.columns]
        return (
            columns,
            [],
            [column for column in columns if is_mostly_numbers[column] and column not in (id_name, "content")],
        )
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
    numbers = [column for column, yes in zip(columns, is_number, strict=True) if yes and column != id_name]
    return columns, lists, numbers


def _read_columns(source: Path, features: Sequence[str], texts: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """The columns of features, and those of `texts` that there are; of a CSV, these as they are written."""
    wanted = [column for column in columns if column in features or column in texts]
    if source.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(source, wanted, None, dict.fromkeys(texts, str))
    return _read_parquet(source, wanted)


def _numbers(frame: pd.DataFrame, names: Sequence[str], source: Path) -> npt.NDArray[Any]:
    """(N, D) float32 of columns. Raises ForeignFeatures naming the first value that is no number."""
    features = np.empty((len(frame), len(names)), np.float32)
    for number, name in enumerate(names):
        column = frame[name]
        if column.dtype.kind not in "fiub":
            # Text and decimals; pandas would make numbers of dates too.
            values = pd.to_numeric(column if column.dtype.kind == "O" else column.astype(str), errors="coerce")
            if values.isna().any():
                row = int(values.isna().to_numpy().argmax())
                raise ForeignFeatures(
                    f"{source}: column {name!r} holds {column.iloc[row]!r} in row {row + 1:,}; expected a number. Mend or "
                    "remove the row, or leave the column out"
                )
            column = values
        with np.errstate(over="ignore"):  # an infinity is told with its row
            features[:, number] = column.to_numpy(np.float64)
    return features


def _stacked(column: pd.Series, source: Path, option: str) -> npt.NDArray[Any]:
    """(N, D) float32 of a column of N lists. Raises ForeignFeatures naming the first row that is no such list."""
    size: int | None = None
    for row, value in enumerate(column):
        if isinstance(value, str):
            raise ForeignFeatures(
                f"{source}: column {column.name!r} holds text in row {row + 1:,}, {value[:30]!r}; expected a list of numbers. "
                "Lists survive in Parquet, not in CSV: frame.to_parquet(FILE)"
            )
        if not isinstance(value, np.ndarray | list):
            expected = f"; numbers are named with {option}" if isinstance(value, int | float | np.number) else ""
            raise ForeignFeatures(
                f"{source}: column {column.name!r} holds {value!r} in row {row + 1:,}; expected a list of numbers{expected}"
            )
        size = len(value) if size is None else size
        if len(value) != size:
            raise ForeignFeatures(
                f"{source}: column {column.name!r} holds lists of {size:,} values and, in row {row + 1:,}, one of {len(value):,}"
            )
    with np.errstate(over="ignore"):
        return np.stack([np.asarray(value, np.float32) for value in column])


def _exported_shape(source: Path) -> tuple[int, ...] | None:
    """Of one row, in a file that `export_parquet` wrote; Parquet lists are flat."""
    if source.suffix.lower() in (".csv", ".tsv"):
        return None
    import pyarrow.parquet as pq

    text = (pq.read_schema(source).metadata or {}).get(b"headrace")
    return FeatureSpec.from_json(text.decode()).shape if text else None


def _hdf5(source: Path, ids: Path | None, key: str | None, id_key: str | None) -> Foreign:
    with h5py.File(source, "r") as file:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        listed = ", ".join(f"{name} {item.shape}" for name, item in found.items()) or "no data sets"
        numbers = [name for name, item in found.items() if item.ndim in (2, 4) and item.dtype.kind == "f"]
        chosen = key or (numbers[0] if len(numbers) == 1 else None)
        if chosen not in found:
            raise ForeignFeatures(f"{source}: name the data set of features with --key; it has {listed}")
        features = np.asarray(found[chosen][()])
        if ids is not None:
            return _with_table(features, _id_table(source, ids, id_key), source, id_key)
        texts = [name for name, item in found.items() if item.ndim == 1 and item.dtype.kind in _TEXT_KINDS]
        named = id_key or ("id" if "id" in texts else texts[0] if len(texts) == 1 else None)
        if named not in found:
            raise ForeignFeatures(
                f"{source}: name the data set of ids with --id-key, or a table with --ids; it has {listed}"
            )
        content = _values(found["content"][()]) if "content" in texts else None
        return _checked(source, _values(found[named][()]), features, content)


def _checked(
    source: Path,
    ids: pd.Series,
    features: npt.NDArray[Any],
    content: pd.Series | None,
    columns: FeatureColumns = _NO_COLUMNS,
) -> Foreign:
    if len(ids) != len(features):
        raise ForeignFeatures(
            f"{source}: {len(features):,} rows of features and {len(ids):,} ids; expected one for each"
        )
    if not len(ids):
        raise ForeignFeatures(f"{source}: there are no rows")
    names = as_text(ids).reset_index(drop=True)
    nameless = names.isna() | (names == "")
    if nameless.any():
        raise ForeignFeatures(
            f"{source}: {int(nameless.sum()):,} rows have no id, first row {int(nameless.to_numpy().argmax()) + 1:,}"
        )
    hashes = None if content is None else as_text(content).tolist()
    if hashes is not None and not all(isinstance(value, str) and _HASH.fullmatch(value) for value in hashes):
        hashes = None  # some other column of this name
    twice = names.duplicated()
    # Content hashes tell rows apart where ids do not: one cache may hold two folders with the same names.
    if hashes is None and twice.any():
        raise ForeignFeatures(
            f"{source}: {int(twice.sum()):,} ids occur more than once, first {names[int(twice.to_numpy().argmax())]!r}"
        )
    _refuse_infinite(source, names, features, columns)
    if features.ndim == 2 and (counting := row_numbers(features)):
        first = ", ".join(str(int(value)) for value in features[:3, counting[0]])
        raise ForeignFeatures(
            f"{source}: {columns.describe(counting[0])} counts the rows ({first}, …): not a feature. {columns.leave_out(counting)}"
        )
    return Foreign(names.tolist(), features, hashes, columns, str(source))


def _refuse_infinite(source: Path, ids: pd.Series, features: npt.NDArray[Any], columns: FeatureColumns) -> None:
    """Raises ForeignFeatures naming the first value that is no finite number."""
    if features.dtype.kind != "f":
        return
    for start in range(0, len(features), _FINITE_ROWS):
        block = features[start : start + _FINITE_ROWS].reshape(min(_FINITE_ROWS, len(features) - start), -1)
        with np.errstate(over="ignore"):  # rows are kept as float32 at most
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if not finite.all():
            row, value = (int(place) for place in np.argwhere(~finite)[0])
            raise ForeignFeatures(
                f"{source}: {columns.describe(value)} is {block[row, value]} in row {start + row + 1:,} (id {ids[start + row]!r}); "
                "expected finite numbers, of float32 at most. Mend or remove the row, or leave the column out"
            )
