"""`headrace predict`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrace.cache.errors import HeadraceError
from headrace.pipelines.console import make_console, utf8_stdout


class TableFormat(StrEnum):
    """What `headrace predict` writes."""

    csv = "csv"
    parquet = "parquet"
    jsonl = "jsonl"


class OutputError(HeadraceError, ValueError):
    """The output cannot be written as asked."""


ModelArgument = Annotated[
    Path,
    typer.Argument(
        help="A run, by its recipe or its directory (the selected model is used: winner or "
        "ensemble); a "
        "model directory; what "
        "headrace export wrote."
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        metavar="MODULE:FUNCTION",
        help="Import this code, which a model or run asks for by its directory; nothing else is "
        "imported. May be given several "
        "times.",
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
    kind: Annotated[
        TableFormat | None, typer.Option("--format", help="Default: as --out's name ends.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace a table of predictions that is there; no other file is."
        ),
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
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Images, or folders of them, to leave out; * and ? match. May be given several "
            "times."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; default: one per core.", min=1)
    ] = None,
    device: DeviceOption = "auto",
    trust_code: TrustOption = None,
) -> None:
    """Predict the class of images, with probabilities: one row per image, in the order given.

    Interrupted at any moment, the same command goes on where it was. An image that cannot be
    decoded has its reason in its row.

    Example: headrace predict headrace-runs/recipe new-photos/ --out predictions.csv
    """
    chosen = _format(out, kind)
    from headrace.pipelines.models.model import load_model
    from headrace.pipelines.planning.devices import find_device
    from headrace.pipelines.predict.bulk import predict_stream, predict_table
    from headrace.pipelines.predict.listing import list_images

    loaded = load_model(model, trust_code=trust_code or ())
    listing = list_images(
        images,
        path_column=path_column,
        id_column=id_column,
        path_pattern=path_pattern,
        root=root,
        array_key=array_key,
        exclude=tuple(exclude or ()),
    )
    listed = listing.samples
    console = make_console(stderr=True)
    for note in (*listing.notes, *(f"left out: {item}" for item in listing.left_out)):
        console.print(f"note: {note}", soft_wrap=True)
    where = find_device(device)
    try:
        if out == "-":
            with utf8_stdout() as table:
                summary = predict_stream(
                    loaded, listed, table, chosen, device=where, console=make_console(quiet=True)
                )
        else:
            summary = predict_table(
                loaded,
                listed,
                Path(out),
                chosen,
                force=force,
                workers=workers,
                device=where,
                console=console,
            )
    except KeyboardInterrupt:
        console.print(
            "\nInterrupted. What is finished is kept; the same command goes on from here.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    said = f"{summary.images:,} images"
    if summary.new < summary.images:
        said += f", {summary.new:,} of them predicted now"
    if any(summary.counts.values()):
        common = sorted(summary.counts.items(), key=lambda item: -item[1])
        said += ": " + ", ".join(f"{count:,} {name}" for name, count in common[:10] if count)
    if summary.failed:
        said += f". {summary.failed:,} could not be used: the column `error` says why"
    console.print(said if out == "-" else f"{said}. Wrote {out}", soft_wrap=True)
    if summary.failed == summary.images:
        raise typer.Exit(1)


def _format(out: str, kind: TableFormat | None) -> str:
    from headrace.pipelines.predict.tables import FORMATS

    if out == "-":
        if kind is TableFormat.parquet:
            raise OutputError(
                "Parquet is no text for a screen: give a file with --out, or --format csv or jsonl"
            )
        return kind.value if kind else "csv"
    suffix = Path(out).suffix.lower()
    if kind is None and suffix not in FORMATS:
        raise OutputError(
            f"--out {out}: expected a name that ends in {', '.join(FORMATS)}, or --format"
        )
    if Path(out).is_dir():
        raise OutputError(
            f"--out {out} is a folder; expected the name of a file, such as "
            f"{out.rstrip('/')}/predictions.csv"
        )
    return kind.value if kind else FORMATS[suffix]
