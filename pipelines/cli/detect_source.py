"""What a folder, a table, archives or an array of images hold, as the lines of a recipe."""

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from headrace.cache.errors import HeadraceError
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError, yaml_list
from headrace.extract.images.byte_ranges import file_of, read_bytes
from headrace.extract.images.decoding import is_deep
from headrace.extract.sources.array import array_labels, measure_range
from headrace.extract.sources.folder import has_images
from headrace.extract.sources.formats import ARRAY_KINDS, MAYBE_TABLES, is_archive
from headrace.extract.sources.layout import SPLIT_WORDS, Layout
from headrace.extract.sources.listing import Listing
from headrace.extract.sources.read import ImageSource, detect_source, read_source
from headrace.extract.sources.table import read_table_file
from headrace.extract.sources.tabular import find_images, is_table, table_files
from headrace.pipelines.selection.cautions import near_copies

_TARGET_NAMES = ("label", "labels", "class", "target", "category", "diagnosis", "species", "y")
_GROUP_NAMES = ("group", "patient", "patient_id", "subject", "subject_id", "slide", "scene", "site")
_SPLIT_NAMES = ("split", "set", "subset", "partition")
_PATHS_LOOKED_AT = 100
_CLASSES_NAMED = 8
_IMAGES_OPENED = 60
_PREDICTION_COLUMNS = {"file", "class", "error"}  # of the tables that `headrace predict` writes
_SEPARATORS = (";", "|", ",", " ")


class InitError(HeadraceError, ValueError):
    """No recipe can be written for what was found."""


@dataclass(frozen=True)
class Finding:
    """What `init` found: the lines of the recipe's images and task sections, and sentences for the
    user.
    """

    images: str
    task: str
    sentence: str
    notes: tuple[str, ...] = ()  # what was assumed, and what is left out


def look(
    location: Path, base: Path, *, layout: Layout = "auto", exclude: tuple[str, ...] = ()
) -> Finding:
    """The recipe's lines for what `location` holds; paths in them start from `base`, the recipe's
    folder.

    layout, exclude: as in the recipe's section `images`, into which they are written.

    Raises InitError when there is nothing to train on, SourceError for a file that cannot be read.
    """
    source = detect_source(location, layout=layout, exclude=exclude)
    finding = _look_at(location, source, base)
    asked = f"  layout: {layout}\n" if layout != "auto" else ""
    asked += f"  exclude: {yaml_list(exclude)}\n" if exclude else ""
    return replace(finding, images=finding.images + asked)


def _look_at(location: Path, source: ImageSource, base: Path) -> Finding:
    if source.kind == "image":
        raise InitError(
            f"{location} is one image. Give the folder of images, with one sub-folder per class, "
            "or a table of them"
        )
    if source.kind == "folder":
        return _look_at_folder(location, source, base)
    if source.kind == "archive":
        return _look_at_archives(location, source, base)
    if source.kind == "array":
        return _look_at_array(location, source, base)
    return _look_at_table(Path(source.location), source, base)


def _look_at_folder(folder: Path, source: ImageSource, base: Path) -> Finding:
    """Class folders, unless they are none and a table beside the images says more; both readings
    are told.
    """
    tables = [path for path in sorted(folder.iterdir()) if is_table(path) and path.is_file()]
    predictions = [path for path in tables if _is_predictions(path)]
    readings: dict[Path, Finding] = {}
    refusals: list[str] = []
    for table in tables:
        if table not in predictions:
            try:
                readings[table] = _look_at_table(
                    table, replace(source, kind="table", location=table), base
                )
            except (
                HeadraceError
            ) as refusal:  # a table of something else, unless the folder is no use either
                if table.suffix.lower() not in MAYBE_TABLES:
                    refusals.append(str(refusal))
    notes = [f"{path.name} is a table of predictions and was not read" for path in predictions]
    try:
        finding = _look_at_class_folders(folder, source, base)
    except HeadraceError as error:
        if len(readings) == 1:
            (reading,) = readings.values()
            return replace(reading, notes=(*reading.notes, *notes))
        if readings:
            names = ", ".join(path.name for path in readings)
            raise InitError(
                f"{folder} holds several tables that could name the images ({names}): name one. "
                f"Try: {_command(next(iter(readings)))}"
            ) from None
        arrays = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ARRAY_KINDS]
        if arrays and not has_images(folder):
            if len(arrays) > 1:
                raise InitError(
                    f"{folder} holds {len(arrays)} array files: name one. Try: "
                    f"{_command(arrays[0])}"
                ) from None
            return _look_at(arrays[0], replace(source, kind="array", location=arrays[0]), base)
        if not refusals:
            raise
        raise InitError("\n".join([str(error), *refusals])) from None
    if readings:
        named = ", ".join(path.name for path in readings)
        notes.append(
            f"the sub-folders are taken for the classes. {named} could name the images and their "
            f"labels, too: for that, {_command(next(iter(readings)))}"
        )
    return replace(finding, notes=(*finding.notes, *notes))


