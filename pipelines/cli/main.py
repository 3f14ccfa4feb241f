"""The command `headrace`.

Most imports are inside the functions: torch alone takes seconds, and `--help` or a wrong argument
should be answered at once.
"""

import gc
import importlib.metadata
import inspect
import itertools
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from headrace.cache.errors import HeadraceError
from headrace.cache.home import unknown_home_message
from headrace.pipelines.cli.advise import advise_command
from headrace.pipelines.cli.backbones import backbones_command
from headrace.pipelines.cli.cache.app import app as cache_app
from headrace.pipelines.cli.cluster import app as cluster_app
from headrace.pipelines.cli.completion import complete_runs
from headrace.pipelines.cli.doctor import doctor_command
from headrace.pipelines.cli.export import export_command
from headrace.pipelines.cli.extract import extract_command
from headrace.pipelines.cli.options import (
    ClusterOption,
    DryRunOption,
    ExcludeOption,
    JsonOption,
    ProgressOption,
    QuietOption,
    SetOption,
    StrictOption,
    VerboseOption,
    WorkersOption,
    flag,
    print_json,
    progress_console,
    resumable,
)
from headrace.pipelines.cli.predict import predict_command
from headrace.pipelines.cli.report import report_command
from headrace.pipelines.console import escape_unencodable, make_console, utf8_stdout, valid_text
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.thread_memory import end_where_no_thread_begins

if TYPE_CHECKING:
    from headrace.pipelines.recipe.load import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Extract deep features once, train hundreds of classifier heads on them, fine-tune "
    "only the winners.",
    epilog="Your own images: headrace init photos, then headrace run recipe.yaml. Each command has "
    "an example: headrace run --help. The Tab key completes commands and options after headrace "
    "--install-completion.",
)
# Headings in `headrace --help`.
_AFTER_RUN, _WHAT_THERE_IS = "After a run", "What there is"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"headrace {importlib.metadata.version('headrace')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        # Eager: it is answered before typer asks for a command.
        flag(
            "--version", help="Print the version and stop.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(help="Where its recipe, features and results go.")
    ] = Path("headrace-demo"),
    workers: WorkersOption = None,
    quiet: QuietOption = False,
) -> None:
    """Real solar cells, a pretrained network, hundreds of heads, a leaderboard.

    Interrupt it at any moment and call it again: it goes on where it was.

    Example: headrace demo
    """
    from headrace.pipelines.cli.demo import REFERENCE, write_demo
    from headrace.pipelines.recipe.text import naming_lines

    recipe = write_demo(folder)
    console = make_console()
    _say(console, f"2,624 photographs of solar cells: which are defective? The recipe is {recipe}")
    loaded_recipe = _load(recipe)
    with resumable(), naming_lines(recipe):
        _train(loaded_recipe, progress_console(quiet=quiet), workers, reference=REFERENCE)
    _say(
        console,
        "Next, try:\n"
        f"  headrace report {recipe}     # one page to look at: mistakes, likely label errors, "
        "near-duplicates\n"
        f"  headrace run {recipe} --dry-run     # what a run would do, and what is there already\n"
        f"  headrace cache ls --cache {folder / 'headrace-cache'}     # the features that were "
        "kept\n"
        "  headrace init FOLDER     # a recipe for your own images",
    )


