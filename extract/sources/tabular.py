"""Images that tables name or hold: one row per image."""

import glob
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from headrace.cache.home import expand_home
from headrace.cache.text import as_text
from headrace.extract.errors import (
    SourceError,
    check_unique_ids,
    missing_path_message,
    nearest_names,
)
from headrace.extract.images.byte_ranges import encode_path, locator_file, printable_name
from headrace.extract.images.crops import Crop
from headrace.extract.sources.archive import RESERVED_COLUMNS
from headrace.extract.sources.birds import IMAGES, is_list_of_birds
from headrace.extract.sources.folder import EXCLUDED_ENTRIES, image_paths
from headrace.extract.sources.formats import TABLE_SUFFIXES
from headrace.extract.sources.image_column import find_image_column
from headrace.extract.sources.label_studio import local_names
from headrace.extract.sources.layout import split_side
from headrace.extract.sources.listing import Listing, Tally
from headrace.extract.sources.regions import Boxes, find_boxes
from headrace.extract.sources.table import Table, read_table_file

_BOX_NAMES = frozenset({"bbox", "box", "boxes", "bboxes", "bounding_box", "bounding_boxes"})
HUGGING_FACE_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ROBOFLOW_TABLES = ("_annotations.coco.json", "_classes.csv")
_MEANINGS = {"path": "where the image is", "id": "what tells rows apart"} | dict.fromkeys(
    ("content", "_content"), "the hash of an image's bytes"
)
_PLACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class TableOptions:
    """The way a table names its images; see the recipe's section `images`."""

    path_column: str | None = None  # default: found, see `find_image_column`
    # default: `id` where there is such a column, else the path as written
    id_column: str | None = None
    # what relative paths start from; default: the table's own folder
    root: str | Path | None = None
    path_pattern: str | None = None  # a path with columns in braces: train/{id}.jpg
    exclude: tuple[str, ...] = ()
    boxes: Boxes | Literal["auto", "none"] = "auto"


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
    table_paths = table_files(expand_home(table))
    tally = Tally()
    sample_frames: list[pd.DataFrame] = []
    notes: list[str] = []
    split_sides = _sides(table_paths)
    has_several = len(table_paths) > 1
    common_folder = os.path.commonpath([table_path.parent for table_path in table_paths])
    for table_path in table_paths:
        has_boxes = isinstance(options.boxes, Boxes)
        table_contents = read_table_file(table_path, annotations=has_boxes)
        notes += table_contents.notes
        samples = _samples(table_path, table_contents, options, tally, notes, labelled)
        if split_sides is not None and "split" not in samples:
            samples["split"] = split_sides[table_path]
        sample_frames.append(samples)
    if split_sides is not None:
        notes.append(
            f"the names {', '.join(dict.fromkeys(split_sides.values()))} are those of the sides of "
            "a split"
        )
    if (
        labelled
        and has_several
        and pd.concat([sample_frame["id"] for sample_frame in sample_frames]).duplicated().any()
    ):
        # names that are unique in one table only
        for table_path, sample_frame in zip(table_paths, sample_frames, strict=True):
            sample_frame["id"] = (
                f"{table_path.relative_to(common_folder).as_posix()}/"
                + sample_frame["id"].astype(str)
            )
    samples = pd.concat(sample_frames, ignore_index=True) if has_several else sample_frames[0]
    _count_unnamed(table_paths, samples, tally)
    samples = _exclude(samples, options.exclude, tally)
    source_text = (
        str(table_paths[0])
        if not has_several
        else f"{len(table_paths)} tables ({table_paths[0]}, …)"
    )
    if samples.empty:
        left_out_text = "; ".join(map(str, tally.left_out()))
        raise SourceError(
            f"{source_text}: the table has no "
            f"rows{f' that can be used ({left_out_text})' if left_out_text else ''}. Expected one "
            "row per image."
        )
    if labelled:
        check_unique_ids(samples["id"], source_text)
    return tally.listing(samples, dict.fromkeys(notes))


def _count_unnamed(table_paths: Sequence[Path], samples: pd.DataFrame, tally: Tally) -> None:
    """Count the images beside a metadata.csv, which speaks for its whole folder, unnamed by it."""
    metadata_folders = [file.parent for file in table_paths if file.name in HUGGING_FACE_METADATA]
    named_paths = set(samples["path"]) if metadata_folders else set()
    for folder in metadata_folders:
        for image_path in image_paths(folder):
            if image_path not in named_paths:
                tally.found += 1
                tally.leave_out(
                    "images that no row names",
                    printable_name(os.path.relpath(locator_file(image_path), folder)),
                )


