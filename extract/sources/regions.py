"""Rows that are parts of images: boxes that a table gives, and tiles of large images."""

import io
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.text import as_numbers
from headrace.extract.errors import SourceError
from headrace.extract.images.bands import upright_size
from headrace.extract.images.crops import Background, Crop
from headrace.extract.images.locators import is_locator, locator_file, read_bytes
from headrace.extract.sources.listing import Listing

BoxFormat = Literal["xywh", "xyxy", "cxcywh"]  # as torchvision's BoundingBoxFormat

# {names of four columns that are taken for a box: its format}, compared without regard to case.
_KNOWN_COLUMNS: dict[tuple[str, str, str, str], BoxFormat] = {
    ("x", "y", "width", "height"): "xywh",
    ("x", "y", "w", "h"): "xywh",
    ("x1", "y1", "x2", "y2"): "xyxy",
    ("xmin", "ymin", "xmax", "ymax"): "xyxy",
    ("x_min", "y_min", "x_max", "y_max"): "xyxy",
    ("left", "top", "width", "height"): "xywh",
    ("left", "top", "right", "bottom"): "xyxy",
    ("bbox_x", "bbox_y", "bbox_w", "bbox_h"): "xywh",
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"): "xywh",
    ("cx", "cy", "width", "height"): "cxcywh",
    ("x_center", "y_center", "width", "height"): "cxcywh",
}
BACKGROUNDS = get_args(Background)
# Pixels between the starts of two tiles. Each tile goes through the network: one tile per pixel
# would be a million for a small photo, and the grid may come from a stranger's model file.
_MIN_STRIDE = 8


