"""Images that tables name or hold: one row per image."""

import glob
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.home import expand_home
from headrace.cache.text import as_text
from headrace.extract.errors import (
    SourceError,
    check_unique_ids,
    missing_path_message,
    nearest_names,
)
from headrace.extract.images.crops import Crop
from headrace.extract.images.locators import encode_path, locator_file, printable_name
from headrace.extract.sources.archive import RESERVED_COLUMNS
from headrace.extract.sources.birds import IMAGES, is_list_of_birds
from headrace.extract.sources.folder import UNMATCHED_NAMES, image_paths
from headrace.extract.sources.formats import TABLE_SUFFIXES, is_image
from headrace.extract.sources.image_column import are_files, find_image_column, spaced_texts
from headrace.extract.sources.label_studio import local_names
from headrace.extract.sources.layout import split_sides
from headrace.extract.sources.listing import Listing, Tally
from headrace.extract.sources.regions import Boxes, find_boxes
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import Table, read_table_file

_BOX_NAMES = frozenset(
    {"bbox", "box", "boxes", "bboxes", "bounding_box", "bounding_boxes"}
    | {"region_shape_attributes"}  # of the VGG Image Annotator
)
HUGGING_FACE_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ROBOFLOW_TABLES = ("_annotations.coco.json", "_classes.csv")
# What headrace keeps in the columns of RESERVED_COLUMNS.
_MEANINGS = {"path": "where the image is", "id": "what tells rows apart"} | dict.fromkeys(
    ("content", "_content"), "the hash of an image's bytes"
)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")  # a column in a path pattern
_COLUMN_AND_WIDTH = re.compile(r"(.*):0(\d{1,3})", re.DOTALL)


def read_tables(source: ImageSource, *, labelled: bool = True) -> Listing:
    """List the rows of tables, in their order: `id`, `path`, then every column of the tables.

    Its location is a CSV, TSV, JSON lines, JSON (COCO too), Parquet or Arrow file, a pattern
    (`data/train-*.parquet`), a folder of Parquet files, or one that `datasets` saved. Parquet and
    Arrow may hold the images themselves.
    labelled: True to train, when each row needs an id of its own. False to predict: then every row
    stays in its place, also one that is repeated or names no image.

    If the names of the tables or of their folders are the sides of a split, and no column `split`
    says otherwise, such a column has them. Whether an image's file exists is not checked here: a
    missing one becomes a recorded failure of its sample.

    Raises SourceError.
    """
    table_paths = table_files(source.path)
    tally = Tally()
    frames: list[pd.DataFrame] = []
    notes: list[str] = []
    # The sides of a split, by the tables' names or by those of their folders.
    sides: Sequence[str | None] = (
        split_sides([file.name for file in table_paths])
        or split_sides([file.parent.name for file in table_paths])
        or [None] * len(table_paths)
    )
    for table_path, side in zip(table_paths, sides, strict=True):
        has_boxes = isinstance(source.boxes, Boxes)
        table_contents = read_table_file(table_path, annotations=has_boxes)
        notes += table_contents.notes
        samples = _samples(table_path, table_contents, source, tally, notes, labelled)
        if side is not None and "split" not in samples:
            samples["split"] = side
        frames.append(samples)
    if side_names := ", ".join(dict.fromkeys(filter(None, sides))):
        notes.append(f"the names {side_names} are those of the sides of a split")
    source_text = str(table_paths[0])
    if len(table_paths) > 1:
        source_text = f"{len(table_paths)} tables ({source_text}, …)"
        if labelled and pd.concat([frame["id"] for frame in frames]).duplicated().any():
            # Ids that are unique only within a table get the table's name in front.
            common_folder = os.path.commonpath([table_path.parent for table_path in table_paths])
            for table_path, frame in zip(table_paths, frames, strict=True):
                name = table_path.relative_to(common_folder).as_posix()
                frame["id"] = f"{name}/" + frame["id"].astype(str)
    samples = pd.concat(frames, ignore_index=True)
    _count_unnamed(table_paths, samples, tally)
    samples = tally.exclude_rows(samples, source.exclude)
    if samples.empty:
        left_out_text = "; ".join(map(str, tally.left_out()))
        usable = f" that can be used ({left_out_text})" if left_out_text else ""
        raise SourceError(
            f"{source_text}: the table has no rows{usable}. Expected one row per image."
        )
    if labelled:
        check_unique_ids(samples["id"], source_text)
    return tally.listing(samples, dict.fromkeys(notes))


