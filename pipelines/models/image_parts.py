"""The boxes or tiles of images that a model was trained on, as its file describes them."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.extract.images.crops import split_crop
from headrace.extract.sources.regions import Boxes, Tiles
from headrace.extract.sources.source import ImageSource
from headrace.heads.persist import WRITE_AGAIN
from headrace.pipelines.models.errors import ModelError


@dataclass(frozen=True)
class ImageParts:
    """Tiles of a grid, boxes in columns of a table, or the detections of a detector."""

    tiles: Tiles | None = None
    boxes: Boxes | Literal["auto", "none"] = "none"  # auto: columns found by their usual names
    min_confidence: float | None = None  # of detections


def trained_parts(source: ImageSource | None, paths: Iterable[str]) -> ImageParts | None:
    """Return the parts of images that a model is trained on; None for whole images.

    source: None for features given from Python. paths: of the images.
    """
    if source is None:
        return None
    if source.tiles is not None:
        return ImageParts(tiles=source.tiles)
    if source.detections is not None:
        # "auto": when it predicts, a table of boxes serves as well as a detector's results.
        return ImageParts(boxes="auto", min_confidence=source.min_confidence)
    has_boxes = source.boxes != "none" and any(split_crop(path)[1] is not None for path in paths)
    return ImageParts(boxes=source.boxes) if has_boxes else None


def parts_fields(parts: ImageParts | None) -> dict[str, Any]:
    """Return the fields of a model's description for parts: none for whole images."""
    return {} if parts is None else {"image_parts": dataclasses.asdict(parts)}


def read_image_parts(fields: Any, model_path: Path) -> ImageParts | None:
    """Return the parts from the fields of a model's description, None from None. Raises
    ModelError.
    """
    if fields is None:
        return None
    try:
        tiles, boxes = fields["tiles"], fields["boxes"]
        if isinstance(boxes, dict):
            columns = boxes["columns"]
            boxes = Boxes(**boxes | {"columns": None if columns is None else tuple(columns)})
        grid = None if tiles is None else Tiles(**tiles)
        confidence = fields["min_confidence"]
        is_known = isinstance(boxes, Boxes) or boxes in ("auto", "none")
        if not is_known or not (confidence is None or 0 <= confidence <= 1):
            raise ValueError("a recipe cannot have them")
        return ImageParts(grid, boxes, confidence)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{model_path}: the boxes or tiles that it was trained on are none of this version: "
            f"{str(fields)[:80]} ({str(error)[:120]}). {WRITE_AGAIN}"
        ) from error
