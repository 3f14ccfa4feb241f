"""The command `headrace`. Imports what a command needs when it runs, so that `--help` and bad input answer at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cache import HeadraceError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Extract deep features once, train hundreds of classifier heads on them, fine-tune only the winners.",
)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo's recipe, features and results go.")] = Path(
        "headrace-demo"
    ),
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one per core.", min=1)] = None,
) -> None:
    """Real solar cells, a pretrained network, hundreds of heads, a leaderboard.

    Interrupt it at any moment and call it again: it goes on where it was. Example: headrace demo
    """
    from headrace.pipelines.demo import REFERENCE, write_demo

    recipe = write_demo(folder)
    console = Console()
    console.print(
        f"2,624 photographs of solar cells: which ones are defective? The recipe is {recipe}", highlight=False
    )
    _run(recipe, console, workers=workers, reference=REFERENCE)
    console.print("Next, try:")
    console.print(
        f"  headrace run {recipe} --dry-run     what a run would do, and what is already there", highlight=False
    )
    console.print("  headrace init FOLDER                    a recipe for your own images", highlight=False)
    console.print(
        f"  python -c \"import pandas; print(pandas.read_csv('{_shown(folder)}/headrace-runs/recipe/leaderboard.csv'))\"",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; `headrace init` writes one.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is written.")] = False,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one per core.", min=1)] = None,
) -> None:
    """Extract what is missing, train what is missing, rank, and show the winner the test split once.

    Example: headrace run recipe.yaml --dry-run
    """
    _run(recipe, Console(), workers=workers, dry_run=dry_run)


@app.command()
def init(
    source: Annotated[Path, typer.Argument(help="A folder with one sub-folder per class, or a CSV or Parquet table.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
) -> None:
    """Write a commented recipe for the images that are there.

    Example: headrace init photos/ --out photos.yaml
    """
    from headrace.pipelines.init import write_recipe

    finding = write_recipe(source, out, force=force)
    console = Console()
    console.print(f"Found {finding.sentence}. Wrote {out}.", highlight=False)
    console.print(f"Next: headrace run {out} --dry-run", highlight=False)


def _run(
    path: Path, console: Console, *, workers: int | None, dry_run: bool = False, reference: str | None = None
) -> None:
    from headrace.pipelines.recipe import load_recipe

    recipe = load_recipe(path)
    from headrace.pipelines.run import run_recipe
    from headrace.pipelines.show import show_plan, show_result
    from headrace.pipelines.survey import survey

    if dry_run:
        surveyed = survey(recipe, console, write=False)
        show_plan(console, surveyed.plan, recipe.cache, recipe.out)
        return
    result = run_recipe(recipe, console=console, workers=workers)
    show_result(console, result, reference=reference)


def _shown(path: Path) -> str:
    return path.as_posix()


def main() -> None:
    """Run the command line. A HeadraceError is printed alone, with exit code 2; Ctrl-C ends with 130."""
    try:
        app(standalone_mode=True)
    except HeadraceError as error:
        Console(stderr=True).print("[bold red]Error:[/] ", end="")
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("\nInterrupted. What is finished is kept; the same command goes on from here.")
        sys.exit(130)