def table_files(table: Path) -> list[Path]:
    """The files that a table's name means, absolute. Raises SourceError where there are none."""
    if table.is_file():
        return [table.absolute()]
    if table.is_dir():
        data_files = saved_dataset_files(table) or sorted(
            file
            for pattern in ("*.parquet", "*/*.parquet")
            for file in table.glob(pattern)
            if not file.name.startswith(".")
        )
        if not data_files:
            raise SourceError(
                f"{table} is a folder without Parquet files, and none that `datasets` saved. Name "
                "a table in it"
            )
        return [file.absolute() for file in data_files]
    matched_paths = sorted(glob.glob(str(table)))
    if not matched_paths:
        raise SourceError(missing_path_message(table, "a table"))
    return [Path(match).absolute() for match in matched_paths]


def saved_dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder made by `datasets`' save_to_disk, in order; else []."""
    try:
        if (folder / "dataset_dict.json").is_file():
            split_names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))[
                "splits"
            ]
            return [file for name in split_names for file in saved_dataset_files(folder / name)]
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


def _sides(table_paths: Sequence[Path]) -> dict[Path, str] | None:
    """The side of a split that each table's name, or else its folder's, says; None where some say
    none, or all the same.
    """
    for table_names in (
        [file.name for file in table_paths],
        [file.parent.name for file in table_paths],
    ):
        side_of_table = dict(zip(table_paths, map(split_side, table_names), strict=True))
        if (
            None not in side_of_table.values()
            and len({side.lower() for side in side_of_table.values() if side}) > 1
        ):
            return {file: side for file, side in side_of_table.items() if side is not None}
    return None


def _samples(
    table_path: Path,
    table: Table,
    options: TableOptions,
    tally: Tally,
    notes: list[str],
    labelled: bool,
) -> pd.DataFrame:
    frame = table.frame
    if frame.empty and not table.image_columns:
        return pd.DataFrame(columns=["id", "path"], dtype=object)
    tally.found += len(frame)
    for column_name, setting in (
        (options.path_column, "path_column"),
        (options.id_column, "id_column"),
    ):
        if column_name is not None and column_name not in (*frame.columns, *table.image_columns):
            columns = [*frame.columns, *table.image_columns]
            raise SourceError(
                f"{table_path}: there is no column {column_name!r} ({setting}). Nearest: "
                f"{nearest_names(column_name, columns, 1)}. The columns are: {', '.join(columns)}."
            )
    image_root = (
        expand_home(options.root) if options.root is not None else table_path.parent
    ).absolute()
    image_column, is_pattern = _image_column(table, table_path, image_root, options, notes)
    if image_column in table.image_columns:
        written_names, locators = _cells(table_path, frame, image_column)
    else:
        written_names = (
            _fill_pattern(frame, image_column, table_path)
            if is_pattern
            else local_names(as_text(frame[image_column]), image_root)
        )
        locators = written_names.map(
            lambda value: _find(str(image_root), value), na_action="ignore"
        )
    found_boxes = find_boxes(frame, options.boxes, table_path)
    if found_boxes is None and options.boxes == "auto":
        notes += [
            f"{table_path.name}: the column {name!r} may hold boxes, and is not read: whole images "
            "are. For boxes: four columns of numbers (images.boxes)"
            for name in frame.columns
            if str(name).lower() in _BOX_NAMES
        ]
    if found_boxes is not None:
        crops, box_note = found_boxes
        notes.append(box_note)
        n_without = sum(crop is None for crop in crops)
        if n_without and labelled:
            boxless = [
                str(name) for name, crop in zip(written_names, crops, strict=True) if not crop
            ]
            tally.leave_out("rows without a box", *boxless[:3], count=n_without)
        if "image" not in frame:
            frame = frame.assign(image=written_names)
        box_rows = pd.Series([crop is not None for crop in crops], index=frame.index)
        written_names, locators = _crop_names(written_names, locators, crops)
        if labelled:
            frame = frame[box_rows]
            written_names, locators = written_names[box_rows], locators[box_rows]
    id_column = options.id_column
    if id_column is None and "id" in frame.columns and image_column != "id":
        id_and_path = (
            pd.DataFrame({"id": as_text(frame["id"]), "path": locators}).dropna().drop_duplicates()
        )
        if labelled and id_and_path["id"].duplicated().any():
            # headrace's own `id` tells rows apart, and this one does not
            frame = frame.rename(columns={"id": "image_id"})
            notes.append(
                f"{table_path.name}: the column 'id' repeats, so that the paths tell the rows "
                "apart; it is called 'image_id' here"
            )
        else:
            id_column = "id"
            notes.append(
                f"{table_path.name}: the column 'id' tells the rows apart (images.id_column)"
            )
    _refuse_reserved(frame, table_path, image_column, id_column)
    sample_ids = written_names if id_column is None else as_text(frame[id_column])
    kept_columns = frame.drop(
        columns=[
            name
            for name in frame.columns
            if name in ("id", "path") or name == f"{image_column}.path"
        ]
    )
    if not labelled:
        placeholder_names = pd.Series(
            [f"row {row + 1} names no image" for row in range(len(frame))], index=frame.index
        )
        sample_ids = sample_ids.where(sample_ids.notna(), written_names).where(
            written_names.notna() | sample_ids.notna(), placeholder_names
        )
        locators = locators.where(locators.notna(), f"{image_root}/" + placeholder_names)
    samples = pd.DataFrame({"id": sample_ids, "path": locators}, dtype=object)
    samples[list(kept_columns.columns)] = kept_columns
    if (
        table_path.name in HUGGING_FACE_METADATA
        and "split" not in samples
        and written_names.notna().all()
    ):
        split_sides = [
            split_side(path.split("/")[0]) if "/" in path else None for path in written_names
        ]
        # as Hugging Face has it, for a table above the folders of a split
        if None not in split_sides and len(set(split_sides)) > 1:
            samples["split"] = split_sides
            notes.append(
                f"{table_path.name}: the first folders of the paths are the sides of a split"
            )
    return _leave_out(samples, table_path, tally, repeated=not labelled)