@app.command()
def init(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with one sub-folder per class, a table, archives (tar, zip), or an "
            "array file (npz, HDF5, idx)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    force: Annotated[bool, flag("--force", help="Overwrite a recipe that is there.")] = False,
    layout: Annotated[
        Literal["auto", "classes", "split"],
        typer.Option(
            help="What the outer folders are: classes, or the sides of a split with the classes "
            "in them."
        ),
    ] = "auto",
    exclude: ExcludeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a commented recipe for the images that are there.

    Example: headrace init photos/ --out photos.yaml
    """
    from headrace.pipelines.cli.init import write_recipe

    finding = write_recipe(source, out, force=force, layout=layout, exclude=tuple(exclude or ()))
    if json_output:
        print_json("init", recipe=out.absolute(), found=finding.sentence, notes=finding.notes)
        return
    console = make_console()
    for note in finding.notes:
        _say(console, f"note: {note}")
    _say(
        console,
        f"Found {finding.sentence}. Wrote {out}.\nNext: headrace run {shlex.quote(str(out))} "
        "--dry-run",
    )


@app.command()
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="The recipe, a YAML file; `headrace init` writes one.",
            autocompletion=complete_runs,
        ),
    ],
    dry_run: DryRunOption = False,
    workers: WorkersOption = None,
    strict: StrictOption = False,
    retry_failed: Annotated[
        bool,
        flag("--retry-failed", help="Train the heads that failed in an earlier call once more."),
    ] = False,
    cluster: ClusterOption = None,
    settings: SetOption = None,
    progress: ProgressOption = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Extract and train what is missing, rank, and score the winner on the test split.

    Interrupted at any moment, the same command goes on where it was. --dry-run shows first what it
    would do.

    Example: headrace run recipe.yaml --dry-run
    """
    from headrace.pipelines.recipe.load import on_cluster, strictly
    from headrace.pipelines.recipe.text import naming_lines

    loaded_recipe = _load(recipe, tuple(settings or ()))
    if cluster:
        loaded_recipe = on_cluster(loaded_recipe, cluster)
    if strict:
        loaded_recipe = strictly(loaded_recipe)
    progress_output = progress_console(quiet=quiet, verbose=verbose, progress_format=progress)
    with resumable(), naming_lines(recipe):
        if dry_run:
            # With the options of this call, without which another plan would be carried out.
            words = ["headrace", "run", str(recipe)]
            words += [f"--cluster={cluster}"] if cluster else []
            words += [f"--set={setting}" for setting in settings or ()]
            _print_plan(
                loaded_recipe,
                progress_output,
                shlex.join(words),
                retry_failed=retry_failed,
                json_output=json_output,
            )
        else:
            _train(
                loaded_recipe,
                progress_output,
                workers,
                retry_failed=retry_failed,
                json_output=json_output,
            )
    if not dry_run and not json_output and not quiet:
        _say(
            make_console(),
            f"Next: headrace report {shlex.quote(str(recipe))}     # one page to look at: "
            "mistakes, likely label errors, near-duplicates",
        )


@app.command(rich_help_panel=_AFTER_RUN)
def status(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run: its recipe, or its directory, headrace-runs/NAME, which may be on a "
            "file system that nodes share.",
            autocompletion=complete_runs,
        ),
    ],
    json_output: JsonOption = False,
) -> None:
    """How far a run is: its stage, tasks, workers, failures, time left.

    Also while it runs, from any shell or node.

    Example: headrace status recipe.yaml
    """
    from headrace.pipelines.cli.status import print_status_json, show_status

    if json_output:
        print_status_json(run)
    else:
        show_status(make_console(), run)


app.command("extract")(extract_command)
app.command("report", rich_help_panel=_AFTER_RUN)(report_command)
app.command("advise", rich_help_panel=_AFTER_RUN)(advise_command)
app.command("predict", rich_help_panel=_AFTER_RUN)(predict_command)
app.command("export", rich_help_panel=_AFTER_RUN)(export_command)
app.command("backbones", rich_help_panel=_WHAT_THERE_IS)(backbones_command)
app.add_typer(cache_app, name="cache", rich_help_panel=_WHAT_THERE_IS)
app.add_typer(cluster_app, name="cluster", rich_help_panel=_WHAT_THERE_IS)
app.command("doctor", rich_help_panel=_WHAT_THERE_IS)(doctor_command)


@app.command(rich_help_panel=_WHAT_THERE_IS)
def schema(
    name: Annotated[
        list[str] | None,
        typer.Argument(
            help="recipe, or a command that takes --json: run, status, cache ls, 'run --dry-run' …"
        ),
    ] = None,
) -> None:
    """Print a JSON Schema: of recipes, for editors, or of what a command prints with --json.

    Example: headrace schema recipe
    """
    from headrace.pipelines.cli.schema import RECIPE, schema as make_schema

    with utf8_stdout() as stream:
        stream.write(json.dumps(make_schema(" ".join(name or [RECIPE])), indent=2) + "\n")


def _load(recipe_path: Path, settings: tuple[str, ...] = ()) -> "Recipe":
    from headrace.pipelines.recipe.load import load_recipe

    recipe = load_recipe(recipe_path, settings=settings)
    _require_utf8(recipe.paths.root)
    return recipe


def _print_plan(
    recipe: "Recipe", progress: Console, next_command: str, *, retry_failed: bool, json_output: bool
) -> None:
    from headrace.pipelines.cli.run_json import plan_fields
    from headrace.pipelines.cli.show import show_images, show_plan
    from headrace.pipelines.planning.plan import check_space
    from headrace.pipelines.planning.run_state import read_run_state

    state = read_run_state(recipe, write=False, retry_failed=retry_failed, console=progress)
    if json_output:
        # Before the object: an error is printed as an object, too, and would be a second.
        check_space(state.plan, recipe.cache, recipe.storage.budget_gb)
        fields = plan_fields(recipe, state.plan, state.accounting, state.notes)
        print_json("run --dry-run", **fields)
        return
    console = make_console()
    show_images(console, state.accounting, state.notes)
    show_plan(console, state.plan, recipe.cache, recipe.out)
    _say(console, f"Next: {next_command}")
    # After the plan, in which a person sees what needs the space.
    check_space(state.plan, recipe.cache, recipe.storage.budget_gb)


