"""The lists of CUB-200 and NABirds: an image's path, class and side of the split by its number."""

from pathlib import Path

import pandas as pd

from headrace.extract.errors import SourceError

IMAGES, LABELS = "images.txt", "image_class_labels.txt"
_CLASSES, _SPLIT = "classes.txt", "train_test_split.txt"


def is_list_of_birds(table_path: Path) -> bool:
    """Return whether this is the list of images of such a data set."""
    return table_path.name == IMAGES and (table_path.parent / LABELS).is_file()


def bird_rows(table_path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the images' columns `id`, `path`, `label` (the class's name) and, if the data set has
    one, `split`; and a note on what was assumed.

    Raises SourceError for a list whose lines are not a number and a value.
    """
    folder = table_path.parent
    paths, labels = _read_list(table_path), _read_list(folder / LABELS)
    if (folder / _CLASSES).is_file():
        labels = labels.map(_read_list(folder / _CLASSES))
    columns = {"path": "images/" + paths, "label": labels.reindex(paths.index)}
    if (folder / _SPLIT).is_file():
        sides = _read_list(folder / _SPLIT).map({"1": "train", "0": "test"})
        columns["split"] = sides.reindex(paths.index)
    frame = pd.DataFrame(columns, index=paths.index).rename_axis("id").reset_index()
    return frame.astype(object), (
        f"{table_path.name}: the lists of CUB-200: labels are those of {LABELS}",
    )


def _read_list(path: Path) -> "pd.Series[str]":
    """Return the values of a list by the number that each line begins with."""
    # utf-8-sig: a byte order mark would be part of the first number.
    text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip().split(maxsplit=1) for line in text.splitlines()]
    pairs = [line for line in lines if line]
    if any(len(pair) < 2 for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise SourceError(f"{path}: expected lines of a number, each once, and a value")
    return pd.Series(dict(pairs), dtype=object)