def _crop_names(
    written_names: pd.Series, locators: pd.Series, crops: Sequence[Crop | None]
) -> tuple[pd.Series, pd.Series]:
    """Return boxes' ids and locators: of whole images without a box, missing without an image."""
    box_names, box_locators = [
        pd.Series(
            [
                value if crop is None or pd.isna(value) else write(str(value), crop)
                for value, crop in zip(values, crops, strict=True)
            ],
            index=values.index,
            dtype=object,
        )
        for values, write in (
            (written_names, lambda name, crop: f"{name}#{crop}"),
            (locators, lambda path, crop: crop.locator(path)),
        )
    ]
    return box_names, box_locators


def _image_column(
    table: Table, table_path: Path, image_root: Path, options: TableOptions, notes: list[str]
) -> tuple[str, bool]:
    """Return the image column of the options, or that of `find_image_column`."""
    if options.path_pattern is not None:
        return options.path_pattern, True
    if options.path_column is not None:
        return options.path_column, False
    image_column, is_pattern = find_image_column(table, table_path, image_root)
    if is_pattern:
        notes.append(
            f"{table_path.name}: the images are {image_column}, by the column in braces "
            "(images.path_pattern)"
        )
    elif image_column != "path":
        notes.append(
            f"{table_path.name}: the images are those of the column {image_column!r} "
            "(images.path_column)"
        )
    return image_column, is_pattern


def _leave_out(
    samples: pd.DataFrame, table_path: Path, tally: Tally, *, repeated: bool
) -> pd.DataFrame:
    """The rows that can be used; the others are counted. repeated: also rows that stand twice."""
    for reason, column in (("rows that name no image", "path"), ("rows without an id", "id")):
        is_missing = samples[column].isna()
        if is_missing.any():
            row_names = [
                f"{table_path.name}, row {row + 1}" for row in samples.index[is_missing][:3]
            ]
            tally.leave_out(reason, *row_names, count=int(is_missing.sum()))
            samples = samples[~is_missing]
    is_duplicate = pd.Series(False, index=samples.index)
    if not repeated:
        try:
            is_duplicate = samples.duplicated()
        except TypeError:  # cells of lists
            is_duplicate = samples.astype(str).duplicated()
    if is_duplicate.any():
        tally.leave_out(
            "rows that are another row once more",
            *samples["id"][is_duplicate].head(3),
            count=int(is_duplicate.sum()),
        )
        samples = samples[~is_duplicate]
    return samples.reset_index(drop=True)


def _exclude(samples: pd.DataFrame, patterns: Sequence[str], tally: Tally) -> pd.DataFrame:
    if not patterns:
        return samples
    is_excluded = samples["id"].map(lambda name: tally.excludes(patterns, name)).astype(bool)
    if is_excluded.any():
        tally.leave_out(
            EXCLUDED_ENTRIES, *samples["id"][is_excluded].head(3), count=int(is_excluded.sum())
        )
    return samples[~is_excluded].reset_index(drop=True)


def _fill_pattern(frame: pd.DataFrame, pattern: str, table_path: Path) -> pd.Series:
    """Return the pattern with each row's values for `{column}`; missing where one of them is."""
    column_names = list(dict.fromkeys(_PLACE.findall(pattern)))
    absent_names = [name for name in column_names if name not in frame.columns]
    if absent_names or not column_names:
        raise SourceError(
            f"images.path_pattern {pattern!r}: {table_path} has no column "
            f"{', '.join(map(repr, absent_names)) or 'in braces'}. Expected a path with a column's "
            "name in braces, such as train/{id}.jpg. The columns are: "
            f"{', '.join(frame.columns)}."
        )
    column_texts = pd.DataFrame({name: as_text(frame[name]) for name in column_names})

    def fill(values: Mapping[Any, Any]) -> str:
        return _PLACE.sub(lambda place: str(values[place[1]]), pattern)

    filled_paths = pd.Series(
        [fill(row) for row in column_texts.to_dict("records")], index=frame.index, dtype=object
    )
    return filled_paths.where(column_texts.notna().all(axis=1), None)


