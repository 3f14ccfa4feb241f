"""Tables:

CSV, TSV, JSON lines, JSON, Parquet and Arrow files as data frames whose text is as written.
"""

import csv
import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.cache.text import as_text, normalize_text
from headrace.extract.errors import SourceError, absent
from headrace.extract.images.byte_ranges import open_arrow
from headrace.extract.sources.coco import coco_rows
from headrace.extract.sources.formats import IMAGE_SUFFIXES, has_image_signature, unread_format

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_LINES_LOOKED_AT = 20
_CELLS_LOOKED_AT = 100
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
_EXPECTED = "a table ends in .csv, .tsv, .jsonl, .json, .parquet or .arrow"

# What a compressed table may become: repeated rows reach some fifty times, and deflate a thousand.
_GZIP_RATIO, _GZIP_FLOOR_BYTES = 200, 1 << 26
_BUFFER_BYTES = 1 << 16
_SIGNATURE_BYTES = 32
_MOST_COLUMNS = 20_000  # each takes a millisecond or so


@dataclass(frozen=True)
class Table:
    """A table as it is: text trimmed and in one Unicode form, empty cells missing, numbers only
    where the file has types.
    """

    frame: pd.DataFrame
    image_columns: tuple[str, ...] = ()  # columns of encoded images, which are not in `frame`
    notes: tuple[str, ...] = ()


def read_table_file(file: Path) -> Table:
    """Read a table by what its name says it is. Raises SourceError when it cannot be read so."""
    if not file.is_file():
        raise SourceError(absent(file, "a table: .csv, .tsv, .jsonl, .json or .parquet"))
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if compressed else suffixes[-1:] or [""])[0] if suffixes else ""
    try:
        if suffix in (".parquet", ".pq"):
            return _read_parquet(file)
        if suffix == ".arrow":
            opened = open_arrow(file)
            return _from_arrow(opened, opened.num_rows)
        if suffix in _TEXT_SUFFIXES:
            return _read_csv(_read_text(file, compressed), suffix, file)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(_read_text(file, compressed), file)
        if suffix == ".json":
            return _read_json(_read_text(file, compressed), file)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file}: cannot be read as {suffix[1:]}: {error}. Expected text in UTF-8 whose first "
            "line names the columns; save it as UTF-8 (iconv -f latin1 -t utf-8), or give a "
            "Parquet file the suffix .parquet."
        ) from error
    except SourceError:
        raise
    # Parsers of foreign files raise anything, zlib's errors and RecursionError among it.
    except Exception as error:
        expected = (
            "a Parquet file"
            if suffix in (".parquet", ".pq")
            else "one line of column names, then one per image"
        )
        raise SourceError(
            f"{file}: cannot be read as {suffix[1:]}: {str(error).strip()}. Expected {expected}."
        ) from error
    if (unread := unread_format(file)) is not None:
        raise SourceError(f"{unread}. ({_EXPECTED}.)")
    raise SourceError(f"{file}: {_EXPECTED}; found {suffix or 'no suffix'}.")


def _read_text(file: Path, compressed: bool) -> str:
    if compressed:
        most = max(_GZIP_FLOOR_BYTES, _GZIP_RATIO * file.stat().st_size)
        with gzip.open(file) as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise SourceError(
                f"{file}: it decompresses to more than {_GZIP_RATIO} times its size, which no "
                "table does. Decompress it yourself if it is one: gunzip FILE"
            )
    else:
        data = file.read_bytes()
    # Spreadsheets write UTF-16 with its mark; without one it cannot be told from other bytes.
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return data.decode(encoding)


def _read_csv(text: str, suffix: str, file: Path) -> Table:
    default = "\t" if suffix in (".tsv", ".tab") else ","
    delimiter = _delimiter(text, default)
    names = next(
        csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=delimiter != "\t"), []
    )
    _check_header([normalize_text(name) for name in names], file)
    frame = pd.read_csv(
        io.StringIO(text),
        sep=delimiter,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=delimiter != "\t",
        low_memory=False,
    )
    if not isinstance(
        frame.index, pd.RangeIndex
    ):  # pandas would take the first values for the rows' names
        raise SourceError(
            f"{file}: the rows have more values than the header has names ({len(frame.columns)}). "
            "Give every column a name in the first line, or delete what ends the rows."
        )
    notes = (
        []
        if delimiter == default
        else [f"{file.name}: the columns are separated by {_DELIMITERS[delimiter]}"]
    )
    if '"' in text:
        notes += _joined_lines(frame, file)
    return Table(_clean(frame), notes=tuple(notes))