def _is_predictions(table: Path) -> bool:
    """Whether a table is one that `headrace predict` wrote."""
    try:
        return set(read_table_file(table).frame.columns) >= _PREDICTION_COLUMNS
    except SourceError:
        return False


def _look_at_class_folders(folder: Path, source: ImageSource, base: Path) -> Finding:
    listing = read_source(source)
    samples = listing.samples
    counts = samples["label"].value_counts()
    if len(counts) < 2:
        found = (
            f"one class only, {counts.index[0]!r}"
            if len(counts)
            else "images, but no sub-folder for a class"
        )
        inner = (
            sorted(path.name for path in folder.joinpath(str(counts.index[0])).glob("*/"))
            if len(counts)
            else []
        )
        hint = (
            (
                ". If the folders in it are the classes, try: "
                f"{_command(folder / str(counts.index[0]))}"
            )
            if len(inner) > 1
            else ""
        )
        raise InitError(
            f"{folder}: found {found} ({len(samples):,} images). A classifier needs two classes or "
            f"more: one sub-folder each, or a CSV with the columns path and label{hint}"
        )
    has_split = "split" in samples
    layout = (
        "train, val or test, and in it one sub-folder per class"
        if has_split
        else "one sub-folder per class"
    )
    split = (
        "\n  split: split                  # the names of the outer folders" if has_split else ""
    )
    name = "inner folder" if has_split else "sub-folder"
    return Finding(
        images=f"  folder: {_relative(folder, base)}      # {layout}\n",
        task=f"  target: label                  # the name of the {name}{split}",
        sentence=(
            f"{len(samples):,} images in {_named_classes(counts)}, {counts.min():,} to "
            f"{counts.max():,} each"
        )
        + (f"; {_sizes(samples['split'])}" if has_split else ""),
        notes=_notes(listing),
    )


def _look_at_archives(location: Path, source: ImageSource, base: Path) -> Finding:
    listing = read_source(source)
    samples = listing.samples
    columns = [str(column) for column in samples.columns if column not in ("id", "path")]
    task, target, notes = _task(samples, columns, location)
    key = "zip" if _holds_zip(location) else "tar"
    return Finding(
        images=f"  {key}: {_relative(location, base)}      # archives; or a pattern: "
        "train-{000..031}.tar\n",
        task=task,
        sentence=f"{len(samples):,} images in archives, {samples[target].nunique():,} classes in "
        f"{target!r}",
        notes=(*notes, *_notes(listing)),
    )


def _named_classes(counts: "pd.Series[Any]") -> str:
    """ "3 classes (crane, heron, stork)"."""
    names = sorted(map(str, counts.index))
    more = ", …" if len(names) > _CLASSES_NAMED else ""
    return f"{len(names):,} classes ({', '.join(names[:_CLASSES_NAMED])}{more})"


def _holds_zip(location: Path) -> bool:
    files = (
        [path for path in location.iterdir() if is_archive(path)]
        if location.is_dir()
        else [location]
    )
    return all(file.suffix.lower() == ".zip" for file in files)


def _look_at_array(location: Path, source: ImageSource, base: Path) -> Finding:
    images = f"  array: {_relative(location, base)}\n"
    notes: list[str] = []
    if location.is_file():
        key, labels, labels_key = array_labels(location)
        pixel_range = measure_range(location, key)
        source = replace(
            source, array_key=key, labels=labels, labels_key=labels_key, pixel_range=pixel_range
        )
        images += "" if key is None else f"  array_key: {_scalar(key)}\n"
        images += "" if labels is None else f"  labels: {_relative(labels, base)}\n"
        images += "" if labels_key is None else f"  labels_key: {_scalar(labels_key)}\n"
        if pixel_range is not None:
            images += (
                f"  pixel_range: [{pixel_range[0]:g}, {pixel_range[1]:g}]      # black and white, "
                "measured on all images\n"
            )
            notes.append(
                f"the pixels have no range of their own; all values lie in {pixel_range[0]:g} to "
                f"{pixel_range[1]:g}, which is taken for black and white (images.pixel_range)"
            )
    listing = read_source(source)
    samples = listing.samples
    if samples["label"].isna().all():
        raise InitError(
            f"{location}: {len(samples):,} images, and no labels beside them. Write the recipe by "
            "hand, with\n"
            f"images:\n{images}  labels: FILE      # .npy, .npz, HDF5 or idx, one value per image"
        )
    task, _, assumed = _task(
        samples, ["label", *(["split"] if "split" in samples else [])], location
    )
    split = f"; {_sizes(samples['split'])}" if "split" in samples else ""
    return Finding(
        images,
        task,
        f"{len(samples):,} images in {samples['label'].nunique():,} classes{split}",
        (*notes, *assumed, *_notes(listing)),
    )


