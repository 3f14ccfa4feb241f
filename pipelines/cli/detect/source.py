"""Detection of a recipe's lines from a folder, a table, archives or an array of images."""

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import yaml

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError, as_yaml_list
from headrace.extract.images.locators import is_locator, locator_file
from headrace.extract.sources.array import detect_array_labels, measure_pixel_range
from headrace.extract.sources.folder import has_images, is_hidden
from headrace.extract.sources.formats import (
    ARRAY_KINDS,
    IMAGE_SUFFIXES,
    MAYBE_TABLES,
    annotation_files,
    is_archive,
)
from headrace.extract.sources.layout import SPLIT_WORDS, Layout, split_side_in, split_sides
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import read_table_file
from headrace.extract.sources.tabular import is_table
from headrace.pipelines.cli.detect.class_folders import detect_class_folders, detect_names
from headrace.pipelines.cli.detect.columns import (
    GROUP_NAMES,
    first_named,
    named_target,
    targets_text,
    task_section,
    yaml_text,
)
from headrace.pipelines.cli.detect.finding import (
    Finding,
    example_paths,
    init_command,
    listing_notes,
    path_text,
    split_sizes,
)
from headrace.pipelines.cli.detect.pixels import detect_pixels
from headrace.pipelines.cli.detect.table import FOLDER_PATTERN, detect_table
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.predict.tables import is_predictions
from headrace.pipelines.predict.units import is_unit_table

# Names of numbered folders that hold parts of one set; those of others may be classes.
_PART_OF_SET = (
    r"(part|batch|chunk|shard|set|images?|imgs?|photos?|data|folder|dir|vol|disk)[ ._-]*$"
)


