"""CSV, TSV, JSON lines, JSON, Parquet and Arrow files as data frames whose text is as written."""

import csv
import gzip
import io
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.cache.count_text import count_text
from headrace.cache.text import as_text, load_json, normalize_text
from headrace.extract.errors import SourceError, missing_path_message
from headrace.extract.images.locators import open_arrow
from headrace.extract.sources.birds import bird_rows, is_list_of_birds
from headrace.extract.sources.coco import coco_boxes, coco_rows
from headrace.extract.sources.datasets_text import with_image_paths
from headrace.extract.sources.formats import IMAGE_SUFFIXES, has_image_signature, unread_format
from headrace.extract.sources.label_studio import holds_tasks, task_rows
from headrace.extract.sources.layout import SPLIT_WORDS
from headrace.extract.sources.sagemaker import with_class_names

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_IN_BRACKETS = re.compile(r"\[[^\]]*\]")
_SEPARATOR_LINE = re.compile(r"\Asep=.\r?\n")  # Excel's first line that names the separator
_LINES_LOOKED_AT = 20  # of a text, to find its delimiter
_CELLS_LOOKED_AT = 100  # of a column, to tell what it holds
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
_EXPECTED = "a table ends in .csv, .tsv, .jsonl, .json, .parquet or .arrow"

# How many times its size a compressed table may become, beyond 64 MiB. Tables of repeated rows
# reach some fifty times; a file made to fill the memory reaches a thousand.
_GZIP_RATIO, _GZIP_FLOOR_BYTES = 200, 1 << 26
_BUFFER_BYTES = 1 << 16  # of a Parquet file, read at a time
_MAX_COLUMNS = 20_000  # reading each takes about a millisecond


@dataclass(frozen=True)
class Table:
    """A table as a data frame.

    Text is trimmed and in one Unicode form, empty cells are missing, and columns are numbers only
    if the file has types.
    """

    frame: pd.DataFrame
    image_columns: tuple[str, ...] = ()  # columns of encoded images, which are not in `frame`
    notes: tuple[str, ...] = ()


def read_table_file(table_path: Path, *, annotations: bool = False) -> Table:
    """Read a table in the format that its suffix says.

    annotations: for COCO: a row per annotation, with its box, instead of a row per image.

    Raises SourceError when it cannot be read.
    """
    if not table_path.is_file():
        expected = "a table: .csv, .tsv, .jsonl, .json or .parquet"
        raise SourceError(missing_path_message(table_path, expected))
    file_name = table_path.name.lower()
    compressed = file_name.endswith(".gz")
    suffix = Path(file_name.removesuffix(".gz")).suffix
    try:
        if suffix in (".parquet", ".pq"):
            return _read_parquet(table_path)
        if suffix == ".arrow":
            arrow_table = open_arrow(table_path)
            return _from_arrow(arrow_table, arrow_table.num_rows)
        if is_list_of_birds(table_path):
            frame, notes = bird_rows(table_path)
            return Table(_clean(frame), notes=notes)
        if suffix in _TEXT_SUFFIXES:
            return _read_csv(_read_text(table_path, compressed), suffix, table_path)
        if suffix in (".jsonl", ".ndjson", ".manifest"):
            return _read_json_lines(_read_text(table_path, compressed), table_path)
        if suffix == ".json":
            return _read_json(_read_text(table_path, compressed), table_path, annotations)
    # Has a message of its own, because what helps is another encoding.
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{table_path}: cannot be read as {suffix[1:]}: {error}. Expected text in UTF-8 whose "
            "first line names the columns, or a Parquet file with the suffix .parquet. A table of "
            f"Excel's is read after {_utf8_command(table_path)}"
        ) from error
    except SourceError:
        raise
    # Parsers raise anything on damaged files, zlib.error and RecursionError among others.
    except Exception as error:
        expected_content = (
            "a Parquet file"
            if suffix in (".parquet", ".pq")
            else "one line of column names, then one per image"
        )
        raise SourceError(
            f"{table_path}: cannot be read as {suffix[1:]}: {str(error).strip()}. Expected "
            f"{expected_content}."
        ) from error
    if (unread := unread_format(table_path)) is not None:
        raise SourceError(f"{unread}. ({_EXPECTED}.)")
    raise SourceError(f"{table_path}: {_EXPECTED}; found {suffix or 'no suffix'}.")