def _count_unnamed(table_paths: Sequence[Path], samples: pd.DataFrame, tally: Tally) -> None:
    """Count the images in the folder of a Hugging Face metadata file that it does not name."""
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
    """Return the absolute paths of the files of a table: itself, those in a folder, or those that
    match a pattern.

    Raises SourceError when there are none.
    """
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
    """Return the Arrow files of a folder that `datasets` saved (save_to_disk), in order; [] for
    other folders.

    Raises SourceError for such a folder that is damaged, or selects rows by a second file.
    """
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{folder}: not a whole folder of `datasets` ({type(error).__name__}: {error}). Save "
            "it again"
        ) from error
    return []


def _samples(
    table_path: Path,
    table: Table,
    source: ImageSource,
    tally: Tally,
    notes: list[str],
    labelled: bool,
) -> pd.DataFrame:
    """Return the usable rows of one table; counts and notes are added to `tally` and `notes`."""
    frame = table.frame
    if frame.empty and not table.image_columns:
        return pd.DataFrame(columns=["id", "path"], dtype=object)
    _require_columns(table_path, [*frame.columns, *table.image_columns], source)
    root = table_path.parent if source.root is None else source.root
    image_root = expand_home(root).absolute()
    image_column, is_pattern = _image_column(table, table_path, image_root, source, notes)
    if is_pattern and "*" in image_column.rpartition("/")[2]:
        frame, written_names = _rows_of_folders(frame, image_column, table_path, image_root)
        locators = written_names.map(lambda name: _find(str(image_root), name), na_action="ignore")
    else:
        written_names, locators = _image_names(
            table, table_path, image_root, image_column, is_pattern
        )
    tally.found += len(frame)
    boxes = find_boxes(frame, source.boxes, table_path)
    if boxes is not None:
        crops, box_note = boxes
        notes.append(box_note)
        if "image" not in frame:
            frame = frame.assign(image=written_names)
        has_box = pd.Series([crop is not None for crop in crops], index=frame.index)
        names, locators = _crop_names(written_names, locators, crops)
        if labelled:
            tally.leave_out_rows("rows without a box", written_names, ~has_box)
            frame, names, locators = frame[has_box], names[has_box], locators[has_box]
        written_names = names
    elif source.boxes == "auto":
        notes += [
            f"{table_path.name}: the column {name!r} may hold boxes, and is not read: whole images "
            "are. For boxes: four columns of numbers (images.boxes)"
            for name in frame.columns
            if str(name).lower() in _BOX_NAMES
        ]
    id_column = source.id_column
    if id_column is None and "id" in frame.columns and image_column != "id":
        if labelled and _ids_repeat(frame["id"], locators):
            # The samples' own column `id` must be unique, and this one is not.
            frame = frame.rename(columns={"id": "image_id"})
            note = "repeats, so that the paths tell the rows apart; it is called 'image_id' here"
        else:
            id_column, note = "id", "tells the rows apart (images.id_column)"
        notes.append(f"{table_path.name}: the column 'id' {note}")
    _refuse_reserved(frame, table_path, image_column, id_column)
    sample_ids = written_names if id_column is None else as_text(frame[id_column])
    if not labelled:
        # Rows without an image keep their place, under a path that does not exist: a failure.
        row_numbers = pd.Series(range(1, len(frame) + 1), index=frame.index)
        placeholders = "row " + row_numbers.astype(str) + " names no image"
        sample_ids = sample_ids.fillna(written_names).fillna(placeholders)
        locators = locators.fillna(f"{image_root}/" + placeholders)
    samples = pd.DataFrame({"id": sample_ids, "path": locators}, dtype=object)
    replaced_columns = ["id", "path", f"{image_column}.path"]
    samples = samples.join(frame.drop(columns=replaced_columns, errors="ignore"))
    has_metadata_split = table_path.name in HUGGING_FACE_METADATA and "split" not in samples
    # Hugging Face puts one metadata file above the folders of a split.
    if has_metadata_split and written_names.notna().all():
        first_folders = written_names.map(lambda name: name.rpartition("/")[0].split("/")[0])
        if (sides := split_sides(first_folders.tolist())) is not None:
            samples["split"] = sides
            notes.append(
                f"{table_path.name}: the first folders of the paths are the sides of a split"
            )
    if source.name_pattern is not None:
        samples = _with_names(samples, written_names, source.name_pattern, tally)
    return _leave_out(samples, table_path, tally, repeated=not labelled)