def detect_recipe(
    location: Path,
    recipe_folder: Path,
    *,
    layout: Layout = "auto",
    exclude: tuple[str, ...] = (),
    name_pattern: str | None = None,
) -> Finding:
    """Return the recipe's lines for the images at `location`, with paths relative to
    `recipe_folder`.

    layout, exclude, name_pattern: as in the recipe's section `images`, and written there.

    Raises InvalidInput when there is nothing to train on, SourceError for a file that cannot be
    read.
    """
    source = detect_source(location, layout=layout, exclude=exclude)
    if name_pattern is None:
        finding = _detect(location, source, recipe_folder)
    else:
        finding = detect_names(location, replace(source, name_pattern=name_pattern), recipe_folder)
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
    return detect_table(source.path, source, recipe_folder)


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
                table_findings[table] = detect_table(
                    table, replace(source, kind="table", location=table), recipe_folder
                )
            except HeadraceError as refusal:
                # Its message is shown only if the folder has no classes either. A text file that
                # lists no images is a read-me and needs no message.
                if table.suffix.lower() not in MAYBE_TABLES or _lists_images(table):
                    refusal_texts.append(str(refusal))
    with_files = {
        table: finding for table, finding in table_findings.items() if _has_files(finding)
    }
    # A table of names for classes (`{"0": "cat"}`) leads to no file, as the images' own does.
    name_tables = [table for table in tables if table not in (*with_files, *prediction_tables)]
    prediction_notes = [
        f"{path.name} is a table of predictions and was not read" for path in prediction_tables
    ]
    try:
        finding = detect_class_folders(folder, source, recipe_folder)
    except HeadraceError as error:
        table_findings = with_files or table_findings
        if len(table_findings) > 1 and (pattern := _pattern_of_sides(list(table_findings))):
            table_findings = {
                pattern: detect_table(
                    pattern, replace(source, kind="table", location=pattern), recipe_folder
                )
            }
        if len(table_findings) == 1:
            ((table, table_finding),) = table_findings.items()
            table_finding = _with_class_names(table_finding, name_tables)
            table_notes = _table_notes(folder, (), table, table_finding)
            return replace(
                table_finding, notes=(*table_finding.notes, *table_notes, *prediction_notes)
            )
        if table_findings:
            table_names = ", ".join(path.name for path in table_findings)
            raise InvalidInput(
                f"{folder} holds several tables that could name the images ({table_names}): name "
                f"one. Try: {init_command(next(iter(table_findings)))}"
            ) from None
        array_files = [
            path for path in sorted(folder.iterdir()) if path.suffix.lower() in ARRAY_KINDS
        ]
        if array_files and not has_images(folder):
            if len(array_files) > 1:
                raise InvalidInput(
                    f"{folder} holds {len(array_files)} array files: name one. Try: "
                    f"{init_command(array_files[0])}"
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
    table, table_finding = next(iter(with_files.items()), (folder, finding))
    table_notes = _table_notes(folder, finding.class_names, table, table_finding)
    if len(with_files) == 1 and table_notes:
        table_finding = _with_class_names(table_finding, name_tables)
        return replace(table_finding, notes=(*table_finding.notes, *table_notes, *prediction_notes))
    class_finding = _with_class_names(finding, name_tables)
    other_tables = with_files or (table_findings if class_finding is finding else {})
    if other_tables:
        table_names = ", ".join(path.name for path in other_tables)
        prediction_notes.append(
            f"the sub-folders are taken for the classes. {table_names} could name the images and "
            f"their labels, too: for that, {init_command(next(iter(other_tables)))}"
        )
    return replace(class_finding, notes=(*class_finding.notes, *prediction_notes))


def _pattern_of_sides(tables: Sequence[Path]) -> Path | None:
    """Return the pattern that fits the tables and no other file, if each is a side of a split by
    its name (`Train.csv`, `Test.csv`); else None.
    """
    names = [table.name for table in tables]
    suffixes = {table.suffix for table in tables}
    if len(suffixes) > 1 or split_sides(names) is None:
        return None
    common = os.path.commonprefix(names)  # noqa: RUF071 - letters of names, not parts of paths
    pattern = f"{common}*{suffixes.pop()}"
    return tables[0].with_name(pattern) if {*tables[0].parent.glob(pattern)} == {*tables} else None


def _with_class_names(finding: Finding, name_tables: Sequence[Path]) -> Finding:
    """Return the finding with the names of its classes, where a table without images says them
    (`cat_to_name.json`: {"1": "pink primrose", …}).
    """
    for table in name_tables:
        frame = pd.DataFrame()
        with contextlib.suppress(SourceError):
            frame = read_table_file(table).frame
        if len(frame.columns) != 2 or "relabel" in finding.task:
            continue
        name_of_class = dict(zip(as_text(frame.iloc[:, 0]), as_text(frame.iloc[:, 1]), strict=True))
        if finding.class_names and {*finding.class_names} <= {*name_of_class}:
            relabel = {name: name_of_class[name] for name in finding.class_names}
            relabel_text = yaml.safe_dump(
                relabel, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False
            ).strip()
            return replace(
                finding,
                task=f"{finding.task}\n  relabel: {relabel_text}",
                notes=(*finding.notes, f"{table.name} names the classes (task.relabel)"),
            )
    return finding


def _has_files(table_finding: Finding) -> bool:
    return any(
        is_locator(path) or Path(locator_file(path)).is_file() for path in table_finding.examples
    )


def _lists_images(text_file: Path) -> bool:
    """Return whether the first line of a text begins with the name of an image."""
    with open(text_file, encoding="utf-8", errors="replace") as lines:
        words = re.split(r"[\s,;]+", lines.readline(1000))
    return Path(words[0]).suffix.lower() in IMAGE_SUFFIXES


def _table_notes(
    folder: Path, class_folders: Sequence[str], table: Path, table_finding: Finding
) -> list[str]:
    """Return a note if the sub-folders beside a table are no classes."""
    if not table.is_file():  # a pattern of tables, or none
        return []
    parts_text = _parts_text(folder, class_folders, table, table_finding)
    note = f"{table.name} names the images and their labels; the sub-folders {parts_text}"
    return [] if parts_text is None else [note]


def _parts_text(
    folder: Path, class_folders: Sequence[str], table: Path, table_finding: Finding
) -> str | None:
    """Return what the sub-folders are if they are no classes, by their names and the table beside
    them.

    They are sides of a split where all are named like `train_images`, as in Kaggle's competitions
    (not if one is called just `train` or `test`: then the classes are expected in it), or numbered
    parts of one set, such as `images_001`, where the table names files that are there. `grade1` and
    `grade2` are classes, unless the table has a column that is named like a label. Folders of
    patients are none, nor are folders that the table has a row for.
    class_folders: names of the folders that would be the classes.
    """
    names = [path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    if names and all(split_side_in(name) and name.lower() not in SPLIT_WORDS for name in names):
        return "are sides of a split"
    if _has_files(table_finding) and FOLDER_PATTERN in table_finding.images:
        return "are those of its rows"
    names = list(class_folders) or names
    stems = {name.rstrip("0123456789") for name in names}
    if len(names) < 2 or len(stems) > 1 or not (stem := stems.pop()):
        return None
    if _has_files(table_finding) and first_named(GROUP_NAMES, [stem]):
        return f"are those of its {stem.strip(' -_')}s"
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
        images=f"  {archive_key}: {path_text(location, recipe_folder)}      # archives; or a "
        "pattern: train-{000..031}.tar\n",
        task=task_lines,
        sentence=(
            f"{count_text(len(samples), 'image')} in archives, {targets_text(samples, targets)}"
        ),
        notes=(*task_notes, *listing_notes(listing)),
        examples=example_paths(samples),
    )


def _detect_array(location: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    image_lines = f"  array: {path_text(location, recipe_folder)}\n"
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
            "" if labels_file is None else f"  labels: {path_text(labels_file, recipe_folder)}\n"
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
    column_names = [
        str(name) for name in samples if name not in ("id", "path") and samples[name].notna().any()
    ]
    if not set(column_names) - {"split"}:
        raise InvalidInput(
            f"{location}: {count_text(len(samples), 'image')}, and no labels beside them. Write "
            "the recipe by hand, with\n"
            f"images:\n{image_lines}  labels: FILE      # .npy, .npz, HDF5 or idx, one value per "
            "image"
        )
    task_lines, targets, task_notes = task_section(samples, column_names, location)
    split_text = f"; {split_sizes(samples['split'])}" if "split" in samples else ""
    return Finding(
        image_lines,
        task_lines,
        f"{count_text(len(samples), 'image')}, {targets_text(samples, targets)}{split_text}",
        (*range_notes, *task_notes, *listing_notes(listing)),
    )