def _utf8_command(table_path: Path) -> str:
    # Windows' text in western Europe, which ISO 8859-1 is a part of.
    new_path = table_path.with_name(f"utf8-{table_path.name}")
    return f"iconv -f cp1252 -t utf-8 {shlex.quote(str(table_path))} > {shlex.quote(str(new_path))}"


def _read_text(table_path: Path, is_compressed: bool) -> str:
    if is_compressed:
        max_bytes = max(_GZIP_FLOOR_BYTES, _GZIP_RATIO * table_path.stat().st_size)
        with gzip.open(table_path) as stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise SourceError(
                f"{table_path}: it decompresses to more than {_GZIP_RATIO} times its size, which "
                "no table does. Decompress it yourself if it is one: gunzip FILE"
            )
    else:
        data = table_path.read_bytes()
    # Spreadsheets write UTF-16 with a byte order mark; without one it is no known encoding.
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = data.decode(encoding)
    text = _SEPARATOR_LINE.sub("", text, count=1)
    # Old spreadsheets for Mac OS end lines with a carriage return alone.
    return text if "\n" in text else text.replace("\r", "\n")


def _read_csv(text: str, suffix: str, table_path: Path) -> Table:
    if (paths := _listed_paths(text)) is not None:
        note = f"{table_path.name}: a path in each line, and no names of columns"
        return Table(_clean(pd.DataFrame({"path": paths}, dtype=object)), notes=(note,))
    default_delimiter = "\t" if suffix in (".tsv", ".tab") else ","
    delimiter = _delimiter(text, default_delimiter)
    header_names = next(
        csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=delimiter != "\t"), []
    )
    _check_header([normalize_text(name) for name in header_names], table_path)
    frame = pd.read_csv(
        io.StringIO(text),
        sep=delimiter,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=delimiter != "\t",
        low_memory=False,
    )
    # Where rows have more values than the header, pandas takes the first ones for row names.
    if not isinstance(frame.index, pd.RangeIndex):
        raise SourceError(
            f"{table_path}: the rows have more values than the header has names "
            f"({len(frame.columns)}). Give every column a name in the first line, or delete what "
            "ends the rows."
        )
    notes: list[str] = []
    if delimiter != default_delimiter:
        notes.append(f"{table_path.name}: the columns are separated by {_DELIMITERS[delimiter]}")
    if '"' in text:
        notes += _joined_lines(frame, table_path)
    frame, image_notes = with_image_paths(frame, table_path)
    notes += image_notes
    return Table(_clean(frame), notes=tuple(notes))


