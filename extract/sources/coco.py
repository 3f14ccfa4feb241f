"""COCO annotations as labels of whole images, or as rows with a box each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.extract.errors import SourceError

# Of an image, that are read otherwise, or say nothing of it.
_OWN_KEYS = frozenset({"id", "image_id", "file_name", "path", "label", "content", "_content"}) | {
    *("x", "y", "width", "height", "license", "coco_url", "flickr_url")
}


def coco_rows(values: Mapping[str, Any], table_path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return a row per image, `path` (COCO's file_name) and `label`, and notes on what was assumed.

    values: the parsed JSON file. The label is the name of the category of the image's annotations;
    if some image has several, all labels are lists of names, for `task.kind: multi`.

    Raises SourceError for annotations of images or categories that are not there.
    """
    images, annotations = values["images"], values.get("annotations")
    try:
        category_names = _category_names(values)
        # {image: its categories}, a dict as an ordered set
        image_ids = [_id_of(image, "image") for image in images]
        labels_by_image: dict[Any, dict[str, None]] = {image_id: {} for image_id in image_ids}
        if n_repeated := len(images) - len(labels_by_image):
            raise SourceError(
                f"{table_path}: {count_text(n_repeated, 'id')} of images occur more than once"
            )
        for annotation in annotations or []:
            label = category_names[annotation["category_id"]]
            labels_by_image[annotation["image_id"]][label] = None
        image_paths = [str(image["file_name"]) for image in images]
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{table_path}: not COCO as expected: {type(error).__name__} {error}. Expected images "
            "with id and file_name, annotations with image_id and category_id, categories with id "
            "and name"
        ) from error
    note = f"{table_path.name}: COCO; the label of an image is the category of its annotations"
    label_lists = list(map(list, labels_by_image.values()))
    label_column: list[Any]
    if any(len(labels) > 1 for labels in label_lists):
        note += ". Some images have several, so that the labels are lists: task.kind: multi"
        label_column = [labels or None for labels in label_lists]
    else:
        label_column = [labels[0] if labels else None for labels in label_lists]
    frame = pd.DataFrame({"path": image_paths, "label": pd.Series(label_column, dtype=object)})
    return frame.join(_image_columns(images)), (note,)


def coco_boxes(values: Mapping[str, Any], table_path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return a row per annotation, and notes on what was assumed.

    Columns: `path` (COCO's file_name), `label` (its category), and x, y, width and height of its
    box in pixels.

    Raises SourceError for annotations of images that are not there.
    """
    try:
        category_names = _category_names(values)
        images = {_id_of(image, "image"): image for image in values["images"]}
        image_paths = {image_id: str(image["file_name"]) for image_id, image in images.items()}
        annotations = values.get("annotations") or []
        # Without regions of many objects, which COCO leaves out of its evaluation too.
        single = [annotation for annotation in annotations if not annotation.get("iscrowd")]
        rows = [
            (
                image_paths[annotation["image_id"]],
                category_names.get(annotation.get("category_id")),
                *annotation["bbox"],
            )
            for annotation in single
        ]
        frame = pd.DataFrame(rows, columns=["path", "label", "x", "y", "width", "height"])
        image_of_row = [images[annotation["image_id"]] for annotation in single]
        frame = frame.join(_image_columns(image_of_row))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{table_path}: not COCO as expected: {type(error).__name__} {error}. Expected images "
            "with id and file_name, and annotations with image_id, category_id and bbox (x, y, "
            "width, height)"
        ) from error
    note = f"{table_path.name}: COCO; each of its {count_text(len(single), 'annotation')} is a row"
    if len(single) < len(annotations):
        note += f", less {len(annotations) - len(single):,} of crowds"
    return frame, (note,)


def _category_names(values: Mapping[str, Any]) -> dict[Any, str]:
    return {
        _id_of(category, "category"): str(
            # Herbarium's
            category["scientificName"] if "name" not in category else category["name"]
        )
        for category in values.get("categories") or []
    }


def _id_of(entry: Mapping[str, Any], entry_kind: str) -> Any:
    # `image_id` and `category_id` as Herbarium names them
    return entry[f"{entry_kind}_id"] if "id" not in entry else entry["id"]


def _image_columns(images: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return what else COCO's images say (a camera's location, a sequence) as columns."""
    names = dict.fromkeys(
        name
        for image in images
        for name, value in image.items()
        if name not in _OWN_KEYS and isinstance(value, str | int | float)
    )
    return pd.DataFrame(
        {name: pd.Series([image.get(name) for image in images], dtype=object) for name in names},
        index=range(len(images)),
    )
