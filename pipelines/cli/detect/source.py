"""Detection of a recipe's lines from a folder, a table, archives or an array of images."""

import contextlib
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import UnidentifiedImageError

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.extract.errors import as_yaml_list
from headrace.extract.images.decoding import has_deep_pixels
from headrace.extract.images.locators import locator_file, read_bytes
from headrace.extract.images.opening import decoding_reason, open_image
from headrace.extract.sources.array import detect_array_labels, measure_pixel_range
from headrace.extract.sources.folder import has_images, is_hidden
from headrace.extract.sources.formats import (
    ARRAY_KINDS,
    IMAGE_SUFFIXES,
    MAYBE_TABLES,
    annotation_files,
    has_image_signature,
    is_archive,
)
from headrace.extract.sources.image_column import are_files, find_image_column, spaced_texts
from headrace.extract.sources.layout import SPLIT_WORDS, Layout, split_side_in
from headrace.extract.sources.listing import Listing
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.extract.sources.tabular import is_table, table_files
from headrace.pipelines.cli.detect.band_files import find_band_files
from headrace.pipelines.cli.detect.columns import (
    GROUP_NAMES,
    first_named,
    is_full,
    n_distinct,
    named_target,
    table_doubts,
    targets_text,
    task_section,
    yaml_text,
)
from headrace.pipelines.cli.detect.pixels import detect_pixels
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.predict.tables import is_predictions
from headrace.pipelines.predict.units import is_unit_table
from headrace.pipelines.recipe.targets import name_some
from headrace.pipelines.selection.cautions import near_copies

# Names of numbered folders that hold parts of one set; those of others may be classes.
_PART_OF_SET = (
    r"(part|batch|chunk|shard|set|images?|imgs?|photos?|data|folder|dir|vol|disk)[ ._-]*$"
)
_CLASS_AND_NUMBER = r"(?P<label>[^/]*[^-/_. \d])[-_. ]*\d+\.\w+$"
_MAX_CLASSES_NAMED = 8  # in a message
_N_IMAGES_OPENED = 60  # spread over the listing, to see whether some have more than 8 bits
_N_IMAGES_DECODED = 8  # spread over the listing, to measure their bands and values


@dataclass(frozen=True)
class Finding:
    """Lines for the recipe's sections `images` and `task`, and sentences for the user."""

    images: str
    task: str
    sentence: str
    notes: tuple[str, ...] = ()  # what was assumed, and what is left out
    backbone: str = ""  # lines for a backbone
    examples: tuple[str, ...] = ()  # paths of some images, to look at their pixels


def detect_recipe(
    location: Path, recipe_folder: Path, *, layout: Layout = "auto", exclude: tuple[str, ...] = ()
) -> Finding:
    """Return the recipe's lines for the images at `location`, with paths relative to
    `recipe_folder`.

    layout, exclude: as in the recipe's section `images`, and written there. Raises InvalidInput
    when there is nothing to train on, SourceError for a file that cannot be read.
    """
    source = detect_source(location, layout=layout, exclude=exclude)
    finding = _detect(location, source, recipe_folder)
    pixels = detect_pixels(finding.examples)
    option_lines = pixels.images
    option_lines += f"  layout: {layout}\n" if layout != "auto" else ""
    option_lines += f"  exclude: {as_yaml_list(exclude)}\n" if exclude else ""
    return replace(
        finding,
        images=finding.images + option_lines,
        backbone=pixels.backbone,
        notes=(*finding.notes, *pixels.notes),
    )


