"""Images as callers of Python functions give them, as a table with their paths."""

import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from headrace.extract.images.locators import encode_path
from headrace.extract.sources.read import detect_source, read_source, warn_about_left_out
from headrace.pipelines.errors import InvalidInput

# torchvision's ImageFolder stands for any data set with `samples`, pairs of a path and the number
# of a class, and `classes`, their names.
ImagesLike = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | pd.DataFrame | Any
_EXPECTED = (
    "a folder, a table, an archive or an array file, a list of paths, a DataFrame with the column "
    "path, or torchvision's ImageFolder"
)


def image_table(images: ImagesLike, *, labelled: bool) -> pd.DataFrame:
    """Return images as a table with the columns `id`, by default the path, `path`, and what else
    the caller gave.

    labelled: whether the classes must be told too. Raises InvalidInput for what holds no paths,
    SourceError for a source that cannot be read.
    """
    if isinstance(images, str | os.PathLike):
        location = os.fspath(images)
        listing = read_source(detect_source(location), labelled=labelled)
        warn_about_left_out(listing, location)
        return listing.samples
    table = images if isinstance(images, pd.DataFrame) else _table_of(images, labelled)
    _check_columns(table)
    # pandas sorts by no column that has the name of the index, too.
    no_names: list[Any] = [None] * table.index.nlevels
    table = table.rename_axis(index=no_names)
    if table.empty:
        raise InvalidInput(f"no image is given. Expected {_EXPECTED}")
    no_paths = table["path"][~table["path"].map(lambda path: isinstance(path, str | os.PathLike))]
    if len(no_paths):
        raise InvalidInput(
            f"{len(no_paths):,} of {len(table):,} images have no path: that of row "
            f"{no_paths.index[0]!r} is {no_paths.iloc[0]!r}. Leave them out: "
            "table[table['path'].notna()]"
        )
    # A text may be a locator, which names an image within a file; a path is never one.
    paths = table["path"].map(lambda path: path if isinstance(path, str) else encode_path(path))
    if "id" not in table:
        return table.assign(id=paths, path=paths)
    _check_ids(table["id"], paths)
    return table.assign(path=paths)


def _check_columns(table: pd.DataFrame) -> None:
    columns = table.columns.tolist()
    if "path" not in columns:
        if "path" in table.index.names:
            cure = "It is the index: table.reset_index()"
        else:
            renamed = f"rename(columns={{{columns[0]!r}: 'path'}})" if columns else "assign(path=…)"
            cure = f"Name the one that holds the files so: table.{renamed}"
        raise InvalidInput(
            f"the table of images has no column path. It has: {', '.join(map(str, columns))}. "
            f"{cure}"
        )
    if not table.columns.is_unique:
        repeated = table.columns[table.columns.duplicated()][0]
        raise InvalidInput(
            f"the table of images has several columns {repeated!r}. Keep the first of each: "
            "table.loc[:, ~table.columns.duplicated()]"
        )


def _check_ids(ids: pd.Series, paths: pd.Series) -> None:
    """Raise InvalidInput for ids of several images, and for ids that cannot be sorted, and so give
    no split.
    """
    images = pd.DataFrame({"id": ids, "path": paths}).drop_duplicates()
    if images["id"].duplicated().any():
        repeated = images["id"][images["id"].duplicated()].iloc[0]
        raise InvalidInput(
            f"the column id of the table of images has {str(repeated)!r} for several images; "
            "expected one each. Name what it holds: table.rename(columns={'id': 'patient'})"
        )
    try:
        ids.sort_values()
    except TypeError:
        raise InvalidInput(
            "the column id of the table of images holds values that have no order, such as numbers "
            "beside texts. Make them texts: table.assign(id=table['id'].astype(str))"
        ) from None


def _table_of(images: Any, labelled: bool) -> pd.DataFrame:
    # torch.utils.data.Subset
    if hasattr(images, "dataset") and hasattr(images, "indices"):
        return _table_of(images.dataset, labelled).iloc[list(images.indices)]
    if hasattr(images, "samples") and hasattr(images, "classes"):
        table = pd.DataFrame(images.samples, columns=["path", "label"])
        # Those of torchvision's ImageNet are tuples of synonyms.
        names = [name if isinstance(name, str) else ", ".join(name) for name in images.classes]
        return table.assign(label=[names[number] for number in table["label"]])
    if labelled:
        raise InvalidInput(
            f"images with their labels are given as {type(images).__name__}. Rows of features are "
            "in an order of their own, so labels alone do not tell whose they are: give "
            "pandas.DataFrame({'path': PATHS, 'label': LABELS})"
        )
    # A DataLoader yields batches of pixels.
    has_batches = hasattr(images, "dataset")
    if isinstance(images, Mapping) or not isinstance(images, Iterable) or has_batches:
        raise InvalidInput(f"images are given as {type(images).__name__}. Expected {_EXPECTED}")
    iterator = iter(images)
    first_images = list(itertools.islice(iterator, 1))
    if first_images and not isinstance(first_images[0], str | os.PathLike):
        raise InvalidInput(
            f"images are given as {type(images).__name__} of {type(first_images[0]).__name__}. "
            "Features belong to the bytes of files: save images in memory, "
            "numpy.savez('images.npz', images=IMAGES, labels=LABELS) with images (N, H, W, 3) "
            "uint8, and give 'images.npz'"
        )
    return pd.DataFrame({"path": [*first_images, *iterator]}, dtype=object)
