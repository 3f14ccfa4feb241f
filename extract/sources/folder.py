"""Images as files in folders."""

import contextlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import normalize_text
from headrace.extract.errors import SourceError, check_unique_ids, missing_path_message
from headrace.extract.images.locators import encode_path, locator_file, printable_name
from headrace.extract.sources.formats import (
    IMAGE_SUFFIXES,
    describe_suffix,
    is_image,
    is_image_array,
    unread_format,
)
from headrace.extract.sources.layout import FolderParts, read_layout
from headrace.extract.sources.listing import EXCLUDED_ENTRIES, Listing, Tally, notes_on_masks
from headrace.extract.sources.source import ImageSource

UNMATCHED_NAMES = "names that images.name_pattern does not match"
LINKED_FOLDERS = "links to folders that are read under their own names"
HIDDEN_ENTRIES = "hidden entries (names that begin with a dot, folders that tools leave)"
# Folders that macOS's archives, Python and Synology's file servers leave: no classes.
_TOOL_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir")


class _Image(NamedTuple):
    id: str
    path: str  # of a sample, see `encode_path`
    folders: FolderParts
    groups: Mapping[str, str | None]  # named groups of `name_pattern`


def read_folder(source: ImageSource, *, labelled: bool = True) -> Listing:
    """List the images below a folder, sorted by id: columns `id`, `path`, `label`, `split` if the
    folders are those of a split, and one for each named group of `name_pattern`.

    The id is the path below the folder with forward slashes. A file is an image by its suffix, else
    by its first bytes, an array by its shape (`is_image_array`); all others are counted by what
    they are. Hidden files and folders are left out. Links are followed once, after the real
    folders.

    labelled: whether labels are needed; then a class's folder without images is refused.

    Raises SourceError when the folder is absent or has no images, saying what it has, and for
    folders that `read_layout` refuses.
    """
    image_root, name_pattern = source.path, source.name_pattern
    if not image_root.is_dir():
        raise SourceError(missing_path_message(image_root, "a folder of images"))
    tally = Tally()
    others: dict[FolderParts, str] = {}  # {folder of other files: the first of them}
    pattern = None if name_pattern is None else re.compile(name_pattern)
    images = sorted(_list_images(image_root.absolute(), source.exclude, pattern, tally, others))
    if not images:
        raise SourceError(_no_images_message(image_root, tally, others))
    if len({image.id for image in images}) < len(images):
        images = _tell_apart(images, image_root.absolute())
        check_unique_ids((image.id for image in images), str(image_root))
    image_ids = [image.id for image in images]
    read_labels = read_layout(
        [image.folders for image in images],
        others,
        source.layout,
        str(image_root),
        labelled=labelled and "(?P<label>" not in (name_pattern or ""),
    )
    columns: dict[str, Sequence[str | None]] = {
        "id": image_ids,
        "path": [image.path for image in images],
        "label": read_labels.labels,
    }
    if read_labels.splits is not None:
        columns["split"] = read_labels.splits
    for name in pattern.groupindex if pattern else ():
        columns[name] = [image.groups[name] for image in images]
    notes = [*read_labels.notes, *notes_on_masks(image_ids)]
    usual_endings = (*IMAGE_SUFFIXES, ".npy")
    unusual_names = [name for name in image_ids if not name.lower().endswith(usual_endings)]
    if unusual_names:
        notes.append(
            f"{count_text(len(unusual_names), 'file is', 'files are')} images by their content and "
            f"not by their names, such as {unusual_names[0]}"
        )
    return tally.listing(pd.DataFrame(columns), notes)


def _list_images(
    image_root: Path,
    exclude: Sequence[str],
    pattern: re.Pattern[str] | None,
    tally: Tally,
    others: dict[FolderParts, str],
) -> Iterator[_Image]:
    """Yield the images below a folder; count other files, and add their folders to `others`."""
    for folders, name, path in _walk(image_root, tally):
        shown_name = printable_name("/".join((*folders, name) if name else folders))
        is_excluded = tally.excludes(exclude, shown_name)
        if not name:
            if not is_excluded:
                others.setdefault(folders, "")
            continue
        tally.found += 1
        image_id = normalize_text(shown_name)
        match = pattern.search(image_id) if pattern else None
        if is_excluded:
            tally.leave_out(EXCLUDED_ENTRIES, shown_name)
        elif not (is_image(path) or is_image_array(path)):
            tally.leave_out(describe_suffix(name), shown_name)
            others.setdefault(folders, path)
        elif pattern and match is None:
            tally.leave_out(UNMATCHED_NAMES, shown_name)
        else:
            yield _Image(image_id, encode_path(path), folders, match.groupdict() if match else {})


