"""Images as members of archives: tar (WebDataset shards, or class folders), and zip.

A side file (`.cls`, `.txt`, `.json`) holds the label or other columns of the image of its name,
without the suffix (`a.b.jpg`: `a.b.cls`) or, as in WebDataset, up to the first dot (`a.cls`). Of
several members of one name the last counts, as for `tar -x`.
"""

import functools
import glob
import itertools
import os
import posixpath
import re
import tarfile
import zipfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.home import expand_home
from headrace.cache.text import load_json, normalize_text
from headrace.extract.errors import SourceError, check_unique_ids
from headrace.extract.images.heif import reads_heif
from headrace.extract.images.locators import encode_path, open_compressed, printable_name
from headrace.extract.sources.folder import HIDDEN_ENTRIES, is_hidden
from headrace.extract.sources.formats import (
    HEIF_SUFFIXES,
    IMAGE_SUFFIXES,
    TAR_ENDINGS,
    describe_suffix,
    has_image_signature,
    is_archive,
    repeats_image,
)
from headrace.extract.sources.layout import FolderParts, Layout, read_layout, split_sides
from headrace.extract.sources.listing import EXCLUDED_ENTRIES, Listing, Tally, notes_on_masks
from headrace.extract.sources.source import ImageSource

_SIDE_FILES = frozenset({"cls", "txt", "json"})
_MAX_SIDE_FILE_BYTES = 2**20  # a larger text or JSON file holds no label
_MAX_MEMBER_BYTES = 2**31  # no image is so large, and it would be read into memory whole
RESERVED_COLUMNS = frozenset({"id", "path", "content", "_content"})


@dataclass(frozen=True)
class _Member:
    """A file in an archive."""

    name: str
    locator: str  # archive, byte range and name: the path of a sample, see images/locators.py
    head: bytes  # its first 32 bytes, if its suffix is not that of an image
    side_file: bytes | None  # its content, if it is a side file


@dataclass(frozen=True)
class _Link:
    """A link in a tar archive."""

    name: str
    target: str  # name of the member that it links to
    hard: bool


class _Entry(NamedTuple):
    """A file or link in an archive, by its header."""

    name: str
    size: int  # bytes
    details: str  # of its locator, without the name
    unreadable: str | None  # why it cannot be read
    read: Callable[[int], bytes]  # returns its first bytes of that number, -1 for all of them
    link: _Link | None = None


@dataclass(frozen=True)
class _Image:
    """An image in an archive, with what its side files say of it."""

    archive: str
    member: _Member
    columns: dict[str, Any]


def read_archives(source: ImageSource, *, labelled: bool = True) -> Listing:
    """List the images in archives: `id`, `path` (a locator), `label`, `split` where folders or
    archives are those of a split, and the keys of `.json` side files whose values are scalars or
    lists of them.

    Its location is a tar or zip file, a folder of such, a pattern (`train-*.tar`,
    `train-{000..031}.tar`) or a list of these; `exclude` has patterns of names of members, or of
    the archive and the member.
    labelled: whether labels are needed; then a class's folder without images is refused.

    The label is that of `.cls`, `.txt` or the key `label` of `.json`; if no image has such a side
    file, that of the folders in the archive, as for folders on disk. Only headers, side files and
    the first bytes of members without an image's suffix are read.

    Raises SourceError for damaged archives, and when there are no images.
    """
    location = source.location
    archive_paths = _expand([location] if isinstance(location, (str, Path)) else location)
    tally = Tally()
    images: list[_Image] = []
    folders_of_others: set[FolderParts] = set()  # folders in the archives that hold other files
    for archive_path, archive_name in zip(archive_paths, _names(archive_paths), strict=True):
        images += _read_archive(
            archive_path, archive_name, source.exclude, tally, folders_of_others
        )
    source_text = (
        str(archive_paths[0])
        if len(archive_paths) == 1
        else f"{len(archive_paths)} archives ({archive_paths[0]}, …)"
    )
    if not images:
        found_text = "; ".join(map(str, tally.left_out()[:5])) or "nothing"
        raise SourceError(
            f"{source_text}: no images (found: {found_text}). Expected members that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}. Where its files are of other formats, unpack "
            "it and name the folder: the message then says how to convert them"
        )
    rows = [
        {
            "id": normalize_text(printable_name(f"{image.archive}/{image.member.name}")),
            "path": image.member.locator,
            **image.columns,
        }
        for image in images
    ]
    check_unique_ids((row["id"] for row in rows), source_text)
    frame = pd.DataFrame(rows)
    notes = _add_labels(frame, images, folders_of_others, source.layout, source_text, labelled)
    sides = split_sides([Path(image.archive).name for image in images])
    if "split" not in frame and sides is not None:
        frame["split"] = sides
        notes.append("the archives' names are those of the sides of a split")
    notes += [*_notes_on_samples(images), *notes_on_masks(frame["id"])]
    return tally.listing(frame, notes)


