"""Detection of a recipe's lines from a table of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError
from headrace.extract.sources.folder import is_hidden
from headrace.extract.sources.image_column import are_files, find_image_column, spaced_texts
from headrace.extract.sources.listing import is_image_folder
from headrace.extract.sources.read import read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import Table, read_table_file
from headrace.extract.sources.tabular import table_files
from headrace.pipelines.cli.detect.columns import (
    MIN_GROUPS,
    few_valued,
    n_distinct,
    named_target,
    nearly_named,
    table_doubts,
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
    patients_in_names,
)
from headrace.pipelines.errors import InvalidInput

FOLDER_PATTERN = "}/*"  # ends the pattern of a table with a row for each folder
_MAX_ROOTS_TRIED = 50  # folders beside a table: of many, none is the one of all images


def detect_table(table: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    """Return the lines for a table, or a pattern of tables, of images.

    Raises SourceError for a table whose images are not found, InvalidInput for one of class names.
    """
    table_file = table_files(table)[0]
    table_data = read_table_file(table_file)
    image_lines = f"  table: {path_text(table, recipe_folder)}\n"
    path_source, is_pattern = find_image_column(table_data, table_file, table_file.parent)
    root_line = "  # root: images      # what relative paths start from\n"
    if not is_pattern and path_source in table_data.frame:
        root = _root_elsewhere(table_data.frame[path_source], table_file.parent)
        if root is not None:
            source = replace(source, root=root)
            root_line = (
                f"  root: {path_text(root, recipe_folder)}      # what relative paths start from\n"
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
    try:
        listing = read_source(source)
    except SourceError as error:
        raise SourceError(f"{error}{_join_labels(table_file, table_data, path_source)}") from None
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
    if "\n  group:" not in task_lines and "\n  split:" not in task_lines:
        name_lines, group_line, name_notes = patients_in_names(
            samples["id"],
            samples[targets[0]] if "\n  kind:" not in task_lines else None,
        )
        image_lines += name_lines
        task_lines += group_line
        task_notes += name_notes
    if is_pattern and path_source.endswith(FOLDER_PATTERN):
        # Images of one slide or patient are alike.
        folder_column = path_source.removesuffix(FOLDER_PATTERN).rpartition("{")[2]
        if folder_column in ("id", "path"):  # the samples' own
            folder_column = "folder"
        n_folders = samples[folder_column].nunique()
        if len(targets) == 1 and n_distinct(samples[targets[0]]) == n_folders:
            raise InvalidInput(
                f"{table}: each of its {count_text(n_folders, 'row')} is a folder of images with a "
                "label of its own: the folders are the classes, and it says their names"
            )
        if "\n  group:" not in task_lines and n_folders >= MIN_GROUPS:
            task_lines += f"\n  group: {yaml_text(folder_column)}"
        task_notes.append(
            f"{folder_column!r} names folders, and each image in them has the row's label. To "
            f"score each folder by all of its images: task.unit: {yaml_text(folder_column)}"
        )
    has_label = samples[targets].notna().all(axis=1) | ('"": 0' in task_lines)
    return Finding(
        images=image_lines + root_line,
        task=task_lines,
        sentence=(
            f"{count_text(len(samples), 'image')} in {table.name}, {targets_text(samples, targets)}"
            + table_doubts(samples["path"], has_label.where(has_label), table_file)
        ),
        notes=(*pattern_notes, *task_notes, *listing_notes(listing)),
        examples=example_paths(samples),
        class_names=(
            () if "kind:" in task_lines else tuple(as_text(samples[targets[0]]).dropna().unique())
        ),
    )


def _join_labels(table_file: Path, table_data: Table, path_column: str) -> str:
    """Return, in words, the commands that join the rows of one image to one; "" for tables without
    such rows.
    """
    frame = table_data.frame
    if table_file.suffix.lower() != ".csv" or path_column not in frame:
        return ""
    columns = [str(name) for name in frame if name != path_column]
    label = named_target(columns) or nearly_named(frame, columns) or few_valued(frame, columns)
    if label is None or not frame[path_column].duplicated().any():
        return ""
    new_path = table_file.with_name(f"{table_file.stem}-joined.csv")

    def command(join: str) -> str:
        return (
            f'`python -c "import pandas as p; g = p.read_csv({str(table_file)!r}, dtype=str)'
            f".groupby({path_column!r}); t = g.first(); t[{label!r}] = g[{label!r}].agg(lambda s: "
            f'{join}); t.to_csv({str(new_path)!r})"`'
        )

    joined = command("';'.join(sorted(set(s.dropna())))")
    return (
        f" To have all values of {label!r} of an image in one cell, {joined}; or the commonest "
        f"one, {command('s.mode()[0]')}. Then {init_command(new_path)}"
    )


def _root_elsewhere(names: "pd.Series[Any]", folder: Path) -> Path | None:
    """Return the folder that a table's paths start from, where they lead to no files from the
    table's own: above it, as they name that folder too, or one that they do not name, in it or
    beside it.
    """
    paths = spaced_texts(names).str.lstrip("/")
    if are_files(folder, spaced_texts(names)) or are_files(folder, paths):
        return None
    inner_folders = [path for path in sorted(folder.glob("*/")) if not is_hidden(path.name)]
    siblings = [path for path in folder.absolute().parent.glob("*/") if is_image_folder(path.name)]
    above = (root for root in folder.absolute().parents[:2] if are_files(root, paths))
    if (root := next(above, None)) is not None:
        return root
    # Of names without a folder, several may have one.
    paths = paths[paths.str.contains("/")]
    others = [*inner_folders[:_MAX_ROOTS_TRIED], *siblings]
    roots = [root for root in others if are_files(root, paths)]
    return roots[0] if len(roots) == 1 else None