def _with_names(
    samples: pd.DataFrame, written_names: pd.Series, name_pattern: str, tally: Tally
) -> pd.DataFrame:
    """Return the samples with the named groups of a pattern in their paths as columns; rows that
    it does not match are left out and counted.
    """
    matches = written_names.astype(str).map(re.compile(name_pattern).search)
    is_match = matches.notna() | written_names.isna()
    tally.leave_out_rows(UNMATCHED_NAMES, written_names, ~is_match)
    columns = {
        name: matches.map(lambda match, name=name: match[name], na_action="ignore")
        for name in re.compile(name_pattern).groupindex
    }
    return samples.assign(**columns)[is_match]


def _image_names(
    table: Table, table_path: Path, image_root: Path, image_column: str, is_pattern: bool
) -> tuple[pd.Series, pd.Series]:
    """Return the images' names as the table writes them, and their paths or locators."""
    frame = table.frame
    if image_column in table.image_columns:
        return _cells(table_path, frame, image_column)
    if is_pattern:
        names = _fill_pattern(frame, image_column, table_path)
        names = _in_folders(names, image_column, image_root)
    else:
        names = _below_root(local_names(as_text(frame[image_column]), image_root), image_root)
    return names, names.map(lambda name: _find(str(image_root), name), na_action="ignore")


def _below_root(names: pd.Series, image_root: Path) -> pd.Series:
    """Return the names without a slash at their beginning, where the files are below the root and
    not there (Places365: `/a/airfield/1.jpg`).
    """
    examples = spaced_texts(names)
    from_root = examples[examples.str.startswith("/")].str.lstrip("/")
    if from_root.empty or are_files(image_root, examples) or not are_files(image_root, from_root):
        return names
    return names.str.lstrip("/")


def _ids_repeat(ids: pd.Series, locators: pd.Series) -> bool:
    """Return whether rows of different images have the same id."""
    id_and_path = pd.DataFrame({"id": as_text(ids), "path": locators}).dropna().drop_duplicates()
    return bool(id_and_path["id"].duplicated().any())


def _require_columns(table_path: Path, columns: Sequence[str], source: ImageSource) -> None:
    """Raise SourceError for a column of the options that the table does not have."""
    for column_name, setting in (
        (source.path_column, "path_column"),
        (source.id_column, "id_column"),
    ):
        if column_name is not None and column_name not in columns:
            raise SourceError(
                f"{table_path}: there is no column {column_name!r} ({setting}). Nearest: "
                f"{nearest_names(column_name, columns, 1)}. The columns are: {', '.join(columns)}."
            )


def _crop_names(
    written_names: pd.Series, locators: pd.Series, crops: Sequence[Crop | None]
) -> tuple[pd.Series, pd.Series]:
    """Return the ids and locators of boxes; those of rows without a box, or an image, stay."""
    names = [
        name if crop is None or pd.isna(name) else f"{name}#{crop}"
        for name, crop in zip(written_names, crops, strict=True)
    ]
    paths = [
        path if crop is None or pd.isna(path) else crop.locator(path)
        for path, crop in zip(locators, crops, strict=True)
    ]
    index = locators.index
    return pd.Series(names, index, dtype=object), pd.Series(paths, index, dtype=object)


def _image_column(
    table: Table, table_path: Path, image_root: Path, source: ImageSource, notes: list[str]
) -> tuple[str, bool]:
    """Return (path pattern, True) or (image column, False), of the options or found."""
    if source.path_pattern is not None:
        return source.path_pattern, True
    if source.path_column is not None:
        return source.path_column, False
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
    """Return the rows with an image and an id, and count the others.

    repeated: whether a row that is equal to an earlier one stays.
    """
    for reason, column in (("rows that name no image", "path"), ("rows without an id", "id")):
        is_missing = samples[column].isna()
        if is_missing.any():
            row_names = [
                f"{table_path.name}, row {row + 1}" for row in samples.index[is_missing][:3]
            ]
            tally.leave_out(reason, *row_names, count=int(is_missing.sum()))
            samples = samples[~is_missing]
    if not repeated:
        try:
            is_duplicate = samples.duplicated()
        except TypeError:  # cells of lists
            is_duplicate = samples.astype(str).duplicated()
        tally.leave_out_rows("rows that are another row once more", samples["id"], is_duplicate)
        samples = samples[~is_duplicate]
    return samples.reset_index(drop=True)


