"""What detection finds, and the lines and notes that all kinds of sources share."""

import contextlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import UnidentifiedImageError

from headrace.cache.count_text import count_text
from headrace.cache.text import as_text
from headrace.extract.images.decoding import has_deep_pixels
from headrace.extract.images.locators import read_bytes
from headrace.extract.images.opening import decoding_reason, open_image
from headrace.extract.sources.formats import has_image_signature
from headrace.extract.sources.listing import Listing
from headrace.pipelines.cli.detect.columns import (
    GROUP_NAMES,
    MIN_GROUPS,
    first_named,
    is_full,
    yaml_text,
)
from headrace.pipelines.selection.cautions import near_copies

_MAX_CLASSES_NAMED = 8  # in a message
# Words before a number, in paths, of what several images may be of.
_PATIENT = re.compile(
    r"(?<![a-z])(?P<word>patient|subject|case|slide|person)[-_ ]?[0-9]", re.IGNORECASE
)
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


def patients_in_names(
    image_ids: "pd.Series[Any]", labels: "pd.Series[Any] | None"
) -> tuple[str, str, list[str]]:
    """Return the recipe's lines for the images and the task, and a note, where the images' paths
    name patients, or the like, such as `patient00012/study1/view1.jpg`; else nothing.

    labels: the class of each image; None where the target is no class.
    """
    first_match = _PATIENT.search(next(iter(image_ids), ""))
    if first_match is None:
        return "", "", []
    word = first_match["word"]
    pattern = f"(?<![A-Za-z])(?P<{word.lower()}>{word}[-_ ]?[0-9]+)"
    groups = image_ids.str.extract(pattern, expand=False)
    if groups.isna().any() or not MIN_GROUPS <= groups.nunique() < len(groups):
        return "", "", []
    # Persons to be told apart: each is a class, which no split by persons could divide.
    if labels is not None and (groups.groupby(as_text(labels)).nunique() == 1).all():
        return "", "", []
    return (
        f"  name_pattern: {yaml_text(pattern)}      # of the paths; named groups are columns\n",
        f"\n  group: {word.lower()}",
        [
            f"the paths name {groups.nunique():,} {word.lower()}s, such as {groups.iloc[0]}, whose "
            "images stay on one side of every split (images.name_pattern, task.group)"
        ],
    )


def named_classes(class_counts: "pd.Series[Any]") -> str:
    """Return "3 classes (crane, heron, stork)"."""
    class_names = sorted(map(str, class_counts.index))
    more_text = ", …" if len(class_names) > _MAX_CLASSES_NAMED else ""
    classes_text = count_text(len(class_names), "class", "classes")
    return f"{classes_text} ({', '.join(class_names[:_MAX_CLASSES_NAMED])}{more_text})"


def split_sizes(split_column: "pd.Series[Any]") -> str:
    """Return "300 in train, 100 in test"."""
    return ", ".join(
        f"{count:,} in {side_name}" for side_name, count in split_column.value_counts().items()
    )


def example_paths(samples: pd.DataFrame) -> tuple[str, ...]:
    """Return the paths of a few images, spread over the listing."""
    step = max(1, len(samples) // _N_IMAGES_DECODED)
    return tuple(samples["path"].astype(str)[::step][:_N_IMAGES_DECODED])


def listing_notes(listing: Listing) -> tuple[str, ...]:
    """Return what is left out of the listing, and what a look at some of its images showed."""
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


def init_command(path: Path) -> str:
    """Return the command that writes a recipe for another file or folder, quoted for a shell."""
    return f"headrace init {shlex.quote(str(path))}"


def path_text(path: Path, recipe_folder: Path) -> str:
    """Return a path as a person would write it: relative, unless it starts two folders up."""
    relative_path = os.path.relpath(path.absolute(), recipe_folder)
    return yaml_text(str(path.absolute()) if relative_path.startswith("../..") else relative_path)