def _detect(location: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    if source.kind == "image":
        raise InvalidInput(
            f"{location} is one image. Give the folder of images, with one sub-folder per class, "
            "or a table of them"
        )
    if source.kind == "folder":
        return _detect_folder(location, source, recipe_folder)
    if source.kind == "archive":
        return _detect_archives(location, source, recipe_folder)
    if source.kind == "array":
        return _detect_array(location, source, recipe_folder)
    return _detect_table(source.path, source, recipe_folder)


def _detect_folder(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    """Return the lines for a folder: its sub-folders are the classes, or a table in it has them.

    If both are possible the sub-folders are taken, and a note says how to take the table.
    """
    tables = [path for path in sorted(folder.iterdir()) if is_table(path) and path.is_file()]
    # They lie beside the images where predict has been tried, and name them as a table of labels
    # does.
    prediction_tables = [path for path in tables if _is_predictions(path)]
    table_findings: dict[Path, Finding] = {}
    refusal_texts: list[str] = []
    for table in tables:
        if table not in prediction_tables:
            try:
                table_findings[table] = _detect_table(
                    table, replace(source, kind="table", location=table), recipe_folder
                )
            except HeadraceError as refusal:
                # Its message is shown only if the folder has no classes either. A text file that
                # lists no images is a read-me and needs no message.
                if table.suffix.lower() not in MAYBE_TABLES or _lists_images(table):
                    refusal_texts.append(str(refusal))
    prediction_notes = [
        f"{path.name} is a table of predictions and was not read" for path in prediction_tables
    ]
    try:
        finding = _detect_class_folders(folder, source, recipe_folder)
    except HeadraceError as error:
        if len(table_findings) == 1:
            (table_finding,) = table_findings.values()
            return replace(table_finding, notes=(*table_finding.notes, *prediction_notes))
        if table_findings:
            table_names = ", ".join(path.name for path in table_findings)
            raise InvalidInput(
                f"{folder} holds several tables that could name the images ({table_names}): name "
                f"one. Try: {_init_command(next(iter(table_findings)))}"
            ) from None
        array_files = [
            path for path in sorted(folder.iterdir()) if path.suffix.lower() in ARRAY_KINDS
        ]
        if array_files and not has_images(folder):
            if len(array_files) > 1:
                raise InvalidInput(
                    f"{folder} holds {len(array_files)} array files: name one. Try: "
                    f"{_init_command(array_files[0])}"
                ) from None
            return _detect(
                array_files[0],
                replace(source, kind="array", location=array_files[0]),
                recipe_folder,
            )
        if (annotations_text := annotation_files(folder)) is not None:
            raise InvalidInput(f"{folder} holds {annotations_text}") from None
        if not refusal_texts:
            raise
        raise InvalidInput("\n".join([str(error), *refusal_texts])) from None
    table, table_finding = next(iter(table_findings.items()), (folder, finding))
    if len(table_findings) == 1 and (parts_text := _parts_text(folder, table, table_finding)):
        table_note = f"{table.name} names the images and their labels; the sub-folders {parts_text}"
        return replace(table_finding, notes=(*table_finding.notes, table_note, *prediction_notes))
    if table_findings:
        table_names = ", ".join(path.name for path in table_findings)
        prediction_notes.append(
            f"the sub-folders are taken for the classes. {table_names} could name the images and "
            f"their labels, too: for that, {_init_command(next(iter(table_findings)))}"
        )
    return replace(finding, notes=(*finding.notes, *prediction_notes))


def _lists_images(text_file: Path) -> bool:
    """Return whether the first line of a text begins with the name of an image."""
    with open(text_file, encoding="utf-8", errors="replace") as lines:
        words = re.split(r"[\s,;]+", lines.readline(1000))
    return Path(words[0]).suffix.lower() in IMAGE_SUFFIXES


def _parts_text(folder: Path, table: Path, table_finding: Finding) -> str | None:
    """Return what the sub-folders are if they are no classes, by their names and the table beside
    them.

    They are sides of a split where all are named like `train_images`, as in Kaggle's competitions
    (not if one is called just `train` or `test`: then the classes are expected in it), or numbered
    parts of one set, such as `images_001`, where the table names files that are there. `grade1` and
    `grade2` are classes, unless the table has a column that is named like a label.
    """
    names = [path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if all(split_side_in(name) and name.lower() not in SPLIT_WORDS for name in names):
        return "are sides of a split"
    stems = {name.rstrip("0123456789") for name in names}
    if len(names) < 2 or len(stems) > 1 or not (stem := stems.pop()):
        return None
    # A file of one name in several parts is none of them in particular.
    if not any(Path(locator_file(path)).is_file() for path in table_finding.examples):
        return None
    is_part = re.search(_PART_OF_SET, stem, re.IGNORECASE) is not None
    has_label = named_target(list(map(str, read_table_file(table).frame))) is not None
    return "are its parts" if is_part or has_label else None


def _is_predictions(table: Path) -> bool:
    """Return whether a table is one that `headrace predict` wrote, of images or of units."""
    # Predicted values have columns of any names; the record beside their table says whose it is.
    has_record = table.with_name(f"{table.name}.json").is_file()
    is_ours = is_predictions(table, allow_values=has_record) or is_unit_table(table)
    return is_ours and table.stat().st_size > 0


def _detect_class_folders(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    listing = read_source(source)
    samples = listing.samples
    class_counts = samples["label"].value_counts()
    band_files = find_band_files(samples)
    # Before names are taken for classes: those of bands would be.
    if band_files is not None and band_files.lacks_classes:
        raise InvalidInput(f"{folder}: {band_files.message(folder)}")
    if len(class_counts) < 2 and (by_names := _classes_by_names(folder, listing, recipe_folder)):
        return by_names
    if len(class_counts) < 2:
        found_text, hint_text = "images, but no sub-folder for a class", ""
        if len(class_counts):
            found_text = f"one class only, {class_counts.index[0]!r}"
            class_folder = folder / str(class_counts.index[0])
            while len(inner_folders := list(class_folder.glob("*/"))) == 1:
                class_folder = inner_folders[0]
            if len(inner_folders) > 1:
                hint_text = (
                    f". If the folders in it are the classes, try: {_init_command(class_folder)}"
                )
        raise InvalidInput(
            f"{folder}: found {found_text} ({count_text(len(samples), 'image')}). A classifier "
            "needs two classes or more: one sub-folder each, or a CSV with the columns path and "
            f"label{hint_text}"
            + "".join(f". Left out: {left_out}" for left_out in listing.left_out[:3])
        )
    smallest, largest = class_counts.min(), class_counts.max()
    sizes_text = f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    sentence = (
        f"{count_text(len(samples), 'image')} in {_named_classes(class_counts)}, {sizes_text} each"
    )
    layout_text, task_lines = "one sub-folder per class", "the name of the sub-folder"
    if "split" in samples:
        layout_text = "train, val or test, and in it one sub-folder per class"
        task_lines = (
            "the name of the inner folder\n"
            "  split: split                  # the names of the outer folders"
        )
        sentence += f"; {_split_sizes(samples['split'])}"
    return Finding(
        images=f"  folder: {_path_text(folder, recipe_folder)}      # {layout_text}\n",
        task=f"  target: label                  # {task_lines}",
        sentence=sentence,
        notes=(
            *_inner_folders(samples["id"], depth=int("split" in samples)),
            *([] if band_files is None else [band_files.message(folder)]),
            *_listing_notes(listing),
        ),
        examples=_examples(samples),
    )


def _inner_folders(image_ids: "pd.Series[Any]", depth: int) -> list[str]:
    """Return a note if all images lie in folders below those that are taken for the classes.

    Those may be the classes, and the outer ones patients (or organs, or days), of which one folder
    of each holds every class. depth: 1 if the classes' folders lie in sides of a split.
    """
    folders_of_image = [image_id.split("/")[depth:-1] for image_id in image_ids]
    n_levels = min(map(len, folders_of_image))
    for level in range(1, n_levels):
        outer_of_inner: dict[str, set[str]] = {}
        for folders in folders_of_image:
            outer_of_inner.setdefault(folders[level], set()).add(folders[0])
        if len(outer_of_inner) < 2:
            continue  # BreakHis: benign/SOB/adenosis
        if 2 * len(outer_of_inner) > len(folders_of_image):
            continue  # a folder for each image
        recur = all(len(outer_names) > 1 for outer_names in outer_of_inner.values())
        split, between = "(?P<split>[^/]+)/" * depth, "[^/]+/" * (level - 1)
        group_text = ", and the outer ones groups: task.group: group"
        if not recur:
            # Those of patients lie in one class each too.
            group_text = (
                ". If they are patients or scenes instead, they are groups, task.group: group, by "
                f"name_pattern: '^{split}(?P<label>[^/]+)/{between}(?P<group>[^/]+)/'"
            )
        outer = "(?P<group>[^/]+)/" if recur else "[^/]+/"
        return [
            f"the folders in them ({name_some(sorted(outer_of_inner))}) may be the classes, too: "
            f"for that, in the recipe's images, name_pattern: "
            f"'^{split}{outer}{between}(?P<label>[^/]+)/'{group_text}"
        ]
    return []


def _classes_by_names(folder: Path, listing: Listing, recipe_folder: Path) -> Finding | None:
    """Return the lines for images named by class and number, such as `cat.12.jpg`; None unless all
    are, with two classes or more and at least two images in each.
    """
    matches = [re.search(_CLASS_AND_NUMBER, image_id) for image_id in listing.samples["id"]]
    labels = [match["label"] for match in matches if match is not None]
    class_counts = pd.Series(labels).value_counts()
    # A class of one image is rather a name that happens to fit the pattern.
    if len(labels) < len(matches) or len(class_counts) < 2 or class_counts.min() < 2:
        return None
    listing = replace(listing, samples=listing.samples.assign(label=labels))
    return Finding(
        images=f"  folder: {_path_text(folder, recipe_folder)}\n"
        f"  name_pattern: '{_CLASS_AND_NUMBER}'      # named groups are columns\n",
        task="  target: label",
        sentence=f"{count_text(len(listing.samples), 'image')} in {_named_classes(class_counts)}",
        notes=(
            "no sub-folders for classes; the words that file names begin with are taken for them "
            "(images.name_pattern)",
            *_listing_notes(listing),
        ),
        examples=_examples(listing.samples),
    )


def _detect_archives(location: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    listing = read_source(source)
    samples = listing.samples
    column_names = [str(column) for column in samples.columns if column not in ("id", "path")]
    # One folder is no class: Kaggle's train.zip has all images in `train`.
    in_one_folder = column_names == ["label"] and samples["label"].nunique() < 2
    if in_one_folder or samples[column_names].isna().all(axis=None):
        raise InvalidInput(
            f"{location}: {count_text(len(samples), 'image')}, and no labels: neither folders for "
            "the classes nor files such as 0001.cls beside 0001.jpg"
            + "".join(f". Left out: {left_out}" for left_out in listing.left_out[:3])
            + ". Where a table in it or beside it has the labels, unpack the archive, and give "
            "headrace init the folder"
        )
    task_lines, targets, task_notes = task_section(samples, column_names, location)
    archives = list(filter(is_archive, location.iterdir())) if location.is_dir() else [location]
    archive_key = "zip" if all(path.suffix.lower() == ".zip" for path in archives) else "tar"
    return Finding(
        images=f"  {archive_key}: {_path_text(location, recipe_folder)}      # archives; or a "
        "pattern: train-{000..031}.tar\n",
        task=task_lines,
        sentence=(
            f"{count_text(len(samples), 'image')} in archives, {targets_text(samples, targets)}"
        ),
        notes=(*task_notes, *_listing_notes(listing)),
        examples=_examples(samples),
    )


def _named_classes(class_counts: "pd.Series[Any]") -> str:
    """Return "3 classes (crane, heron, stork)"."""
    class_names = sorted(map(str, class_counts.index))
    more_text = ", …" if len(class_names) > _MAX_CLASSES_NAMED else ""
    classes_text = count_text(len(class_names), "class", "classes")
    return f"{classes_text} ({', '.join(class_names[:_MAX_CLASSES_NAMED])}{more_text})"


def _detect_array(location: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    image_lines = f"  array: {_path_text(location, recipe_folder)}\n"
    range_notes: list[str] = []
    if location.is_file():
        array_key, labels_file, labels_key = detect_array_labels(location)
        pixel_range = measure_pixel_range(location, array_key)
        source = replace(
            source,
            array_key=array_key,
            labels=labels_file,
            labels_key=labels_key,
            pixel_range=pixel_range,
        )
        image_lines += "" if array_key is None else f"  array_key: {yaml_text(array_key)}\n"
        image_lines += (
            "" if labels_file is None else f"  labels: {_path_text(labels_file, recipe_folder)}\n"
        )
        image_lines += "" if labels_key is None else f"  labels_key: {yaml_text(labels_key)}\n"
        if pixel_range is not None:
            image_lines += (
                f"  pixel_range: [{pixel_range[0]:g}, {pixel_range[1]:g}]      # black and white, "
                "measured on all images\n"
            )
            range_notes.append(
                f"the pixels have no range of their own; all values lie in {pixel_range[0]:g} to "
                f"{pixel_range[1]:g}, which is taken for black and white (images.pixel_range)"
            )
    listing = read_source(source)
    samples = listing.samples
    label_columns = [
        str(column) for column in samples if column not in ("id", "path", "split", "label")
    ] or ["label"]
    if samples[label_columns].isna().all(axis=None):
        raise InvalidInput(
            f"{location}: {count_text(len(samples), 'image')}, and no labels beside them. Write "
            "the recipe by hand, with\n"
            f"images:\n{image_lines}  labels: FILE      # .npy, .npz, HDF5 or idx, one value per "
            "image"
        )
    split_columns = ["split"] if "split" in samples else []
    task_lines, targets, task_notes = task_section(
        samples, [*label_columns, *split_columns], location
    )
    split_text = f"; {_split_sizes(samples['split'])}" if split_columns else ""
    return Finding(
        image_lines,
        task_lines,
        f"{count_text(len(samples), 'image')}, {targets_text(samples, targets)}{split_text}",
        (*range_notes, *task_notes, *_listing_notes(listing)),
    )


def _split_sizes(split_column: "pd.Series[Any]") -> str:
    return ", ".join(
        f"{count:,} in {side_name}" for side_name, count in split_column.value_counts().items()
    )


def _detect_table(table: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    table_file = table_files(table)[0]
    table_data = read_table_file(table_file)
    image_lines = f"  table: {_path_text(table, recipe_folder)}\n"
    path_source, is_pattern = find_image_column(table_data, table_file, table_file.parent)
    root_line = "  # root: images      # what relative paths start from\n"
    if not is_pattern and path_source in table_data.frame:
        root = _root_above(table_data.frame[path_source], table_file.parent)
        if root is not None:
            source = replace(source, root=root)
            root_line = (
                f"  root: {_path_text(root, recipe_folder)}      # what relative paths start from\n"
            )
    pattern_notes: list[str] = []
    if is_pattern:
        pattern_notes.append(
            f"the image files were found by the pattern {path_source!r} (images.path_pattern)"
        )
        image_lines += (
            f"  path_pattern: {yaml_text(path_source)}      # where the images are, by the column "
            "in braces\n"
        )
        source = replace(source, path_pattern=path_source)
    else:
        image_lines += f"  path_column: {yaml_text(path_source)}\n"
        source = replace(source, path_column=path_source)
    listing = read_source(source)
    samples = listing.samples
    table_columns = table_data.frame.columns
    # the reader's own name for a column `id` that repeats, as patients' do
    repeats = "image_id" in samples and "image_id" not in table_columns
    if "id" in table_columns and path_source != "id" and not repeats:
        image_lines += "  id_column: id\n"
    other_columns = [
        column
        for column in samples.columns
        if column not in (path_source, "id", "path")
        and not column.endswith(".path")
        and n_distinct(samples[column]) is not None  # None: cells are lists
    ]
    task_lines, targets, task_notes = task_section(samples, other_columns, table)
    return Finding(
        images=image_lines + root_line,
        task=task_lines,
        sentence=(
            f"{count_text(len(samples), 'image')} in {table.name}, {targets_text(samples, targets)}"
            + table_doubts(samples["path"], samples[targets[0]], table_file)
        ),
        notes=(*pattern_notes, *task_notes, *_listing_notes(listing)),
        examples=_examples(samples),
    )


def _root_above(names: "pd.Series[Any]", folder: Path) -> Path | None:
    """Return the folder above the table's that its paths start from, where they lead to no files
    from the table's own: they name that folder too.
    """
    roots = [folder, *folder.absolute().parents[:2]]
    root = next((root for root in roots if are_files(root, spaced_texts(names))), folder)
    return None if root == folder else root


def _examples(samples: pd.DataFrame) -> tuple[str, ...]:
    step = max(1, len(samples) // _N_IMAGES_DECODED)
    return tuple(samples["path"].astype(str)[::step][:_N_IMAGES_DECODED])


def _listing_notes(listing: Listing) -> tuple[str, ...]:
    return (
        *listing.notes,
        *(f"left out: {item}" for item in listing.left_out),
        *_opened_images(listing.samples),
        *_near_copies(listing.samples),
    )


def _near_copies(samples: pd.DataFrame) -> list[str]:
    """Return a note if neighbours in the listing are nearly the same image, and no column of groups
    keeps them on one side of the split.
    """
    named_columns = [name for name in map(str, samples) if first_named(GROUP_NAMES, [name])]
    group_column = first_named(
        GROUP_NAMES, [name for name in named_columns if is_full(samples[name])]
    )
    copies_note = near_copies(samples, group_column)
    return [] if copies_note is None else [copies_note]


def _opened_images(samples: pd.DataFrame) -> list[str]:
    """Return notes if, among a few images, some have 8 bits and some more, or some are no images.

    Scales of depths differ, from which a head could tell classes apart that come of different
    sources.
    """
    image_by_depth: dict[bool, str] = {}
    unread: list[str] = []
    examples = samples[["id", "path"]].iloc[:: max(1, len(samples) // _N_IMAGES_OPENED)]
    for image_id, image_path in examples.itertuples(index=False):
        # The run reports an image that cannot be opened, and why.
        with contextlib.suppress(Exception):
            data = read_bytes(image_path)
            # Arrays have no signature, and were checked when they were listed.
            is_known = "::" in image_path or data[:6] == b"\x93NUMPY"
            if not is_known and not has_image_signature(data[:32]):
                try:
                    open_image(data)
                except UnidentifiedImageError as error:
                    unread.append(f"{image_id}: {decoding_reason(error, data)}")
            image_by_depth.setdefault(has_deep_pixels(data), image_id)
    notes = []
    if unread:
        notes.append(
            f"{len(unread)} of {count_text(len(examples), 'image')} that were looked at cannot be "
            f"read, such as {unread[0]}"
        )
    if len(image_by_depth) == 2:
        notes.append(
            f"some images have 8 bits ({image_by_depth[False]}) and some more "
            f"({image_by_depth[True]}): white is 255 in the ones and, without images.pixel_range, "
            "65535 or what the file says in the others. If they come of one sensor, their "
            "brightness differs by that"
        )
    return notes


def _init_command(path: Path) -> str:
    """Return the command that writes a recipe for another file or folder, quoted for a shell."""
    return f"headrace init {shlex.quote(str(path))}"


def _path_text(path: Path, recipe_folder: Path) -> str:
    """Return a path as a person would write it: relative, unless it starts two folders up."""
    relative_path = os.path.relpath(path.absolute(), recipe_folder)
    return yaml_text(str(path.absolute()) if relative_path.startswith("../..") else relative_path)
