"""`headrace backbones [NAME]`: search the networks that there are; show one's taps with their
shapes, bytes and cost.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    bool, typer.Option("--all", help="Every name found; every node, layers within blocks too.")
]


def backbones_command(
    name: NameArgument = None, image_size: SizeOption = None, every: AllOption = False
) -> None:
    """List and search the backbones, or show one's taps.

    Example: headrace backbones torchvision:resnet50

    Nothing is downloaded: shapes and costs need no weights.
    """
    from headrace.extract.backbones.library import backbone_names, backbone_tags
    from headrace.extract.spec import BackboneSpec
    from headrace.extract.taps.describe import describe_backbone

    console = make_console()
    known = backbone_names()
    if name is not None and (name in known or name.startswith("python:")):
        info = describe_backbone(BackboneSpec(name, image_size=image_size), weights=False)
        _show(console, info, backbone_tags(name), every)
        return
    found = [entry for entry in known if name is None or name.lower() in entry.lower()]
    if name is not None and not found:
        # Says which names are near, and leaves with the exit code of a user's mistake.
        describe_backbone(BackboneSpec(name if ":" in name else f"timm:{name}"), weights=False)
    shown = found if every else found[:_MANY]
    for entry in shown:
        console.print(entry, soft_wrap=True)
    if len(shown) < len(found):
        console.print(
            f"… {len(found) - len(shown):,} more of {len(found):,}. Narrow it: headrace backbones "
            "resnet; or --all"
        )
    elif len(found) > 0:
        console.print(
            f"{len(found):,} backbones. Its taps: headrace backbones {found[0]}", soft_wrap=True
        )


def _show(console: Console, info: "BackboneInfo", tags: list[str], every: bool) -> None:
    how = json.loads(info.preprocessing)
    resize = "x".join(map(str, how["resize"]))
    crop = "x".join(map(str, how["crop"]))
    lines = [
        (
            f"{info.name}: {info.parameters / 1e6:,.1f} M parameters, "
            f"{info.multiply_adds / 1e9:,.2f} G multiply-adds per image"
        ),
        f"input: {how['mode']} resize to {resize} ({how['interpolation']}), crop {crop}",
        f"weights: {', '.join(tags) if tags else 'none of its own: name a file'}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for column in ("output", ".map bytes", ".avg bytes", "cost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    chosen = {tap.node for tap in info.auto}
    hidden = 0
    for tap in info.taps:
        if not every and tap.node.count(".") > _DEPTH and tap.node not in chosen:
            hidden += 1
            continue
        table.add_row(
            tap.node,
            "x".join(map(str, tap.shape)),
            f"{tap.map_bytes:,}",
            f"{tap.avg_bytes:,}",
            f"{tap.cost:.0%}",
            "auto" if tap.node in chosen else "",
        )
    console.print(table)
    console.print(
        "bytes: per image as float16. cost: share of the whole forward that is spent to reach the "
        "node.",
        soft_wrap=True,
    )
    if hidden:
        console.print(f"{hidden:,} layers within blocks are not shown: --all", soft_wrap=True)
    console.print(f"taps: auto is [{', '.join(map(str, info.auto))}]", soft_wrap=True)