def _joined_lines(frame: pd.DataFrame, file: Path) -> list[str]:
    """A note on cells with line breaks.

    Raises SourceError where they are what names the rows, or paths of images.

    A quote without its pair takes all up to the next one, however many rows later, for one cell.
    """
    rows: list[int] = []
    refused = False
    for place, name in enumerate(frame.columns):
        cells = frame[name].str.strip()
        broken = cells.str.contains("[\r\n]", na=False).to_numpy(dtype=bool)
        if broken.any():
            rows += (broken.nonzero()[0] + 1).tolist()
            others = cells[~broken]
            others = others[others.fillna("") != ""].head(_CELLS_LOOKED_AT)
            paths = [Path(str(value)).suffix.lower() in IMAGE_SUFFIXES for value in others]
            refused |= place == 0 or (bool(paths) and all(paths))
    if not rows:
        return []
    found = (
        f"{len(rows):,} cells hold line breaks, first in row {min(rows):,}: an unpaired quote "
        '(") joins lines'
    )
    if refused:
        raise SourceError(
            f"{file}: {found}, and these cells are in a column that tells the rows apart. "
            "Delete the quote or write its pair; a "
            'quote within a cell is written twice (""). Where the line breaks are meant, put a '
            "column of paths first"
        )
    return [f"{file.name}: {found}"]


def _delimiter(text: str, default: str) -> str:
    """What separates the columns: the default where the header has it, else what divides the first
    lines alike.
    """
    lines = list(itertools.islice(io.StringIO(text), _LINES_LOOKED_AT))
    if not lines:
        return default
    for delimiter in (default, *(other for other in _DELIMITERS if other != default)):
        widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        if widths and widths[0] > 1 and (delimiter == default or len(set(widths)) == 1):
            return delimiter
    return default


def _check_header(names: list[str], file: Path) -> None:
    """Raises SourceError where the first line is no line of names, or gives two columns
    one name.
    """
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if images:
        raise SourceError(
            f"{file}: the first line looks like an image and what belongs to it "
            f"({', '.join(names[:4])}), not like the names of columns, and would be lost. Put a "
            "line of names above it, for example: path,label"
        )
    if len(names) > _MOST_COLUMNS:
        raise SourceError(
            f"{file}: {len(names):,} columns; a table of images has {_MOST_COLUMNS:,} at most."
        )
    repeated = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if repeated:
        raise SourceError(
            f"{file}: {len(repeated)} names stand over several columns, first {repeated[0]!r}. "
            "Give each its own."
        )


def _read_json_lines(text: str, file: Path) -> Table:
    records = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # JSON may hold other line breaks as they are, such as U+2028
        if not line.strip():
            continue
        try:
            record = _parse_json(line, f"{file}, line {number}")
        except SourceError:
            raise
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{file}, line {number}: no JSON ({error}). Expected one object per line."
            ) from error
        if not isinstance(record, dict):
            raise SourceError(
                f'{file}, line {number}: expected an object such as {{"path": …}}; found '
                f"{line[:40]}"
            )
        records.append(record)
    return Table(_clean(pd.DataFrame(records, dtype=object)))


def _parse_json(text: str, where: str) -> Any:
    """The value that a JSON text holds.

    Raises SourceError where an object has a key twice, ValueError for other text.
    """

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            key, count = Counter(key for key, _ in pairs).most_common(1)[0]
            raise SourceError(
                f"{where}: an object has the key {key!r} {count} times; expected once, as only the "
                "last value would count. Delete the others, or give each a key of its own"
            )
        return values

    return json.loads(text, object_pairs_hook=build)


def _read_json(text: str, file: Path) -> Table:
    values = _parse_json(text, str(file))
    if isinstance(values, dict) and isinstance(values.get("images"), list):
        frame, notes = coco_rows(values, file)
        return Table(_clean(frame), notes=notes)
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return Table(_clean(pd.DataFrame(values, dtype=object)))
    if isinstance(values, dict) and all(isinstance(value, (str, int)) for value in values.values()):
        frame = pd.DataFrame({"path": list(values), "label": list(values.values())}, dtype=object)
        return Table(
            _clean(frame),
            notes=(f"{file.name}: its keys are the paths, and its values the labels",),
        )
    raise SourceError(
        f"{file}: expected a list of objects, an object of paths and labels, or COCO (the keys "
        f"images, annotations and categories); found {text[:40].strip()}…"
    )


def _read_parquet(file: Path) -> Table:
    opened = pq.ParquetFile(file)
    schema = opened.schema_arrow
    images = tuple(
        name
        for name in _image_columns(schema)
        if not _is_binary(schema.field(name).type) or _are_images(_parquet_values(file, name))
    )
    columns = [field.name for field in schema if field.name not in images]
    # Of a struct of bytes and path, the path alone: the images stay on disk.
    columns += [f"{name}.path" for name in images if _has_path(schema.field(name).type)]
    table = opened.read(columns=columns).replace_schema_metadata(schema.metadata)
    empty = [
        name
        for name in images
        if _holds_bytes(schema.field(name).type) and _is_empty(file, f"{name}.bytes")
    ]
    return _from_arrow(table, opened.metadata.num_rows, images, empty)


