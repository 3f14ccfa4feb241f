"""The listing of a source: the samples that can be used, and a count of everything that cannot."""

import posixpath
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import normalize_text

_EXAMPLES = 3  # names kept of the entries left out for one reason
EXCLUDED_ENTRIES = "entries that images.exclude names"

# What is drawn onto an image, in a file of its own: `1_mask.png` beside `1.png`.
_MASK = re.compile(
    r"(?P<image>.+?)(?P<tail>[-_. ](masks?|seg|segmentation|ground_?truth|gt|annotation|labels?)"
    r"([-_ ]?\d)?)",
    re.IGNORECASE,
)
# The same in a folder of its own: `masks/1.png` beside `images/1.png`.
_MASK_FOLDER = re.compile(
    r"masks?|trimaps?|seg|segmentations?|ground_?truth|gt|annotations?|labels?", re.IGNORECASE
)
_IMAGE_FOLDER = re.compile(r"images?|imgs?|photos?|pictures?|scans?|raw|inputs?", re.IGNORECASE)

# the noun of a reason, and a verb right after it
_PLURAL = re.compile(
    r"\b(file|image|row|folder|name|link|member|archive|array|table|entr)(s|ies)\b"
    r"( that (are|name)\b)?"
)
_SINGULAR_ENDING = {"s": "", "ies": "y"}
_SINGULAR_VERB = {None: "", "are": " that is", "name": " that names"}


def _singular(reason: str) -> str:
    """Return "row that names no image" of "rows that name no image"."""
    return _PLURAL.sub(
        lambda match: match[1] + _SINGULAR_ENDING[match[2]] + _SINGULAR_VERB[match[4]],
        reason,
        count=1,
    )


@dataclass(frozen=True)
class LeftOut:
    """Entries of a source that are not used, for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...]  # the first few names

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.examples) else ""
        examples = f": {', '.join(self.examples)}{more}" if self.examples else ""
        return f"{count_text(self.count, _singular(self.reason), self.reason)}{examples}"


@dataclass(frozen=True)
class Listing:
    """The images of a source.

    found = len(samples) + annotations + the sum of left_out.
    """

    # One row per image: `id`, `path` (a file or a locator), then the user's columns.
    samples: pd.DataFrame
    found: int  # files of a folder, rows of a table, members of an archive, images of an array
    left_out: tuple[LeftOut, ...] = ()
    annotations: int = 0  # entries that hold labels of the samples: side files of an archive
    notes: tuple[str, ...] = ()  # what was assumed in reading, for a person


@dataclass
class Tally:
    """Counts of the entries that a reader meets, and of those that are left out, by reason."""

    found: int = 0
    annotations: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    # {pattern of `images.exclude`: whether it has matched an entry}
    patterns: dict[str, bool] = field(default_factory=dict)

    def leave_out(self, reason: str, *names: str, count: int = 1) -> None:
        """Count entries under a reason, words that follow a number: "files without a suffix"."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples[reason] = [*self.examples.get(reason, []), *names][:_EXAMPLES]

    def leave_out_rows(self, reason: str, names: pd.Series, is_left_out: pd.Series) -> None:
        """Count the marked rows under a reason; `names` has a name for each row."""
        if count := int(is_left_out.sum()):
            self.leave_out(reason, *map(str, names[is_left_out].head(_EXAMPLES)), count=count)

    def exclude_rows(self, samples: pd.DataFrame, patterns: Collection[str]) -> pd.DataFrame:
        """Return the samples whose ids `images.exclude` does not match, and count the others."""
        if not patterns:
            return samples
        is_excluded = samples["id"].map(lambda name: self.excludes(patterns, name)).astype(bool)
        self.leave_out_rows(EXCLUDED_ENTRIES, samples["id"], is_excluded)
        return samples[~is_excluded].reset_index(drop=True)

    def excludes(self, patterns: Collection[str], *names: str) -> bool:
        """Return whether a name of an entry, or of a folder above it, matches `images.exclude`."""
        # Every pattern is tried, also after a match: one that matches nothing becomes a note.
        matches = {pattern: any(_matches(name, pattern) for name in names) for pattern in patterns}
        for pattern, is_match in matches.items():
            self.patterns[pattern] = is_match or self.patterns.get(pattern, False)
        return any(matches.values())

    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the reasons with their counts, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(
            LeftOut(reason, count, tuple(self.examples[reason])) for reason, count in ordered
        )

    def listing(self, samples: pd.DataFrame, notes: Iterable[str] = ()) -> Listing:
        """Return the listing of `samples` with these counts."""
        notes = tuple(notes)
        unmatched = [repr(pattern) for pattern, matched in self.patterns.items() if not matched]
        if unmatched:
            notes += (f"images.exclude: {', '.join(unmatched)} matches nothing",)
        return Listing(samples, self.found, self.left_out(), self.annotations, notes)


