"""Detection of a recipe's lines from a folder, a table, archives or an array of images."""

import contextlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import UnidentifiedImageError

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.text import as_text, normalize_text
from headrace.extract.errors import SourceError, as_yaml_list
from headrace.extract.images.decoding import has_deep_pixels
from headrace.extract.images.locators import is_locator, locator_file, read_bytes
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
from headrace.extract.sources.layout import (
    SPLIT_WORDS,
    Layout,
    side_of_cell,
    sides_of_folders,
    split_side_in,
    split_sides,
)
from headrace.extract.sources.listing import (
    Listing,
    is_image_folder,
    mask_patterns,
    notes_on_masks,
)
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.table import Table, read_table_file
from headrace.extract.sources.tabular import is_table, table_files
from headrace.pipelines.cli.detect.band_files import find_band_files
from headrace.pipelines.cli.detect.columns import (
    GROUP_NAMES,
    MIN_GROUPS,
    few_valued,
    first_named,
    is_full,
    n_distinct,
    named_target,
    nearly_named,
    table_doubts,
    targets_text,
    task_section,
    yaml_text,
)
from headrace.pipelines.cli.detect.pixels import detect_pixels
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.predict.tables import is_predictions
from headrace.pipelines.predict.units import is_unit_table
from headrace.pipelines.recipe.targets import alike_classes, name_some
from headrace.pipelines.selection.cautions import near_copies

