"""`headrace backbones [NAME]`: search the networks that there are; show one's taps with their
shapes, bytes and cost.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from headrace.pipelines.cli.options import JsonOption, flag
from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    from headrace.extract.taps.describe import BackboneInfo

# dots in a node's name that are shown without --all: stages and blocks, not the layers inside them
_DEPTH = 1
_MANY = 40

NameArgument = Annotated[
    str | None, typer.Argument(help="Part of a name to search for, or a whole name to show.")
]
SizeOption = Annotated[
    int | None, typer.Option("--image-size", help="Shapes at this input size instead of its own.")
]
AllOption = Annotated[
    bool, flag("--all", help="Every name found; every node, layers within blocks too.")
]


def backbones_command(
    name: NameArgument = None,
    image_size: SizeOption = None,
    every: AllOption = False,
    json_output: JsonOption = False,
) -> None:
    """List and search the backbones, or show one's taps.

    Example: headrace backbones torchvision:resnet50

    Nothing is downloaded: shapes and costs need no weights.
    """
    from headrace.extract.backbones.library import backbone_names, backbone_tags
    from headrace.extract.spec import BackboneSpec
    from headrace.extract.taps.describe import describe_backbone

    console = make_console()
    known_names = backbone_names()
    if name is not None and (name in known_names or name.startswith("python:")):
        backbone_info = describe_backbone(BackboneSpec(name, image_size=image_size), weights=False)
        if json_output:
            _print_json([name], backbone_info, backbone_tags(name))
        else:
            _show(console, backbone_info, backbone_tags(name), every)
        return
    matching_names = [
        backbone_name
        for backbone_name in known_names
        if name is None or name.lower() in backbone_name.lower()
    ]
    if name is not None and not matching_names:
        # Says which names are near, and leaves with the exit code of a user's mistake.
        describe_backbone(BackboneSpec(name if ":" in name else f"timm:{name}"), weights=False)
    if json_output:
        _print_json(matching_names, None, [])
        return
    shown_names = matching_names if every else matching_names[:_MANY]
    for backbone_name in shown_names:
        console.print(backbone_name, soft_wrap=True)
    if len(shown_names) < len(matching_names):
        console.print(
            f"… {len(matching_names) - len(shown_names):,} more of {len(matching_names):,}. Narrow "
            "it: headrace backbones resnet; or --all"
        )
    elif len(matching_names) > 0:
        console.print(
            f"{len(matching_names):,} backbones. Its taps: headrace backbones {matching_names[0]}",
            soft_wrap=True,
        )


def _print_json(names: list[str], backbone_info: "BackboneInfo | None", tags: list[str]) -> None:
    from headrace.pipelines.cli.json_output import (
        BackboneOutput,
        BackbonesOutput,
        TapOutput,
        print_json,
    )

    backbone = None
    if backbone_info is not None:
        backbone = BackboneOutput(
            name=backbone_info.name,
            parameters=backbone_info.parameters,
            multiply_adds=backbone_info.multiply_adds,
            preprocessing=json.loads(backbone_info.preprocessing),
            weights=tuple(tags),
            auto=tuple(map(str, backbone_info.auto)),
            taps=tuple(
                TapOutput(
                    node=tap.node,
                    shape=tap.shape,
                    map_bytes=tap.map_bytes,
                    avg_bytes=tap.avg_bytes,
                    cost=tap.cost,
                )
                for tap in backbone_info.taps
            ),
        )
    print_json(BackbonesOutput(names=tuple(names), backbone=backbone))


def _show(console: Console, backbone_info: "BackboneInfo", tags: list[str], show_all: bool) -> None:
    preprocessing = json.loads(backbone_info.preprocessing)
    resize = "x".join(map(str, preprocessing["resize"]))
    crop = "x".join(map(str, preprocessing["crop"]))
    header_lines = [
        (
            f"{backbone_info.name}: {backbone_info.parameters / 1e6:,.1f} M parameters, "
            f"{backbone_info.multiply_adds / 1e9:,.2f} G multiply-adds per image"
        ),
        (
            f"input: {preprocessing['mode']} resize to {resize} "
            f"({preprocessing['interpolation']}), crop {crop}"
        ),
        f"weights: {', '.join(tags) if tags else 'none of its own: name a file'}",
    ]
    for header_line in header_lines:
        console.print(header_line, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for column_name in ("output", ".map bytes", ".avg bytes", "cost"):
        table.add_column(column_name, justify="right", no_wrap=True)
    table.add_column("")
    auto_nodes = {tap.node for tap in backbone_info.auto}
    n_hidden = 0
    for tap in backbone_info.taps:
        if not show_all and tap.node.count(".") > _DEPTH and tap.node not in auto_nodes:
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
    console.print(
        "bytes: per image as float16. cost: share of the whole forward that is spent to reach the "
        "node.",
        soft_wrap=True,
    )
    if n_hidden:
        console.print(f"{n_hidden:,} layers within blocks are not shown: --all", soft_wrap=True)
    console.print(f"taps: auto is [{', '.join(map(str, backbone_info.auto))}]", soft_wrap=True)