def _matches(name: str, pattern: str) -> bool:
    """Return whether a name, or a folder that it lies in, is or matches a shell pattern."""
    plain_pattern = normalize_text(pattern).removeprefix("./").rstrip("/")
    name_parts = normalize_text(name).split("/")
    prefixes = ("/".join(name_parts[: count + 1]) for count in range(len(name_parts)))
    return any(prefix == plain_pattern or fnmatchcase(prefix, plain_pattern) for prefix in prefixes)


def is_mask_folder(name: str) -> bool:
    """Return whether a folder is named as one of masks, which are drawn onto images."""
    return _MASK_FOLDER.fullmatch(name) is not None


def is_image_folder(name: str) -> bool:
    """Return whether a folder is named as one of images."""
    return _IMAGE_FOLDER.fullmatch(name) is not None


def mask_patterns(image_ids: Iterable[str]) -> dict[str, str]:
    """Return {id: pattern that leaves it out} of the images that are named like masks or the like
    of images beside them.
    """
    stem_of = {image_id: posixpath.splitext(image_id)[0] for image_id in image_ids}
    stems = set(stem_of.values())
    patterns = {
        image_id: f"*{match['tail']}{image_id.removeprefix(stem)}"
        for image_id, stem in stem_of.items()
        for match in [_MASK.fullmatch(stem)]
        if match is not None and match["image"] in stems
    }
    # {place: names of the images anywhere below its folder of images}
    names_of_images: dict[str, set[str]] = defaultdict(set)
    # {(place, its folder of masks): ids of the images below}
    ids_of_masks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image_id, stem in stem_of.items():
        *folders, name = stem.split("/")
        for level, folder in enumerate(folders):
            place = "/".join(folders[:level])
            if is_image_folder(folder):
                names_of_images[place].add(name)
            elif is_mask_folder(folder):
                ids_of_masks[place, folder].append(image_id)
    for (place, folder), mask_ids in ids_of_masks.items():
        for mask_id in mask_ids:
            if posixpath.basename(stem_of[mask_id]) in names_of_images.get(place, ()):
                patterns[mask_id] = f"*/{folder}" if place else folder
    return patterns


def notes_on_masks(image_ids: Iterable[str]) -> list[str]:
    """Return a note if images are named like masks or the like of images beside them; else []."""
    pattern_of_mask = mask_patterns(image_ids)
    if not pattern_of_mask:
        return []
    patterns = sorted(set(pattern_of_mask.values()))
    options = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in patterns)
    return [
        f"{count_text(len(pattern_of_mask), 'image is named', 'images are named')} like masks of "
        f"those beside them, such as {next(iter(pattern_of_mask))}, and count as images. To leave "
        f"them out: images.exclude: [{', '.join(map(repr, patterns))}] (headrace init and predict: "
        f"{options})"
    ]


def join_listings(listings: Iterable[Listing]) -> Listing:
    """Return several listings as one, in their order."""
    parts = list(listings)
    tally = Tally(sum(part.found for part in parts), sum(part.annotations for part in parts))
    for left_out in (left_out for part in parts for left_out in part.left_out):
        tally.leave_out(left_out.reason, *left_out.examples, count=left_out.count)
    # Each note once: the sides of a split mostly have the same.
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return tally.listing(pd.concat([part.samples for part in parts], ignore_index=True), notes)