def _sizes(split: "pd.Series[Any]") -> str:
    return ", ".join(f"{count:,} in {name}" for name, count in split.value_counts().items())


def _look_at_table(table: Path, source: ImageSource, base: Path) -> Finding:
    file = table_files(table)[0]
    read = read_table_file(file)
    lines = f"  table: {_relative(table, base)}\n"
    where, is_pattern = find_images(read, file, file.parent)
    notes: list[str] = []
    if is_pattern:
        notes.append(
            f"no column names image files; they were found by the pattern {where!r} "
            "(images.path_pattern)"
        )
        lines += (
            f"  path_pattern: {_scalar(where)}      # where the images are, by the column in "
            "braces\n"
        )
        source = replace(source, path_pattern=where)
    else:
        lines += f"  path_column: {_scalar(where)}\n"
        source = replace(source, path_column=where)
    used = [where]
    if "id" in read.frame.columns and "id" not in used:
        lines += "  id_column: id\n"
        used.append("id")
        source = replace(source, id_column="id")
    listing = read_source(source)
    samples = listing.samples
    others = [
        column
        for column in samples.columns
        if column not in (*used, "id", "path")
        and not column.endswith(".path")
        and _values(samples[column]) is not None
    ]
    task, target, assumed = _task(samples, others, table)
    return Finding(
        images=f"{lines}  # root: images      # what relative paths start from\n",
        task=task,
        sentence=(
            f"{len(samples):,} images in {table.name}, {_classes(samples[target])} in column "
            f"{target!r}"
        )
        + _doubts(samples["path"], samples[target]),
        notes=(*notes, *assumed, *_notes(listing)),
    )


def _notes(listing: Listing) -> tuple[str, ...]:
    return (
        *listing.notes,
        *(f"left out: {item}" for item in listing.left_out),
        *_mixed_depths(listing.samples),
        *_near_copies(listing.samples),
    )


def _near_copies(samples: pd.DataFrame) -> list[str]:
    """A note where neighbours in the listing are nearly the same image, and no column that is taken
    for groups keeps them together.
    """
    group = _first_named(
        _GROUP_NAMES,
        [
            str(name)
            for name in samples
            if str(name).lower() in _GROUP_NAMES and _is_full(samples[name])
        ],
    )
    found = near_copies(samples, group)
    return [] if found is None else [found]


