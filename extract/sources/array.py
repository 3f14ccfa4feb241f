"""Images as items of arrays: `.npy`, `.npz`, HDF5 and idx files (the MNIST family)."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from headrace.cache.home import expand_home
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError, absent
from headrace.extract.images.byte_ranges import open_array, path_text
from headrace.extract.sources.folder import EXCLUDED
from headrace.extract.sources.formats import ARRAY_KINDS, unread_format
from headrace.extract.sources.layout import SPLIT_WORDS
from headrace.extract.sources.listing import Listing, Tally, join_listings

_IMAGE_CHANNELS = (1, 3, 4)
_IDX_IMAGES = re.compile(r"(?P<prefix>.*)images[-.]idx\d(-ubyte)?(\.gz)?", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)
_IMAGES_AT_ONCE = 64


def read_array(
    images: str | Path,
    *,
    key: str | None = None,
    labels: str | Path | None = None,
    labels_key: str | None = None,
    exclude: Sequence[str] = (),
    ranged: bool = True,
) -> Listing:
    """One row per image of an array: `id` (its index), `path` (a locator) and `label` where there
    are labels.

    `images` is a `.npy`, `.npz`, HDF5 or idx file (`.gz` or not) of shape (N, H, W), (N, H, W, C)
    or (N, C, H, W); or a folder of idx files named as MNIST's are, whose labels are found beside
    them and whose `split` is train or test. `key` names the array in a `.npz` or HDF5 file; it can
    be left out where only one has such a shape. `labels` is another file of one of these kinds,
    `labels_key` an array in it, or in the same file. ranged: whether the range of the pixels is
    given, which floats and integers of other sizes than 8 and 16 bits do not have of themselves.
    Raises SourceError.
    """
    file = expand_home(images).absolute()
    if file.is_dir():
        return _read_idx_family(file, exclude)
    kind = _kind(file)
    key = key if key is not None or kind not in ("npz", "h5") else _only_images(file, kind)
    array = _open(file, kind, key or "")
    if not _is_images(shape := _shape(array)):
        raise SourceError(
            f"{file}: the array has shape {shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, "
            "W) with 1, 3 or 4 channels. One image in a file of its own is named by a table with "
            "a column path"
        )
    if not ranged and not has_range(array.dtype):
        raise SourceError(
            f"{file}: pixels of type {array.dtype} have no range of their own; say which values "
            "are black and white: images.pixel_range: [0, 1] in the recipe (`headrace init` "
            "measures it)"
        )
    details = f"{key}:" if kind in ("npz", "h5") else ""
    count = len(array)
    width = len(str(count - 1))
    frame = pd.DataFrame(
        {
            "id": [f"{file.name}/{index:0{width}d}" for index in range(count)],
            "path": [f"{path_text(file)}::{kind}:{details}{index}" for index in range(count)],
            "label": _labels(file, kind, labels, labels_key, count),
        }
    )
    tally = Tally(found=count)
    excluded = np.array([tally.excludes(exclude, name) for name in frame["id"]], bool)
    if excluded.any():
        tally.leave_out(EXCLUDED, *frame["id"][excluded].head(3), count=int(excluded.sum()))
    return tally.listing(frame[~excluded].reset_index(drop=True))


def has_range(dtype: "np.dtype[Any]") -> bool:
    """Whether the type of pixels says which values are black and white:

    8 and 16 bits, and booleans.
    """
    return dtype in (np.uint8, np.uint16, np.bool_)


def measure_range(images: str | Path, key: str | None = None) -> tuple[float, float] | None:
    """The range of an array's values, for `images.pixel_range`; None where the type says it.

    [0, 1] or [0, 255] where all values lie in it, else the least and the greatest. Reads every
    image once.
    """
    file = expand_home(images).absolute()
    if file.is_dir():
        return None
    kind = _kind(file)
    array = _open(file, kind, key or (_only_images(file, kind) if kind in ("npz", "h5") else ""))
    if has_range(array.dtype):
        return None
    low, high = np.inf, -np.inf
    for start in range(0, len(array), _IMAGES_AT_ONCE):
        block = np.asarray(array[start : start + _IMAGES_AT_ONCE])
        finite = block[np.isfinite(block)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    for whole in ((0.0, 1.0), (0.0, 255.0)):
        if whole[0] <= low and high <= whole[1]:
            return whole
    return (low, high) if low < high else None


def idx_pairs(folder: Path) -> list[tuple[Path, Path | None]]:
    """The idx files of images in a folder, each with that of its labels:

    `train-images-idx3-ubyte.gz`, `train-labels-idx1-…`.
    """
    pairs = []
    for file in sorted(folder.iterdir()):
        match = _IDX_IMAGES.fullmatch(file.name)
        if match is not None and file.is_file():
            wanted = re.compile(
                rf"{re.escape(match['prefix'])}labels[-.]idx\d(-ubyte)?(\.gz)?", re.IGNORECASE
            )
            pairs.append(
                (
                    file,
                    next(
                        (
                            other
                            for other in sorted(folder.iterdir())
                            if wanted.fullmatch(other.name)
                        ),
                        None,
                    ),
                )
            )
    return pairs


def array_labels(images: Path) -> tuple[str | None, Path | None, str | None]:
    """(key of the images, file of the labels, key of the labels) of an array file, as far as they
    go without saying.

    In a `.npz` or HDF5 file: the one array of images, and the one array in it that has a value per
    image; for an idx
    file: the file of labels beside it. Raises SourceError when several arrays could be images.
    """
    file = expand_home(images).absolute()
    kind = _kind(file)
    if kind == "idx":
        return None, dict(idx_pairs(file.parent)).get(file), None
    if kind == "npy":
        return None, None, None
    shapes = _shapes(file, kind)
    key = _only_images(file, kind)
    fitting = [
        name for name, shape in shapes.items() if shape in ((shapes[key][0],), (shapes[key][0], 1))
    ]
    return key, None, fitting[0] if len(fitting) == 1 else None


def _read_idx_family(folder: Path, exclude: Sequence[str]) -> Listing:
    pairs = idx_pairs(folder)
    if not pairs:
        raise SourceError(
            f"{folder}: a folder without idx files of images (…-images-idx3-ubyte, .gz or not). "
            "Name an array: a .npy, .npz, HDF5 or idx file"
        )
    parts = [read_array(images, labels=labels, exclude=exclude) for images, labels in pairs]
    sides = [_side(images.name) for images, _ in pairs]
    for part, side in zip(parts, sides, strict=True):
        part.samples["split"] = side
    listing = join_listings(parts)
    if None not in sides and len(set(sides)) > 1:
        return listing
    listing = replace(listing, samples=listing.samples.drop(columns="split"))
    if not any(sides) or None not in sides:
        return listing
    unnamed = next(
        images.name for (images, _), side in zip(pairs, sides, strict=True) if side is None
    )
    note = (
        f"{unnamed}: its name has no word of a split (train, test, …), so that there is no column "
        "split"
    )
    return replace(listing, notes=(*listing.notes, note))


def _side(name: str) -> str | None:
    """The side of a split that an idx file's name says, anywhere in it:

    `emnist-letters-train-images-idx3-ubyte`.
    """
    match = _SPLIT_IN_NAME.search(name)
    if match is not None:
        return SPLIT_WORDS[match[0].lower()]
    return "test" if "t10k" in name.lower() else None  # MNIST's test images are called t10k


def _labels(
    file: Path, kind: str, labels: str | Path | None, labels_key: str | None, count: int
) -> pd.Series:
    if labels is None and labels_key is None:
        return pd.Series([None] * count, dtype=object)
    source = expand_home(labels).absolute() if labels is not None else file
    source_kind = _kind(source) if labels is not None else kind
    if source_kind in ("npz", "h5") and labels_key is None:
        raise SourceError(
            f"{source}: name the array of labels in it with labels_key; it has "
            f"{_names(source, source_kind)}"
        )
    array = _open(source, source_kind, labels_key or "")
    shape = _shape(array)
    if shape[:1] != (count,) or math.prod(shape) != count:
        raise SourceError(
            f"{source}: the labels have shape {shape} for {count} images; expected one for each: "
            f"({count},). Name another file or array: images.labels, images.labels_key (in Python: "
            "labels=, labels_key=)"
        )
    texts = as_text(pd.Series(np.asarray(array[:]).reshape(count))).astype(object)
    return texts.where(texts.notna() & (texts != ""), None)


def _open(file: Path, kind: str, key: str) -> Any:
    try:
        return open_array(str(file), kind, key)
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error


def _shape(array: Any) -> tuple[int, ...]:
    """The shape; that of a data set of HDF5 which was made without one (`h5py.Empty`) is ()."""
    return tuple(array.shape or ())


def _kind(file: Path) -> str:
    if not file.is_file():
        raise SourceError(absent(file, "an array: .npy, .npz, .h5 or idx"))
    suffix = file.suffix.lower()
    if suffix in ARRAY_KINDS:
        return ARRAY_KINDS[suffix]
    if re.search(r"idx\d|\.idx", file.name):
        return "idx"
    raise SourceError(
        unread_format(file)
        or (
            f"{file}: arrays end in .npy, .npz, .h5 or .hdf5, or are idx files (…-idx3-ubyte, "
            f".gz); found {suffix}"
        )
    )


def _is_images(shape: tuple[int, ...]) -> bool:
    if min(shape, default=0) < 1:  # no bytes would stand for any number of them
        return False
    if len(shape) == 3:  # (H, W, 3) is one colour image, not many grey ones of three columns
        return not (shape[2] in (3, 4) and shape[1] > shape[2])
    return len(shape) == 4 and (shape[3] in _IMAGE_CHANNELS or shape[1] in _IMAGE_CHANNELS)


def _only_images(file: Path, kind: str) -> str:
    shapes = _shapes(file, kind)
    fitting = [name for name, shape in shapes.items() if _is_images(shape)]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no arrays"
        example = fitting[0] if fitting else "NAME"
        raise SourceError(
            f"{file}: {len(fitting)} arrays could be images; name one with key. It has: {listed}. "
            f"In the recipe: images.array_key: {example} (in Python: key=)"
        )
    return fitting[0]


def _names(file: Path, kind: str) -> str:
    return ", ".join(_shapes(file, kind))


def _shapes(file: Path, kind: str) -> dict[str, tuple[int, ...]]:
    try:
        if kind == "npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: _npz_shape(archive, name) for name in archive.files}
        found: dict[str, tuple[int, ...]] = {}
        with h5py.File(file, "r") as opened:
            opened.visititems(
                lambda name, item: found.update(
                    {name: _shape(item)} if isinstance(item, h5py.Dataset) else {}
                )
            )
        return found
    except (
        Exception
    ) as error:  # zipfile, NumPy and h5py raise anything on bytes that are not theirs
        raise SourceError(f"{file}: cannot be read as {kind}: {error}") from error


def _npz_shape(archive: Any, name: str) -> tuple[int, ...]:
    with archive.zip.open(f"{name}.npy") as member:  # the header alone
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape: tuple[int, ...] = read(member)[0]
        return shape