def _parquet_values(file: Path, column: str) -> Iterator[Any]:
    """The values of a column, without what is missing; no more of the file is read than is asked
    for.
    """
    with pq.ParquetFile(
        file, buffer_size=_BUFFER_BYTES
    ) as opened:  # else a whole row group of images would be in memory
        for group in range(opened.metadata.num_row_groups):
            for batch in opened.iter_batches(batch_size=16, row_groups=[group], columns=[column]):
                yield from (cell.as_py() for cell in batch.column(0) if cell.is_valid)


def _arrow_values(cells: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column, without what is missing."""
    return (
        cell.as_py()
        for chunk in cells.chunks
        if chunk.null_count < len(chunk)
        for cell in chunk
        if cell.is_valid
    )


def _are_images(values: Iterable[bytes]) -> bool:
    """Whether a column of bytes holds images, by its first value; else it is text, as TensorFlow's
    exports store it.

    A value with a NUL is no text: an image all the same, damaged or of a format that is not read.
    """
    first = next((value for value in values if value), None)
    return first is None or has_image_signature(first[:_SIGNATURE_BYTES]) or b"\0" in first


def _is_empty(file: Path, column: str) -> bool:
    """Whether a Parquet column holds nothing but missing values, by the file's own statistics."""
    missing = 0
    with pq.ParquetFile(file, buffer_size=_BUFFER_BYTES) as opened:
        for group in range(opened.metadata.num_row_groups):
            # A chunk whose description is damaged ends the process where it is asked for; where it
            # is read, that is an error.
            next(opened.iter_batches(batch_size=1, row_groups=[group], columns=[column]), None)
            described = opened.metadata.row_group(group)
            for chunk in map(described.column, range(described.num_columns)):
                if chunk.path_in_schema == column:
                    if not chunk.is_stats_set or chunk.statistics.null_count is None:
                        return False
                    missing += chunk.statistics.null_count
        return bool(opened.metadata.num_rows) and missing == opened.metadata.num_rows


def _has_path(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def _image_columns(schema: pa.Schema) -> tuple[str, ...]:
    """What can hold images: columns of bytes, or of structs with a field `bytes`, as Hugging Face's
    Image feature is stored.
    """
    return tuple(
        field.name for field in schema if _is_binary(field.type) or _holds_bytes(field.type)
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    place = kind.get_field_index("bytes")
    return place >= 0 and _is_binary(kind.field(place).type)


def _from_arrow(
    table: pa.Table, rows: int, images: tuple[str, ...] | None = None, empty: Sequence[str] = ()
) -> Table:
    """The columns that are no images; what `datasets` stores as the path of one is the column
    `NAME.path`.

    images: the columns of images; None where they are to be found. empty: those without bytes. They
    name files, and the column `NAME` has their paths.
    """
    if images is None:
        images = tuple(
            name
            for name in _image_columns(table.schema)
            if not _is_binary(table[name].type) or _are_images(_arrow_values(table[name]))
        )
        empty = [
            name
            for name in images
            if pa.types.is_struct(table[name].type)
            and pc.struct_field(table[name], "bytes").null_count == len(table)
        ]
    class_names = _class_names(table.schema)
    texts = [
        field.name for field in table.schema if field.name not in images and _is_binary(field.type)
    ]
    for name in set(images) & set(table.column_names):
        cells = table[name]
        table = table.drop_columns([name])
        if _has_path(cells.type):
            table = table.append_column(
                name if name in empty else f"{name}.path", pc.struct_field(cells, "path")
            )
    images = tuple(name for name in images if name not in empty)
    # Python's integers where there are gaps: as floats, large ones would become others.
    frame = table.to_pandas(integer_object_nulls=True)
    if not table.column_names:  # of nothing but images; the rows are counted all the same
        frame = pd.DataFrame(index=pd.RangeIndex(rows))
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(drop=frame.index.name is None)
    for name in texts:
        if name in frame:
            frame[name] = as_text(frame[name])
    for name, names in class_names.items():
        if name in frame:
            frame[name] = [
                names[int(value)] if _is_class(value, names) else None for value in frame[name]
            ]
    notes = tuple(
        f"the numbers of {name!r} are classes, named in the file"
        for name in class_names
        if name in frame
    )
    return Table(_clean(frame), images, notes)


def _is_class(value: Any, names: list[str]) -> bool:
    return (
        value is not None and value == value and 0 <= int(value) < len(names)
    )  # ClassLabel has -1 for none


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of integer columns, from what `datasets` writes into a file's
    metadata.
    """
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"][
            "features"
        ]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}


def _clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Names of columns and text in one form, empty text missing. Typed columns and lists stay."""
    frame = frame.rename(columns={name: normalize_text(str(name)) for name in frame.columns})
    for name in frame.columns:
        if _is_text(frame[name]):
            text = as_text(frame[name])
            frame[name] = text.mask(text == "")
    return frame


def _is_text(column: pd.Series) -> bool:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return True
    if isinstance(column.dtype, pd.StringDtype):
        return True
    return column.dtype == object and all(
        isinstance(value, str) or value is None or value != value for value in column
    )