def _train(
    recipe: "Recipe",
    progress: Console,
    workers: int | None,
    *,
    retry_failed: bool = False,
    reference: str | None = None,
    json_output: bool = False,
) -> None:
    from headrace.pipelines.cli.run_json import run_fields
    from headrace.pipelines.cli.show import show_files, show_result
    from headrace.pipelines.cluster.survive_hangup import outlive_terminal
    from headrace.pipelines.run import run_recipe

    outlive_terminal(recipe.paths.terminal)
    result = run_recipe(recipe, console=progress, workers=workers, retry_failed=retry_failed)
    if json_output:
        print_json("run", **run_fields(result))
    else:
        console = make_console()
        show_result(console, result, reference=reference)
        show_files(console, result)


def _require_utf8(out_folder: Path) -> None:
    # A run's tables are UTF-8, and contain paths of its other files.
    if valid_text(str(out_folder)) != str(out_folder):
        raise InvalidInput(
            f"out: {out_folder}: a name in this path is no UTF-8, so that results cannot be kept "
            "there. Rename it, or set `out` in the recipe to another folder; if the name is right "
            "and the locale is not, set LC_ALL=C.UTF-8"
        )


def _say(console: Console, text: str) -> None:
    """Print text without wrapping its lines: a wrapped command could not be copied."""
    console.print(text, soft_wrap=True)


# Typer keeps the line breaks in all paragraphs of a docstring but the first, and a terminal of 80
# columns would break each of these lines again.
for _commands in (app, cache_app, cluster_app):
    for _command in _commands.registered_commands:
        _paragraphs = (inspect.getdoc(_command.callback) or "").split("\n\n")
        _command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs)

_NO_MEMORY = (
    "The system gave this process no more memory: a limit (ulimit -v, a container's), or other "
    "processes hold it. Make room, or take fewer workers, and run the same command again; finished "
    "work is kept"
)


def main() -> None:
    """Run the command line.

    An error that the user or the machine caused is printed without a traceback, with exit code 2.
    With --json, any error is also printed as one object on the standard output.
    """
    escape_unencodable()
    # Processes that this one starts would otherwise take a `random.py` in the current folder, which
    # may be a folder of images that somebody sent, for Python's own.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Of large images and damaged metadata. Images that cannot be read are counted and named.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Listings of images are many small objects that all stay alive. Python's default is to look
    # for garbage after every 700 new objects, which took a tenth of a command's time.
    gc.set_threshold(50_000, 20, 100)
    arguments = itertools.takewhile(lambda argument: argument != "--", sys.argv[1:])
    # Not from typer, which parses nothing if an argument is wrong, as --json=1 is.
    json_output = any(argument.split("=")[0] == "--json" for argument in arguments)
    no_memory_output = ""
    if json_output:
        from headrace.pipelines.cli.json_error import error_output
        from headrace.pipelines.cli.json_output import json_text

        no_memory_output = json_text(error_output("MemoryError", _NO_MEMORY, 2))
    end_where_no_thread_begins(_NO_MEMORY, no_memory_output)
    try:
        app()
    except SystemExit as end:
        if json_output and end.code:
            from headrace.pipelines.cli.json_error import print_exit

            print_exit(end)
        raise
    except KeyboardInterrupt:
        sys.exit(130)  # before a command began: within one, click handles Ctrl-C
    except Exception as error:
        message = _message(error)
        if json_output:
            from headrace.pipelines.cli.json_error import print_error

            kind = type(error).__name__
            print_error(kind, message or str(error), 1 if message is None else 2)
        if message is None:
            raise
        error_console = make_console(stderr=True)
        error_console.print("Error: ", style="bold red", end="")
        error_console.print(message, soft_wrap=True)
        sys.exit(2)


def _message(error: Exception) -> str | None:
    """Return the message of an error that the user or the machine caused; None for a bug."""
    if isinstance(error, HeadraceError | OSError):
        return str(error)
    # The RuntimeError is Python's when there is no memory for the stack of a thread.
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        return _NO_MEMORY
    # From pathlib, which does not name the path: a library was given one that begins with `~`.
    if str(error) == "Could not determine home directory.":
        return unknown_home_message()
    return None