def _cells(table_path: Path, frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """Return ids and locators of images in cells: named by their own paths where these differ."""
    kind = "arrow" if table_path.suffix.lower() == ".arrow" else "parquet"
    locators = pd.Series(
        [f"{encode_path(table_path)}::{kind}:{column}:{row}" for row in range(len(frame))],
        index=frame.index,
        dtype=object,
    )
    n_digits = len(str(max(0, len(frame) - 1)))
    sample_ids = pd.Series(
        [f"{table_path.name}/{row:0{n_digits}d}" for row in range(len(frame))],
        index=frame.index,
        dtype=object,
    )
    original_paths = frame.get(f"{column}.path")
    if (
        original_paths is not None
        and original_paths.notna().all()
        and not original_paths.duplicated().any()
    ):
        sample_ids = as_text(original_paths)
    return sample_ids, locators


def _find(image_root: str, written_path: str) -> str:
    """The path that a table's text means: an absolute path stays; on disk it may be in another
    Unicode form or of Windows.
    """
    if "://" in written_path[:12]:
        if not written_path.startswith("file://"):
            raise SourceError(
                f"{written_path}: images are read from disk. Download them, and name the files in "
                "the table"
            )
        written_path = written_path.removeprefix("file://")
    if (
        written_path.isascii()
        and "\\" not in written_path
        and "/." not in written_path
        and "//" not in written_path
        and written_path[:1] != "."
    ):
        # nearly all, and a table has millions
        return encode_path(os.path.join(image_root, written_path))
    path = Path(image_root, written_path)
    if written_path.isascii() and "\\" not in written_path:
        return encode_path(path)
    unicode_forms = [
        written_path,
        *(unicodedata.normalize(form, written_path) for form in ("NFC", "NFD")),
    ]
    candidates = [
        Path(image_root, form) for text in unicode_forms for form in (text, text.replace("\\", "/"))
    ]
    return encode_path(next((candidate for candidate in candidates if candidate.exists()), path))


def _refuse_reserved(
    frame: pd.DataFrame, table_path: Path, path_column: str | None, id_column: str | None
) -> None:
    """Refuse columns that headrace's own replace: a task would get the wrong values."""
    used_columns = {"id"} if "id" in (id_column, path_column) else set()
    used_columns |= {"path"} if "path" in (path_column, id_column) else set()
    for column_name in frame.columns:
        if column_name in RESERVED_COLUMNS - used_columns:
            other_way = {
                "id": ", or take the ids from it: images.id_column: id (in Python: id_column='id')",
                "path": (
                    f", or read the images from it: images.path_column: path (now: {path_column})"
                ),
            }.get(column_name, "")
            raise SourceError(
                f"{table_path}: the table has a column {column_name!r}, and headrace keeps "
                f"{_MEANINGS[column_name]} under this name. Rename the column, for example to "
                f"{'image' if column_name.startswith('_') else 'image_'}{column_name}{other_way}."
            )


def is_table(path: str | Path) -> bool:
    """Return whether a file's name is that of a table."""
    name = Path(path).name.lower().removesuffix(".gz")
    return Path(name).suffix in (TABLE_SUFFIXES | {".arrow"})


def metadata_table(folder: Path) -> Path | None:
    """The table that speaks for a folder of images: metadata.csv or .jsonl with a column file_name,
    as Hugging Face has it, the tables that Roboflow exports, or the lists of CUB-200.

    Where each side of a split has its own, a pattern that names them all; None where there is none.
    """
    if is_list_of_birds(folder / IMAGES):
        return folder / IMAGES
    with os.scandir(folder) as entries:  # which a million images would make slow through Path
        sub_folders = sorted(
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith(".")
            # a link may lead to itself, which Path knows for no folder
            and (Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir())
        )
    for name in (*HUGGING_FACE_METADATA, *_ROBOFLOW_TABLES):
        if _speaks_for_folder(folder / name):
            return folder / name
        if sub_folders and all(_speaks_for_folder(entry / name) for entry in sub_folders):
            return folder / "*" / name
    return None


def _speaks_for_folder(file: Path) -> bool:
    if not file.is_file() or file.name in _ROBOFLOW_TABLES:
        return file.is_file()
    try:
        return "file_name" in read_table_file(file).frame.columns
    except SourceError:
        return False
