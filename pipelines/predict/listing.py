"""Listing of the images that are named on the command line."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.cache.count_text import count_text
from headrace.extract.images.crops import split_crop
from headrace.extract.images.locators import printable_name
from headrace.extract.sources.listing import Listing, join_listings
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.regions import Boxes
from headrace.extract.sources.source import ImageSource
from headrace.extract.sources.tabular import is_table
from headrace.heads.data.side_columns import SideColumn
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.side_columns import require_columns
from headrace.pipelines.records import RUN_AGAIN, read_record


def list_images(
    sources: Sequence[str | Path],
    *,
    side_columns: Sequence[SideColumn] = (),
    unit_column: str | None = None,
    optional_column: str | None = None,
    **options: Any,
) -> Listing:
    """Return one row per image, in the order given, with columns `file` (its name for people),
    `path` (a file or a locator in one) and those that the model reads beside an image.

    An image in a folder is named by the folder's name and its path below it, any other by its id.
    Where two sources give two images one name, the folder of the source, or a table's own path, is
    put before it.

    sources: image files, folders, tables, archives, array files, or recipes, whose images are read
    with the recipe's options.
    side_columns, unit_column: columns that the model reads, which every source must have.
    optional_column: a column that is None where a source lacks it.
    options: fields of ImageSource, such as path_column.

    Raises SourceError for a source that does not exist, RecipeError for a broken recipe, DataError
    for a source without the columns that the model reads.
    """
    names = [column.name for column in side_columns]
    names += [] if unit_column is None or unit_column in names else [unit_column]
    optional = [] if optional_column is None or optional_column in names else [optional_column]
    image_sources = [
        image_source for source in sources for image_source in _sources(str(source), options)
    ]
    listings = [_list_source(source, names, optional) for source in image_sources]
    if len(listings) == 1:
        return listings[0]
    all_samples = pd.concat([listing.samples for listing in listings])
    paths_of_name = all_samples.groupby("file")["path"].nunique()
    for image_source, listing in zip(image_sources, listings, strict=True):
        path, names_of_files = image_source.path, listing.samples["file"]
        prefix = printable_name(str(path if is_table(path) else path.parent))
        # A name stands for one image: a report, or a join by `file`, could not tell two apart.
        listing.samples["file"] = names_of_files.where(
            names_of_files.map(paths_of_name) == 1, f"{prefix}/" + names_of_files
        )
    return join_listings(listings)


def whole_images_note(parts: ImageParts | None, paths: Iterable[str]) -> list[str]:
    """Return a note if some images are whole, but the model was trained on boxes in images."""
    if parts is None or parts.tiles is not None:  # whole images are cut into tiles
        return []
    n_whole = sum(split_crop(path)[1] is None for path in paths)
    if not n_whole:
        return []
    columns = parts.boxes.columns if isinstance(parts.boxes, Boxes) else None
    advice = (
        "(images.boxes): give a table that names these images, with the columns of their boxes, "
        f"{', '.join(columns or ('x', 'y', 'width', 'height'))}"
        if parts.min_confidence is None
        else "(images.detections): name the detector's results for these images, --detections"
    )
    return [
        f"{count_text(n_whole, 'image is', 'images are')} predicted as a whole, but the model was "
        f"trained on parts of images {advice}"
    ]


def unrecorded_parts_note(model_path: Path) -> list[str]:
    """Return a note if a model's file, by an earlier version, does not say that it was trained on
    parts of images, but the recipe of its run does. Raises RunDamaged.
    """
    recipe_path = RunPaths(model_path.absolute().parent).recipe
    if not recipe_path.is_file():
        return []
    images = read_record(recipe_path).get("images") or {}
    return [
        f"{model_path} does not say that it was trained on parts of images, but its run's recipe "
        f"has images.{name}. {RUN_AGAIN}"
        for name in ("tiles", "boxes", "detections")
        if images.get(name) not in (None, "auto", "none")
    ]


def _sources(location: str, options: dict[str, Any]) -> list[ImageSource]:
    """Return the image sources of a command-line argument; a recipe may name two."""
    if Path(location).suffix.lower() not in (".yaml", ".yml"):
        return [detect_source(location, **options)]
    # The recipe's modules are imported for a recipe alone; other sources are listed sooner without.
    from headrace.pipelines.recipe.load import load_recipe

    images = load_recipe(location).images
    unlabelled = images.unlabelled_source()
    return [images.source(), *([] if unlabelled is None else [unlabelled])]


def _list_source(source: ImageSource, required: Sequence[str], optional: Sequence[str]) -> Listing:
    location = str(source.location)
    listing = read_source(source, labelled=False)
    file_names = listing.samples["id"].astype(str)
    if source.kind == "folder":
        file_names = f"{printable_name(location).rstrip('/')}/" + file_names
    require_columns(listing.samples, required, f"{location}: ")
    named = pd.DataFrame({"file": file_names, "path": listing.samples["path"].astype(str)})
    columns = listing.samples.reindex(columns=[*required, *optional])
    return replace(listing, samples=pd.concat([named, columns], axis=1))
