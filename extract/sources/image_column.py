"""The column of a table that names or holds its images, found by its values."""

import itertools
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from headrace.cache.text import as_text
from headrace.extract.errors import SourceError
from headrace.extract.sources.formats import IMAGE_SUFFIXES, OTHER_FORMATS, is_archive
from headrace.extract.sources.listing import is_image_folder, is_mask_folder
from headrace.extract.sources.table import Table

# Usual names of the column that names the image, the likeliest first; `file_name` is Hugging Face's
# and COCO's.
PATH_NAMES = (
    *("path", "file_name", "filename", "filepath", "file_path", "image_path"),
    *("image", "file", "img", "img_path"),
)
_CELLS_LOOKED_AT = 100  # of a column, to tell what it holds
_MAX_NAMED = 20  # columns in a message; the others are counted
_BASE64_STARTS = {"/9j/": ".jpg", "iVBOR": ".png", "R0lGOD": ".gif", "UklGR": ".webp"}
_MIN_BASE64 = 60  # characters of an image: shorter texts may begin so by chance
_MIN_EDGE = 8  # pixels, of images whose pixels are the cells of a table
_MAX_FOLDER_DEPTH = 5  # levels below the folder in which images that ids name are looked for


def find_image_column(table: Table, table_path: Path, image_root: Path) -> tuple[str, bool]:
    """Find the column of a table that names or holds its images.

    Return (the column, False), or (a pattern of paths such as `train/{id}.jpg`, True) for ids
    without a suffix, and for names whose folder they do not say, which are looked for among the
    images below `image_root`. A column with one of PATH_NAMES and paths in it comes first, then one
    with paths or images in it; of several, one whose files are there.

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
    named_paths = [
        column_name
        for column_name in named_columns
        if column_name in image_columns or _names_images(frame[column_name], any)
    ]
    path_columns = [
        str(column_name) for column_name in frame.columns if _names_images(frame[column_name], all)
    ]
    candidates = [*image_columns, *path_columns]
    likely_columns = named_paths or (
        candidates if len(candidates) == 1 and not named_columns else []
    )
    for column_name in likely_columns:
        if column_name in image_columns or are_files(image_root, spaced_texts(frame[column_name])):
            return column_name, False
    for column_name in likely_columns:
        if (pattern := _folder_column(frame, column_name, image_root)) is not None:
            return pattern, True
    if (pattern := _find_pattern(frame, table_path, image_root, likely_columns)) is not None:
        return pattern, True
    if not likely_columns and (pattern := _find_folders(frame, image_root)) is not None:
        return pattern, True
    if likely_columns:
        return likely_columns[0], False
    if (
        len(named_columns) == 1
        and not candidates
        and _base64_command(frame[named_columns], table_path) is None
    ):
        return named_columns[0], False
    column_names = [*map(str, frame.columns), *image_columns]
    column_list = ", ".join(column_names[:_MAX_NAMED])
    if len(column_names) > _MAX_NAMED:
        column_list += f" and {len(column_names) - _MAX_NAMED:,} more"
    if (command := _base64_command(frame, table_path)) is not None:
        raise SourceError(f"{table_path}: its cells are images in base64. {command}")
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
            f"{_csv_command(table_path, column_list)}"
        )
    if (pixels := _pixels_command(frame, table_path)) is not None:
        raise SourceError(f"{table_path}: its cells are the pixels of images. {pixels}")
    example = next((name for name in frame.columns if "Unnamed" not in str(name)), "id")
    archives = sorted(path.name for path in image_root.glob("*") if is_archive(path))
    if archives:  # as Kaggle hands out its contests
        unpack = "unzip" if archives[0].lower().endswith(".zip") else "tar -xf"
        raise SourceError(
            f"{table_path}: no column names image files that are there. If they are in "
            f"{archives[0]}, unpack it beside the table: cd {shlex.quote(str(image_root))} && "
            f"{unpack} {shlex.quote(archives[0])}. The columns are: {column_list}."
        )
    raise SourceError(
        f"{table_path}: no column names image files. Name it: images.path_column; or, for ids "
        "without an ending, say where their images are: images.path_pattern: "
        f"folder/{{{example}}}.jpg (several columns may be in it, each in braces). The columns "
        f"are: {column_list}."
    )


def _base64_command(frame: pd.DataFrame, table_path: Path) -> str | None:
    """Return how to write the images that a column of a CSV holds as base64; None for others."""
    for name in frame.columns:
        cell = next(iter(as_text(frame[name]).dropna()), "")
        code = cell.rpartition(",")[2]  # after data:image/png;base64,
        suffix = next((end for start, end in _BASE64_STARTS.items() if code.startswith(start)), "")
        if not suffix or len(code) < _MIN_BASE64:
            continue
        new_path = table_path.with_name(f"{table_path.stem}-images.csv")
        script = (
            f"import pandas as p, base64 as b, pathlib; t = p.read_csv({str(table_path)!r}, "
            f"dtype=str); d = pathlib.Path({str(table_path.with_suffix(''))!r}); d.mkdir(); "
            f"t['path'] = [str(d / f'{{n}}{suffix}') for n in range(len(t))]; "
            "[pathlib.Path(f).write_bytes(b.b64decode(c.split(',')[-1])) for f, c in "
            f"zip(t['path'], t[{name!r}])]; "
            f"t.drop(columns=[{name!r}]).to_csv({str(new_path)!r}, index=False)"
        )
        return (
            f'To write them as files: `python -c "{script}"`, then headrace init '
            f"{shlex.quote(str(new_path))}"
        )
    return None


def _pixels_command(frame: pd.DataFrame, table_path: Path) -> str | None:
    """Return how to make an array of a table with a column for each pixel (MNIST at Kaggle), or
    with all pixels in a cell (FER2013); None for other tables.
    """
    if frame.empty:
        return None
    first_row = frame.iloc[0].astype(str)
    label = next((name for name in first_row.index if name.lower() == "label"), frame.columns[0])
    pixels = first_row.drop(label)
    array = f"t.drop(columns=[{label!r}]).to_numpy('uint8')"
    in_one_cell = pixels[pixels.str.fullmatch(r"\d+( \d+)+")]
    other_columns = ""
    if len(in_one_cell):
        array = f"n.array([c.split() for c in t[{in_one_cell.index[0]!r}]]).astype('uint8')"
        other_columns = "".join(
            f", {name}=n.array(t[{name!r}], 'U')"
            for name in pixels.index.drop(in_one_cell.index[0])
            if str(name).isidentifier()
        )
        pixels = pd.Series(in_one_cell.iloc[0].split(" "))
    if not pixels.str.fullmatch(r"\d{1,3}").all():
        return None
    n_values = len(pixels)
    n_channels = 3 if n_values % 3 == 0 and math.isqrt(n_values // 3) ** 2 * 3 == n_values else 1
    edge = math.isqrt(n_values // n_channels)
    if edge < _MIN_EDGE or edge * edge * n_channels != n_values:
        return None
    shape = f"-1, {edge}, {edge}" + (", 3" if n_channels == 3 else "")
    new_path = table_path.with_suffix(".npz")
    script = (
        f"import pandas as p, numpy as n; t = p.read_csv({str(table_path)!r}); "
        f"n.savez({str(new_path)!r}, images={array}.reshape({shape}), labels=t[{label!r}]"
        f"{other_columns})"
    )
    return (
        f'To make an array of them: python -c "{script}", and then headrace init '
        f"{shlex.quote(str(new_path))}"
    )


def _csv_command(table_path: Path, first_line: str) -> str:
    """Return the shell command that writes a table with blanks as CSV."""
    is_compressed = table_path.suffix.lower() == ".gz"
    # Under a name that is free: the shell empties an existing file, the table itself included,
    # before the command reads anything.
    stem = (table_path.with_suffix("") if is_compressed else table_path).stem
    new_names = itertools.chain([f"{stem}.csv"], (f"{stem}-{n}.csv" for n in itertools.count(2)))
    new_paths = (table_path.with_name(name) for name in new_names)
    new_path = next(path for path in new_paths if not os.path.lexists(path))
    old_text, new_text = shlex.quote(str(table_path)), shlex.quote(str(new_path))
    command = f"tr -s ' ' , < {old_text}"
    if is_compressed:
        command = f"gzip -dc {old_text} | tr -s ' ' ,"
    # A first line with an image or a number is a row, so the line of column names is added.
    words = first_line.split()
    is_image = [Path(word).suffix.lower() in IMAGE_SUFFIXES for word in words]
    if any(is_image) or any(word.lstrip("-").isdecimal() for word in words[1:]):
        names = ["path" if image else "label" for image in is_image]
        names[0] = names[0] if any(is_image) else "id"
        names = [name if name not in names[:n] else f"{name}{n}" for n, name in enumerate(names)]
        command = f"(echo {','.join(names)}; {command})"
    return f"{command} > {new_text}"


def _folder_column(frame: pd.DataFrame, name_column: str, image_root: Path) -> str | None:
    """Return the pattern `{FOLDER}/{NAME}` if another column has the folders in which the files of
    `name_column` lie (Timelapse's RelativePath), or None.
    """
    names = spaced_texts(frame[name_column])
    for folder_column in frame.columns:
        folders = as_text(frame[folder_column])[names.index].str.replace("\\", "/")
        if folder_column != name_column and are_files(image_root, folders + "/" + names):
            return f"{{{folder_column}}}/{{{name_column}}}"
    return None


def _find_pattern(
    frame: pd.DataFrame, table_path: Path, folder: Path, name_columns: Sequence[str]
) -> str | None:
    """Return the pattern by which a column of ids, or of names, finds images below a folder, or
    None.

    Tables of Kaggle's contests have such ids. Where the images lie in several folders
    (`images_001`, `images_002`), the pattern has `*` for what differs. name_columns: those that
    name files; the others are tried as ids without a suffix.

    Raises SourceError when several patterns fit: `images/{id}.jpg` and `masks/{id}.png`.
    """
    # Names that say their folders are found there or nowhere: no walk through all of a disk.
    if name_columns and all(
        spaced_texts(frame[name]).str.contains("/").all() for name in name_columns
    ):
        return None
    pattern = _fitting_pattern(frame, table_path, _patterns_below(folder), name_columns)
    if pattern is not None and not _in_mask_folder(pattern):
        return pattern
    # Lists lie beside the folder of the images, too: `annotations/list.csv` and `images/1.jpg`.
    siblings = [path for path in folder.absolute().parent.glob("*/") if is_image_folder(path.name)]
    for sibling in siblings:
        if sibling != folder.absolute():
            patterns_by_text = _patterns_below(sibling, ("..", sibling.name))
            found = _fitting_pattern(frame, table_path, patterns_by_text, name_columns)
            if found is not None:
                return found
    return pattern


def _find_folders(frame: pd.DataFrame, image_root: Path) -> str | None:
    """Return the pattern `{FOLDERS}/{COLUMN}/*` if a column names folders of images, one in each
    row, such as those of slides or patients; or None.
    """
    folders = {parts for found in _patterns_below(image_root).values() for parts, _ in found}
    prefixes_by_name: dict[str, set[tuple[str, ...]]] = {}
    for parts in filter(None, folders):
        prefixes_by_name.setdefault(parts[-1], set()).add(parts[:-1])
    for column_name in frame.columns:
        ids = as_text(frame[column_name]).dropna()
        if len(ids) < 2 or ids.duplicated().any() or any(s in str(column_name) for s in "{}"):
            continue
        paths = spaced_texts(ids[ids.str.contains("/")])
        # Paths may begin with the root's own folder.
        for prefix in ("", "../"):
            if any(os.path.isdir(os.path.join(image_root, prefix + path)) for path in paths):
                return f"{prefix}{{{column_name}}}/*"
        counts = Counter(
            place for name in ids for place in prefixes_by_name.get(name.rstrip("/"), ())
        )
        most = max(counts.values(), default=0)
        best = [place for place, count in counts.items() if count == most]
        if 2 * most >= len(ids) and len(best) == 1:
            return "/".join((*best[0], f"{{{column_name}}}", "*"))
    return None


# {stem or name of an image: (folders, file name pattern) that would name it}
_PatternsByText = dict[str, list[tuple[tuple[str, ...], str]]]


def _patterns_below(folder: Path, prefix: tuple[str, ...] = ()) -> _PatternsByText:
    """Return the patterns of paths of the images below a folder; `prefix` begins each path."""
    patterns_by_text: _PatternsByText = {}
    for parent_folder, folders, file_names in os.walk(folder):
        inner_parts = Path(parent_folder).relative_to(folder).parts
        parent_parts = (*prefix, *inner_parts)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and len(inner_parts) < _MAX_FOLDER_DEPTH
        )
        for name in sorted(file_names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                patterns_by_text.setdefault(stem, []).append((parent_parts, "{}" + suffix))
                patterns_by_text.setdefault(name, []).append((parent_parts, "{}"))
    return patterns_by_text


def _in_mask_folder(pattern: str) -> bool:
    return any(map(is_mask_folder, pattern.split("/")[:-1]))


def _fitting_pattern(
    frame: pd.DataFrame,
    table_path: Path,
    patterns_by_text: _PatternsByText,
    name_columns: Sequence[str],
) -> str | None:
    """Return the pattern by which a column names the most images, or None.

    Raises SourceError when several patterns fit.
    """
    # The column `id` first. Each row names an image of its own: a column of classes, whose values
    # repeat, cannot.
    for column_name in name_columns or sorted(frame.columns, key=lambda name: name != "id"):
        ids = as_text(frame[column_name]).dropna()
        if ids.duplicated().any() or any(letter in str(column_name) for letter in "{}"):
            continue
        ids = spaced_texts(ids)
        # Spreadsheets take the zeros of 00012 away.
        digits = {len(text) for text in patterns_by_text if text.isdecimal()}
        for width in (0, *sorted(digits if ids.str.isdecimal().all() else ())):
            placeholder = f"{{{column_name}:0{width}}}" if width else f"{{{column_name}}}"
            patterns_of_id = [patterns_by_text.get(value.zfill(width), []) for value in ids]
            fitting_patterns = [
                text.replace("{}", placeholder) for text in _common_patterns(patterns_of_id)
            ]
            fitting_patterns = [
                text for text in fitting_patterns if not _in_mask_folder(text)
            ] or fitting_patterns
            if len(fitting_patterns) > 1 and not name_columns:
                raise SourceError(
                    f"{table_path}: the column {column_name!r} could name the images "
                    f"{' or '.join(fitting_patterns)}. Say which: images.path_pattern: "
                    f"{fitting_patterns[0]}"
                )
            if len(fitting_patterns) == 1:
                return fitting_patterns[0]
    return None


def _common_patterns(patterns_of_id: Sequence[Sequence[tuple[tuple[str, ...], str]]]) -> list[str]:
    """Return the patterns that name the images of half of the ids or more: images may be missing.

    patterns_of_id: for each id the (folders, file name pattern) of its images. Folders of one
    depth, in which no id has two images, are one pattern with `*`.
    """
    min_ids = len(patterns_of_id) / 2
    # {(depth, file name pattern): for each id that has such images, their folders}
    folders_by_depth: dict[tuple[int, str], list[list[tuple[str, ...]]]] = {}
    for patterns in patterns_of_id:
        id_folders: dict[tuple[int, str], list[tuple[str, ...]]] = {}
        for folders, name_pattern in patterns:
            id_folders.setdefault((len(folders), name_pattern), []).append(folders)
        for key, folders_of_id in id_folders.items():
            folders_by_depth.setdefault(key, []).append(folders_of_id)
    fitting: list[str] = []
    for (_, name_pattern), folder_lists in folders_by_depth.items():
        counts = Counter(itertools.chain.from_iterable(folder_lists))
        if len(folder_lists) >= min_ids and all(len(folders) == 1 for folders in folder_lists):
            starred = map(_with_star, zip(*counts, strict=True))  # level by level
            fitting.append("/".join((*starred, name_pattern)))
        else:
            frequent = [folders for folders, n_ids in counts.items() if n_ids >= min_ids]
            fitting += ["/".join((*folders, name_pattern)) for folders in frequent]
    return fitting


def _with_star(names: Sequence[str]) -> str:
    """Return the one name, or `*` for several: `images_*` for images_1, images_2."""
    if len(set(names)) == 1:
        return names[0]
    stems = {name.rstrip("0123456789") for name in names}
    return f"{stems.pop()}*" if len(stems) == 1 else "*"


def spaced_texts(column: pd.Series) -> pd.Series:
    """Return about 100 cells from all over a column as text: its first may be in one folder."""
    texts = as_text(column).dropna()
    return texts.iloc[:: max(1, len(texts) // _CELLS_LOOKED_AT)]


def are_files(image_root: Path, paths: pd.Series) -> bool:
    """Return whether a path leads to a file; of most tables the first does."""
    return any(os.path.isfile(os.path.join(image_root, path)) for path in paths.dropna())


def _names_images(column: pd.Series, enough: Callable[[Iterable[bool]], bool]) -> bool:
    """Return whether a column names image files, also of formats that are not read here.

    enough: `any` or `all`, of its values.
    """
    values = column.dropna().head(_CELLS_LOOKED_AT)
    suffixes = [Path(value).suffix.lower() if isinstance(value, str) else "" for value in values]
    return bool(suffixes) and enough(
        suffix in IMAGE_SUFFIXES or suffix in OTHER_FORMATS for suffix in suffixes
    )