def _listed_paths(text: str) -> list[str] | None:
    """Return the lines of a list of image files, as `find` writes one; None for other texts."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in lines:
        # The names of QuPath's tiles have commas in brackets. Elsewhere they, and tabs, separate
        # cells: `cat,1.jpg` is a label and a path, without names of columns.
        outside = _IN_BRACKETS.sub("", line)
        has_cells = any(delimiter in outside for delimiter in _DELIMITERS)
        if has_cells or Path(line).suffix.lower() not in IMAGE_SUFFIXES:
            return None
    return lines or None


def _joined_lines(frame: pd.DataFrame, table_path: Path) -> list[str]:
    """Return a note if cells have line breaks, which an unpaired quote causes.

    Raises SourceError if they are in the first column, or in one of images' paths.
    """
    # From an unpaired quote to the next one, many rows later, the parser reads a single cell: rows
    # are missing without an error.
    broken_rows: list[int] = []
    is_refused = False
    for column_index, column_name in enumerate(frame.columns):
        cells = frame[column_name].str.strip()
        has_line_break = cells.str.contains("[\r\n]", na=False).to_numpy(dtype=bool)
        if has_line_break.any():
            broken_rows += (has_line_break.nonzero()[0] + 1).tolist()
            is_whole = ~has_line_break & (cells.fillna("") != "")
            whole_cells = cells[is_whole].head(_CELLS_LOOKED_AT)
            suffixes = {Path(value).suffix.lower() for value in whole_cells}
            is_refused |= column_index == 0 or (bool(suffixes) and suffixes <= IMAGE_SUFFIXES)
    if not broken_rows:
        return []
    line_break_text = (
        f"{count_text(len(broken_rows), 'cell holds', 'cells hold')} line breaks, first in row "
        f'{min(broken_rows):,}: an unpaired quote (") joins lines'
    )
    if is_refused:
        raise SourceError(
            f"{table_path}: {line_break_text}, and these cells are in a column that tells the rows "
            "apart. Delete the quote or write its pair; a quote within a cell is written twice "
            '(""). Where the line breaks are meant, put a column of paths first'
        )
    return [f"{table_path.name}: {line_break_text}"]


def _delimiter(text: str, default_delimiter: str) -> str:
    """Return the default delimiter if the header has it, otherwise the first of _DELIMITERS that
    gives all of the first lines the same number of cells.
    """
    first_lines = list(itertools.islice(io.StringIO(text), _LINES_LOOKED_AT))
    for delimiter in dict.fromkeys([default_delimiter, *_DELIMITERS]):
        widths = [len(row) for row in csv.reader(first_lines, delimiter=delimiter) if row]
        # Text in cells holds delimiters too, but rarely the same number in every line.
        is_even = delimiter == default_delimiter or len(set(widths)) == 1
        if widths and widths[0] > 1 and is_even:
            return delimiter
    return default_delimiter


def _check_header(column_names: list[str], table_path: Path) -> None:
    """Raise SourceError if the first line is no line of names, or gives two columns one name."""
    # A name that ends with a slash is a folder (MURA's lists of studies).
    is_path = [
        Path(name).suffix.lower() in IMAGE_SUFFIXES or name.endswith("/") for name in column_names
    ]
    if any(is_path):
        # As of Vertex AI: TRAIN,gs://bucket/1.jpg,cat
        is_side = [name.lower() in SPLIT_WORDS for name in column_names]
        names = [
            "path" if path else "split" if side else "label"
            for path, side in zip(is_path, is_side, strict=True)
        ]
        names = [name if name not in names[:n] else f"{name}{n}" for n, name in enumerate(names)]
        raise SourceError(
            f"{table_path}: the first line looks like an image and what belongs to it "
            f"({', '.join(column_names[:4])}), not like the names of columns, and would be lost. "
            f"Put a line of names above it, for example: {','.join(names[:8])}"
        )
    if len(column_names) > _MAX_COLUMNS:
        raise SourceError(
            f"{table_path}: {len(column_names):,} columns; a table of images has "
            f"{_MAX_COLUMNS:,} at most."
        )
    counts = Counter(filter(None, column_names))
    if repeated_names := sorted(name for name, count in counts.items() if count > 1):
        raise SourceError(
            f"{table_path}: {len(repeated_names)} names stand over several columns, first "
            f"{repeated_names[0]!r}. Give each its own."
        )


def _read_json_lines(text: str, table_path: Path) -> Table:
    records = []
    # Not splitlines: text in JSON may hold other line breaks unescaped, such as U+2028.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse_json(line, f"{table_path}, line {line_number}")
        except SourceError:  # is a ValueError too, and names the line already
            raise
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{table_path}, line {line_number}: no JSON ({error}). Expected one object per "
                "line."
            ) from error
        if not isinstance(record, dict):
            raise SourceError(
                f'{table_path}, line {line_number}: expected an object such as {{"path": …}}; '
                f"found {line[:40]}"
            )
        records.append(record)
    return _from_records(with_class_names(records), table_path)


def _from_records(
    records: list[dict[str, Any]], table_path: Path, notes: Sequence[str] = ()
) -> Table:
    frame, image_notes = with_image_paths(pd.DataFrame(records, dtype=object), table_path)
    return Table(_clean(_without_objects(frame)), notes=(*notes, *image_notes))


def _without_objects(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which the values of objects in cells are columns: `meta.label`."""
    columns: dict[str, pd.Series] = {}
    for name, cells in frame.items():
        objects = [cell for cell in cells if isinstance(cell, dict)]
        keys = dict.fromkeys(key for cell in objects for key in cell)
        if not objects or len(keys) > _CELLS_LOOKED_AT:  # rather a mapping than a record
            columns[str(name)] = cells
            continue
        for key in keys:
            columns[f"{name}.{key}"] = cells.map(
                lambda cell, key=key: cell.get(key) if isinstance(cell, dict) else None
            )
    return pd.DataFrame(columns, index=frame.index)


