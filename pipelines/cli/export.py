"""`headrace export`: a trained model for use without headrace."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headrace.pipelines.cli.options import JsonOption, flag, print_json
from headrace.pipelines.cli.predict import ModelArgument, TrustOption
from headrace.pipelines.console import make_console


class ExportFormat(StrEnum):
    """Formats of `headrace export`."""

    torch = "torch"
    onnx = "onnx"
    safetensors = "safetensors"


def export_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    formats: Annotated[
        list[ExportFormat] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="<torch|onnx|safetensors>",
            help="May be given several times; default: torch and safetensors.",
        ),
    ] = None,
    force: Annotated[
        bool,
        flag("--force", help="Replace a folder that an earlier export wrote; no other is."),
    ] = False,
    trust_code: TrustOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take the model away as torch.export, ONNX or safetensors, with its preprocessing and a card.

    Each is loaded again and compared with headrace's own predictions before the folder appears.

    Example: headrace export headrace-runs/recipe my-model --format onnx --format torch
    """
    from headrace.pipelines.models.model import load_model

    # Before the exporters are imported, which takes seconds: a wrong path is answered at once.
    loaded_model = load_model(model, trust_code=trust_code or ())
    from headrace.pipelines.export.write import export_model

    format_names = [
        format_option.value
        for format_option in formats or [ExportFormat.torch, ExportFormat.safetensors]
    ]
    exported = export_model(loaded_model, out, format_names, force=force)
    if json_output:
        print_json(
            "export",
            out=out.absolute(),
            card=out.absolute() / "MODEL_CARD.md",
            differences=exported.differences,
            tolerance=exported.tolerance,
        )
        return
    console = make_console()
    for format_name, difference in exported.differences.items():
        message = (
            f"{format_name}: differs from headrace by at most {difference:.1e} "
            f"({exported.tolerance:g} is allowed)"
        )
        console.print(message, soft_wrap=True)
    # A random view cannot be part of a graph.
    if not exported.all_views:
        message = (
            "note: the graphs see the evaluation crop alone; headrace averages over random views "
            "too"
        )
        console.print(message, soft_wrap=True)
    console.print(f"Wrote {out}. How to use it: {out / 'MODEL_CARD.md'}", soft_wrap=True)
