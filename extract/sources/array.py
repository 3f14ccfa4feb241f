"""Images as items of arrays: `.npy`, `.npz`, HDF5 and idx files (the MNIST family)."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.format.hdf5_values import find_data_sets, open_hdf5, read_values
from headrace.cache.home import expand_home
from headrace.cache.text import as_text
from headrace.extract.errors import SourceError, missing_path_message
from headrace.extract.images.locators import encode_path, open_array
from headrace.extract.images.raw_pixels import MAX_ARRAY_HEADER_BYTES, array_shape
from headrace.extract.sources.archive import RESERVED_COLUMNS
from headrace.extract.sources.formats import ARRAY_KINDS, unread_format
from headrace.extract.sources.layout import SPLIT_IN_NAME, split_side_in
from headrace.extract.sources.listing import Listing, Tally, join_listings
from headrace.extract.sources.source import ImageSource

_IMAGE_CHANNELS = (1, 3, 4)  # grey, colours, colours and alpha
_IDX_IMAGES = re.compile(r"(?P<prefix>.*)images[-.]idx\d(-ubyte)?(\.gz)?", re.IGNORECASE)
# Words of a file's name by which the file of images and that of their labels differ.
_LABELS_WORDS = (("x", "y"), ("x", "Y"), ("images", "labels"), ("data", "labels"))
_LABELS_NAMES = ("label", "labels", "y", "target", "targets")
_IMAGES_AT_ONCE = 64  # read together to measure the range of the pixels
_MAX_LABELS = 1000  # of an image; a longer row is features


def read_array(source: ImageSource, *, labelled: bool = True) -> Listing:
    """List the images of an array: `id` (file and index), `path` (a locator) and `label`.

    Its location is a `.npy`, `.npz`, HDF5 or idx file (`.gz` or not) of shape (N, H, W), (N, H, W,
    C) or (N, C, H, W), of any number of channels if the backbone names bands; or a folder of idx
    files with MNIST's names, whose labels are found beside them and whose `split` is train or test.
    Where the arrays of a file are those of the sides of a split, `split` is train, validation or
    test.
    labelled: True to train; then arrays of other types than booleans and unsigned integers of 8
    and 16 bits need a `pixel_range`. False to predict, when the model knows the range.

    Raises SourceError.
    """
    key = source.array_key
    array_path = source.path.absolute()
    if array_path.is_dir():
        return _read_idx_family(array_path, source, labelled=labelled)
    has_range = not labelled or source.pixel_range is not None
    file_kind = _kind(array_path)
    if file_kind not in ("npz", "h5"):
        return _read_one(array_path, file_kind, "", source, has_range)
    if key is None and source.labels is None and source.labels_key is None:
        sides = _split_arrays(_shapes(array_path, file_kind))
        if sides:
            return _join_sides(
                [
                    _read_one(
                        array_path,
                        file_kind,
                        images_key,
                        replace(source, labels_key=side_labels_key),
                        has_range,
                        id_prefix=f"{array_path.name}/{images_key}",
                    )
                    for images_key, side_labels_key, _ in sides
                ],
                [side for _, _, side in sides],
            )
    key = _only_images(array_path, file_kind) if key is None else key
    return _read_one(array_path, file_kind, key, source, has_range)


def _read_one(
    array_path: Path,
    file_kind: str,
    key: str,
    source: ImageSource,
    has_range: bool,
    id_prefix: str | None = None,
) -> Listing:
    """List the images of one array; `id_prefix` is by default the name of its file."""
    array = _open(array_path, file_kind, key)
    if not _is_images(shape := _shape(array)):
        raise SourceError(
            f"{array_path}: the array has shape {shape}; expected (N, H, W), (N, H, W, C) or (N, "
            "C, H, W). One image in a file of its own is named by a table with a column path"
        )
    # Arrays of other numbers of channels are bands, whose ranges the backbone's `bands` say.
    if not (has_range or has_pixel_range(array.dtype)) and _has_usual_channels(shape):
        raise SourceError(
            f"{array_path}: pixels of type {array.dtype} have no range of their own; say which "
            "values are black and white: images.pixel_range: [0, 1] in the recipe (`headrace "
            "init` measures it)"
        )
    key_prefix = f"{key}:" if file_kind in ("npz", "h5") else ""
    n_images = len(array)
    n_digits = len(str(n_images - 1))
    prefix = id_prefix or array_path.name
    frame = pd.DataFrame(
        {
            "id": [f"{prefix}/{index:0{n_digits}d}" for index in range(n_images)],
            "path": [
                f"{encode_path(array_path)}::{file_kind}:{key_prefix}{index}"
                for index in range(n_images)
            ],
            **_label_columns(array_path, file_kind, source, n_images),
            # Of one side of a split, the arrays of another may have as many values.
            **({} if id_prefix else _other_columns(array_path, file_kind, source, n_images)),
        }
    )
    tally = Tally(found=n_images)
    return tally.listing(tally.exclude_rows(frame, source.exclude))


def _split_arrays(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str | None, str]]:
    """Return (array of images, array of its labels or None, side) for each side of a split.

    shapes: {array's name: shape}. The names of all arrays of images must differ only in the word
    for the side (`train_images`, `test_images`); otherwise [].
    """
    images = [
        name for name, shape in shapes.items() if _is_images(shape) and _has_usual_channels(shape)
    ]
    sides = [side for name in images if (side := _side(name)) is not None]
    stems = {SPLIT_IN_NAME.sub("", name) for name in images}
    if len(images) < 2 or len(set(sides)) < len(images) or len(stems) > 1:
        return []
    labels_by_stem = [
        {
            SPLIT_IN_NAME.sub("", name): name
            for name in _labels_of(shapes[images_key], shapes)
            if _side(name) == side
        }
        for images_key, side in zip(images, sides, strict=True)
    ]
    common_stems = set.intersection(*map(set, labels_by_stem))
    labels_stem = common_stems.pop() if len(common_stems) == 1 else ""
    return [
        (images_key, names.get(labels_stem), side)
        for images_key, names, side in zip(images, labels_by_stem, sides, strict=True)
    ]


def has_pixel_range(dtype: "np.dtype[Any]") -> bool:
    """Return whether a type has a range of its own: unsigned 8 and 16 bits, and booleans."""
    return dtype in (np.uint8, np.uint16, np.bool_)


def measure_pixel_range(images: str | Path, key: str | None = None) -> tuple[float, float] | None:
    """Return the range of an array's values, for `images.pixel_range`.

    (0, 1) or (0, 255) if all values lie in it, else the extremes. None if its type has a range, if
    all values are equal, and for a folder. Reads every image once. Raises SourceError.
    """
    array_path = expand_home(images).absolute()
    if array_path.is_dir():
        return None
    file_kind = _kind(array_path)
    keys = [key or ""]
    if key is None and file_kind in ("npz", "h5"):
        sides = _split_arrays(_shapes(array_path, file_kind))
        keys = [name for name, _, _ in sides] or [_only_images(array_path, file_kind)]
    lowest, highest = np.inf, -np.inf
    for array in (_open(array_path, file_kind, array_key) for array_key in keys):
        if has_pixel_range(array.dtype):
            return None
        for start in range(0, len(array), _IMAGES_AT_ONCE):
            image_block = np.asarray(array[start : start + _IMAGES_AT_ONCE])
            finite_values = image_block[np.isfinite(image_block)]
            if finite_values.size:
                lowest = min(lowest, float(finite_values.min()))
                highest = max(highest, float(finite_values.max()))
    for standard_range in ((0.0, 1.0), (0.0, 255.0)):
        if standard_range[0] <= lowest and highest <= standard_range[1]:
            return standard_range
    return (lowest, highest) if lowest < highest else None


def idx_pairs(folder: Path) -> list[tuple[Path, Path | None]]:
    """Return a folder's idx files of images, each with the file of its labels or None.

    Their names are as `train-images-idx3-ubyte.gz` and `train-labels-idx1-ubyte.gz`.
    """
    pairs: list[tuple[Path, Path | None]] = []
    files = sorted(folder.iterdir())
    for file in files:
        if (match := _IDX_IMAGES.fullmatch(file.name)) and file.is_file():
            labels_name = rf"{re.escape(match['prefix'])}labels[-.]idx\d(-ubyte)?(\.gz)?"
            labels = (path for path in files if re.fullmatch(labels_name, path.name, re.IGNORECASE))
            pairs.append((file, next(labels, None)))
    return pairs


def detect_array_labels(images: Path) -> tuple[str | None, Path | None, str | None]:
    """Return (key of the images, file of the labels, key of the labels) of an array file.

    Each is None if it is not needed or not certain. In a `.npz` or HDF5 file: the only array of
    images, and the only array with a value or row per image, in the same file or in one beside it
    (`split_train_x.h5`, `split_train_y.h5`); all None if `read_array` finds the sides of a split by
    their names. For an idx or `.npy` file: the file of labels beside it.

    Raises SourceError when several arrays could be images.
    """
    array_path = expand_home(images).absolute()
    file_kind = _kind(array_path)
    if file_kind == "idx":
        return None, dict(idx_pairs(array_path.parent)).get(array_path), None
    if file_kind == "npy":
        return None, _labels_beside(array_path), None
    shapes = _shapes(array_path, file_kind)
    if _split_arrays(shapes):
        return None, None, None
    images_key = _only_images(array_path, file_kind)
    fitting_names = _labels_of(shapes[images_key], shapes)
    if not fitting_names and (labels_file := _labels_beside(array_path)) is not None:
        names = _labels_of(shapes[images_key], _shapes(labels_file, file_kind))
        return images_key, labels_file, names[0] if len(names) == 1 else None
    return images_key, None, fitting_names[0] if len(fitting_names) == 1 else None


def _labels_beside(array_path: Path) -> Path | None:
    """Return the file whose name differs only in the word for labels: `y.npy` for `X.npy`."""
    for images_word, labels_word in _LABELS_WORDS:
        word = re.compile(rf"(?<![a-z]){images_word}(?![a-z])", re.IGNORECASE)
        labels_path = array_path.with_name(word.sub(labels_word, array_path.name))
        if labels_path != array_path and labels_path.is_file():
            return labels_path
    return None


def _read_idx_family(folder: Path, source: ImageSource, *, labelled: bool) -> Listing:
    pairs = idx_pairs(folder)
    if not pairs:
        raise SourceError(
            f"{folder}: a folder without idx files of images (…-images-idx3-ubyte, .gz or not). "
            "Name an array: a .npy, .npz, HDF5 or idx file"
        )
    listings = [
        read_array(replace(source, location=images, labels=labels), labelled=labelled)
        for images, labels in pairs
    ]
    sides = [_side(images.name) for images, _ in pairs]
    if None not in sides and len(set(sides)) > 1:
        return _join_sides(listings, sides)
    listing = join_listings(listings)
    if not any(sides) or None not in sides:
        return listing
    unnamed_file = pairs[sides.index(None)][0].name
    note = (
        f"{unnamed_file}: its name has no word of a split (train, test, …), so that there is no "
        "column split"
    )
    return replace(listing, notes=(*listing.notes, note))


def _join_sides(listings: Sequence[Listing], sides: Sequence[str | None]) -> Listing:
    for listing, side in zip(listings, sides, strict=True):
        listing.samples["split"] = side
    return join_listings(listings)


def _side(name: str) -> str | None:
    """Return the side of a split that a name has a word for; MNIST calls its test images t10k."""
    return split_side_in(name) or ("test" if "t10k" in name.lower() else None)


def _label_columns(
    array_path: Path, file_kind: str, source: ImageSource, n_images: int
) -> dict[str, npt.NDArray[np.object_]]:
    """Return {column: N texts or None}: `label`, or `label_0`, `label_1`, … for labels (N, L)."""
    labels, labels_key = source.labels, source.labels_key
    if labels is None and labels_key is None:
        return {"label": np.full(n_images, None, object)}
    labels_path = expand_home(labels).absolute() if labels is not None else array_path
    labels_kind = _kind(labels_path) if labels is not None else file_kind
    if labels_kind in ("npz", "h5") and labels_key is None:
        raise SourceError(
            f"{labels_path}: name the array of labels in it with labels_key; it has "
            f"{', '.join(_shapes(labels_path, labels_kind))}"
        )
    label_array = _open(labels_path, labels_kind, labels_key or "")
    shape = _shape(label_array)
    if shape[:1] != (n_images,) or not _are_labels(shape):
        raise SourceError(
            f"{labels_path}: the labels have shape {shape} for {count_text(n_images, 'image')}; "
            f"expected one for each: ({n_images},), or a row for each. Name another file or array: "
            "images.labels, images.labels_key (in Python: labels=, labels_key=)"
        )
    values = _label_values(label_array, labels_path).reshape(n_images, -1)
    n_columns = values.shape[1]
    names = ["label"] if n_columns == 1 else [f"label_{index}" for index in range(n_columns)]
    return {name: _cell_texts(column) for name, column in zip(names, values.T, strict=True)}


def _other_columns(
    array_path: Path, file_kind: str, source: ImageSource, n_images: int
) -> dict[str, npt.NDArray[np.object_]]:
    """Return {array's name: N texts or None} of the arrays in a file that have one value for each
    image, such as its patient or its side of a split.
    """
    if file_kind not in ("npz", "h5"):
        return {}
    taken_names = {source.labels_key, *RESERVED_COLUMNS, "label"}
    columns = {}
    for name, shape in _shapes(array_path, file_kind).items():
        if shape == (n_images,) and name not in taken_names:
            # Of types that are not read here, such as Python objects.
            with contextlib.suppress(SourceError, ValueError):
                array = _open(array_path, file_kind, name)
                columns[name] = _cell_texts(_label_values(array, array_path))
    return columns


def _cell_texts(values: npt.NDArray[Any]) -> npt.NDArray[np.object_]:
    """Return values (N,) as N texts, or None for missing and empty ones."""
    texts = as_text(pd.Series(values))
    return texts.astype(object).where(texts.notna() & (texts != ""), None).to_numpy()


def _label_values(label_array: Any, labels_path: Path) -> npt.NDArray[Any]:
    if not isinstance(label_array, h5py.Dataset):
        return np.asarray(label_array[:])
    try:
        return read_values(labels_path, label_array)
    except ValueError as error:
        raise SourceError(f"{labels_path}: {error}") from error


def _labels_of(images_shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the arrays that can be labels of images of this shape; those alone that
    are named like labels, where there are such.
    """
    names = [
        name
        for name, shape in shapes.items()
        if shape[:1] == images_shape[:1] and _are_labels(shape)
    ]
    return [name for name in names if name.lower() in _LABELS_NAMES] or names


def _are_labels(shape: tuple[int, ...]) -> bool:
    """Return whether an array can be labels: (N,), (N, L), or either with more axes of one."""
    return len(shape) > 0 and math.prod(shape[1:]) <= max(shape[1:2], default=1) <= _MAX_LABELS


def _open(array_path: Path, file_kind: str, array_key: str) -> Any:
    try:
        return open_array(str(array_path), file_kind, array_key)
    except OSError as error:
        raise SourceError(f"{array_path}: cannot be read: {error.strerror or error}") from error


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape or ())  # None for a data set of HDF5 without values (`h5py.Empty`)


def _kind(array_path: Path) -> str:
    if not array_path.is_file():
        raise SourceError(missing_path_message(array_path, "an array: .npy, .npz, .h5 or idx"))
    suffix = array_path.suffix.lower()
    if suffix in ARRAY_KINDS:
        return ARRAY_KINDS[suffix]
    if re.search(r"idx\d|\.idx", array_path.name):
        return "idx"
    raise SourceError(
        unread_format(array_path)
        or (
            f"{array_path}: arrays end in .npy, .npz, .h5 or .hdf5, or are idx files "
            f"(…-idx3-ubyte, .gz); found {suffix}"
        )
    )


def _is_images(shape: tuple[int, ...]) -> bool:
    # An axis of 0 takes no bytes, so a file of a few bytes could declare any number of images.
    if min(shape, default=0) < 1:
        return False
    if len(shape) == 3:  # (H, W, 3) is one colour image, not many grey ones of three columns
        return not (shape[2] in (3, 4) and shape[1] > shape[2])
    return len(shape) == 4


def _has_usual_channels(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or shape[3] in _IMAGE_CHANNELS or shape[1] in _IMAGE_CHANNELS


def _only_images(array_path: Path, file_kind: str) -> str:
    shapes = _shapes(array_path, file_kind)
    names = [name for name, shape in shapes.items() if _is_images(shape)]
    # Arrays of other numbers of channels are images of bands, or features.
    names = [name for name in names if _has_usual_channels(shapes[name])] or names
    if len(names) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no arrays"
        raise SourceError(
            f"{array_path}: {len(names)} arrays could be images; name one with key. It has: "
            f"{listed}. In the recipe: images.array_key: {names[0] if names else 'NAME'} (in "
            "Python: key=)"
        )
    return names[0]


def _shapes(array_path: Path, file_kind: str) -> dict[str, tuple[int, ...]]:
    try:
        if file_kind == "npz":
            with np.load(array_path, allow_pickle=False) as npz_archive:
                return {name: _npz_shape(npz_archive, name) for name in npz_archive.files}
        with open_hdf5(array_path) as hdf5_file:
            data_sets = find_data_sets(hdf5_file)
            if unnamed := [name for name in data_sets if not isinstance(name, str)]:
                raise ValueError(f"the name {unnamed[0]!r} is no UTF-8")
            return {name: _shape(data_set) for name, data_set in data_sets.items()}
    except Exception as error:
        # zipfile, NumPy and h5py raise anything on bytes that are not theirs
        raise SourceError(f"{array_path}: cannot be read as {file_kind}: {error}") from error


def _npz_shape(npz_archive: Any, array_name: str) -> tuple[int, ...]:
    with npz_archive.zip.open(f"{array_name}.npy") as member:
        return array_shape(member.read(MAX_ARRAY_HEADER_BYTES))
