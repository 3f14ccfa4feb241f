"""`headrace predict`: a table of predictions for new images."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.cache.count_text import count_text
from headrace.cache.home import expand_home
from headrace.pipelines.cli.completion import complete_runs
from headrace.pipelines.cli.options import (
    ExcludeOption,
    JsonOption,
    ProgressOption,
    QuietOption,
    WorkersOption,
    flag,
    print_json,
    progress_console,
    resumable,
)
from headrace.pipelines.console import make_console, utf8_stdout
from headrace.pipelines.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from headrace.extract.sources.listing import Listing
    from headrace.heads.unit_rule import UnitRule
    from headrace.pipelines.models.image_parts import ImageParts
    from headrace.pipelines.models.model import Model
    from headrace.pipelines.predict.bulk import PredictionSummary
    from headrace.pipelines.predict.units import UnitNames


TableFormat = Literal["csv", "parquet", "jsonl"]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        help="A run, by its recipe or its directory (the selected model is used: winner or "
        "ensemble); a model directory; what headrace export wrote.",
        autocompletion=complete_runs,
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        metavar="MODULE:FUNCTION",
        help="Import this code, which a model or run asks for by its directory; nothing else is "
        "imported. May be given several times.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="Where the networks run: auto, cpu, cuda or cuda:N.")
]


def predict_command(
    model: ModelArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, tables, archives (.tar, .tar.gz, .zip), arrays (.npy, "
            ".npz, .h5); or a recipe, whose images are read as it says."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="The table to write (.csv, .parquet, .jsonl); - is the screen."
        ),
    ] = "predictions.csv",
    format_option: Annotated[
        TableFormat | None, typer.Option("--format", help="Default: as --out's name ends.")
    ] = None,
    force: Annotated[
        bool,
        flag("--force", help="Replace a table of predictions that is there; no other file is."),
    ] = False,
    path_column: Annotated[
        str | None,
        typer.Option(help="The column of a table that names or holds the images; default: found."),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(help="The column of a table that names its rows; default: id, else the path."),
    ] = None,
    path_pattern: Annotated[
        str | None, typer.Option(help="Where a table's images are, by its columns: train/{id}.jpg.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Where a table's relative paths start; default: the table's folder."),
    ] = None,
    array_key: Annotated[
        str | None, typer.Option(help="Which array of a .npz or .h5 file holds the images.")
    ] = None,
    box_columns: Annotated[
        str | None,
        typer.Option(
            help="The four columns of a table that hold the boxes, in the order that the model "
            "knows, such as x,y,width,height; default: those that it was trained on."
        ),
    ] = None,
    detections: Annotated[
        Path | None,
        typer.Option(
            help="MegaDetector's results for these images (JSON): the animals in it are predicted."
        ),
    ] = None,
    whole_images: Annotated[
        bool,
        flag("--whole-images", help="Predict whole images, also with a model of boxes or tiles."),
    ] = False,
    exclude: ExcludeOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where images may have features, of which no network runs; default: the cache of "
            "the model's run."
        ),
    ] = None,
    no_cache: Annotated[bool, flag("--no-cache", help="Run the networks on every image.")] = False,
    update_cache: Annotated[
        bool, flag("--update-cache", help="Keep the features of images that the cache lacks.")
    ] = False,
    trust_code: TrustOption = None,
    progress: ProgressOption = "auto",
    quiet: QuietOption = False,
    json_output: JsonOption = False,
) -> None:
    """Predict the class of images, with probabilities: one row per image, in the order given.

    Images whose features are in the cache need no network. Of a model of boxes or tiles each box or
    tile is a row. A model of units (patients, slides) writes a table of them beside that of the
    images. Interrupted at any moment, the same command goes on where it was. An image that cannot
    be decoded has its reason in its row.

    Example: headrace predict headrace-runs/recipe new-photos/ --out predictions.csv
    """
    # Options first: a model takes seconds to load.
    table_format = _table_format(out, format_option)
    if out == "-" and json_output:
        raise InvalidInput("--out - and --json both want the standard output: give --out a file")
    from headrace.pipelines.models.model import load_model
    from headrace.pipelines.planning.devices import find_device
    from headrace.pipelines.predict.bulk import predict_stream, predict_table, unit_column
    from headrace.pipelines.predict.listing import list_images
    from headrace.pipelines.predict.units import units_path, weights_path

    loaded_model = load_model(model, trust_code=trust_code or ())
    cache_root = _cache_root(loaded_model, cache, no_cache=no_cache, update_cache=update_cache)
    rule = loaded_model.unit_rule
    parts = loaded_model.image_parts
    listing = list_images(
        images,
        side_columns=loaded_model.side_columns,
        # A head on bags cannot predict images without their units; for other heads the units are a
        # table more.
        unit_column=unit_column(loaded_model),
        optional_column=None if rule is None else rule.column,
        path_column=path_column,
        id_column=id_column,
        path_pattern=path_pattern,
        root=root,
        array_key=array_key,
        exclude=tuple(exclude or ()),
        **_parts_options(parts, box_columns, detections, whole_images=whole_images),
    )
    samples = listing.samples
    # On the standard error, as the table may go to the standard output.
    console = make_console(stderr=True)
    unit_names = _unit_names(rule, samples)
    notes = _notes(
        loaded_model,
        listing,
        lacks_units=rule is not None and unit_names is None,
        whole_images=whole_images,
        names_parts=bool(whole_images or box_columns or detections),
    )
    for note in () if json_output else notes:
        console.print(f"note: {note}", soft_wrap=True)
    # Refused here, before networks run, if it is not there.
    device_name = find_device(device)
    with resumable():
        if update_cache and cache_root is not None:
            from headrace.pipelines.run import cache_images

            cache_images(
                loaded_model,
                samples,
                cache_root,
                workers=workers,
                device=device_name,
                console=progress_console(quiet=quiet or out == "-", progress_format=progress),
            )
        if out == "-":
            with utf8_stdout() as stdout:
                summary = predict_stream(
                    loaded_model,
                    samples,
                    stdout,
                    table_format,
                    device=device_name,
                    cache_root=cache_root,
                    # A bar of progress would stand among the rows, which go to the same screen.
                    console=make_console(quiet=True),
                )
        else:
            summary = predict_table(
                loaded_model,
                samples,
                Path(out),
                table_format,
                force=force,
                n_workers=workers,
                device=device_name,
                cache_root=cache_root,
                unit_names=unit_names,
                console=progress_console(quiet=quiet, progress_format=progress),
            )
    units_table = None if unit_names is None else units_path(Path(out))
    weights_table = weights_path(Path(out)) if loaded_model.takes_units else None
    if json_output:
        print_json(
            "predict",
            out=Path(out).absolute(),
            units=units_table and units_table.absolute(),
            weights=weights_table and weights_table.absolute(),
            notes=notes,
            **vars(summary),
        )
    else:
        console.print(_summary_text(summary, out, units_table, weights_table), soft_wrap=True)
    # A script should notice when it gave a folder without any image that can be used.
    if summary.failed == summary.images:
        raise typer.Exit(1)


def _notes(
    model: "Model", listing: "Listing", *, lacks_units: bool, whole_images: bool, names_parts: bool
) -> tuple[str, ...]:
    """Return what a person should know of the images before their predictions.

    names_parts: whether options say which parts of the images to predict.
    """
    from headrace.pipelines.predict.listing import unrecorded_parts_note, whole_images_note

    notes = [*listing.notes, *(f"left out: {item}" for item in listing.left_out)]
    if lacks_units and model.unit_rule is not None:
        notes.append(
            f"the model predicts units of {model.unit_rule.column!r}, and the images have no such "
            "column: give a table with it, or the recipe. Images alone are predicted"
        )
    if model.image_parts is None and not names_parts:
        notes += unrecorded_parts_note(model.path)
    elif not whole_images:
        notes += whole_images_note(model.image_parts, listing.samples["path"])
    return tuple(notes)


def _unit_names(rule: "UnitRule | None", samples: "pd.DataFrame") -> "UnitNames | None":
    """Return the unit of each image; None if the model predicts none, or no image has one."""
    from headrace.cache.text import as_text
    from headrace.pipelines.predict.units import UnitNames
    from headrace.pipelines.recipe.targets import empty_as_missing

    if rule is None:
        return None
    names = as_text(empty_as_missing(samples[rule.column])).astype(object)
    # A column that is empty throughout is the same as none.
    if names.isna().all():
        return None
    return UnitNames(rule, names.where(names.notna(), None).to_numpy())


def _summary_text(
    summary: "PredictionSummary", out: str, units_table: Path | None, weights_table: Path | None
) -> str:
    """Return "12 images, 10 of them predicted now; a: 7, b: 5. Wrote predictions.csv"."""
    summary_text = count_text(summary.images, "image")
    if summary.new < summary.images:
        summary_text += f", {summary.new:,} of them predicted now"
    if summary.cached:
        summary_text += f", {summary.cached:,} from cached features"
    if any(summary.counts.values()):
        # The sort is stable: classes of equal counts stay in their order.
        commonest = sorted(summary.counts.items(), key=lambda item: -item[1])
        # The name before the count, for a class may be called 7.
        summary_text += "; " + ", ".join(
            f"{class_name}: {count:,}" for class_name, count in commonest[:10] if count
        )
    if summary.failed:
        summary_text += f". {summary.failed:,} could not be used: the column `error` says why"
    # Tables of units and of weights are beside a file alone.
    if out != "-":
        summary_text += f". Wrote {out}"
        if units_table is not None:
            summary_text += f" and, of units, {units_table}"
        if weights_table is not None:
            summary_text += f". What each image weighs: {weights_table}"
    return summary_text


def _parts_options(
    parts: "ImageParts | None",
    box_columns: str | None,
    detections: Path | None,
    *,
    whole_images: bool,
) -> dict[str, Any]:
    """Return options of `list_images` for the parts of images that the model was trained on: whole
    images, boxes, tiles or detected animals.
    """
    from headrace.extract.sources.regions import Boxes

    if whole_images + (box_columns is not None) + (detections is not None) > 1:
        raise InvalidInput("give one of --whole-images, --box-columns and --detections")
    if whole_images:
        return {"boxes": "none"}
    if detections is not None:
        options: dict[str, Any] = {"boxes": "none", "detections": detections.absolute()}
        if parts is not None and parts.min_confidence is not None:
            options["min_confidence"] = parts.min_confidence
        return options
    if box_columns is None:
        return {} if parts is None else {"boxes": parts.boxes, "tiles": parts.tiles}
    columns = tuple(name.strip() for name in box_columns.split(","))
    if len(columns) != 4:
        raise InvalidInput(
            f"--box-columns {box_columns}: expected the names of four columns, such as "
            "x,y,width,height"
        )
    boxes = Boxes() if parts is None or isinstance(parts.boxes, str) else parts.boxes
    return {"boxes": dataclasses.replace(boxes, columns=columns)}


def _cache_root(
    model: "Model", cache: Path | None, *, no_cache: bool, update_cache: bool
) -> Path | None:
    """Return the cache to take features from: by the options, or else that of the model's run.

    Raises InvalidInput for options that contradict each other.
    """
    from headrace.pipelines.moved_paths import moved_with_run
    from headrace.pipelines.paths import RunPaths
    from headrace.pipelines.records import read_record

    if no_cache:
        if cache is not None or update_cache:
            raise InvalidInput("--no-cache leaves nothing for --cache and --update-cache: drop it")
        return None
    if cache is not None:
        cache_root = expand_home(cache).absolute()
        # A mistyped path would only make all images be predicted by the networks, and nobody would
        # see it.
        if not update_cache and not cache_root.is_dir():
            raise InvalidInput(f"--cache {cache}: no such folder. To make one: --update-cache")
        return cache_root
    paths = RunPaths(model.path.absolute().parent)
    if paths.recipe.is_file():
        return Path(moved_with_run(read_record(paths.recipe)["cache"], model.path))
    if update_cache:
        raise InvalidInput(f"{model.path} is in no run: say which cache, --cache headrace-cache")
    return None


def _table_format(out: str, format_option: TableFormat | None) -> str:
    from headrace.pipelines.predict.tables import FORMATS

    if out == "-":
        if format_option == "parquet":
            raise InvalidInput(
                "Parquet is no text for a screen: give a file with --out, or --format csv or jsonl"
            )
        return format_option or "csv"
    suffix = Path(out).suffix.lower()
    if format_option is None and suffix not in FORMATS:
        raise InvalidInput(
            f"--out {out}: expected a name that ends in {', '.join(FORMATS)}, or --format"
        )
    if Path(out).is_dir():
        raise InvalidInput(
            f"--out {out} is a folder; expected the name of a file, such as "
            f"{out.rstrip('/')}/predictions.csv"
        )
    return format_option or FORMATS[suffix]
