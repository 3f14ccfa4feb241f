"""The meaning of the folders that hold images: classes, or sides of a split with classes."""

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.cache.count_text import count_text
from headrace.cache.text import normalize_text
from headrace.extract.errors import SourceError, as_yaml_list
from headrace.extract.images.locators import printable_name

Layout = Literal["auto", "classes", "split"]
# Names of the folders that a file lies in, from the outermost below the source.
FolderParts = tuple[str, ...]

# {usual name of a side of a split: the side}, in columns, as folders, and in names of shards.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "holdout": "test",
}
# The longest first; otherwise `training` would be read as `train`.
_ANY_SPLIT_WORD = "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
_SPLIT_NAME = re.compile(rf"({_ANY_SPLIT_WORD})(?![a-z])", re.IGNORECASE)
SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({_ANY_SPLIT_WORD})(?![a-z])", re.IGNORECASE)


def split_side(file_name: str) -> str | None:
    """Return the word for a side that a name begins with, as it is written, or None.

    `train` for `train-00000-of-00002.parquet`, `val` for `val.csv`.
    """
    name_match = _SPLIT_NAME.match(file_name)
    return name_match[1] if name_match else None


def split_sides(names: Sequence[str]) -> list[str] | None:
    """Return the sides of a split that the names begin with; None if one of them begins with no
    side, or all begin with the same.
    """
    sides = [side for name in names if (side := split_side(name))]
    is_split = len(sides) == len(names) and len({side.lower() for side in sides}) > 1
    return sides if is_split else None


def split_side_in(name: str) -> str | None:
    """Return the side of a split that a name has anywhere (`emnist-train-images`), or None."""
    match = SPLIT_IN_NAME.search(name)
    return SPLIT_WORDS[match[0].lower()] if match else None


@dataclass(frozen=True)
class FolderLabels:
    """Labels and sides of a split that the folders of N images give."""

    labels: list[str | None]  # N; None for an image that lies in no class's folder
    splits: list[str | None] | None  # N names of outer folders; None if those are the classes
    notes: tuple[str, ...]  # what was assumed


def read_layout(
    image_folders: Sequence[FolderParts],
    other_folders: Collection[FolderParts],
    layout: Layout,
    source_text: str,
    *,
    labelled: bool = True,
) -> FolderLabels:
    """Return labels, and sides of a split, from the folders of the images.

    image_folders: for each of N images the folders that it lies in.
    other_folders: the folders of other files, and empty folders.
    layout: "classes" if the outermost folders are the classes, "split" if they are the sides of a
    split with the classes in them, "auto" to decide by their names.
    source_text: the source, to begin a message with.
    labelled: False if no labels are needed; then nothing is refused.

    Raises SourceError for a class or a side whose folder has no image, and for "auto" where both
    layouts are possible, with how to say which.
    """
    if not labelled:
        return FolderLabels([None] * len(image_folders), None, ())
    class_depth = _split_depth(image_folders, layout, source_text)
    _refuse_vanished(image_folders, other_folders, class_depth, source_text)
    folder_names_by_label: dict[str, set[str]] = defaultdict(set)  # the folders' own names by label
    labels: list[str | None] = []
    for folders in image_folders:
        if len(folders) <= class_depth:
            labels.append(None)
            continue
        label = normalize_text(printable_name(folders[class_depth]))
        folder_names_by_label[label].add(folders[class_depth])
        labels.append(label)
    notes = [
        f"the folders {', '.join(map(repr, sorted(folder_names)))} are one class, {label!r}: they "
        "differ in blanks or in the form of accents alone"
        for label, folder_names in sorted(folder_names_by_label.items())
        if len(folder_names) > 1
    ]
    if not class_depth:
        return FolderLabels(labels, None, tuple(notes))
    splits = [folders[0] if folders else None for folders in image_folders]
    notes.append(
        f"the folders {', '.join(sorted(filter(None, set(splits))))} are the sides of a split, and "
        "the folders in them the classes"
    )
    if n_unlabelled := sum(label is None for label in labels):
        notes.append(
            f"{count_text(n_unlabelled, 'image lies', 'images lie')} in no class's folder and have "
            "no label"
        )
    return FolderLabels(labels, splits, tuple(notes))


def _split_depth(image_folders: Sequence[FolderParts], layout: Layout, source_text: str) -> int:
    """Return the level of the classes' folders: 0 the outermost, 1 below the sides of a split."""
    if layout != "auto":
        return int(layout == "split")
    outer_names = sorted({folders[0] for folders in image_folders if folders})
    split_names = [name for name in outer_names if name.lower() in SPLIT_WORDS]
    other_names = [name for name in outer_names if name.lower() not in SPLIT_WORDS]
    sides = {SPLIT_WORDS[name.lower()] for name in split_names}
    # One word of a split among other folders: a class that happens to have this name.
    if not sides or (other_names and len(sides) < 2):
        return 0
    train_classes = {
        folders[1]
        for folders in image_folders
        if len(folders) > 1 and SPLIT_WORDS.get(folders[0].lower()) == "train"
    }
    if len(outer_names) == 1 and len(train_classes) < 2:
        return 0  # one folder that happens to have this name; callers refuse a single class
    if train_classes and not other_names:
        return 1
    # Taken for the other one, either would give a head of classes that nobody meant.
    others = f" and {', '.join(other_names[:5])}" if other_names else ""
    lacking = "" if other_names else " without a class's folder in train"
    raise SourceError(
        f"{source_text} holds {', '.join(split_names)}, which are words for the sides of a split,"
        f"{others}{lacking}. Are these the classes, or a split with the classes in them? Say which "
        "in the recipe, images.layout: classes or images.layout: split (headrace init: --layout "
        "split); or move away what does not belong, or leave it out: images.exclude: [NAME] "
        "(headrace init: --exclude NAME)"
    )


def _refuse_vanished(
    image_folders: Sequence[FolderParts],
    other_folders: Collection[FolderParts],
    class_depth: int,
    source_text: str,
) -> None:
    """Raise SourceError for classes and sides of a split whose folders have no image."""
    if class_depth:
        # Folders beside the sides of the split hold neither sides nor classes.
        other_folders = [
            folders for folders in other_folders if folders and folders[0].lower() in SPLIT_WORDS
        ]
    for level in range(class_depth + 1):
        used_names = {folders[level] for folders in image_folders if len(folders) > level}
        existing_names = {folders[level] for folders in other_folders if len(folders) > level}
        if vanished_names := sorted(existing_names - used_names):
            names = list(map(printable_name, vanished_names[:5]))
            folder_role = "class" if level == class_depth else "side of the split"
            alone_text = ""
            if level == 0 and len(used_names) == 1:
                # The photos and a folder of something else, and not two classes.
                (only_name,) = used_names
                only_folder = shlex.quote(f"{source_text}/{only_name}")
                alone_text = (
                    f". If {only_name} holds all images, name it: headrace init {only_folder}"
                )
            raise SourceError(
                f"{source_text}: no file in the folder {', '.join(names)} can be used as an image, "
                f"so that this {folder_role} would be missing. Add images that can be read, or "
                f"leave it out: images.exclude: {as_yaml_list(names)} in the recipe (headrace "
                f"init: --exclude {shlex.quote(names[0])}){alone_text}"
            )