# Names of numbered folders that hold parts of one set; those of others may be classes.
_PART_OF_SET = (
    r"(part|batch|chunk|shard|set|images?|imgs?|photos?|data|folder|dir|vol|disk)[ ._-]*$"
)
_CLASS_AND_NUMBER = r"(?P<label>[^/]*[^-/_. \d])[-_. ]*\d+\.\w+$"
_MAX_CLASSES_NAMED = 8  # in a message
_MAX_NAME_PARTS = 8  # that a proposed pattern names
# Words before a number, in paths, of what several images may be of.
_PATIENT = re.compile(
    r"(?<![a-z])(?P<word>patient|subject|case|slide|person)[-_ ]?[0-9]", re.IGNORECASE
)
_FOLDER_PATTERN = "}/*"  # ends the pattern of a table with a row for each folder
_MOST = 0.9  # of the names, which are alike
_MAX_ROOTS_TRIED = 50  # folders beside a table: of many, none is the one of all images
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
    class_names: tuple[str, ...] = ()  # of one target with a class for each image


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
        finding = _detect_names(location, replace(source, name_pattern=name_pattern), recipe_folder)
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
    with_files = {
        table: finding for table, finding in table_findings.items() if _has_files(finding)
    }
    # A table of names for classes (`{"0": "cat"}`) leads to no file, as the images' own does.
    name_tables = [table for table in tables if table not in (*with_files, *prediction_tables)]
    prediction_notes = [
        f"{path.name} is a table of predictions and was not read" for path in prediction_tables
    ]
    try:
        finding = _detect_class_folders(folder, source, recipe_folder)
    except HeadraceError as error:
        table_findings = with_files or table_findings
        if len(table_findings) > 1 and (pattern := _pattern_of_sides(list(table_findings))):
            table_findings = {
                pattern: _detect_table(
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
            f"their labels, too: for that, {_init_command(next(iter(other_tables)))}"
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
    if _has_files(table_finding) and _FOLDER_PATTERN in table_finding.images:
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


def _detect_class_folders(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    listing = read_source(source)
    samples = listing.samples
    class_counts = samples["label"].value_counts()
    band_files = find_band_files(samples)
    # Before names are taken for classes: those of bands would be.
    if band_files is not None and band_files.lacks_classes:
        raise InvalidInput(f"{folder}: {band_files.message(folder)}")
    # Names in several folders may say less than the folders do.
    is_flat = samples["id"].str.rpartition("/")[0].nunique() < 2
    if is_flat and (by_names := _classes_by_names(folder, listing, recipe_folder)):
        return by_names
    if _are_shards(samples["id"]):
        raise InvalidInput(
            f"{folder}: the folders are named for the first letters of the files in them, and are "
            "no classes. Give a table of the images and their labels"
        )
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
        elif (pattern := _names_in_parts(samples["id"])) is not None:
            hint_text = (
                ". If their names say it, name the parts that matter, one of them label: "
                f"{_init_command(folder)} --name-pattern {shlex.quote(pattern)}"
            )
        raise InvalidInput(
            f"{folder}: found {found_text} ({count_text(len(samples), 'image')}). A classifier "
            "needs two classes or more: one sub-folder each, or a CSV with the columns path and "
            f"label{hint_text}"
            + "".join(f". Left out: {left_out}" for left_out in listing.left_out[:3])
        )
    _refuse_masks_as_classes(folder, samples)
    smallest, largest = class_counts.min(), class_counts.max()
    sizes_text = f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    sentence = (
        f"{count_text(len(samples), 'image')} in {_named_classes(class_counts)}, {sizes_text} each"
    )
    layout_text, task_lines = "one sub-folder per class", "the name of the sub-folder"
    split_notes: list[str] = []
    if "split" in samples:
        layout_text = "train, val or test, and in it one sub-folder per class"
        task_lines = "the name of the inner folder"
        sentence += f"; {_split_sizes(samples['split'])}"
        is_train = samples["split"].map(lambda side: side_of_cell(str(side), "split")) == "train"
        if samples["label"][is_train].nunique() < 2 and is_train.any():
            # As for the detection of anomalies, whose training images are all good.
            split_notes.append(
                "the images of train are of one class, which teaches no difference: a split of all "
                "images is drawn instead"
            )
        else:
            task_lines += "\n  split: split                  # the names of the outer folders"
    # A split of the user's own may divide patients.
    names_of_patients = samples["id"] if "split" not in samples else samples["id"].iloc[:0]
    name_lines, group_line, name_notes = _patients_in_names(names_of_patients)
    return Finding(
        images=f"  folder: {_path_text(folder, recipe_folder)}      # {layout_text}\n{name_lines}",
        task=f"  target: label                  # {task_lines}{group_line}",
        sentence=sentence,
        notes=(
            *alike_classes(class_counts.index),
            *split_notes,
            *name_notes,
            *_inner_folders(folder, samples),
            *([] if band_files is None else [band_files.message(folder)]),
            *_listing_notes(listing),
        ),
        examples=_examples(samples),
        class_names=tuple(map(str, class_counts.index)),
    )


def _are_shards(image_ids: "pd.Series[Any]") -> bool:
    """Return whether two levels of folders or more spell how the files in them begin, as
    `0/a/0af3.jpg` does: a way to store many files.
    """
    folders_of_file = image_ids.str.split("/").str[:-1]
    lengths = folders_of_file.map(lambda folders: sum(len(name) < 3 for name in folders))
    prefixes = folders_of_file.map(lambda folders: "".join(n for n in folders if len(n) < 3))
    names = image_ids.str.rpartition("/")[2]
    return bool(
        lengths.min() > 1
        and all(name.startswith(prefix) for name, prefix in zip(names, prefixes, strict=True))
    )


def _refuse_masks_as_classes(folder: Path, samples: pd.DataFrame) -> None:
    """Raise InvalidInput if one class alone would be left without the images named like masks."""
    mask_ids = mask_patterns(samples["id"])
    if not mask_ids or samples["label"][~samples["id"].isin(mask_ids)].nunique() > 1:
        return
    (note,) = notes_on_masks(samples["id"])
    labels = samples["label"][~samples["id"].isin(mask_ids)].dropna().unique()
    images_text = "" if len(labels) != 1 else f", or {_init_command(folder / labels[0])}"
    raise InvalidInput(f"{folder}: {note}{images_text}")


def _inner_folders(folder: Path, samples: pd.DataFrame) -> list[str]:
    """Return a note if all images lie in folders below those that are taken for the classes.

    Those may be the classes, and the outer ones patients (or organs, or days), of which one folder
    of each holds every class.
    """
    labelled = samples[samples["label"].notna()]
    # The level of the classes' folders: they may lie in sides of a split.
    first_folders = [normalize_text(name) for name in labelled["id"].iloc[0].split("/")[:-1]]
    depth = first_folders.index(labelled["label"].iloc[0], int("split" in samples))
    folders_of_image = [image_id.split("/")[depth:-1] for image_id in labelled["id"]]
    n_levels = min(map(len, folders_of_image))
    for level in range(1, n_levels):
        outer_of_inner: dict[str, set[str]] = {}
        for folders in folders_of_image:
            outer_of_inner.setdefault(folders[level], set()).add(folders[0])
        if len(outer_of_inner) < 2:
            continue  # BreakHis: benign/SOB/adenosis
        if sides := sides_of_folders(outer_of_inner):
            # MVTec AD: bottle/train/good, cable/train/good
            one_set = folder / folders_of_image[0][0]
            return [
                f"the folders in them are named for sides of a split ({name_some(sorted(sides))}), "
                f"so that each of the classes may be a set of its own: {_init_command(one_set)}"
            ]
        if 2 * len(outer_of_inner) > len(folders_of_image):
            continue  # a folder for each image
        recur = all(len(outer_names) > 1 for outer_names in outer_of_inner.values())
        split, between = "[^/]+/" * depth, "[^/]+/" * (level - 1)
        if depth:
            split = split.replace("[^/]+", "(?P<split>[^/]+)", 1)
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


def _detect_names(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    """Return the lines for a folder of images whose names say what `source.name_pattern` names."""
    name_pattern = source.name_pattern
    assert name_pattern is not None
    if source.kind != "folder":
        raise InvalidInput(
            f"{folder}: --name-pattern is for the names of images in a folder; a {source.kind} has "
            "columns of its own. Leave it out"
        )
    try:
        group_names = list(re.compile(name_pattern).groupindex)
    except re.error as error:
        raise InvalidInput(f"--name-pattern {name_pattern!r}: {error}") from None
    if not group_names or {"id", "path"} & set(group_names):
        raise InvalidInput(
            f"--name-pattern {name_pattern!r}: expected named groups, which become columns (not id "
            "or path), such as '(?P<label>[a-z]+)_[0-9]+'"
        )
    listing = read_source(source)
    samples = listing.samples
    columns = [
        str(name) for name in samples if name not in ("id", "path") and samples[name].notna().any()
    ]
    task_lines, targets, task_notes = task_section(samples, columns, folder)
    return Finding(
        images=f"  folder: {_path_text(folder, recipe_folder)}\n"
        f"  name_pattern: {yaml_text(name_pattern)}      # named groups are columns\n",
        task=task_lines,
        sentence=f"{count_text(len(samples), 'image')}, {targets_text(samples, targets)}",
        notes=(*task_notes, *_listing_notes(listing)),
        examples=_examples(samples),
    )


def _patients_in_names(image_ids: "pd.Series[Any]") -> tuple[str, str, list[str]]:
    """Return the recipe's lines for the images and the task, and a note, where the images' paths
    name patients, or the like, such as `patient00012/study1/view1.jpg`; else nothing.
    """
    first_match = _PATIENT.search(next(iter(image_ids), ""))
    if first_match is None:
        return "", "", []
    word = first_match["word"]
    pattern = f"(?<![A-Za-z])(?P<{word.lower()}>{word}[-_ ]?[0-9]+)"
    groups = image_ids.str.extract(pattern, expand=False)
    if groups.isna().any() or not MIN_GROUPS <= groups.nunique() < len(groups):
        return "", "", []
    return (
        f"  name_pattern: {yaml_text(pattern)}      # of the paths; named groups are columns\n",
        f"\n  group: {word.lower()}",
        [
            f"the paths name {groups.nunique():,} {word.lower()}s, such as {groups.iloc[0]}, whose "
            "images stay on one side of every split (images.name_pattern, task.group)"
        ],
    )


def _names_in_parts(image_ids: "pd.Series[Any]") -> str | None:
    """Return a pattern with a group for each part of the images' names, where nearly all have as
    many parts, of which one or more recur (UTKFace: age, gender, race, date); None elsewhere.
    """
    for separator in ("_", "-"):
        stems = (image_id.rpartition("/")[2].partition(".")[0] for image_id in image_ids)
        names = [stem.split(separator) for stem in stems]
        ((n_parts, n_alike),) = Counter(map(len, names)).most_common(1)
        if not 2 <= n_parts <= _MAX_NAME_PARTS or n_alike < _MOST * len(names):
            continue
        whole = [parts for parts in names if len(parts) == n_parts]
        n_values = [len(set(values)) for values in zip(*whole, strict=True)]
        if any(2 <= count <= len(whole) / 3 for count in n_values):
            groups = (f"(?P<part{n + 1}>[^/{separator}.]+)" for n in range(n_parts))
            return f"(^|/){separator.join(groups)}[.][^/]*$"
    return None


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
    split_text = f"; {_split_sizes(samples['split'])}" if "split" in samples else ""
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
        root = _root_elsewhere(table_data.frame[path_source], table_file.parent)
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
        name_lines, group_line, name_notes = _patients_in_names(samples["id"])
        image_lines += name_lines
        task_lines += group_line
        task_notes += name_notes
    if is_pattern and path_source.endswith(_FOLDER_PATTERN):
        # Images of one slide or patient are alike.
        folder_column = path_source.removesuffix(_FOLDER_PATTERN).rpartition("{")[2]
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
        notes=(*pattern_notes, *task_notes, *_listing_notes(listing)),
        examples=_examples(samples),
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
        f"one, {command('s.mode()[0]')}. Then {_init_command(new_path)}"
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