def _parse_json(text: str, location: str) -> Any:
    """Return the value of a JSON text.

    location: file and line, for messages. Raises SourceError for an object that has a key twice,
    ValueError for text that is not JSON.
    """

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            key, count = Counter(key for key, _ in pairs).most_common(1)[0]
            raise SourceError(
                f"{location}: an object has the key {key!r} {count} times; expected once, as only "
                "the last value would count. Delete the others, or give each a key of its own"
            )
        return values

    return load_json(text, errors="surrogateescape", object_pairs_hook=build)


def _read_json(text: str, table_path: Path, annotations: bool) -> Table:
    values = _parse_json(text, str(table_path))
    if isinstance(values, dict) and isinstance(values.get("images"), list):
        frame, notes = (coco_boxes if annotations else coco_rows)(values, table_path)
        return Table(_clean(frame), notes=notes)
    if holds_tasks(values):
        frame, notes = task_rows(values, table_path)
        return Table(_clean(frame), notes=notes)
    rows = _json_rows(values)
    if rows is not None:
        records, meaning = rows
        return _from_records(
            records, table_path, [f"{table_path.name}: {meaning}"] if meaning else []
        )
    raise SourceError(
        f"{table_path}: expected a list of objects, an object of paths and labels, or COCO (the "
        f"keys images, annotations and categories); found {text[:40].strip()}…"
    )


def _json_rows(values: Any) -> tuple[list[dict[str, Any]], str] | None:
    """Return the rows of a JSON file, and in words how they were found; None if there are none."""
    if isinstance(values, list):
        if all(isinstance(value, dict) for value in values):
            return values, ""
        if all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1:
            names = _names_of(list(zip(*values, strict=True)))
            records = [dict(zip(names, value, strict=True)) for value in values]
            return records, f"its lists are rows of {', '.join(names)}"
        return None
    if not isinstance(values, dict) or not values:
        return None
    cells = list(values.values())
    if all(isinstance(cell, (str, int)) for cell in cells):
        pairs = [{"path": path, "label": label} for path, label in values.items()]
        return pairs, "its keys are the paths, and its values the labels"
    if all(isinstance(cell, dict) for cell in cells):
        # VIA's keys are names with the file's size: `1.jpg4711`.
        is_path = _are_image_names(values) and not any("path" in cell for cell in cells)
        key_name = "path" if is_path else "key"
        return [{key_name: key, **cell} for key, cell in values.items()], "its keys are rows"
    if all(
        isinstance(cell, list) and all(isinstance(text, str) for text in cell) for cell in cells
    ):
        if _are_image_names(values):
            return (
                [{"path": path, "label": labels} for path, labels in values.items()],
                "its keys are the paths, and its values lists of labels",
            )
        if all(map(_are_image_names, cells)):
            return (
                [{"path": path, "label": key} for key, paths in values.items() for path in paths],
                "its keys are the labels, and its values the paths",
            )
    # The rows may lie below a key, or in a key for each side of a split.
    parts = {key: _json_rows(cell) for key, cell in values.items() if isinstance(cell, list)}
    sides = {key: part[0] for key, part in parts.items() if part and _name_images(part[0])}
    if len(sides) == 1:
        ((key, records),) = sides.items()
        return records, f"the rows are those of its key {key!r}"
    if sides and {key.lower() for key in sides} <= set(SPLIT_WORDS):
        split_rows = [{**record, "split": side} for side in sides for record in sides[side]]
        return split_rows, "its keys are the sides of a split"
    return None


