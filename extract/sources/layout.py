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
from headrace.extract.images.byte_ranges import printable_name

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
    """Return the side of a split that a name begins with (`train-00000-of-00002.parquet`)."""
    name_match = _SPLIT_NAME.match(file_name)
    return name_match[1] if name_match else None


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
    for parent_folders in image_folders:
        label = (
            normalize_text(printable_name(parent_folders[class_depth]))
            if len(parent_folders) > class_depth
            else None
        )
        if label is not None:
            folder_names_by_label[label].add(parent_folders[class_depth])
        labels.append(label)
    notes = [
        f"the folders {', '.join(map(repr, sorted(folder_names)))} are one class, {label!r}: they "
        "differ in blanks or in the form of accents alone"
        for label, folder_names in sorted(folder_names_by_label.items())
        if len(folder_names) > 1
    ]
    if not class_depth:
        return FolderLabels(labels, None, tuple(notes))
    split_sides = sorted({parent_folders[0] for parent_folders in image_folders if parent_folders})
    notes.append(
        f"the folders {', '.join(split_sides)} are the sides of a split, and the folders in them "
        "the classes"
    )
    if n_unlabelled := sum(label is None for label in labels):
        notes.append(
            f"{count_text(n_unlabelled, 'image lies', 'images lie')} in no class's folder and have "
            "no label"
        )
    return FolderLabels(
        labels,
        [parent_folders[0] if parent_folders else None for parent_folders in image_folders],
        tuple(notes),
    )


def _split_depth(image_folders: Sequence[FolderParts], layout: Layout, source_text: str) -> int:
    """Return the level of the classes' folders: 0 the outermost, 1 below the sides of a split."""
    if layout != "auto":
        return int(layout == "split")
    outer_names = sorted({parent_folders[0] for parent_folders in image_folders if parent_folders})
    split_names = [folder_name for folder_name in outer_names if folder_name.lower() in SPLIT_WORDS]
    other_names = [
        folder_name for folder_name in outer_names if folder_name.lower() not in SPLIT_WORDS
    ]
    train_classes = {
        parent_folders[1]
        for parent_folders in image_folders
        if len(parent_folders) > 1 and SPLIT_WORDS.get(parent_folders[0].lower()) == "train"
    }
    if not split_names or (
        other_names and len({SPLIT_WORDS[folder_name.lower()] for folder_name in split_names}) < 2
    ):
        return 0
    if other_names:
        raise SourceError(
            _ambiguous(
                source_text,
                f"holds {', '.join(split_names)}, which are words for the sides of a split, and "
                f"{', '.join(other_names[:5])}",
            )
        )
    if len(outer_names) == 1 and len(train_classes) < 2:
        return 0  # one folder that happens to have this name; callers refuse a single class
    if not train_classes:
        raise SourceError(
            _ambiguous(
                source_text,
                f"holds {', '.join(split_names)}, which are words for the sides of a split, "
                "without a class's folder in train",
            )
        )
    return 1


def _ambiguous(source_text: str, found_text: str) -> str:
    return (
        f"{source_text} {found_text}. Are these the classes, or a split with the classes in them? "
        "Say which in the recipe, images.layout: classes or images.layout: split (headrace init: "
        "--layout split); or move away what does not belong, or leave it out: images.exclude: "
        "[NAME] (headrace init: --exclude NAME)"
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
            parent_folders
            for parent_folders in other_folders
            if parent_folders and parent_folders[0].lower() in SPLIT_WORDS
        ]
    for level in range(class_depth + 1):
        used_names = {
            parent_folders[level] for parent_folders in image_folders if len(parent_folders) > level
        }
        existing_names = {
            parent_folders[level] for parent_folders in other_folders if len(parent_folders) > level
        }
        if vanished_names := sorted(existing_names - used_names):
            vanished_text = ", ".join(printable_name(name) for name in vanished_names[:5])
            folder_role = "class" if level == class_depth else "side of the split"
            only_name = used_names.pop() if level == 0 and len(used_names) == 1 else None
            alone_text = (
                f". If {only_name} holds all images, name it: headrace init "
                f"{shlex.quote(f'{source_text}/{only_name}')}"
                if only_name
                else ""
            )
            raise SourceError(
                f"{source_text}: no file in the folder {vanished_text} can be used as an image, so "
                f"that this {folder_role} would be missing. Add images that can be read, or leave "
                f"it out: images.exclude: {as_yaml_list(map(printable_name, vanished_names[:5]))} "
                "in the recipe (headrace init: --exclude "
                f"{shlex.quote(printable_name(vanished_names[0]))}){alone_text}"
            )
