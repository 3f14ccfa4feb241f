"""Images that tables name or hold: one row per image."""

import glob
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.home import expand_home
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError, absent, check_unique, nearest
from headrace.extract.images.byte_ranges import file_of, path_text, printable
from headrace.extract.sources.archive import RESERVED_COLUMNS
from headrace.extract.sources.folder import EXCLUDED, image_paths
from headrace.extract.sources.formats import IMAGE_SUFFIXES, OTHER_FORMATS, TABLE_SUFFIXES
from headrace.extract.sources.layout import split_word
from headrace.extract.sources.listing import Listing, Tally
from headrace.extract.sources.table import Table, read_table_file

# What people call the column that names the image, the likeliest first; `file_name` is Hugging
# Face's and COCO's.
PATH_NAMES = (
    "path",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "image_path",
    "image",
    "file",
    "img",
    "img_path",
)
HUGGING_FACE_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MEANINGS = {"path": "where the image is", "id": "what tells rows apart"} | dict.fromkeys(
    ("content", "_content"), "the hash of an image's bytes"
)
_PLACE = re.compile(r"\{([^{}]*)\}")
_PATHS_LOOKED_AT = 100
_DEEPEST_FOLDER = 3  # below a table, of images that ids name


@dataclass(frozen=True)
class TableOptions:
    """How a table names its images; see the recipe's section `images`."""

    path_column: str | None = None  # default: found, see `find_images`
    # default: `id` where there is such a column, else the path as written
    id_column: str | None = None
    # what relative paths start from; default: the table's own folder
    root: str | Path | None = None
    path_pattern: str | None = None  # a path with columns in braces: train/{id}.jpg
    exclude: tuple[str, ...] = ()


def read_tables(
    table: str | Path, options: TableOptions | None = None, *, labelled: bool = True
) -> Listing:
    """The rows of tables, in their order: `id`, `path`, then every column that the tables have.

    table: a CSV, TSV, JSON lines, JSON (COCO too), Parquet or Arrow file, a pattern
    (`data/train-*.parquet`), a folder of Parquet files, or one that `datasets` saved. Parquet and
    Arrow may hold the images themselves. Where the tables' or their folders' names are the sides of
    a split and no column says so, a column `split` has them. Files are not looked for here: a
    missing one becomes a recorded failure of its sample. labelled: rows are to be learned from, so
    that each needs an id of its own; else every row stays in its place, also one that stands twice
    or names no image. Raises SourceError.
    """
    options = options or TableOptions()
    files = table_files(expand_home(table))
    tally = Tally()
    parts: list[pd.DataFrame] = []
    notes: list[str] = []
    sides = _sides(files)
    several = len(files) > 1
    base = os.path.commonpath([file.parent for file in files])
    for file in files:
        read = read_table_file(file)
        notes += read.notes
        samples = _samples(file, read, options, tally, notes, labelled)
        if sides is not None and "split" not in samples:
            samples["split"] = sides[file]
        parts.append(samples)
    if sides is not None:
        notes.append(
            f"the names {', '.join(dict.fromkeys(sides.values()))} are those of the sides of a "
            "split"
        )
    if labelled and several and pd.concat([part["id"] for part in parts]).duplicated().any():
        for file, part in zip(files, parts, strict=True):  # names that are unique in one table only
            part["id"] = f"{file.relative_to(base).as_posix()}/" + part["id"].astype(str)
    samples = pd.concat(parts, ignore_index=True) if several else parts[0]
    _count_unnamed(files, samples, tally)
    samples = _exclude(samples, options.exclude, tally)
    source = str(files[0]) if not several else f"{len(files)} tables ({files[0]}, …)"
    if samples.empty:
        found = "; ".join(map(str, tally.left_out()))
        raise SourceError(
            f"{source}: the table has no rows{f' that can be used ({found})' if found else ''}. "
            "Expected one row per image."
        )
    if labelled:
        check_unique(samples["id"], source)
    return tally.listing(samples, dict.fromkeys(notes))


def _count_unnamed(files: Sequence[Path], samples: pd.DataFrame, tally: Tally) -> None:
    """Count the images beside a metadata.csv, which speaks for its whole folder, that it does not
    name.
    """
    folders = [file.parent for file in files if file.name in HUGGING_FACE_METADATA]
    named = set(samples["path"]) if folders else set()
    for folder in folders:
        for path in image_paths(folder):
            if path not in named:
                tally.found += 1
                tally.leave_out(
                    "images that no row names", printable(os.path.relpath(file_of(path), folder))
                )