def _names_of(columns: Sequence[Sequence[Any]]) -> list[str]:
    names = ["path" if _are_image_names(column) else "label" for column in columns]
    return [name if name not in names[:n] else f"{name}{n}" for n, name in enumerate(names)]


def _are_image_names(cells: Iterable[Any]) -> bool:
    return all(
        isinstance(cell, str) and Path(cell).suffix.lower() in IMAGE_SUFFIXES for cell in cells
    )


def _name_images(records: Sequence[dict[str, Any]]) -> bool:
    """Return whether the first of the rows names an image."""
    return any(_are_image_names([cell]) for record in records[:1] for cell in record.values())


def _read_parquet(table_path: Path) -> Table:
    parquet_file = pq.ParquetFile(table_path)
    schema = parquet_file.schema_arrow
    image_columns = tuple(
        name
        for name in _image_columns(schema)
        if not _is_binary(schema.field(name).type) or _are_images(_parquet_values(table_path, name))
    )
    column_names = [field.name for field in schema if field.name not in image_columns]
    # Of structs of bytes and path only the paths are read: images are read one by one later.
    column_names += [f"{name}.path" for name in image_columns if _has_path(schema.field(name).type)]
    table = parquet_file.read(columns=column_names).replace_schema_metadata(schema.metadata)
    empty_columns = [
        name
        for name in image_columns
        if _holds_bytes(schema.field(name).type) and _is_empty(table_path, f"{name}.bytes")
    ]
    return _from_arrow(table, parquet_file.metadata.num_rows, image_columns, empty_columns)


def _parquet_values(table_path: Path, column_name: str) -> Iterator[Any]:
    """Yield a column's values without the missing ones, reading the file as far as needed."""
    # With a buffer, because without one a whole row group of images would be read into memory.
    with pq.ParquetFile(table_path, buffer_size=_BUFFER_BYTES) as parquet_file:
        for row_group in range(parquet_file.metadata.num_row_groups):
            for batch in parquet_file.iter_batches(
                batch_size=16, row_groups=[row_group], columns=[column_name]
            ):
                yield from (cell.as_py() for cell in batch.column(0) if cell.is_valid)


def _arrow_values(cells: pa.ChunkedArray) -> Iterator[Any]:
    """Yield a column's values without the missing ones."""
    return (
        cell.as_py()
        for chunk in cells.chunks
        if chunk.null_count < len(chunk)
        for cell in chunk
        if cell.is_valid
    )


def _are_images(values: Iterable[bytes]) -> bool:
    """Return whether a column of bytes holds images, judged by its first value, and not text."""
    first_value = next(filter(None, values), None)
    # A value with a NUL is no text but an image, damaged or of a format that is not read.
    return first_value is None or has_image_signature(first_value[:32]) or b"\0" in first_value


def _is_empty(table_path: Path, column_name: str) -> bool:
    """Return whether all of a Parquet column is missing, by the file's own statistics."""
    n_missing = 0
    with pq.ParquetFile(table_path, buffer_size=_BUFFER_BYTES) as parquet_file:
        for row_group in range(parquet_file.metadata.num_row_groups):
            # One row is read first, because `row_group(i).column(j)` ends the process where the
            # description of a column chunk is damaged; reading it raises an error.
            next(
                parquet_file.iter_batches(
                    batch_size=1, row_groups=[row_group], columns=[column_name]
                ),
                None,
            )
            group_metadata = parquet_file.metadata.row_group(row_group)
            for chunk in map(group_metadata.column, range(group_metadata.num_columns)):
                if chunk.path_in_schema == column_name:
                    if not chunk.is_stats_set or chunk.statistics.null_count is None:
                        return False
                    n_missing += chunk.statistics.null_count
        return bool(parquet_file.metadata.num_rows) and n_missing == parquet_file.metadata.num_rows