def _no_images_message(image_root: Path, tally: Tally, others: Mapping[FolderParts, str]) -> str:
    found_text = "; ".join(map(str, tally.left_out()[:5])) or "no files"
    first_other = next(filter(None, others.values()), None)
    advice = (unread_format(first_other) if first_other else None) or (
        "Expected one folder per class holding files that end in "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}, or a table that names images."
    )
    return f"{image_root}: no images found (found: {found_text}). {advice}"


def _tell_apart(images: list[_Image], image_root: Path) -> list[_Image]:
    """Return the images; ids that are equal only in NFC stay as on disk."""
    id_counts = Counter(image.id for image in images)

    def own_id(image: _Image) -> str:
        # é is one letter, or e and an accent: two files, on Linux.
        if id_counts[image.id] == 1:
            return image.id
        return printable_name(os.path.relpath(locator_file(image.path), image_root))

    return [image._replace(id=own_id(image)) for image in images]


def image_paths(folder: Path) -> Iterator[str]:
    """Yield the images anywhere below a folder, as paths of samples (`encode_path`)."""
    for _, name, path in _walk(folder.absolute(), Tally()):
        if name and (is_image(path) or is_image_array(path)):
            yield encode_path(path)


def has_images(folder: Path) -> bool:
    """Return whether there is an image anywhere below a folder."""
    # The folder itself is looked at first, because `_walk` sorts the names of a folder: all 100,000
    # to find one image.
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        visible = (entry for entry in entries if not is_hidden(entry.name))
        if any(entry.is_file() and is_image(entry) for entry in visible):
            return True
    return next(image_paths(folder), None) is not None


def _walk(image_root: Path, tally: Tally) -> Iterator[tuple[FolderParts, str, str]]:
    """Yield (folders, name, path) of files below the root, and of empty folders with the name "".

    Hidden entries and unreadable folders are counted.
    """

    def leave_out(reason: str, parts: FolderParts) -> None:
        tally.found += 1
        tally.leave_out(reason, printable_name("/".join(parts)) or str(image_root))

    # Devices and inodes: a link to a parent folder would otherwise be followed for ever.
    visited_folders: set[tuple[int, int]] = set()
    pending: list[tuple[str, FolderParts]] = [(str(image_root), ())]
    # After all real folders, so that a class's folder is read under its own name, not a link's.
    linked_folders: deque[tuple[str, FolderParts]] = deque()
    while pending or linked_folders:
        directory, parent_folders = pending.pop() if pending else linked_folders.popleft()
        try:
            folder_status = os.stat(directory)
            if (folder_status.st_dev, folder_status.st_ino) in visited_folders:
                leave_out(LINKED_FOLDERS, parent_folders)
                continue
            visited_folders.add((folder_status.st_dev, folder_status.st_ino))
            with os.scandir(directory) as folder_scan:
                entries = sorted(folder_scan, key=lambda entry: entry.name)
        except OSError as error:
            # Counted, not raised: one folder without permission must not hide all others.
            leave_out(f"folders that cannot be read ({error.strerror})", parent_folders)
            continue
        if parent_folders and all(is_hidden(entry.name) for entry in entries):
            # Empty, apart from files that tools leave in folders.
            yield parent_folders, "", directory
        for entry in entries:
            parts = (*parent_folders, entry.name)
            if is_hidden(entry.name):
                leave_out(HIDDEN_ENTRIES, parts)
            elif _is_folder(entry):
                (linked_folders if entry.is_symlink() else pending).append((entry.path, parts))
            elif entry.is_symlink() or entry.is_file():
                # Broken links too: such an image becomes a recorded failure.
                yield parent_folders, entry.name, entry.path
            else:  # reading a pipe or a device could wait for ever
                leave_out("entries other than files (pipes, devices)", parts)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a tool, and not to the images."""
    return name.startswith((".", *_TOOL_FOLDERS))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a broken link
        return False