def table_files(table: Path) -> list[Path]:
    """The files that a table's name means, absolute. Raises SourceError where there are none."""
    if table.is_file():
        return [table.absolute()]
    if table.is_dir():
        files = saved_dataset_files(table) or sorted(
            file
            for pattern in ("*.parquet", "*/*.parquet")
            for file in table.glob(pattern)
            if not file.name.startswith(".")
        )
        if not files:
            raise SourceError(
                f"{table} is a folder without Parquet files, and none that `datasets` saved. Name "
                "a table in it"
            )
        return [file.absolute() for file in files]
    matches = sorted(glob.glob(str(table)))
    if not matches:
        raise SourceError(absent(table, "a table"))
    return [Path(match).absolute() for match in matches]


def saved_dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved (save_to_disk), in their order; empty for
    any other folder.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for name in names for file in saved_dataset_files(folder / name)]
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state.get("_indices_data_files"):
                raise SourceError(
                    f"{folder}: some rows of these files are selected by a second file, as old "
                    "versions of `datasets` saved filters. Save it again: "
                    "load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)"
                )
            return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder}: not a whole folder of `datasets` ({type(error).__name__}: {error}). Save "
            "it again"
        ) from error
    return []


def find_images(table: Table, file: Path, base: Path) -> tuple[str, bool]:
    """What names, or holds, the images: (a column, False), or (a pattern of paths such as
    `train/{id}.jpg`, True).

    A column counts by its name and what it holds, then by what it holds alone; ids without an
    ending are looked for among the images below `base`. Raises SourceError where nothing fits, or
    several columns could be the images.
    """
    frame, held = table.frame, table.image_columns
    named = [
        str(name)
        for wanted in PATH_NAMES
        for name in (*frame.columns, *held)
        if str(name).lower() == wanted
    ]
    for name in named:
        if name in held or _names_images(frame[name], any):
            return name, False
    others = [str(name) for name in frame.columns if _names_images(frame[name], all)]
    candidates = [*held, *others]
    if len(candidates) == 1 and not named:
        return candidates[0], False
    if (pattern := _find_pattern(frame, file, base)) is not None:
        return pattern, True
    if len(named) == 1 and not candidates:
        return named[0], False
    columns = ", ".join([*frame.columns, *held])
    if named or candidates:
        could = list(dict.fromkeys([*named, *candidates]))
        raise SourceError(
            f"{file}: {', '.join(could)} could {'each be' if len(could) > 1 else 'be'} the images; "
            f"name one: images.path_column: {could[0]}. The columns are: {columns}."
        )
    example = frame.columns[0] if len(frame.columns) else "id"
    raise SourceError(
        f"{file}: no column names image files. Name it: images.path_column; or, for ids without an "
        f"ending, say where their images are: images.path_pattern: folder/{{{example}}}.jpg. The "
        f"columns are: {columns}."
    )


def _find_pattern(frame: pd.DataFrame, file: Path, folder: Path) -> str | None:
    """The pattern by which a column of ids names images below a folder, as in Kaggle's tables; None
    where none does.

    Raises SourceError where several do: `images/{id}.jpg` and `masks/{id}.png`.
    """
    places: dict[str, list[str]] = {}  # patterns by the stems of the images that they could name
    for parent, folders, names in os.walk(folder):
        depth = Path(parent).relative_to(folder).parts
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and len(depth) < _DEEPEST_FOLDER
        )
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                places.setdefault(stem, []).append("/".join((*depth, "{}" + suffix)))
    # Each row names an image of its own: a column of classes, whose values repeat, cannot.
    for column in sorted(frame.columns, key=lambda name: name != "id"):
        ids = as_text(frame[column]).dropna()
        if ids.duplicated().any() or any(letter in str(column) for letter in "{}"):
            continue
        ids = ids.head(_PATHS_LOOKED_AT)
        counts = Counter(place for value in ids for place in places.get(value, ()))
        patterns = [
            place.replace("{}", f"{{{column}}}")
            for place, count in counts.items()
            if 2 * count >= len(ids)
        ]
        if len(patterns) > 1:
            raise SourceError(
                f"{file}: the column {column!r} could name the images {' or '.join(patterns)}. Say "
                f"which: images.path_pattern: {patterns[0]}"
            )
        if patterns:
            return patterns[0]
    return None