def _mixed_depths(samples: pd.DataFrame) -> list[str]:
    """A note where some images have 8 bits and some more, by a few of them: their scales differ,
    and may tell classes apart.
    """
    depths: dict[bool, str] = {}
    for name, path in (
        samples[["id", "path"]]
        .iloc[:: max(1, len(samples) // _IMAGES_OPENED)]
        .itertuples(index=False)
    ):
        with contextlib.suppress(
            Exception
        ):  # what cannot be opened is told by the run, with its reason
            depths.setdefault(is_deep(read_bytes(path)), name)
    if len(depths) < 2:
        return []
    return [
        f"some images have 8 bits ({depths[False]}) and some more ({depths[True]}): white is 255 "
        "in the ones and, without images.pixel_range, 65535 or what the file says in the others. "
        "If they come of one sensor, their brightness differs by that"
    ]


def _classes(column: "pd.Series[Any]") -> str:
    count = _values(column)
    return "lists of classes" if count is None else f"{count:,} classes"


def _doubts(paths: "pd.Series[Any]", labels: "pd.Series[Any]") -> str:
    """What a person should know of a table before the first run: rows without a label, and paths
    that lead nowhere.
    """
    said = ""
    if empty := int(labels.isna().sum()):
        said += f"; {empty:,} rows have no label, and a run leaves them out"
    looked = [file_of(path) for path in paths.head(_PATHS_LOOKED_AT).astype(str)]
    gone = [path for path in looked if not Path(path).is_file()]
    if gone:
        said += (
            f"; {len(gone):,} of the first {len(looked):,} files are not there, such as {gone[0]} "
            "(relative paths start from images.root, by default the table's folder)"
        )
    return said


def _task(frame: pd.DataFrame, columns: Sequence[str], where: Path) -> tuple[str, str, list[str]]:
    """The lines of the recipe's task section, the target's column, and notes on what
    was assumed.
    """
    notes: list[str] = []
    named = (_first_named(_SPLIT_NAMES, columns), _first_named(_GROUP_NAMES, columns))
    lists = [
        column
        for column in ("label", "labels")
        if column in frame and _values(frame[column]) is None
    ]
    target = _first_named(_TARGET_NAMES, [*columns, *lists]) or _few_valued(
        frame, [c for c in columns if c not in named]
    )
    if target is None:
        raise InitError(
            f"{where}: no column looks like a label (2 to 1,000 different values). It has: "
            f"{', '.join(map(str, frame.columns))}. To predict a number, write the recipe by hand: "
            "task: {target: COLUMN, kind: regression}"
        )
    task = f"  target: {_scalar(target)}"
    if target in lists:
        task += "\n  kind: multi                    # several labels in a cell"
    elif (separator := _separator(frame[target])) is not None:
        task += (
            "\n  kind: multi                    # several labels in a cell\n  separator: "
            f"{_scalar(separator)}"
        )
        notes.append(
            f"the cells of {target!r} are taken for several labels each, separated by "
            f"{separator!r} (task.separator); for one label each: task.kind: single"
        )
    else:
        values = frame[target].dropna().unique()
        if len(values) < 2:
            found = f"one class only, {values[0]!r}" if len(values) else "no value"
            raise InitError(
                f"{where}: column {target!r} holds {found}. A classifier needs two classes or more"
            )
    labelled = frame[frame[target].notna()]  # a run leaves the others out, whatever else they hold
    split = _first_named(
        _SPLIT_NAMES, [column for column in columns if _holds_sides(labelled[column])]
    )
    group = _first_named(_GROUP_NAMES, [column for column in columns if _is_full(labelled[column])])
    if split:
        task += f"\n  split: {_scalar(split)}"
    if named[0] != split:
        notes.append(
            f"column {named[0]!r} holds other values than train, validation and test, or none, and "
            "is not taken for a split"
        )
    if group:
        task += f"\n  group: {_scalar(group)}"
    if named[1] != group:
        notes.append(
            f"column {named[1]!r} is empty for some images, and is not taken for groups: fill it, "
            f"and set task.group: {_scalar(str(named[1]))}"
        )
    return task, target, notes


def _holds_sides(column: "pd.Series[Any]") -> bool:
    """Whether every cell of a column is a word for a side of a split."""
    return _is_full(column) and set(as_text(column).str.lower()) <= set(SPLIT_WORDS)


def _is_full(column: "pd.Series[Any]") -> bool:
    """Whether no cell of a column is empty."""
    texts = as_text(column)
    return bool(texts.notna().all() and (texts != "").all())


def _separator(column: "pd.Series[Any]") -> str | None:
    """What stands between several labels in the cells of a column: parts recur, and stand alone in
    some cells.
    """
    cells = as_text(column).dropna().unique().tolist()
    for separator in _SEPARATORS:
        combined = [
            {part.strip() for part in cell.split(separator)} for cell in cells if separator in cell
        ]
        parts = {part for combination in combined for part in combination}
        alone = {cell for cell in cells if separator not in cell}
        if (
            parts
            and len(parts | alone) < len(cells)
            and len(parts & alone) * 2 >= len(parts)
            and (separator != " " or _are_labels(combined, parts, alone))
        ):
            return separator
    return None


def _are_labels(combined: list[set[str]], parts: set[str], alone: set[str]) -> bool:
    """Whether words that stand together are labels, and not the words of one name, such as `wild
    cat` beside `cat`.

    Each of them is a label by itself, and they are all the labels that there are, or three of them
    recur in combinations.
    """
    recurring = [part for part in parts if sum(part in combination for combination in combined) > 1]
    return parts <= alone and (parts == alone or len(recurring) >= 3)


def _first_named(names: tuple[str, ...], columns: Sequence[str]) -> str | None:
    lower = {str(column).lower(): str(column) for column in columns}
    return next((lower[name] for name in names if name in lower), None)


def _few_valued(frame: pd.DataFrame, columns: list[str]) -> str | None:
    for column in columns:
        if 2 <= (_values(frame[column]) or 0) <= min(1000, max(2, len(frame) // 3)):
            return str(column)
    return None


def _values(column: "pd.Series[Any]") -> int | None:
    """How many different values a column has; None where it holds lists or the like, as Parquet
    can.
    """
    try:
        return column.nunique()
    except TypeError:
        return None


def _command(path: Path) -> str:
    """What to type for another reading, fit to be pasted."""
    return f"headrace init {shlex.quote(str(path))}"


def _relative(path: Path, base: Path) -> str:
    """As a person would write it: relative where that is short."""
    relative = os.path.relpath(path.absolute(), base)
    return _scalar(str(path.absolute()) if relative.startswith("../..") else relative)


def _scalar(text: str) -> str:
    """Text as a YAML value, quoted where it must be ("2020", "a: b")."""
    return yaml.safe_dump([text], width=10_000, allow_unicode=True).removeprefix("- ").strip()