def _add_labels(
    frame: pd.DataFrame,
    images: Sequence[_Image],
    folders_of_others: set[FolderParts],
    layout: Layout,
    source_text: str,
    labelled: bool,
) -> list[str]:
    """Add the labels, and sides of a split, of the folders to a frame without labels.

    Return notes on what was assumed.
    """
    member_folders = [_folders(image.member.name) for image in images]
    if "label" not in frame:
        read_labels = read_layout(
            *_strip_common_folders(member_folders, folders_of_others),
            layout,
            source_text,
            labelled=labelled,
        )
        frame.insert(2, "label", pd.Series(read_labels.labels, dtype=object))
        if read_labels.splits is not None and "split" not in frame:
            frame["split"] = read_labels.splits
        return list(read_labels.notes)
    n_unlabelled = int(frame["label"].isna().sum())
    # Several folders: they could be meant as classes.
    if not (labelled and n_unlabelled and len(set(member_folders)) > 1):
        return []
    return [
        f"{n_unlabelled:,} of {count_text(len(frame), 'image')} have no label: the side files say "
        "the labels, not the folders, and these have none, or one without a label"
    ]


def _notes_on_samples(images: Sequence[_Image]) -> list[str]:
    """Return a note on samples of WebDataset that have several images; [] if there are none."""
    sample_keys = Counter(f"{image.archive}/{_sample_key(image.member.name)}" for image in images)
    several = [sample_key for sample_key, count in sample_keys.items() if count > 1]
    if not several:
        return []
    return [
        f"{count_text(len(several), 'sample')} (names up to the first dot) have more than one "
        f"image, such as {printable_name(several[0])}: each image is a row"
    ]


def _strip_common_folders(
    member_folders: list[FolderParts], folders_of_others: set[FolderParts]
) -> tuple[list[FolderParts], set[FolderParts]]:
    """Remove the folders that all images share, if several folders remain below them."""
    # `tar -c photos` puts every member into `photos`, which is no class.
    common = member_folders[0]
    while any(parts[: len(common)] != common for parts in member_folders):
        common = common[:-1]
    depth = len(common)
    # If all images are in one folder, it stays: it may be their class.
    if len({parts[depth] for parts in member_folders if len(parts) > depth}) < 2:
        return member_folders, folders_of_others
    return (
        [parts[depth:] for parts in member_folders],
        {parts[depth:] for parts in folders_of_others if parts[:depth] == common},
    )


def _names(archive_paths: Sequence[Path]) -> list[str]:
    """Return the archives' names in ids: their file names, or paths where these are equal."""
    archive_names = [file.name for file in archive_paths]
    if len(set(archive_names)) == len(archive_names):
        return archive_names
    common_folder = os.path.commonpath([file.parent for file in archive_paths])
    return [file.relative_to(common_folder).as_posix() for file in archive_paths]


def _folders(member: str) -> FolderParts:
    return tuple(member.split("/")[:-1])