def _fill_pattern(frame: pd.DataFrame, pattern: str, table_path: Path) -> pd.Series:
    """Return the pattern filled with each row's values; missing where one of them is missing.

    `{id:05}` fills a value with zeros, which spreadsheets take away, to five characters.
    """
    first, *rest = _PLACEHOLDER.split(pattern)  # text, placeholder, text, placeholder, text …
    columns: list[tuple[str, int]] = []
    for placeholder in rest[::2]:
        # A column may itself have a name like `at:05`.
        has_width = placeholder not in frame.columns and _COLUMN_AND_WIDTH.fullmatch(placeholder)
        columns.append((has_width[1], int(has_width[2])) if has_width else (placeholder, 0))
    absent_names = [name for name, _ in dict.fromkeys(columns) if name not in frame.columns]
    if absent_names or not rest:
        raise SourceError(
            f"images.path_pattern {pattern!r}: {table_path} has no column "
            f"{', '.join(map(repr, absent_names)) or 'in braces'}. Expected a path with a column's "
            "name in braces, such as train/{id}.jpg. The columns are: "
            f"{', '.join(frame.columns)}."
        )
    # As objects: names of files that are no UTF-8 hold surrogates, which Arrow's text cannot.
    filled_paths = pd.Series(first, index=frame.index, dtype=object)
    for (column_name, width), text in zip(columns, rest[1::2], strict=True):
        filled_texts = as_text(frame[column_name]).str.zfill(width)
        filled_paths = filled_paths + filled_texts.astype(object) + text
    return filled_paths


def _rows_of_folders(
    frame: pd.DataFrame, pattern: str, table_path: Path, image_root: Path
) -> tuple[pd.DataFrame, pd.Series]:
    """Return a row for each image that a row's pattern fits, and their names; a row without one has
    no name. A column `path` or `id` of folders is called `folder`.
    """
    filled_paths = _fill_pattern(frame, pattern, table_path)
    names_of_row: list[list[str | None]] = []
    for filled_path in filled_paths:
        # `*` alone is special: ids may have brackets.
        path_glob = "" if pd.isna(filled_path) else glob.escape(filled_path).replace("[*]", "*")
        files = sorted(glob.glob(path_glob.replace("//", "/"), root_dir=image_root))
        names_of_row.append([name for name in files if is_image(image_root / name)] or [None])
    expanded = frame.loc[frame.index.repeat(list(map(len, names_of_row)))].reset_index(drop=True)
    expanded = expanded.rename(
        columns={
            name: "folder"
            for name in ("path", "id")
            if f"{{{name}}}/" in pattern and "folder" not in expanded
        }
    )
    names = [name for names in names_of_row for name in names]
    return expanded, pd.Series(names, index=expanded.index, dtype=object)


def _in_folders(filled_paths: pd.Series, pattern: str, image_root: Path) -> pd.Series:
    """Return the paths of a pattern whose folder has `*`, each in the folder that has its file.

    A path without a file stays. Raises SourceError for files that several of the folders have.
    """
    folder_pattern, _, _ = pattern.rpartition("/")
    if "*" not in folder_pattern or "{" in folder_pattern or filled_paths.isna().all():
        return filled_paths
    folders_of_name: dict[str, list[str]] = {}
    # `*` alone is special: the names of folders may have brackets.
    folder_glob = glob.escape(folder_pattern).replace("[*]", "*")
    if not os.path.isabs(folder_pattern):
        folder_glob = f"{glob.escape(str(image_root))}/{folder_glob}"
    # Each folder is listed once, because a look for every row in every folder takes long.
    for folder in sorted(glob.glob(f"{folder_glob}/")):
        for name in os.listdir(folder):
            folders_of_name.setdefault(name, []).append(os.path.relpath(folder, image_root))
    start = len(folder_pattern) + 1
    names = filled_paths.map(lambda path: path[start:], na_action="ignore")
    folders = names.map(
        lambda name: folders_of_name.get(name, [folder_pattern]), na_action="ignore"
    )
    is_ambiguous = folders.str.len() > 1
    if is_ambiguous.any():
        raise SourceError(
            f"images.path_pattern {pattern!r}: "
            f"{count_text(int(is_ambiguous.sum()), 'file lies', 'files lie')} in several of its "
            f"folders, such as {names[is_ambiguous].iloc[0]} in "
            f"{' and '.join(folders[is_ambiguous].iloc[0][:2])}. Name the folders more closely"
        )
    return folders.str[0] + "/" + names


