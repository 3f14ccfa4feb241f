"""`headrace cache export` and `import`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.pipelines.cli.cache.find import (
    DEFAULT_CACHE,
    CacheOption,
    NameArgument,
    find_feature_set,
    print_line,
    samples_with_content,
)
from headrace.pipelines.cli.options import JsonOption, print_json

if TYPE_CHECKING:
    from headrace.cache.exchange.export import RowSelection
    from headrace.pipelines.recipe.load import Recipe


def export_command(
    name: NameArgument,
    target: Annotated[
        Path,
        typer.Argument(help="The file to write; its suffix says the format unless --format does."),
    ],
    cache: CacheOption = DEFAULT_CACHE,
    kind: Annotated[
        Literal["npy", "parquet", "zarr"] | None,
        typer.Option("--format", help="npy, parquet or zarr."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Export the rows of this recipe's images, in its order, under its ids; "
            "default: all in the cache."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Write one feature set as .npy (with a table of rows beside it), Parquet or Zarr.

    Example: headrace cache export blocks.4.avg features.parquet --recipe recipe.yaml
    """
    from headrace.cache.exchange.export import EXPORTS, find_ambiguous_ids

    format_name = kind or target.suffix.lstrip(".")
    if format_name not in EXPORTS:
        raise CacheError(
            f"{target}: give --format, one of {', '.join(EXPORTS)}, or a name that ends in one of "
            "these"
        )
    if recipe is not None:
        feature_set, selection = _rows_of_recipe(recipe, name)
    else:
        feature_set, selection = open_feature_set(find_feature_set(cache, name)), None
    written_paths = EXPORTS[format_name](feature_set, target, selection)
    missing_ids = [] if selection is None else selection.missing
    # The images of one recipe have one id each; a cache may hold those of several.
    ambiguous_ids = find_ambiguous_ids(feature_set) if selection is None else []
    if json_output:
        print_json(
            "cache export", files=written_paths, missing=missing_ids, ambiguous_ids=ambiguous_ids
        )
        return
    for written_path in written_paths:
        print_line(f"wrote {written_path}")
    if missing_ids:
        print_line(
            f"Left out, without a row: {count_text(len(missing_ids), 'image')} of the recipe, "
            f"{_first_ids(missing_ids)}. `headrace run` makes the rows of images that can be read"
        )
    if ambiguous_ids:
        print_line(
            f"{count_text(len(ambiguous_ids), 'id stands', 'ids stand')} for several images "
            "(folders with the same names, images before and after they were edited), first "
            f"{ambiguous_ids[0]!r}: the column `content` tells them apart, and --recipe exports "
            "the images of one recipe"
        )


def import_command(
    source: Annotated[
        Path, typer.Argument(help="Features of other programs: .npy, .npz, .parquet, .csv, .h5.")
    ],
    name: Annotated[
        str,
        typer.Option(help="What to call them; a recipe uses them as `external_features: [NAME]`."),
    ],
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Whose images the ids belong to, and whose cache is used; not needed for our "
            "exports."
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="The ids, one per row: .csv, .parquet, .txt or .npy; default: in the file."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The array, column of lists or data set of the features.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            help="The columns of a table that are features: names, a pattern such as 'f*', a "
            "range such as f0:f767."
        ),
    ] = None,
    id_key: Annotated[str | None, typer.Option(help="The column or data set of the ids.")] = None,
    dtype: Annotated[
        str, typer.Option(help="How they are stored: float32, float16 or bfloat16.")
    ] = "float32",
    json_output: JsonOption = False,
) -> None:
    """Keep features that other programs made, by the ids of their images, as inputs of a recipe.

    Example: headrace cache import dino.npy --ids names.csv --name dino --recipe recipe.yaml
    """
    from headrace.cache.exchange.external import import_features
    from headrace.cache.exchange.external_files import read_external_features

    loaded_recipe = None
    if recipe is not None:
        from headrace.pipelines.recipe.load import load_recipe

        loaded_recipe = load_recipe(recipe)
        cache = loaded_recipe.cache
    forbidden_names = _columns_that_are_no_features(loaded_recipe) if loaded_recipe else {}
    external_features = read_external_features(
        source,
        ids_path=ids,
        feature_key=key,
        id_key=id_key,
        column_options=columns or (),
        forbidden_names=forbidden_names,
    )
    content_by_id, target_table = None, None
    if loaded_recipe is not None:
        from headrace.pipelines.recipe.targets import target_columns

        samples, content_by_row = samples_with_content(loaded_recipe)
        content_by_id = {
            sample_id: content_hash
            for sample_id, content_hash in zip(samples["id"], content_by_row, strict=True)
            if content_hash is not None
        }
        # By content, to find features that repeat the target under another name.
        target_table = samples[target_columns(loaded_recipe.task)].set_axis(content_by_row, axis=0)
    import_report = import_features(
        cache, name, external_features, content_by_id, dtype=dtype, target_table=target_table
    )
    if json_output:
        print_json(
            "cache import",
            name=name,
            path=import_report.features.path,
            shape=import_report.features.spec.shape,
            rows=import_report.n_rows,
            copies=import_report.n_copies,
            unknown=import_report.n_unknown,
        )
        return
    report_text = (
        f"{count_text(import_report.n_rows, 'row')} of shape {import_report.features.spec.shape} "
        f"kept as {name} in {import_report.features.path}"
    )
    if import_report.n_copies:
        report_text += (
            f"; exact copies of other images, which share a row: {import_report.n_copies:,}"
        )
    if import_report.n_unknown:
        report_text += f"; left out: {import_report.n_unknown:,} with ids that no image has"
    print_line(f"{report_text}. In a recipe: external_features: [{name}]")


def _rows_of_recipe(recipe_path: Path, name_or_tap: str) -> "tuple[FeatureSet, RowSelection]":
    """Return a feature set of the recipe's cache, and the recipe's images selected in it."""
    from headrace.cache.exchange.export import select_rows
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    feature_set = open_feature_set(find_feature_set(recipe.cache, name_or_tap))
    samples, content_by_row = samples_with_content(recipe)
    selection = select_rows(
        feature_set, [str(sample_id) for sample_id in samples["id"]], content_by_row
    )
    # An empty table would look like an export that has worked.
    if not selection.ids:
        raise CacheError(
            f"{feature_set.path} has no row of any of the {count_text(len(samples), 'image')} of "
            f"{recipe_path}, the first is {selection.missing[0]!r}. `headrace run "
            f"{shlex.quote(str(recipe_path))}` makes them"
        )
    return feature_set, selection


def _first_ids(image_ids: list[str]) -> str:
    return f"{', '.join(image_ids[:3])}{', …' if len(image_ids) > 3 else ''}"


def _columns_that_are_no_features(recipe: "Recipe") -> dict[str, str]:
    """Return {column: role} of the columns that the recipe names as target, group, split and so
    on.
    """
    from headrace.pipelines.recipe.targets import target_columns

    task, images = recipe.task, recipe.images
    # A head would read the answer from them.
    columns_by_role: dict[str, Sequence[str | None]] = {
        "task.target": target_columns(task),
        "task.group": [task.group],
        "task.unit": [task.unit],
        "task.split": [task.split],
        "task.fold": [task.fold],
        "images.path_column": [images.path_column],
        "images.id_column": [images.id_column],
    }
    return {
        name: f"the recipe's {role}"
        for role, names in columns_by_role.items()
        for name in names
        if name
    }
