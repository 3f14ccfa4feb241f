"""The parts of images that a model was trained on, boxes or tiles, recorded beside its files."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from headrace.extract.images.crops import split_crop
from headrace.extract.sources.read import ImageSource
from headrace.extract.sources.regions import Boxes, BoxFormat, Tiles
from headrace.pipelines.records import RunDamaged, read_record, write_record

IMAGE_PARTS = "parts.json"


@dataclass(frozen=True)
class ImageParts:
    """Tiles of this grid, or boxes in these columns; auto: in columns known by their names.
    min_confidence: of what a detector has found, where that are the parts.
    """

    tiles: Tiles | None = None
    boxes: Boxes | Literal["auto", "none"] = "none"
    min_confidence: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the parts as values of JSON."""
        boxes = self.boxes if isinstance(self.boxes, str) else dataclasses.asdict(self.boxes)
        return {
            "tiles": None if self.tiles is None else dataclasses.asdict(self.tiles),
            "boxes": boxes,
            "min_confidence": self.min_confidence,
        }

    def save(self, model_directory: Path) -> None:
        """Write the record into a model's directory."""
        write_record(model_directory / IMAGE_PARTS, self.as_json())


def save_image_parts(
    model_directory: Path, source: ImageSource | None, paths: Iterable[str]
) -> None:
    """Record what a model was trained on, or remove that of an earlier model where it was whole
    images, or features that a program gave (source None). paths: of the images.
    """
    has_parts = any(split_crop(path)[1] is not None for path in paths)
    if source is None:
        (model_directory / IMAGE_PARTS).unlink(missing_ok=True)
    elif source.tiles is not None:
        ImageParts(tiles=source.tiles).save(model_directory)
    elif source.detections is not None:
        # a table of boxes is as good as a detector's results
        ImageParts(boxes="auto", min_confidence=source.min_confidence).save(model_directory)
    elif has_parts and source.boxes != "none":
        ImageParts(boxes=source.boxes).save(model_directory)
    else:
        (model_directory / IMAGE_PARTS).unlink(missing_ok=True)


def read_image_parts(model_directory: Path) -> ImageParts | None:
    """Return the record of a model; None for one of whole images. Raises RunDamaged."""
    parts_path = model_directory / IMAGE_PARTS
    try:
        fields = read_record(parts_path)
    except FileNotFoundError:
        return None
    try:
        tiles, boxes = fields["tiles"], fields["boxes"]
        if isinstance(boxes, dict):
            columns = boxes["columns"]
            boxes = Boxes(**boxes | {"columns": None if columns is None else tuple(columns)})
        grid = None if tiles is None else Tiles(**tiles)
        parts = ImageParts(grid, boxes, fields["min_confidence"])
        if not _can_be(parts):
            raise ValueError(fields)
        return parts
    except (KeyError, TypeError, ValueError) as error:
        raise RunDamaged(
            f"{parts_path} is no record of this version: run the recipe again, or fetch the model "
            "again"
        ) from error


def _can_be(parts: ImageParts) -> bool:
    """Tell whether the values are as in a recipe: the file may be a stranger's."""
    tiles, boxes, confidence = parts.tiles, parts.boxes, parts.min_confidence
    if tiles is not None and not (
        type(tiles.size) is int and type(tiles.overlap) is int and 0 <= tiles.max_background <= 1
    ):
        return False
    if confidence is not None and not 0 <= confidence <= 1:
        return False
    if not isinstance(boxes, Boxes):
        return boxes in ("auto", "none")
    columns = boxes.columns or ()
    return (
        boxes.format in get_args(BoxFormat)
        and boxes.unit in (None, "pixels", "fraction")
        and len(columns) in (0, 4)
        and all(isinstance(name, str) for name in columns)
    )