def _cells(table_path: Path, frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """Return ids and locators of the images in a column of a Parquet or Arrow file.

    The ids are the paths stored beside the images if these are unique, else the rows' numbers.
    """
    kind = "arrow" if table_path.suffix.lower() == ".arrow" else "parquet"
    locators = pd.Series(
        [f"{encode_path(table_path)}::{kind}:{column}:{row}" for row in range(len(frame))],
        index=frame.index,
        dtype=object,
    )
    original_paths = frame.get(f"{column}.path")
    if original_paths is not None and original_paths.notna().all() and original_paths.is_unique:
        return as_text(original_paths), locators
    n_digits = len(str(len(frame) - 1))
    names = [f"{table_path.name}/{row:0{n_digits}d}" for row in range(len(frame))]
    return pd.Series(names, index=frame.index, dtype=object), locators


def _find(image_root: str, written_path: str) -> str:
    """Return the path of a sample (`encode_path`) for a path as a table writes it.

    An absolute path stays.
    """
    if "://" in written_path[:12]:
        if not written_path.startswith("file://"):
            raise SourceError(
                f"{written_path}: images are read from disk. Download them, and name the files in "
                "the table"
            )
        written_path = written_path.removeprefix("file://")
    has_one_form = written_path.isascii() and "\\" not in written_path
    # Nearly all paths are so plain that Path would not change them, and a table has millions.
    if has_one_form and written_path[:1] != "." and not re.search(r"/[./]", written_path):
        return encode_path(os.path.join(image_root, written_path))
    path = Path(image_root, written_path)
    if has_one_form:
        return encode_path(path)
    # Another system may have written it: macOS writes é as e and an accent, Windows backslashes.
    composed, decomposed = (unicodedata.normalize(form, written_path) for form in ("NFC", "NFD"))
    candidates = (
        Path(image_root, form)
        for text in (written_path, composed, decomposed)
        for form in (text, text.replace("\\", "/"))
    )
    return encode_path(next((candidate for candidate in candidates if candidate.exists()), path))


def _refuse_reserved(
    frame: pd.DataFrame, table_path: Path, path_column: str | None, id_column: str | None
) -> None:
    """Raise SourceError for columns named as those of the samples, which would replace them."""
    # A pattern of paths such as `images/{path}` reads the images from the column, too.
    in_pattern = {name for name in ("id", "path") if f"{{{name}}}" in (path_column or "")}
    for column_name in frame.columns:
        allowed = ({"id", "path"} & {id_column, path_column}) | in_pattern
        if column_name in RESERVED_COLUMNS - allowed:
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
    """Return the table that lists the images of its folder: Hugging Face's metadata.csv, .jsonl or
    .parquet with a column file_name, the tables that Roboflow exports, or the lists of CUB-200.

    If each sub-folder (the sides of a split) has its own, a pattern that matches them all; None if
    there is no such table.
    """
    if is_list_of_birds(folder / IMAGES):
        return folder / IMAGES
    # Not Path.iterdir, which is slow for a folder of a million images.
    with os.scandir(folder) as entries:
        sub_folders = sorted(
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith(".")
            # Path, because `entry.is_dir` raises an error for a link that leads to itself.
            and (Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir())
        )
    for name in (*HUGGING_FACE_METADATA, *_ROBOFLOW_TABLES):
        if _lists_its_folder(folder / name):
            return folder / name
        if sub_folders and all(_lists_its_folder(entry / name) for entry in sub_folders):
            return folder / "*" / name
    return None


def _lists_its_folder(file: Path) -> bool:
    """Return whether a file is a table of the images in its folder."""
    if not file.is_file() or file.name in _ROBOFLOW_TABLES:
        return file.is_file()
    try:
        return "file_name" in read_table_file(file).frame.columns
    except SourceError:
        return False
