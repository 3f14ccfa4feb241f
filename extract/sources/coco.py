"""COCO annotations as labels of whole images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.extract.errors import SourceError


def coco_rows(values: Mapping[str, Any], file: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """One row per image: `path` (COCO's file_name) and `label`, with what was assumed.

    The label is the name of the category of the image's annotations; where some image has several,
    it is the list of their names, for task.kind: multi. Raises SourceError for annotations of
    images or categories that are not there.
    """
    images, annotations = values["images"], values.get("annotations")
    try:
        names = {
            category["id"]: str(category["name"]) for category in values.get("categories") or []
        }
        labels: dict[Any, dict[str, None]] = {image["id"]: {} for image in images}
        if len(labels) < len(images):
            raise SourceError(
                f"{file}: {len(images) - len(labels)} ids of images occur more than once"
            )
        for annotation in annotations or []:
            labels[annotation["image_id"]][names[annotation["category_id"]]] = None
        paths = [str(image["file_name"]) for image in images]
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{file}: not COCO as expected: {type(error).__name__} {error}. Expected images with "
            "id and file_name, annotations with image_id and category_id, categories with id and "
            "name"
        ) from error
    several = any(len(found) > 1 for found in labels.values())
    column = [
        list(found) or None if several else next(iter(found), None) for found in labels.values()
    ]
    note = f"{file.name}: COCO; the label of an image is the category of its annotations"
    if several:
        note += ". Some images have several, so that the labels are lists: task.kind: multi"
    return pd.DataFrame({"path": paths, "label": pd.Series(column, dtype=object)}), (note,)