def _names_images(column: pd.Series, needed: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether values of a column (any of them, or all) end as images do, also those that are not
    read here.
    """
    values = column.dropna().head(_PATHS_LOOKED_AT)
    suffixes = [Path(value).suffix.lower() if isinstance(value, str) else "" for value in values]
    return bool(suffixes) and needed(
        suffix in IMAGE_SUFFIXES or suffix in OTHER_FORMATS for suffix in suffixes
    )


def _sides(files: Sequence[Path]) -> dict[Path, str] | None:
    """The side of a split that each table's name, or else its folder's, says; None where some say
    none, or all the same.
    """
    for names in ([file.name for file in files], [file.parent.name for file in files]):
        sides = dict(zip(files, map(split_word, names), strict=True))
        if (
            None not in sides.values()
            and len({side.lower() for side in sides.values() if side}) > 1
        ):
            return {file: side for file, side in sides.items() if side is not None}
    return None


def _samples(
    file: Path, table: Table, options: TableOptions, tally: Tally, notes: list[str], labelled: bool
) -> pd.DataFrame:
    frame = table.frame
    if frame.empty and not table.image_columns:
        return pd.DataFrame(columns=["id", "path"], dtype=object)
    tally.found += len(frame)
    for wanted, setting in ((options.path_column, "path_column"), (options.id_column, "id_column")):
        if wanted is not None and wanted not in (*frame.columns, *table.image_columns):
            columns = [*frame.columns, *table.image_columns]
            raise SourceError(
                f"{file}: there is no column {wanted!r} ({setting}). Nearest: "
                f"{nearest(wanted, columns, 1)}. The columns are: {', '.join(columns)}."
            )
    base = (expand_home(options.root) if options.root is not None else file.parent).absolute()
    where, is_pattern = _image_column(table, file, base, options, notes)
    if where in table.image_columns:
        written, paths = _cells(file, frame, where)
    else:
        written = _fill_pattern(frame, where, file) if is_pattern else as_text(frame[where])
        paths = written.map(lambda value: _find(str(base), value), na_action="ignore")
    id_column = options.id_column
    if id_column is None and "id" in frame.columns and where != "id":
        images = (
            pd.DataFrame({"id": as_text(frame["id"]), "path": paths}).dropna().drop_duplicates()
        )
        if labelled and images["id"].duplicated().any():
            frame = frame.rename(
                columns={"id": "image_id"}
            )  # headrace's own `id` tells rows apart, and this one does not
            notes.append(
                f"{file.name}: the column 'id' repeats, so that the paths tell the rows apart; it "
                "is called 'image_id' here"
            )
        else:
            id_column = "id"
            notes.append(f"{file.name}: the column 'id' tells the rows apart (images.id_column)")
    _refuse_reserved(frame, file, where, id_column)
    ids = written if id_column is None else as_text(frame[id_column])
    kept = frame.drop(
        columns=[
            name for name in frame.columns if name in ("id", "path") or name == f"{where}.path"
        ]
    )
    if not labelled:
        nothing = pd.Series(
            [f"row {row + 1} names no image" for row in range(len(frame))], index=frame.index
        )
        ids = ids.where(ids.notna(), written).where(written.notna() | ids.notna(), nothing)
        paths = paths.where(paths.notna(), f"{base}/" + nothing)
    samples = pd.DataFrame({"id": ids, "path": paths}, dtype=object)
    samples[list(kept.columns)] = kept
    if file.name in HUGGING_FACE_METADATA and "split" not in samples and written.notna().all():
        sides = [split_word(path.split("/")[0]) if "/" in path else None for path in written]
        if (
            None not in sides and len(set(sides)) > 1
        ):  # as Hugging Face has it, for a table above the folders of a split
            samples["split"] = sides
            notes.append(f"{file.name}: the first folders of the paths are the sides of a split")
    return _leave_out(samples, file, tally, repeated=not labelled)


def _image_column(
    table: Table, file: Path, base: Path, options: TableOptions, notes: list[str]
) -> tuple[str, bool]:
    """As `find_images`, but for what the options say."""
    if options.path_pattern is not None:
        return options.path_pattern, True
    if options.path_column is not None:
        return options.path_column, False
    found, is_pattern = find_images(table, file, base)
    if is_pattern:
        notes.append(
            f"{file.name}: the images are {found}, by the column in braces (images.path_pattern)"
        )
    elif found != "path":
        notes.append(
            f"{file.name}: the images are those of the column {found!r} (images.path_column)"
        )
    return found, is_pattern


def _leave_out(samples: pd.DataFrame, file: Path, tally: Tally, *, repeated: bool) -> pd.DataFrame:
    """The rows that can be used; the others are counted. repeated: also rows that stand twice."""
    for reason, column in (("rows that name no image", "path"), ("rows without an id", "id")):
        empty = samples[column].isna()
        if empty.any():
            rows = [f"{file.name}, row {row + 1}" for row in samples.index[empty][:3]]
            tally.leave_out(reason, *rows, count=int(empty.sum()))
            samples = samples[~empty]
    again = pd.Series(False, index=samples.index)
    if not repeated:
        try:
            again = samples.duplicated()
        except TypeError:  # cells of lists
            again = samples.astype(str).duplicated()
    if again.any():
        tally.leave_out(
            "rows that are another row once more",
            *samples["id"][again].head(3),
            count=int(again.sum()),
        )
        samples = samples[~again]
    return samples.reset_index(drop=True)


def _exclude(samples: pd.DataFrame, patterns: Sequence[str], tally: Tally) -> pd.DataFrame:
    if not patterns:
        return samples
    excluded = samples["id"].map(lambda name: tally.excludes(patterns, name)).astype(bool)
    if excluded.any():
        tally.leave_out(EXCLUDED, *samples["id"][excluded].head(3), count=int(excluded.sum()))
    return samples[~excluded].reset_index(drop=True)


def _fill_pattern(frame: pd.DataFrame, pattern: str, file: Path) -> pd.Series:
    """The pattern with each row's values in the place of `{column}`; missing where one
    of them is.
    """
    names = list(dict.fromkeys(_PLACE.findall(pattern)))
    absent_names = [name for name in names if name not in frame.columns]
    if absent_names or not names:
        raise SourceError(
            f"images.path_pattern {pattern!r}: {file} has no column "
            f"{', '.join(map(repr, absent_names)) or 'in braces'}. Expected a path with a column's "
            "name in braces, such as train/{id}.jpg. The columns are: "
            f"{', '.join(frame.columns)}."
        )
    texts = pd.DataFrame({name: as_text(frame[name]) for name in names})

    def fill(values: Mapping[Any, Any]) -> str:
        return _PLACE.sub(lambda place: str(values[place[1]]), pattern)

    filled = pd.Series(
        [fill(row) for row in texts.to_dict("records")], index=frame.index, dtype=object
    )
    return filled.where(texts.notna().all(axis=1), None)


def _cells(file: Path, frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """Ids and locators of images that are cells: called by the paths that they came from where
    those tell them apart.
    """
    kind = "arrow" if file.suffix.lower() == ".arrow" else "parquet"
    paths = pd.Series(
        [f"{path_text(file)}::{kind}:{column}:{row}" for row in range(len(frame))],
        index=frame.index,
        dtype=object,
    )
    width = len(str(max(0, len(frame) - 1)))
    ids = pd.Series(
        [f"{file.name}/{row:0{width}d}" for row in range(len(frame))],
        index=frame.index,
        dtype=object,
    )
    written = frame.get(f"{column}.path")
    if written is not None and written.notna().all() and not written.duplicated().any():
        ids = as_text(written)
    return ids, paths


def _find(base: str, written: str) -> str:
    """The path that a table's text means: an absolute path stays; on disk it may be in another
    Unicode form or of Windows.
    """
    if "://" in written[:12]:
        if not written.startswith("file://"):
            raise SourceError(
                f"{written}: images are read from disk. Download them, and name the files in the "
                "table"
            )
        written = written.removeprefix("file://")
    if (
        written.isascii()
        and "\\" not in written
        and "/." not in written
        and "//" not in written
        and written[:1] != "."
    ):
        return path_text(os.path.join(base, written))  # nearly all, and a table has millions
    path = Path(base, written)
    if written.isascii() and "\\" not in written:
        return path_text(path)
    forms = [written, *(unicodedata.normalize(form, written) for form in ("NFC", "NFD"))]
    candidates = [Path(base, form) for text in forms for form in (text, text.replace("\\", "/"))]
    return path_text(next((candidate for candidate in candidates if candidate.exists()), path))


def _refuse_reserved(
    frame: pd.DataFrame, file: Path, path_column: str | None, id_column: str | None
) -> None:
    """Columns that headrace's own would replace: a task that names one would get other values than
    the table's.
    """
    taken = {"id"} if "id" in (id_column, path_column) else set()
    taken |= {"path"} if "path" in (path_column, id_column) else set()
    for name in frame.columns:
        if name in RESERVED_COLUMNS - taken:
            other = {
                "id": ", or take the ids from it: images.id_column: id (in Python: id_column='id')",
                "path": (
                    f", or read the images from it: images.path_column: path (now: {path_column})"
                ),
            }.get(name, "")
            raise SourceError(
                f"{file}: the table has a column {name!r}, and headrace keeps {_MEANINGS[name]} "
                "under this name. Rename the column, for example to "
                f"{'image' if name.startswith('_') else 'image_'}{name}{other}."
            )


def is_table(path: str | Path) -> bool:
    """Whether a file's name is that of a table."""
    name = Path(path).name.lower().removesuffix(".gz")
    return Path(name).suffix in (TABLE_SUFFIXES | {".arrow"})


def metadata_table(folder: Path) -> Path | None:
    """The table of an `imagefolder` as Hugging Face has it: metadata.csv or .jsonl with a column
    file_name, beside the images.

    Where each side of a split has its own, a pattern that names them all; None where there is none.
    """
    for name in HUGGING_FACE_METADATA:
        if _is_metadata(folder / name):
            return folder / name
        inside = [
            entry
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(".")
        ]
        if inside and all(_is_metadata(entry / name) for entry in inside):
            return folder / "*" / name
    return None


def _is_metadata(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        return "file_name" in read_table_file(file).frame.columns
    except SourceError:
        return False
