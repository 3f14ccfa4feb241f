"""Images as files in folders."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headrace.cache.home import expand_home
from headrace.cache.text import normalize_text
from headrace.extract.errors import SourceError, absent, check_unique
from headrace.extract.images.byte_ranges import file_of, path_text, printable
from headrace.extract.sources.formats import IMAGE_SUFFIXES, describe_suffix, is_image
from headrace.extract.sources.layout import Folders, Layout, read_layout
from headrace.extract.sources.listing import Listing, Tally

EXCLUDED = "entries that images.exclude names"
LINKED = "links to folders that are read under their own names"
HIDDEN = "hidden entries (names that begin with a dot)"


@dataclass(frozen=True)
class _Entry:
    """A file below the source, or a folder that has none."""

    folders: Folders
    name: str  # empty for an empty folder
    path: str


def read_folder(
    folder: str | Path,
    *,
    layout: Layout = "auto",
    exclude: Sequence[str] = (),
    labelled: bool = True,
) -> Listing:
    """The images below a folder, sorted by id: columns `id`, `path`, `label`, and `split` where the
    folders are a split.

    The id is the path relative to `folder` with forward slashes. A file is an image by its suffix,
    else by its first bytes; all others are counted by what they are. Hidden files and folders are
    left out; links are followed once, after the real folders, so that what is reached on both ways
    has its real path's name. labelled: refuse a class without images. Raises SourceError when the
    folder is absent or has no images, saying what was found, and see `read_layout`.
    """
    root = expand_home(folder)
    if not root.is_dir():
        raise SourceError(absent(root, "a folder of images"))
    tally = Tally()
    rows: list[tuple[str, str, Folders]] = []
    others: set[Folders] = set()
    for entry in _walk(root.absolute(), tally):
        relative = "/".join((*entry.folders, entry.name)) if entry.name else "/".join(entry.folders)
        excluded = tally.excludes(exclude, printable(relative))
        if not entry.name:
            if not excluded:
                others.add(entry.folders)
            continue
        tally.found += 1
        if excluded:
            tally.leave_out(EXCLUDED, printable(relative))
        elif not is_image(entry.path):
            tally.leave_out(describe_suffix(entry.name), printable(relative))
            others.add(entry.folders)
        else:
            rows.append((normalize_text(printable(relative)), path_text(entry.path), entry.folders))
    if not rows:
        found = "; ".join(map(str, tally.left_out()[:5])) or "no files"
        raise SourceError(
            f"{root}: no images found (found: {found}). Expected one folder per class holding "
            f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}, or a table that names images."
        )
    rows.sort(key=lambda row: row[:2])
    rows = _tell_apart(rows, root.absolute())
    check_unique((name for name, _, _ in rows), str(root))
    odd = [name for name, _, _ in rows if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES]
    read = read_layout(
        [folders for _, _, folders in rows], others, layout, str(root), labelled=labelled
    )
    columns: dict[str, Sequence[str | None]] = {
        "id": [name for name, _, _ in rows],
        "path": [path for _, path, _ in rows],
        "label": read.labels,
    }
    if read.splits is not None:
        columns["split"] = read.splits
    notes = list(read.notes)
    if odd:
        notes.append(
            f"{len(odd):,} files are images by their content and not by their names, such as "
            f"{odd[0]}"
        )
    return tally.listing(pd.DataFrame(columns), notes)


def _tell_apart(rows: list[tuple[str, str, Folders]], root: Path) -> list[tuple[str, str, Folders]]:
    """The rows, those whose names are one in NFC under the names that the disk has: as two systems
    write an accent.
    """
    counts = Counter(name for name, _, _ in rows)
    return [
        (
            name if counts[name] == 1 else printable(os.path.relpath(file_of(path), root)),
            path,
            folders,
        )
        for name, path, folders in rows
    ]


def image_paths(folder: Path) -> Iterator[str]:
    """The images anywhere below a folder, as paths of samples."""
    entries = _walk(folder.absolute(), Tally())
    return (path_text(entry.path) for entry in entries if entry.name and is_image(entry.path))


def has_images(folder: Path) -> bool:
    """Whether there is an image anywhere below a folder."""
    return next(image_paths(folder), None) is not None


def _walk(root: Path, tally: Tally) -> Iterator[_Entry]:
    """Every file below the root, and every folder with nothing in it; hidden entries and unreadable
    folders are counted.
    """
    seen: set[tuple[int, int]] = (
        set()
    )  # devices and inodes, so that a link to a parent does not run for ever
    pending: list[tuple[str, Folders]] = [(str(root), ())]
    links: deque[tuple[str, Folders]] = (
        deque()
    )  # last, so that a link to a class's folder does not rename the class
    while pending or links:
        directory, folders = pending.pop() if pending else links.popleft()
        name = printable("/".join(folders))
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                tally.found += 1
                tally.leave_out(LINKED, name or str(root))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            tally.found += 1
            tally.leave_out(f"folders that cannot be read ({error.strerror})", name or str(root))
            continue
        if folders and all(entry.name.startswith(".") for entry in entries):
            yield _Entry(folders, "", directory)  # empty, but for what tools leave in folders
        for entry in entries:
            if entry.name.startswith("."):
                tally.found += 1
                tally.leave_out(HIDDEN, printable("/".join((*folders, entry.name))))
            elif _is_folder(entry):
                (links if entry.is_symlink() else pending).append(
                    (entry.path, (*folders, entry.name))
                )
            elif (
                entry.is_symlink() or entry.is_file()
            ):  # a broken link too: its image becomes a recorded failure
                yield _Entry(folders, entry.name, entry.path)
            else:  # reading a pipe or a device could wait for ever
                tally.found += 1
                tally.leave_out(
                    "entries that are no files (pipes, devices)",
                    printable("/".join((*folders, entry.name))),
                )


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a broken link
        return False