def _read_archive(
    archive_path: Path,
    archive_name: str,
    exclude: Sequence[str],
    tally: Tally,
    folders_of_others: set[FolderParts],
) -> list[_Image]:
    """Return the images of an archive in its order, and count in `tally` what is left out.

    Folders of members that are no images are added to `folders_of_others`.
    """
    entries = list(_entries(archive_path, archive_name, exclude, tally, folders_of_others))
    members = _resolve(entries, archive_name, tally)
    images = [member for member in members if member.side_file is None and _is_image(member)]
    side_files = {
        member.name: member.side_file for member in members if member.side_file is not None
    }
    used_names = {member.name for member in images}
    damaged_side_files: set[str] = set()
    archive_images = []
    for member in images:
        columns: dict[str, Any] = {}
        # Side files are named by WebDataset's key, or by the whole name of the image.
        sample_keys = (_sample_key(member.name), posixpath.splitext(member.name)[0])
        for sample_key, side_extension in itertools.product(
            # In this order, because the last side file with a column counts.
            dict.fromkeys(sample_keys),
            ("json", "txt", "cls"),
        ):
            side_name = f"{sample_key}.{side_extension}"
            if (data := side_files.get(side_name)) is not None:
                values = _side_columns(side_extension, data)
                (damaged_side_files if values is None else used_names).add(side_name)
                columns |= values or {}
        archive_images.append(_Image(archive_name, member, columns))
    tally.annotations += len(used_names) - len(images)
    for member in members:
        if member.name in used_names:
            continue
        if member.name in damaged_side_files:
            left_out_reason = "side files that are no JSON object"
        elif member.side_file is not None:
            left_out_reason = "side files of no image"
        else:
            left_out_reason = describe_suffix(member.name)
        tally.leave_out(left_out_reason, printable_name(f"{archive_name}/{member.name}"))
        folders_of_others.add(_folders(member.name))
    return archive_images


def _resolve(entries: Sequence[_Member | _Link], archive_name: str, tally: Tally) -> list[_Member]:
    """Return the last member of each name, links as what they lead to; count the others."""
    positions: dict[str, list[int]] = defaultdict(list)  # where in the archive each name stands
    for position, entry in enumerate(entries):
        positions[entry.name].append(position)
    members: list[_Member] = []
    for position, entry in enumerate(entries):
        if position != positions[entry.name][-1]:
            left_out_reason = "members that a later one of the same name replaces"
        elif (member := _follow(entries, positions, position)) is not None:
            members.append(replace(member, name=entry.name))
            continue
        else:
            left_out_reason = "links to what is not in the archive"
        tally.leave_out(left_out_reason, printable_name(f"{archive_name}/{entry.name}"))
    return members


def _follow(
    entries: Sequence[_Member | _Link], positions: Mapping[str, Sequence[int]], position: int
) -> _Member | None:
    """Return the member at a position of the archive, or the one that links there lead to.

    None if the archive does not have it.
    """
    visited_positions: set[int] = set()  # links can lead back to themselves
    while position not in visited_positions:
        entry = entries[position]
        if isinstance(entry, _Member):
            return entry
        visited_positions.add(position)
        target_positions = positions.get(entry.target)
        if not target_positions:
            return None
        # A symbolic link means the last member of a name; a hard link the last one before the link,
        # which `tar -x` has unpacked by then.
        n_before = bisect_left(target_positions, position) if entry.hard else 0
        position = target_positions[n_before - 1]  # for n_before 0 the last one
    return None


def _sample_key(member_name: str) -> str:
    """Return WebDataset's key of a sample: the name up to the first dot of its last part."""
    parent_folder, _, base_name = member_name.rpartition("/")
    stem = base_name.partition(".")[0]
    return f"{parent_folder}/{stem}" if parent_folder else stem


def _is_image(member: _Member) -> bool:
    suffix = posixpath.splitext(member.name)[1].lower()
    return (
        suffix in IMAGE_SUFFIXES
        or (suffix in HEIF_SUFFIXES and reads_heif())
        or (has_image_signature(member.head) and not repeats_image(member.name))
    )


