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


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
_FLAG_NAME = re.compile(r"is[ _-]?(?P<side>.+)", re.IGNORECASE)


def side_of_cell(cell: str, column_name: str) -> str | None:
    """Return the side of a split that a cell stands for: train, validation or test; None if it
    stands for none.

    A cell is one of SPLIT_WORDS, has one side's word among its words (`PublicTest`, `train2017`),
    or is the yes or no of a column such as `is_valid`.
    """
    sides = {SPLIT_WORDS[word] for word in _words(cell) if word in SPLIT_WORDS}
    if len(sides) == 1:
        return sides.pop()
    if (flag := _FLAG_NAME.fullmatch(column_name)) is None or cell.lower() not in (*_YES, *_NO):
        return None
    flag_sides = {SPLIT_WORDS[word] for word in _words(flag["side"]) if word in SPLIT_WORDS}
    if len(flag_sides) != 1:
        return None
    (side,) = flag_sides
    if cell.lower() in _YES:
        return side
    return "test" if side == "train" else "train"


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def sides_of_folders(names: Collection[str]) -> dict[str, str]:
    """Return {name: side} of folders that are the sides of a split, by their names: those that are
    a word for a side, else those that differ in such a word alone (`seg_train`, `seg_test`).
    """
    exact = {name: SPLIT_WORDS[name.lower()] for name in names if name.lower() in SPLIT_WORDS}
    if exact:
        return exact
    with_word = {name: side for name in names if (side := split_side_in(name)) is not None}
    stems = {SPLIT_IN_NAME.sub("", name) for name in with_word}
    return with_word if len(stems) == 1 and len(set(with_word.values())) > 1 else {}


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
    is_split = _is_split(image_folders, layout, source_text)
    class_depth = _class_depth(image_folders) if is_split else 0
    _refuse_vanished(image_folders, other_folders, class_depth, source_text)
    unlabelled_sides = _sides_without_classes(image_folders, class_depth) if is_split else {}
    folder_names_by_label: dict[str, set[str]] = defaultdict(set)  # the folders' own names by label
    labels: list[str | None] = []
    for folders in image_folders:
        if len(folders) <= class_depth or folders[0] in unlabelled_sides:
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
    notes += [
        f"{side}/{folder} is no class of train, and its images have no label"
        for side, folder in sorted(unlabelled_sides.items())
    ]
    n_below_sides = sum(len(folders) <= class_depth for folders in image_folders)
    if n_unlabelled := n_below_sides:
        notes.append(
            f"{count_text(n_unlabelled, 'image lies', 'images lie')} in no class's folder and have "
            "no label"
        )
    return FolderLabels(labels, splits, tuple(notes))


def _is_split(image_folders: Sequence[FolderParts], layout: Layout, source_text: str) -> bool:
    """Return whether the outermost folders are the sides of a split, and not classes."""
    if layout != "auto":
        return layout == "split"
    outer_names = sorted({folders[0] for folders in image_folders if folders})
    side_of_name = sides_of_folders(outer_names)
    split_names = list(side_of_name)
    other_names = [name for name in outer_names if name not in side_of_name]
    # One word of a split among other folders: a class that happens to have this name.
    if not split_names or (other_names and len(set(side_of_name.values())) < 2):
        return False
    train_classes = {
        folders[1]
        for folders in image_folders
        if len(folders) > 1 and side_of_name.get(folders[0]) == "train"
    }
    if len(outer_names) == 1 and len(train_classes) < 2:
        return False  # one folder that happens to have this name; callers refuse a single class
    if train_classes and not other_names:
        return True
    # Taken for the other one, either would give a head of classes that nobody meant.
    others = f" and {', '.join(other_names[:5])}" if other_names else ""
    belongs_not = other_names[:5] or split_names[:1]
    lacking = "" if other_names else " without a class's folder in train"
    raise SourceError(
        f"{source_text} holds {', '.join(split_names)}, which are words for the sides of a split,"
        f"{others}{lacking}. Are these the classes, or a split with the classes in them? Say which "
        "in the recipe, images.layout: classes or images.layout: split (headrace init: --layout "
        f"split); or move away what does not belong, or leave it out: images.exclude: "
        f"{as_yaml_list(list(map(printable_name, belongs_not)))} (headrace init: "
        f"{' '.join(f'--exclude {shlex.quote(printable_name(name))}' for name in belongs_not)})"
    )


def _class_depth(image_folders: Sequence[FolderParts]) -> int:
    """Return the level of the classes' folders in the sides of a split: 1, or below folders that
    each side has one of, such as `seg_train/seg_train/forest`.
    """
    depth = 1
    while True:
        inner_names: dict[str, set[str]] = defaultdict(set)
        for folders in image_folders:
            if folders:
                inner_names[folders[0]].add(folders[depth] if len(folders) > depth else "")
        is_only_folder = all(len(names) == 1 and "" not in names for names in inner_names.values())
        if not inner_names or not is_only_folder or all(len(f) <= depth + 1 for f in image_folders):
            return depth
        depth += 1


def _sides_without_classes(
    image_folders: Sequence[FolderParts], class_depth: int
) -> dict[str, str]:
    """Return {side: its folder} of sides whose images have no label: beside the classes of train
    they have one folder, which is none of these, such as `val/images` or `test/unknown`.
    """
    inner_names: dict[str, set[str]] = defaultdict(set)
    for folders in image_folders:
        if len(folders) > class_depth:
            inner_names[folders[0]].add(folders[class_depth])
    side_of_name = sides_of_folders(inner_names)
    train_classes = {
        name
        for side in inner_names
        if side_of_name.get(side) == "train"
        for name in inner_names[side]
    }
    return {
        side: next(iter(names))
        for side, names in inner_names.items()
        if len(train_classes) > 1 and len(names) == 1 and not names & train_classes
    }


def _refuse_vanished(
    image_folders: Sequence[FolderParts],
    other_folders: Collection[FolderParts],
    class_depth: int,
    source_text: str,
) -> None:
    """Raise SourceError for classes and sides of a split whose folders have no image."""
    if class_depth:
        # Folders beside the sides of the split hold neither sides nor classes.
        outer_names = {folders[0] for folders in (*image_folders, *other_folders) if folders}
        side_of_name = sides_of_folders(outer_names)
        other_folders = [
            folders for folders in other_folders if folders and folders[0] in side_of_name
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
