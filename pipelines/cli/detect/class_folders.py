"""Detection of classes in a folder of images: by its sub-folders, or by the images' names."""

import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import normalize_text
from headrace.extract.sources.layout import side_of_cell, sides_of_folders
from headrace.extract.sources.listing import Listing, mask_patterns, notes_on_masks
from headrace.extract.sources.read import read_source
from headrace.extract.sources.source import ImageSource
from headrace.pipelines.cli.detect.band_files import find_band_files
from headrace.pipelines.cli.detect.columns import targets_text, task_section, yaml_text
from headrace.pipelines.cli.detect.finding import (
    Finding,
    example_paths,
    init_command,
    listing_notes,
    named_classes,
    path_text,
    patients_in_names,
    split_sizes,
)
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.targets import alike_classes, name_some

_CLASS_AND_NUMBER = r"(?P<label>[^/]*[^-/_. \d])[-_. ]*\d+\.\w+$"
_MAX_NAME_PARTS = 8  # that a proposed pattern names
_MOST = 0.9  # of the names, which are alike


def detect_class_folders(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
    """Return the lines for a folder whose sub-folders, or whose images' names, are the classes.

    Raises InvalidInput where there are no two classes.
    """
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
                    f". If the folders in it are the classes, try: {init_command(class_folder)}"
                )
        elif (pattern := _names_in_parts(samples["id"])) is not None:
            hint_text = (
                ". If their names say it, name the parts that matter, one of them label: "
                f"{init_command(folder)} --name-pattern {shlex.quote(pattern)}"
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
        f"{count_text(len(samples), 'image')} in {named_classes(class_counts)}, {sizes_text} each"
    )
    layout_text, task_lines = "one sub-folder per class", "the name of the sub-folder"
    split_notes: list[str] = []
    if "split" in samples:
        layout_text = "train, val or test, and in it one sub-folder per class"
        task_lines = "the name of the inner folder"
        sentence += f"; {split_sizes(samples['split'])}"
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
    named_samples = samples if "split" not in samples else samples.iloc[:0]
    name_lines, group_line, name_notes = patients_in_names(
        named_samples["id"], named_samples["label"]
    )
    return Finding(
        images=f"  folder: {path_text(folder, recipe_folder)}      # {layout_text}\n{name_lines}",
        task=f"  target: label                  # {task_lines}{group_line}",
        sentence=sentence,
        notes=(
            *alike_classes(class_counts.index),
            *split_notes,
            *name_notes,
            *_inner_folders(folder, samples),
            *([] if band_files is None else [band_files.message(folder)]),
            *listing_notes(listing),
        ),
        examples=example_paths(samples),
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
    images_text = "" if len(labels) != 1 else f", or {init_command(folder / labels[0])}"
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
                f"so that each of the classes may be a set of its own: {init_command(one_set)}"
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
        images=f"  folder: {path_text(folder, recipe_folder)}\n"
        f"  name_pattern: '{_CLASS_AND_NUMBER}'      # named groups are columns\n",
        task="  target: label",
        sentence=f"{count_text(len(listing.samples), 'image')} in {named_classes(class_counts)}",
        notes=(
            "no sub-folders for classes; the words that file names begin with are taken for them "
            "(images.name_pattern)",
            *listing_notes(listing),
        ),
        examples=example_paths(listing.samples),
    )


def detect_names(folder: Path, source: ImageSource, recipe_folder: Path) -> Finding:
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
        images=f"  folder: {path_text(folder, recipe_folder)}\n"
        f"  name_pattern: {yaml_text(name_pattern)}      # named groups are columns\n",
        task=task_lines,
        sentence=f"{count_text(len(samples), 'image')}, {targets_text(samples, targets)}",
        notes=(*task_notes, *listing_notes(listing)),
        examples=example_paths(samples),
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
