"""One reader for all kinds of sources: `detect_source` finds the kind, `read_source` the images."""

import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.home import expand_home
from headrace.extract.errors import SourceError, pointer_hint
from headrace.extract.images.locators import encode_path, printable_name
from headrace.extract.sources.archive import read_archives
from headrace.extract.sources.array import idx_pairs, read_array
from headrace.extract.sources.detections import cut_detections
from headrace.extract.sources.folder import (
    HIDDEN_ENTRIES,
    LINKED_FOLDERS,
    has_images,
    read_folder,
)
from headrace.extract.sources.formats import (
    ARRAY_KINDS,
    HEIF_SUFFIXES,
    IMAGE_SUFFIXES,
    is_archive,
    is_image,
    unread_format,
)
from headrace.extract.sources.listing import EXCLUDED_ENTRIES, Listing
from headrace.extract.sources.regions import cut_tiles
from headrace.extract.sources.source import ImageSource, SourceKind
from headrace.extract.sources.tabular import (
    is_table,
    metadata_table,
    read_tables,
    saved_dataset_files,
)

_KINDS_OF_FILES = (
    "a table (.csv, .tsv, .jsonl, .json, .parquet), an archive (.tar, .tar.gz, .zip), an array "
    "file (.npy, .npz, .h5, idx), or an image"
)


class SourceWarning(UserWarning):
    """Some entries of a source are not used."""


def read_source(source: ImageSource, *, labelled: bool = True) -> Listing:
    """List the images of a source, or their boxes or tiles.

    labelled: True to train, when labels are needed: folders that could be classes or sides of a
    split, a class without images, and pixels without a range are refused. False to predict, when
    the model knows classes and range.

    Raises SourceError for a source that cannot be read as the options say.
    """
    listing = _read_images(source, labelled=labelled)
    if source.tiles is None and source.detections is None:
        return listing
    what = "tiles" if source.detections is None else "detections"
    if any("::crop:" in path for path in listing.samples["path"]):
        raise SourceError(
            f"{source.location}: {what} are cut from whole images, and its rows are boxes. Leave "
            f"one of images.{what} and images.boxes out"
        )
    if source.detections is not None:
        if source.tiles is not None:
            raise SourceError("leave one of images.tiles and images.detections out")
        return cut_detections(listing, source.detections, source.min_confidence)
    assert source.tiles is not None
    return cut_tiles(listing, source.tiles)


def _read_images(source: ImageSource, *, labelled: bool) -> Listing:
    match source.kind:
        case "folder":
            return read_folder(source, labelled=labelled)
        case "table":
            return read_tables(source, labelled=labelled)
        case "archive":
            return read_archives(source, labelled=labelled)
        case "array":
            return read_array(source, labelled=labelled)
        case "image":
            name, path = str(source.location), source.path.absolute()
            row = {"id": printable_name(name), "path": encode_path(path), "label": None}
            return Listing(pd.DataFrame([row]), found=1)


def detect_source(location: str | Path, **options: Any) -> ImageSource:
    """Return the source at a path, judged by its name and, for a folder, by its files.

    A folder is one of images if it has any at any depth, unless Hugging Face's `datasets` saved it
    or its metadata file is beside them; otherwise one of archives, tables of images, or an array.
    options: fields of ImageSource.

    Raises SourceError for a path that does not exist, and for formats that are not read.
    """
    source_path = expand_home(location)
    if not source_path.is_dir():
        return ImageSource(_detect_file(source_path), location, **options)
    if saved_dataset_files(source_path):
        return ImageSource("table", location, **options)
    if (metadata_path := metadata_table(source_path)) is not None:
        return ImageSource("table", metadata_path, **options)
    return ImageSource(_detect_in_folder(source_path), location, **options)


def _detect_file(source_path: Path) -> SourceKind:
    file_name = source_path.name.lower()
    if is_archive(source_path):
        return "archive"
    if is_table(source_path):
        return "table"
    has_idx_name = source_path.suffix.lower() not in IMAGE_SUFFIXES | HEIF_SUFFIXES and re.search(
        r"idx\d|\.idx", file_name
    )
    if source_path.suffix.lower() in ARRAY_KINDS or (has_idx_name and source_path.is_file()):
        return "array"
    if source_path.is_symlink() or (source_path.is_file() and is_image(source_path)):
        return "image"
    if not source_path.exists():
        raise SourceError(
            f"{source_path}: no such file or folder.{pointer_hint(source_path)} Give a folder of "
            f"images, {_KINDS_OF_FILES}"
        )
    raise SourceError(
        unread_format(source_path)
        or f"{source_path}: neither an image nor anything that holds images (found "
        f"{source_path.suffix.lower() or 'no suffix'}). Expected {_KINDS_OF_FILES}"
    )


def _detect_in_folder(folder: Path) -> SourceKind:
    # Images first: a folder of photos may hold archives, tables and arrays beside them, a folder
    # of archives rarely images.
    if has_images(folder):
        return "folder"
    child_paths = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(is_archive(entry) for entry in child_paths):
        return "archive"
    if idx_pairs(folder):
        return "array"
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        return "table"
    return "folder"  # whose reader says what was found instead


def warn_about_left_out(listing: Listing, source: str | Path) -> None:
    """Warn (SourceWarning) about entries of a source that are not used.

    For calls from Python; commands print the whole listing.
    """
    # Hidden and excluded entries are no images that anybody misses, and linked ones are used.
    left_out_texts = [
        str(left_out)
        for left_out in listing.left_out
        if left_out.reason not in (HIDDEN_ENTRIES, EXCLUDED_ENTRIES, LINKED_FOLDERS)
    ]
    if left_out_texts:
        warnings.warn(
            f"{source}: left out {'; '.join(left_out_texts)}", SourceWarning, stacklevel=3
        )
