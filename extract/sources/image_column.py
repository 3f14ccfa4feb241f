"""The column of a table that names or holds its images, found by its values."""

import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from headrace.cache.text import as_text
from headrace.extract.errors import SourceError
from headrace.extract.sources.formats import IMAGE_SUFFIXES, OTHER_FORMATS
from headrace.extract.sources.table import Table

# Usual names of the column that names the image, the likeliest first; `file_name` is Hugging Face's
# and COCO's.
PATH_NAMES = (
    *("path", "file_name", "filename", "filepath", "file_path", "image_path"),
    *("image", "file", "img", "img_path"),
)
_CELLS_LOOKED_AT = 100  # of a column, to tell what it holds
_DEEPEST_FOLDER = 3  # levels below the folder in which images that ids name are looked for


def find_image_column(table: Table, table_path: Path, image_root: Path) -> tuple[str, bool]:
    """Find the column of a table that names or holds its images.

    Return (the column, False), or (a pattern of paths such as `train/{id}.jpg`, True) for ids
    without a suffix, which are looked for among the images below `image_root`. A column with one of
    PATH_NAMES and paths in it comes first, then one with paths or images in it.

    Raises SourceError when no column fits, or several could be the images.
    """
    frame, image_columns = table.frame, table.image_columns
    named_columns = [
        str(column_name)
        for path_name in PATH_NAMES
        for column_name in (*frame.columns, *image_columns)
        if str(column_name).lower() == path_name
    ]
    # A usual name needs one path among its values; other columns must hold nothing but paths.
    for column_name in named_columns:
        if column_name in image_columns or _names_images(frame[column_name], any):
            return column_name, False
    path_columns = [
        str(column_name) for column_name in frame.columns if _names_images(frame[column_name], all)
    ]
    candidates = [*image_columns, *path_columns]
    if len(candidates) == 1 and not named_columns:
        return candidates[0], False
    if (pattern := _find_pattern(frame, table_path, image_root)) is not None:
        return pattern, True
    if len(named_columns) == 1 and not candidates:
        return named_columns[0], False
    column_list = ", ".join([*frame.columns, *image_columns])
    if named_columns or candidates:
        possible_columns = list(dict.fromkeys([*named_columns, *candidates]))
        raise SourceError(
            f"{table_path}: {', '.join(possible_columns)} could "
            f"{'each be' if len(possible_columns) > 1 else 'be'} the images; name one: "
            f"images.path_column: {possible_columns[0]}. The columns are: {column_list}."
        )
    if len(frame.columns) == 1 and frame.iloc[:, 0].astype(str).str.contains(r"\S\s+\S").all():
        raise SourceError(
            f"{table_path}: one column only, {column_list!r}: the columns seem to be separated by "
            "blanks. Save it as CSV, with names in its first line: "
            f"{_with_commas(table_path, column_list)}"
        )
    example = frame.columns[0] if len(frame.columns) else "id"
    raise SourceError(
        f"{table_path}: no column names image files. Name it: images.path_column; or, for ids "
        "without an ending, say where their images are: images.path_pattern: "
        f"folder/{{{example}}}.jpg. The columns are: {column_list}."
    )


def _with_commas(table_path: Path, first_line: str) -> str:
    """Return the shell command that writes a table with blanks as CSV."""
    is_compressed = table_path.suffix.lower() == ".gz"
    # Under a name that is free: the shell empties an existing file, the table itself included,
    # before the command reads anything.
    stem = (table_path.with_suffix("") if is_compressed else table_path).stem
    new_names = itertools.chain([f"{stem}.csv"], (f"{stem}-{n}.csv" for n in itertools.count(2)))
    new_paths = (table_path.with_name(name) for name in new_names)
    new_path = next(path for path in new_paths if not os.path.lexists(path))
    old_text, new_text = shlex.quote(str(table_path)), shlex.quote(str(new_path))
    commas = f"tr -s ' ' , < {old_text}"
    if is_compressed:
        commas = f"gzip -dc {old_text} | tr -s ' ' ,"
    # A first line that names an image is a row, so the line of column names is added.
    if any(Path(word).suffix.lower() in IMAGE_SUFFIXES for word in first_line.split()):
        commas = f"(echo path,label; {commas})"
    return f"{commas} > {new_text}"


def _find_pattern(frame: pd.DataFrame, table_path: Path, folder: Path) -> str | None:
    """Return the pattern by which a column of ids names images below a folder, or None.

    Tables of Kaggle's contests have such ids. Raises SourceError when several patterns fit:
    `images/{id}.jpg` and `masks/{id}.png`.
    """
    # {stem of an image: patterns that would name it}
    patterns_by_stem: dict[str, list[str]] = {}
    for parent_folder, folders, file_names in os.walk(folder):
        parent_parts = Path(parent_folder).relative_to(folder).parts
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and len(parent_parts) < _DEEPEST_FOLDER
        )
        for name in sorted(file_names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                patterns_by_stem.setdefault(stem, []).append(
                    "/".join((*parent_parts, "{}" + suffix))
                )
    # Each row names an image of its own: a column of classes, whose values repeat, cannot.
    for column_name in sorted(frame.columns, key=lambda name: name != "id"):
        ids = as_text(frame[column_name]).dropna()
        if ids.duplicated().any() or any(letter in str(column_name) for letter in "{}"):
            continue
        ids = ids.head(_CELLS_LOOKED_AT)
        pattern_counts = Counter(
            pattern for value in ids for pattern in patterns_by_stem.get(value, ())
        )
        fitting_patterns = [
            pattern.replace("{}", f"{{{column_name}}}")
            for pattern, count in pattern_counts.items()
            # Half of the ids are enough: images may be missing, or lie in several folders.
            if 2 * count >= len(ids)
        ]
        if len(fitting_patterns) > 1:
            raise SourceError(
                f"{table_path}: the column {column_name!r} could name the images "
                f"{' or '.join(fitting_patterns)}. Say which: images.path_pattern: "
                f"{fitting_patterns[0]}"
            )
        if fitting_patterns:
            return fitting_patterns[0]
    return None


def _names_images(column: pd.Series, enough: Callable[[Iterable[bool]], bool]) -> bool:
    """Return whether a column names image files, also of formats that are not read here.

    enough: `any` or `all`, of its values.
    """
    values = column.dropna().head(_CELLS_LOOKED_AT)
    suffixes = [Path(value).suffix.lower() if isinstance(value, str) else "" for value in values]
    return bool(suffixes) and enough(
        suffix in IMAGE_SUFFIXES or suffix in OTHER_FORMATS for suffix in suffixes
    )