def _has_path(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_struct(arrow_type) and arrow_type.get_field_index("path") >= 0)


def _image_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that can hold images: bytes, or structs with a field `bytes`."""
    # Hugging Face stores its Image feature as such a struct.
    return tuple(
        field.name for field in schema if _is_binary(field.type) or _holds_bytes(field.type)
    )


def _is_binary(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type))


def _holds_bytes(arrow_type: pa.DataType) -> bool:
    if not pa.types.is_struct(arrow_type):
        return False
    field_index = arrow_type.get_field_index("bytes")
    return field_index >= 0 and _is_binary(arrow_type.field(field_index).type)


def _from_arrow(
    table: pa.Table,
    n_rows: int,
    image_columns: tuple[str, ...] | None = None,
    empty_columns: Sequence[str] = (),
) -> Table:
    """Return the columns that are no images as a Table.

    `datasets` stores an image with its path; of a column `NAME` of images the paths become the
    column `NAME.path`.

    n_rows: needed if all columns are images and are left out.
    image_columns: the columns of images; None to find them here.
    empty_columns: those of them that have paths and no bytes.
    """
    if image_columns is None:
        image_columns = tuple(
            column_name
            for column_name in _image_columns(table.schema)
            if not _is_binary(table[column_name].type)
            or _are_images(_arrow_values(table[column_name]))
        )
        empty_columns = [
            column_name
            for column_name in image_columns
            if pa.types.is_struct(table[column_name].type)
            and pc.struct_field(table[column_name], "bytes").null_count == len(table)
        ]
    class_names = _class_names(table.schema)
    # Bytes that are no images are text: TensorFlow's exports store it so.
    text_columns = [
        field.name
        for field in table.schema
        if field.name not in image_columns and _is_binary(field.type)
    ]
    for column_name in set(image_columns) & set(table.column_names):
        cells = table[column_name]
        table = table.drop_columns([column_name])
        if _has_path(cells.type):
            # Without bytes beside them, paths name files, and are the column itself.
            path_name = column_name if column_name in empty_columns else f"{column_name}.path"
            table = table.append_column(path_name, pc.struct_field(cells, "path"))
    # Integers with a gap stay Python integers; as floats, large ones would lose digits.
    frame = table.to_pandas(integer_object_nulls=True)
    if not table.column_names:  # all columns are images
        frame = pd.DataFrame(index=pd.RangeIndex(n_rows))
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(drop=frame.index.name is None)
    for column_name in text_columns:
        if column_name in frame:
            frame[column_name] = as_text(frame[column_name])
    notes: list[str] = []
    for column_name, class_labels in class_names.items():
        if column_name in frame:
            label_of_number = dict(enumerate(class_labels))
            # None for missing values, and for -1, which `datasets` writes for no label.
            frame[column_name] = [label_of_number.get(value) for value in frame[column_name]]
            notes.append(f"the numbers of {column_name!r} are classes, named in the file")
    images = tuple(name for name in image_columns if name not in empty_columns)
    return Table(_clean(frame), images, tuple(notes))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of integer columns, from the metadata that `datasets` writes."""
    try:
        described = (schema.metadata or {}).get(b"huggingface", b"{}").decode()
        features = load_json(described)["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}


def _clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Normalize the names of columns and text, and make empty text missing; other columns stay."""
    frame = frame.rename(
        columns={column_name: normalize_text(str(column_name)) for column_name in frame.columns}
    )
    for column_name in frame.columns:
        if _is_text(frame[column_name]):
            text = as_text(frame[column_name])
            frame[column_name] = text.mask(text == "")
    return frame


def _is_text(column: pd.Series) -> bool:
    if isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype):
        return True
    return column.dtype == object and all(
        isinstance(value, str) or value is None or value != value for value in column
    )
