"""The parts of images that a model was trained on, boxes or tiles, a part of its own file."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.extract.images.crops import split_crop
from headrace.extract.sources.read import ImageSource
from headrace.extract.sources.regions import Boxes, Tiles
from headrace.heads.persist import WRITE_AGAIN
from headrace.pipelines.models.errors import ModelError


@dataclass(frozen=True)
class ImageParts:
    """Tiles of this grid, or boxes in these columns; auto: in columns known by their names.
    min_confidence: of what a detector has found, where that are the parts.
    """

    tiles: Tiles | None = None
    boxes: Boxes | Literal["auto", "none"] = "none"
    min_confidence: float | None = None


def trained_parts(source: ImageSource | None, paths: Iterable[str]) -> ImageParts | None:
    """Return what a model is trained on; None for whole images, and for features that a program
    gave (source None). paths: of the images.
    """
    if source is None:
        return None
    if source.tiles is not None:
        return ImageParts(tiles=source.tiles)
    if source.detections is not None:
        # a table of boxes is as good as a detector's results
        return ImageParts(boxes="auto", min_confidence=source.min_confidence)
    has_boxes = source.boxes != "none" and any(split_crop(path)[1] is not None for path in paths)
    return ImageParts(boxes=source.boxes) if has_boxes else None


def parts_fields(parts: ImageParts | None) -> dict[str, Any]:
    """Return what a model's description says of parts: nothing where it knows whole images."""
    return {} if parts is None else {"image_parts": dataclasses.asdict(parts)}


def read_image_parts(fields: Any, model_path: Path) -> ImageParts | None:
    """Return the parts whose fields a model's description has, None for none. Raises ModelError."""
    if fields is None:
        return None
    try:
        tiles, boxes = fields["tiles"], fields["boxes"]
        if isinstance(boxes, dict):
            columns = boxes["columns"]
            boxes = Boxes(**boxes | {"columns": None if columns is None else tuple(columns)})
        grid = None if tiles is None else Tiles(**tiles)
        confidence = fields["min_confidence"]
        is_usual = isinstance(boxes, Boxes) or boxes in ("auto", "none")
        if not is_usual or not (confidence is None or 0 <= confidence <= 1):
            raise ValueError("a recipe cannot have them")
        return ImageParts(grid, boxes, confidence)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{model_path}: the boxes or tiles that it was trained on are none of this version: "
            f"{str(fields)[:80]} ({str(error)[:120]}). {WRITE_AGAIN}"
        ) from error
