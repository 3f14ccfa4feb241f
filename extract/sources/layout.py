"""What the folders that images lie in mean: classes, or the sides of a split with the classes in
them.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.cache.text import normalize_text
from headrace.extract.errors import SourceError, yaml_list
from headrace.extract.images.byte_ranges import printable

Layout = Literal["auto", "classes", "split"]
Folders = tuple[str, ...]  # the folders that a file lies in, from the outermost below the source

# What people call the sides of a split, in columns, as folders, and before the number of a shard.
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
_SPLIT_NAME = re.compile(
    rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


def split_word(file_name: str) -> str | None:
    """The side of a split that a file's name begins with:

    `train-00000-of-00002.parquet`; None where there is none.
    """
    match = _SPLIT_NAME.match(file_name)
    return match[1] if match else None


@dataclass(frozen=True)
class Labels:
    """What the folders of N images say."""

    labels: list[str | None]  # None for an image that lies in no class's folder
    splits: list[str | None] | None  # the outer folders; None where they are the classes
    notes: tuple[str, ...]


def read_layout(
    images: Sequence[Folders],
    others: Collection[Folders],
    layout: Layout,
    source: str,
    *,
    labelled: bool = True,
) -> Labels:
    """Labels, and sides of a split, from the folders of the images.

    others: the folders in which other files lie, and empty folders. labelled: labels are wanted;
    else nothing is refused. Raises SourceError for a class or a side none of whose files is an
    image, and where `auto` could mean both layouts, with how to say which.
    """
    if not labelled:
        return Labels([None] * len(images), None, ())
    depth = _split_depth(images, layout, source)
    _refuse_vanished(images, others, depth, source)
    written: dict[str, set[str]] = defaultdict(set)  # the folders' own names by label
    labels: list[str | None] = []
    for folders in images:
        label = normalize_text(printable(folders[depth])) if len(folders) > depth else None
        if label is not None:
            written[label].add(folders[depth])
        labels.append(label)
    notes = [
        f"the folders {', '.join(map(repr, sorted(names)))} are one class, {label!r}: they differ "
        "in blanks or in the form of accents alone"
        for label, names in sorted(written.items())
        if len(names) > 1
    ]
    if not depth:
        return Labels(labels, None, tuple(notes))
    sides = sorted({folders[0] for folders in images if folders})
    notes.append(
        f"the folders {', '.join(sides)} are the sides of a split, and the folders in them the "
        "classes"
    )
    if unlabelled := sum(label is None for label in labels):
        notes.append(f"{unlabelled:,} images lie in no class's folder and have no label")
    return Labels(labels, [folders[0] if folders else None for folders in images], tuple(notes))


def _split_depth(images: Sequence[Folders], layout: Layout, source: str) -> int:
    """0 where the outermost folders are the classes, 1 where they are the sides of a split."""
    if layout != "auto":
        return int(layout == "split")
    outer = sorted({folders[0] for folders in images if folders})
    sides = [name for name in outer if name.lower() in SPLIT_WORDS]
    others = [name for name in outer if name.lower() not in SPLIT_WORDS]
    inner = {
        folders[1]
        for folders in images
        if len(folders) > 1 and SPLIT_WORDS.get(folders[0].lower()) == "train"
    }
    if not sides or (others and len({SPLIT_WORDS[name.lower()] for name in sides}) < 2):
        return 0
    if others:
        raise SourceError(
            _ambiguous(
                source,
                f"holds {', '.join(sides)}, which are words for the sides of a split, and "
                f"{', '.join(others[:5])}",
            )
        )
    if len(outer) == 1 and len(inner) < 2:
        return 0  # one folder that happens to have this name; a class too few is told elsewhere
    if not inner:
        raise SourceError(
            _ambiguous(
                source,
                f"holds {', '.join(sides)}, which are words for the sides of a split, without a "
                "class's folder in train",
            )
        )
    return 1


def _ambiguous(source: str, found: str) -> str:
    return (
        f"{source} {found}. Are these the classes, or a split with the classes in them? Say which "
        "in the recipe, images.layout: classes or images.layout: split (headrace init: --layout "
        "split); or move away what does not belong, or leave it out: images.exclude: [NAME] "
        "(headrace init: --exclude NAME)"
    )


def _refuse_vanished(
    images: Sequence[Folders], others: Collection[Folders], depth: int, source: str
) -> None:
    """Raises SourceError for classes, and sides of a split, that would be gone whole."""
    if depth:
        others = [folders for folders in others if folders and folders[0].lower() in SPLIT_WORDS]
    for level in range(depth + 1):
        used = {folders[level] for folders in images if len(folders) > level}
        there = {folders[level] for folders in others if len(folders) > level}
        if vanished := sorted(there - used):
            names = ", ".join(printable(name) for name in vanished[:5])
            what = "class" if level == depth else "side of the split"
            raise SourceError(
                f"{source}: no file in the folder {names} can be used as an image, so that this "
                f"{what} would be missing. Add images that can be read, or leave it out: "
                f"images.exclude: {yaml_list(map(printable, vanished[:5]))} in the recipe "
                f"(headrace init: --exclude {shlex.quote(printable(vanished[0]))})"
            )