@dataclass(frozen=True)
class Boxes:
    """The columns of a table that hold a box for each row."""

    # None: four columns with names of _KNOWN_COLUMNS
    columns: tuple[str, str, str, str] | None = None
    format: BoxFormat = "xywh"  # of these columns
    # fraction: of the image's width and height; None: pixels, unless all numbers are from 0 to 1
    unit: Literal["pixels", "fraction"] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values of another kind."""
        if self.format not in get_args(BoxFormat) or self.unit not in (None, "pixels", "fraction"):
            raise ValueError(f"boxes of format {self.format!r} in the unit {self.unit!r}")
        names = self.columns
        if names is not None and (len(names) != 4 or not all(isinstance(n, str) for n in names)):
            raise ValueError(f"boxes of the columns {names}: expected the names of four")


@dataclass(frozen=True)
class Tiles:
    """The grid that large images are cut into, in pixels of the upright image.

    The last tile of a row ends where the image does, and overlaps its neighbour by more.
    """

    size: int
    overlap: int = 0
    # white: 220 of 255 and more in every channel; black: 8 and less; nodata: 0 or no value
    background: Background | None = None
    max_background: float = 0.9  # a tile with a larger share of background is empty

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for a grid that cannot be."""
        if not 0 <= self.max_background <= 1:
            raise ValueError(f"max_background is {self.max_background}: expected a share, 0 to 1")
        size, overlap = operator.index(self.size), operator.index(self.overlap)
        max_overlap = min(size - _MIN_STRIDE, size * 7 // 8)
        if not 0 <= overlap <= max_overlap:
            expected = (
                f"an overlap from 0 to {max_overlap} (steps from tile to tile of less than "
                f"{size - max_overlap} pixels would cut an image into very many)"
                if max_overlap >= 0
                else f"a size of {_MIN_STRIDE} and more"
            )
            raise ValueError(
                f"tiles of {self.size} pixels that overlap by {self.overlap}: expected {expected}"
            )
        if self.background is not None and self.background not in BACKGROUNDS:
            raise ValueError(
                f"background is {self.background!r}; expected one of {', '.join(BACKGROUNDS)}"
            )


def find_boxes(
    frame: pd.DataFrame, boxes: Boxes | Literal["auto", "none"], table_path: Path
) -> tuple[list[Crop | None], str] | None:
    """Return the box of each row of a table (None for a row without one) and a note on the columns
    that were taken for it; None for a table of whole images.

    Raises SourceError for columns that do not exist, and for numbers that are no boxes.
    """
    if boxes == "none":
        return None
    options = Boxes() if boxes == "auto" else boxes
    columns, box_format = options.columns, options.format
    if columns is None:
        detected = _detect_box_columns(frame)
        if boxes == "auto" and detected is None:
            return None
        columns, box_format = detected or (("x", "y", "width", "height"), "xywh")
    if absent := [name for name in columns if name not in frame.columns]:
        raise SourceError(
            f"{table_path}: no column {', '.join(map(repr, absent))} for the boxes. Name them: "
            "images.boxes: {columns: [x, y, width, height]} (headrace predict: --box-columns "
            f"x,y,width,height). The columns are: {', '.join(map(str, frame.columns))}."
        )
    values = _box_numbers(frame[list(columns)], table_path)
    has_box = ~np.isnan(values).any(axis=1)
    unit = options.unit
    if unit is None:
        # The whole table decides: a single row, such as 0, 0, 1, 1, may be a box in either unit.
        is_share = (values[has_box] >= 0) & (values[has_box] <= 1)
        unit = "fraction" if has_box.any() and is_share.all() else "pixels"
    left, top, width, height = _left_top_width_height(values, box_format)
    if (is_negative := has_box & ((width < 0) | (height < 0))).any():
        row = int(is_negative.argmax())
        raise SourceError(
            f"{table_path}, row {row + 1}: a box with a negative width or height, as {box_format} "
            f"({', '.join(columns)} = {', '.join(f'{value:g}' for value in values[row])}). Say "
            f"what the columns are: images.boxes: {{columns: [{', '.join(columns)}], format: "
            f"{'xywh' if box_format == 'xyxy' else 'xyxy'}}}"
        )
    # Unless the user says so, "pixels" is a guess. Many boxes of a pixel or less are rather shares
    # of an image, and would be cropped to one pixel each.
    is_point = has_box & (width > 0) & (height > 0) & (width <= 1) & (height <= 1)
    if options.unit is None and unit == "pixels" and is_point.sum() > 0.1 * has_box.sum():
        row = int(is_point.argmax())
        raise SourceError(
            f"{table_path}, row {row + 1}: a box of at most one pixel ({', '.join(columns)} = "
            f"{', '.join(f'{value:g}' for value in values[row])}), one of {int(is_point.sum()):,}. "
            "Say whether they are shares of the image: images.boxes: {unit: fraction}, or pixels: "
            "images.boxes: {unit: pixels}"
        )
    boxes_of_rows = np.stack([left, top, width, height], axis=1).tolist()
    crops = [
        Crop(box[0], box[1], box[2], box[3], unit) if is_present else None
        for box, is_present in zip(boxes_of_rows, has_box, strict=True)
    ]
    note = (
        f"{table_path.name}: each row is the box {', '.join(columns)} of an image ({box_format}, "
        f"{'shares of its width and height' if unit == 'fraction' else 'pixels'}; images.boxes)"
    )
    return crops, note


def _box_numbers(text: pd.DataFrame, table_path: Path) -> Any:
    """Return the numbers of boxes (n, 4) float64, NaN for a missing one. Raises SourceError."""
    numbers = text.apply(as_numbers)
    is_wrong = (numbers.isna() & text.notna()) | np.isinf(numbers)
    if is_wrong.to_numpy().any():
        row, column = np.argwhere(is_wrong.to_numpy())[0]
        raise SourceError(
            f"{table_path}, row {row + 1}: {text.columns[column]} is {text.iat[row, column]!r}; "
            "expected the number of a box. For whole images: images.boxes: none"
        )
    return numbers.to_numpy(np.float64)


def _detect_box_columns(
    frame: pd.DataFrame,
) -> tuple[tuple[str, str, str, str], BoxFormat] | None:
    """Return the columns with the names of a box, as the table writes them, and their format."""
    name_of = {str(name).lower(): str(name) for name in reversed(frame.columns)}
    for (first, second, third, fourth), box_format in _KNOWN_COLUMNS.items():
        if {first, second, third, fourth} <= set(name_of):
            return (name_of[first], name_of[second], name_of[third], name_of[fourth]), box_format
    return None


def _left_top_width_height(
    values: "np.ndarray[Any, np.dtype[np.float64]]", box_format: BoxFormat
) -> tuple[Any, Any, Any, Any]:
    first, second, third, fourth = values.T
    if box_format == "xyxy":
        return first, second, third - first, fourth - second
    if box_format == "cxcywh":
        return first - third / 2, second - fourth / 2, third, fourth
    return first, second, third, fourth


def cut_tiles(listing: Listing, tiles: Tiles) -> Listing:
    """Return a listing of the tiles instead of their images.

    A row has the columns of its image, the id `ID#x,y`, and a locator.
    """
    rows: list[int] = []
    names: list[str] = []
    paths: list[str] = []
    for row, (name, path) in enumerate(
        zip(listing.samples["id"], listing.samples["path"], strict=True)
    ):
        crops = _tiles_of(str(path), tiles)
        # An image whose size cannot be read stays one row, and is recorded as a failure when it is
        # decoded.
        rows += [row] * max(len(crops), 1)
        names += [f"{name}#{crop.left:g},{crop.top:g}" for crop in crops] or [str(name)]
        paths += [crop.locator(str(path)) for crop in crops] or [str(path)]
    samples = part_rows(listing.samples, rows, names, paths)
    n_images = len(listing.samples)
    overlap = f", {tiles.overlap} of them shared" if tiles.overlap else ""
    note = (
        f"{count_text(n_images, 'image is', 'images are')} cut into "
        f"{count_text(len(samples), 'tile')} of {tiles.size} pixels{overlap} (images.tiles); the "
        "tiles of an image have its label, and stay on one side of every split"
    )
    return replace(
        listing,
        samples=samples,
        found=listing.found + len(samples) - n_images,
        notes=(*listing.notes, note),
    )


def part_rows(
    samples: pd.DataFrame, rows: Sequence[int], names: Sequence[str], paths: Sequence[str]
) -> pd.DataFrame:
    """Return a row for each part of an image.

    rows: for each part the position of its image in `samples`; names, paths: its id and locator.
    The column `image` has the image's id, unless the user has a column of that name.
    """
    parts = samples.iloc[list(rows)].reset_index(drop=True)
    # The image can be the unit that is predicted.
    if "image" not in parts:
        parts["image"] = parts["id"]
    return parts.assign(id=pd.Series(names, dtype=object), path=pd.Series(paths, dtype=object))


def _tiles_of(path: str, tiles: Tiles) -> list[Crop]:
    try:
        if is_locator(path):
            width, height = upright_size(io.BytesIO(read_bytes(path)))
        else:
            with open(locator_file(path), "rb") as file:
                width, height = upright_size(file)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, its decoder says when it is decoded
        return []
    stride = tiles.size - tiles.overlap
    return [
        Crop(
            left,
            top,
            min(tiles.size, width),
            min(tiles.size, height),
            background=tiles.background,
            max_background=tiles.max_background if tiles.background else 1.0,
        )
        for top in _starts(height, tiles.size, stride)
        for left in _starts(width, tiles.size, stride)
    ]


def _starts(length: int, size: int, stride: int) -> Sequence[int]:
    """Return where tiles start on an axis: every `stride`, and the last one where it ends at
    `length`.
    """
    if length <= size:
        return (0,)
    return (*range(0, length - size, stride), length - size)
