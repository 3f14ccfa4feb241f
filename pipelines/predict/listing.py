"""The images that are named on the command line: whatever a recipe can name, single files, and
recipes themselves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from headrace.extract.images.byte_ranges import printable_name
from headrace.extract.images.crops import split_crop
from headrace.extract.sources.listing import Listing, join_listings
from headrace.extract.sources.read import detect_source, read_source
from headrace.extract.sources.tabular import is_table
from headrace.heads.data.side_columns import SideColumn
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.side_columns import require_columns
from headrace.pipelines.records import read_record


def list_images(
    sources: Sequence[str | Path],
    *,
    side_columns: Sequence[SideColumn] = (),
    unit_column: str | None = None,
    optional_column: str | None = None,
    **options: Any,
) -> Listing:
    """Return one row per image, in the order given: `file`, as a person would name it, `path`, a
    file or a locator, and the columns that the model reads beside it: side columns, and the unit
    where it predicts several images together. `optional_column`, with the units that are scored, is
    None where a source has no such column.

    sources: image files, folders, tables, archives, array files, or recipes, whose images are read
    with the recipe's options.

    options: fields of ImageSource, such as path_column. A folder's images are named by their path
    below it, behind the folder's own name; all others by their ids, and where two sources would
    give two images one name, behind the folder that the source lies in, or a table's own path.

    Raises SourceError for what is not there, RecipeError for a broken recipe, DataError for a
    source without the columns that the model reads.
    """
    names = [column.name for column in side_columns]
    names += [] if unit_column is None or unit_column in names else [unit_column]
    optional = [] if optional_column is None or optional_column in names else [optional_column]
    sources = [part for source in sources for part in (source, *_unlabelled_source(source))]
    listings = [_list_source(str(source), names, optional, options) for source in sources]
    if len(listings) == 1:
        return listings[0]
    paths_of_name = (
        pd.concat([listing.samples for listing in listings]).groupby("file")["path"].nunique()
    )
    if (paths_of_name > 1).any():
        for source, listing in zip(sources, listings, strict=True):
            is_ambiguous = listing.samples["file"].map(paths_of_name) > 1
            prefix = printable_name(str(source if is_table(source) else Path(source).parent))
            listing.samples.loc[is_ambiguous, "file"] = (
                f"{prefix}/" + listing.samples.loc[is_ambiguous, "file"]
            )
    return join_listings(listings)


def whole_images_note(model_directory: Path, paths: Iterable[str]) -> list[str]:
    """Say how many images are whole where the recipe of the model's run names boxes or tiles; of a
    model in no run, and of boxes that were found by their columns alone, nothing is known.
    """
    recipe_path = RunPaths(model_directory.absolute().parent).recipe
    images = read_record(recipe_path).get("images", {}) if recipe_path.is_file() else {}
    boxed = isinstance(images.get("boxes"), dict)
    key = "images.tiles" if images.get("tiles") else "images.boxes" if boxed else None
    whole = 0 if key is None else sum(split_crop(path)[1] is None for path in paths)
    if not whole:
        return []
    return [
        f"{whole:,} images are predicted as a whole, but the model was trained on parts of images "
        f"({key}): give a recipe that names these images and has that key"
    ]


def _unlabelled_source(source: str | Path) -> list[Path]:
    """Return the source of images without labels that a recipe names beside its own."""
    if not _is_recipe(str(source)):
        return []
    from headrace.pipelines.recipe.load import load_recipe

    location = load_recipe(source).images.unlabelled
    return [] if location is None else [location]


def _is_recipe(location: str) -> bool:
    return Path(location).suffix.lower() in (".yaml", ".yml")


def _list_source(
    location: str, beside: Sequence[str], optional: Sequence[str], options: dict[str, Any]
) -> Listing:
    if _is_recipe(location):
        from headrace.pipelines.recipe.load import load_recipe

        source = load_recipe(location).images.source()
        location = str(source.location)
    else:
        source = detect_source(location, **options)
    listing = read_source(source, labelled=False)
    file_names = listing.samples["id"].astype(str)
    if source.kind == "folder":
        file_names = f"{printable_name(location).rstrip('/')}/" + file_names
    require_columns(listing.samples, beside, f"{location}: ")
    named = pd.DataFrame({"file": file_names, "path": listing.samples["path"].astype(str)})
    columns = listing.samples.reindex(columns=[*beside, *optional])
    return replace(listing, samples=pd.concat([named, columns], axis=1))