def _side_columns(extension: str, data: bytes) -> dict[str, Any] | None:
    """Read a side file's columns; None for a `.json` that holds no JSON object."""
    side_text = normalize_text(data.decode("utf-8-sig", errors="replace"))
    if extension != "json":
        return {"label": side_text or None}
    try:
        side_values = load_json(side_text)
    # RecursionError: brackets nested a thousand deep.
    except (ValueError, RecursionError):
        return None
    if not isinstance(side_values, dict):
        return None
    return {
        name: value
        for name, value in side_values.items()
        if name not in RESERVED_COLUMNS and _is_cell(value)
    }


def _is_cell(value: Any) -> bool:
    """Return whether a value is a scalar or a list of scalars, as a table's cells are."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, (str, int, float, bool)) for item in values)


def _entries(
    archive_path: Path,
    archive_name: str,
    exclude: Sequence[str],
    tally: Tally,
    folders_of_others: set[FolderParts],
) -> Iterator[_Member | _Link]:
    """Yield what an archive holds, apart from hidden, excluded and unreadable entries."""
    is_zip = archive_path.suffix.lower() == ".zip"
    try:
        for entry in (_zip_entries if is_zip else _tar_entries)(archive_path):
            tally.found += 1
            left_out_reason = (
                _left_out(entry.name, archive_name, exclude, folders_of_others, tally)
                or entry.unreadable
                or ("members of more than 2 GiB" if entry.size > _MAX_MEMBER_BYTES else None)
            )
            shown_name = printable_name(entry.name)
            if left_out_reason is not None:
                tally.leave_out(left_out_reason, f"{printable_name(archive_name)}/{shown_name}")
                continue
            if entry.link is not None:
                yield entry.link
                continue
            head, side_file = b"", None
            if entry.name.rpartition(".")[2] in _SIDE_FILES and entry.size < _MAX_SIDE_FILE_BYTES:
                side_file = entry.read(-1)
            elif posixpath.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                head = entry.read(32)
            locator = f"{encode_path(archive_path)}::{entry.details}:{shown_name}"
            yield _Member(entry.name, locator, head, side_file)
    # A damaged archive makes tarfile and zipfile, and what decompresses for them, raise anything:
    # zlib and lzma have errors of their own.
    except Exception as error:
        problem = (
            f"not a whole zip archive ({error}). Fetch it again, or leave it out."
            if is_zip
            else _tar_problem(archive_path, error)
        )
        raise SourceError(f"{archive_path}: {problem}") from error


def _tar_entries(archive_path: Path) -> Iterator[_Entry]:
    is_compressed = archive_path.suffix.lower() != ".tar"
    kind = "tgz" if is_compressed else "tar"
    stream = open_compressed(archive_path) if is_compressed else archive_path.open("rb")
    with stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for entry in archive:
            if entry.isdir():
                continue
            name, link, unreadable = _member_name(entry.name), None, None
            if entry.issym():
                target = posixpath.join(posixpath.dirname(name), entry.linkname)
                link = _Link(name, _member_name(target), hard=False)
            elif entry.islnk():
                link = _Link(name, _member_name(entry.linkname), hard=True)
            elif not entry.isreg():
                unreadable = "members other than files"
            elif entry.issparse():
                unreadable = "sparse members (pack them without --sparse)"
            yield _Entry(
                name,
                entry.size,
                f"{kind}:{entry.offset_data}:{entry.size}",
                unreadable,
                functools.partial(_read_tar_member, archive, entry),
                link,
            )


def _read_tar_member(archive: tarfile.TarFile, entry: tarfile.TarInfo, n_bytes: int) -> bytes:
    stream = archive.fileobj
    assert stream is not None  # an archive that is open for reading
    # Not `archive.extractfile`, which would seek again: a compressed stream is read from its start
    # to go back. tarfile seeks to the next header by itself.
    stream.seek(entry.offset_data)
    data: bytes = stream.read(entry.size if n_bytes < 0 else min(n_bytes, entry.size))
    return data


def _zip_entries(archive_path: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive_path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            name = entry.filename
            if not entry.flag_bits & 0x800:  # the flag: the name is UTF-8
                # Any encoding, which zipfile takes for cp437. Most programs write UTF-8 without
                # the flag too.
                name = os.fsdecode(name.encode("cp437"))
            unreadable = None
            if entry.flag_bits & 0x1:
                unreadable = "encrypted members"
            elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                unreadable = (
                    "members compressed in another way than deflate (pack the archive again: "
                    "zip -r)"
                )
            yield _Entry(
                _member_name(name),
                entry.file_size,
                f"zip:{entry.header_offset}:{entry.compress_size}:{entry.file_size}:"
                f"{entry.compress_type}:{entry.CRC}",
                unreadable,
                functools.partial(_read_zip_member, archive, entry),
            )


def _read_zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, n_bytes: int) -> bytes:
    with archive.open(entry) as member:
        return member.read(n_bytes)


def _member_name(name: str) -> str:
    """Return `a/b.png` for `./a/b.png`, `/a/b.png` and `a//b.png`, which unpack to one file."""
    # Backslashes: old zip programs of Windows write them.
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")


def _left_out(
    member: str, archive: str, exclude: Sequence[str], others: set[FolderParts], tally: Tally
) -> str | None:
    """Return the reason why a member is left out, or None.

    A folder that holds it, and is not hidden itself, is added to `others`.
    """
    shown = printable_name(member)
    excluded = tally.excludes(exclude, shown, f"{archive}/{shown}")
    hidden = [is_hidden(part) for part in member.split("/")]
    if any(hidden):
        # A hidden file such as `owl/.keep` stands for the folder of a class without images.
        if not excluded and not any(hidden[:-1]):
            others.add(_folders(member))
        return HIDDEN_ENTRIES
    return EXCLUDED_ENTRIES if excluded else None


def _tar_problem(archive_path: Path, error: Exception) -> str:
    try:
        with archive_path.open("rb") as archive_file:
            magic = archive_file.read(4)
    except OSError:
        return str(error)
    if magic == b"\x28\xb5\x2f\xfd":
        return "Zstandard compressed it, which is not read here. Decompress it first: zstd -d FILE"
    if archive_path.suffix.lower() == ".tar" and (
        magic[:2] in (b"\x1f\x8b", b"BZ") or magic[:3] == b"\xfd7z"
    ):
        return (
            "a compressed archive under the name of an uncompressed one. Rename it, for example to "
            "FILE.tar.gz"
        )
    return f"not a whole tar archive ({error}). Fetch it again, or leave it out."


def _expand(archives: Sequence[str | Path]) -> list[Path]:
    archive_paths: list[Path] = []
    for archive_name in archives:
        archive_path = expand_home(archive_name)
        if archive_path.is_file():  # not a pattern, though `a[1].zip` looks like one
            matching_paths = [archive_path]
        elif archive_path.is_dir():
            matching_paths = sorted(
                child_path
                for child_path in archive_path.iterdir()
                if is_archive(child_path) and not child_path.name.startswith(".")
            )
        else:
            matching_paths = [
                Path(match)
                for text in _braces(str(archive_path))
                for match in (sorted(glob.glob(text)) or [text])
            ]
        if not matching_paths:
            raise SourceError(
                f"{archive_name}: a folder without archives ({', '.join((*TAR_ENDINGS, '.zip'))})"
            )
        archive_paths += matching_paths
    missing_paths = [file for file in archive_paths if not file.is_file()]
    if missing_paths:
        raise SourceError(
            f"{missing_paths[0]}: no such archive ({len(missing_paths)} of {len(archive_paths)} "
            "are missing)"
        )
    return [file.absolute() for file in archive_paths]


def _braces(text: str) -> list[str]:
    """Expand WebDataset's notation "a-{000..003}.tar" to the four names that it stands for."""
    text_parts: list[list[str]] = []
    last_end = 0
    for match in re.finditer(r"\{(\d+)\.\.(\d+)\}", text):
        first_number, last_number = match[1], match[2]
        text_parts += [
            [text[last_end : match.start()]],
            [f"{n:0{len(first_number)}d}" for n in range(int(first_number), int(last_number) + 1)],
        ]
        last_end = match.end()
    text_parts.append([text[last_end:]])
    return ["".join(chosen_parts) for chosen_parts in itertools.product(*text_parts)]
