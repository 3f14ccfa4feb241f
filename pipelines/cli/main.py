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
from typing import Annotated, Literal

import typer

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
    ExcludeOption,
    JsonOption,
    QuietOption,
    WorkersOption,
    flag,
    print_json,
    progress_console,
    resumable,
)
from headrace.pipelines.cli.predict import predict_command
from headrace.pipelines.cli.report import report_command
from headrace.pipelines.cli.run import load_runnable, run_and_show, run_command
from headrace.pipelines.console import escape_unencodable, make_console, utf8_stdout
from headrace.pipelines.thread_memory import end_where_no_thread_begins

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
    # Here and below lines are not wrapped: a wrapped command could not be copied.
    console.print(
        f"2,624 photographs of solar cells: which are defective? The recipe is {recipe}",
        soft_wrap=True,
    )
    loaded_recipe = load_runnable(recipe)
    with resumable(), naming_lines(recipe):
        run_and_show(loaded_recipe, progress_console(quiet=quiet), workers, reference=REFERENCE)
    name = shlex.quote(str(recipe))
    console.print(
        "Next, try:\n"
        f"  headrace report {name}     # one page to look at: mistakes, likely label errors, "
        "near-duplicates\n"
        f"  headrace run {name} --dry-run     # what a run would do, and what is there already\n"
        f"  headrace cache ls --cache {shlex.quote(str(folder / 'headrace-cache'))}     # the "
        "features that were kept\n"
        "  headrace init FOLDER     # a recipe for your own images",
        soft_wrap=True,
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
    name_pattern: Annotated[
        str | None,
        typer.Option(
            help="What file names say, as a regular expression whose named groups become columns: "
            "'(?P<patient>P[0-9]+)_(?P<label>[a-z]+)'."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Write a commented recipe for the images that are there.

    Example: headrace init photos/ --out photos.yaml
    """
    from headrace.pipelines.cli.init import write_recipe

    finding = write_recipe(
        source,
        out,
        force=force,
        layout=layout,
        exclude=tuple(exclude or ()),
        name_pattern=name_pattern,
    )
    if json_output:
        print_json("init", recipe=out.absolute(), found=finding.sentence, notes=finding.notes)
        return
    console = make_console()
    for note in finding.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(
        f"Found {finding.sentence}. Wrote {out}.\nNext: headrace run {shlex.quote(str(out))} "
        "--dry-run",
        soft_wrap=True,
    )


app.command("run")(run_command)


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
