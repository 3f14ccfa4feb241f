"""`headrace backbones [NAME]`: search the available networks; show one's weights, and its taps with
shapes, bytes and cost.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from headrace.cache.count_text import count_text
from headrace.pipelines.cli.completion import complete_backbones
from headrace.pipelines.cli.options import JsonOption, flag, print_json
from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    from headrace.extract.backbones.published import PublishedWeights
    from headrace.extract.taps.describe import BackboneInfo

# Nodes with more dots in their names are layers inside blocks, and shown only with --all.
_MAX_DOTS = 1
_MAX_LISTED = 40  # names that are listed without --all

NameArgument = Annotated[
    str | None,
    typer.Argument(
        help="Part of a name to search for, or a whole name to show.",
        autocompletion=complete_backbones,
    ),
]
SizeOption = Annotated[
    int | None, typer.Option("--image-size", help="Shapes at this input size instead of its own.")
]
AllOption = Annotated[
    bool, flag("--all", help="Every name found; every node, layers within blocks too.")
]
MeasureOption = Annotated[
    bool, flag("--measure", help="Also run the network for some seconds: images/s on this machine.")
]


def backbones_command(
    name: NameArgument = None,
    image_size: SizeOption = None,
    show_all: AllOption = False,
    measure: MeasureOption = False,
    json_output: JsonOption = False,
) -> None:
    """List and search the backbones with their weights, or show one's taps.

    Example: headrace backbones torchvision:resnet50

    Nothing is downloaded: shapes and costs need no weights.
    """
    from headrace.extract.backbones.library import backbone_names
    from headrace.extract.backbones.published import published_weights
    from headrace.extract.spec import BackboneSpec
    from headrace.extract.taps.describe import describe_backbone

    console = make_console()
    known_names = backbone_names()
    matching_names = [
        backbone_name
        for backbone_name in known_names
        if name is None or name.lower() in backbone_name.lower()
    ]
    if name is not None and (name in known_names or not matching_names):
        # For an unknown name, describe_backbone raises an error that names similar ones.
        spec = BackboneSpec(name if ":" in name else f"timm:{name}", image_size=image_size)
        # Weights change no shape and no cost, and would have to be downloaded.
        backbone_info = describe_backbone(spec)
        weights = published_weights(spec.name)
        images_per_s = None
        if measure:
            from headrace.extract.taps.describe import measure_rate

            # Random weights are as fast, and are not downloaded.
            images_per_s = measure_rate(dataclasses.replace(spec, weights="random:0"))
        if json_output:
            _print_json([spec.name], backbone_info, weights, images_per_s)
        else:
            _show(console, backbone_info, weights, images_per_s, show_all)
        return
    if json_output:
        _print_json(matching_names, None, [], None)
        return
    shown_names = matching_names if show_all else matching_names[:_MAX_LISTED]
    console.print(_table_of_names({shown: published_weights(shown) for shown in shown_names}))
    if len(shown_names) < len(matching_names):
        console.print(
            f"… {len(matching_names) - len(shown_names):,} more of {len(matching_names):,}. Narrow "
            "it: headrace backbones resnet; or --all"
        )
    else:
        console.print(
            f"{count_text(len(matching_names), 'backbone')}. Its taps: headrace backbones "
            f"{matching_names[0]}",
            soft_wrap=True,
        )


def _table_of_names(weights_by_name: "dict[str, list[PublishedWeights]]") -> Table:
    """Return a table with a row for each network: the input size of its default weights, the best
    accuracy, how many weights there are, and their licences.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    for column in ("pixels", "ImageNet", "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("licences", overflow="fold")
    for name, weights in weights_by_name.items():
        # Weights that were trained without labels have no accuracy.
        accuracies = [entry.imagenet_accuracy for entry in weights if entry.imagenet_accuracy]
        table.add_row(
            name,
            str(weights[0].image_size or "") if weights else "",
            f"{max(accuracies):.1%}" if accuracies else "",
            str(len(weights)),
            ", ".join(sorted({entry.licence for entry in weights if entry.licence})),
        )
    return table


def _weights_table(weights: "list[PublishedWeights]") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for column in ("pixels", "classes", "ImageNet"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for entry in weights:
        table.add_row(
            entry.tag,
            str(entry.image_size or ""),
            "" if entry.classes is None else f"{entry.classes:,}",
            "" if entry.imagenet_accuracy is None else f"{entry.imagenet_accuracy:.1%}",
            entry.licence or "",
        )
    return table


def _print_json(
    names: list[str],
    backbone_info: "BackboneInfo | None",
    weights: "list[PublishedWeights]",
    images_per_s: float | None,
) -> None:
    backbone = backbone_info and {
        "name": backbone_info.name,
        "parameters": backbone_info.parameters,
        "multiply_adds": backbone_info.multiply_adds,
        "images_per_s": images_per_s,
        "preprocessing": json.loads(backbone_info.preprocessing),
        "weights": weights,
        "auto": tuple(map(str, backbone_info.auto)),
        "taps": backbone_info.taps,
    }
    print_json("backbones", names=names, backbone=backbone)


def _show(
    console: Console,
    backbone_info: "BackboneInfo",
    weights: "list[PublishedWeights]",
    images_per_s: float | None,
    show_all: bool,
) -> None:
    preprocessing = json.loads(backbone_info.preprocessing)
    resize, crop = ("x".join(map(str, preprocessing[key])) for key in ("resize", "crop"))
    header_text = (
        f"{backbone_info.name}: {backbone_info.parameters / 1e6:,.1f} M parameters, "
        f"{backbone_info.multiply_adds / 1e9:,.2f} G multiply-adds per image\n"
        f"input: {preprocessing['mode']} resize to {resize} ({preprocessing['interpolation']}), "
        f"crop {crop}"
    )
    if images_per_s is not None:
        header_text += (
            f"\nmeasured here: {images_per_s:,.1f} images/s, decoding not counted, on all cores"
        )
    console.print(header_text, soft_wrap=True)
    if weights:
        console.print(_weights_table(weights))
    else:
        console.print("weights: none of its own: name a file")
    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for column_name in ("output", ".map bytes", ".avg bytes", "cost"):
        table.add_column(column_name, justify="right", no_wrap=True)
    table.add_column("")
    auto_nodes = {tap.node for tap in backbone_info.auto}
    n_hidden = 0
    for tap in backbone_info.taps:
        # What `auto` takes is shown at any depth: people look for what they are going to get.
        if not show_all and tap.node.count(".") > _MAX_DOTS and tap.node not in auto_nodes:
            n_hidden += 1
            continue
        table.add_row(
            tap.node,
            "x".join(map(str, tap.shape)),
            f"{tap.map_bytes:,}",
            f"{tap.avg_bytes:,}",
            f"{tap.cost:.0%}",
            "auto" if tap.node in auto_nodes else "",
        )
    console.print(table)
    footer_text = (
        "bytes: per image as float16. cost: share of the whole forward that is spent to reach the "
        "node."
    )
    if n_hidden:
        hidden_text = count_text(n_hidden, "layer within a block is", "layers within blocks are")
        footer_text += f"\n{hidden_text} not shown: --all"
    footer_text += f"\ntaps: auto is [{', '.join(map(str, backbone_info.auto))}]"
    console.print(footer_text, soft_wrap=True)
