"""Options and their handling that several commands share."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperOption

from headrace.pipelines.console import make_console

_VALUE_NAMES = {
    "<bool>": "",
    "<str>": "TEXT",
    "<path>": "PATH",
    "<int>": "NUMBER",
    "<int range>": "NUMBER",
    "<float range>": "NUMBER",
    "<list[Path]>": "PATH ...",
    "<list[str]>": "TEXT ...",
}
# None in earlier versions of typer, which do not call `_value_name` either.
_typer_value_name: Any = getattr(TyperArgument, "display_type_rich", None)


def _value_name(parameter: Any, ctx: Any) -> str | None:
    """Return the name of a value in --help: its metavar, or a word instead of Python's type."""
    if parameter.metavar is not None and isinstance(parameter, TyperOption):
        return str(parameter.metavar)
    name: str | None = _typer_value_name(parameter, ctx)
    return name and _VALUE_NAMES.get(name, name)


# Patched, for a subclass would not do: typer itself makes the option --help of each command.
for _parameter_class in (TyperArgument, TyperOption):
    _parameter_class.display_type_rich = _value_name  # type: ignore[assignment, method-assign]


def flag(*names: str, help: str, **options: Any) -> Any:
    """Return an option without a value; the empty metavar keeps <bool> out of --help."""
    return typer.Option(*names, help=help, metavar="", **options)


JsonOption = Annotated[
    bool,
    flag(
        "--json",
        help="Print one JSON object instead of text; `headrace schema` prints its JSON Schema.",
    ),
]
QuietOption = Annotated[
    bool, flag("--quiet", "-q", help="No progress; the result and errors alone.")
]
VerboseOption = Annotated[
    bool,
    flag(
        "--verbose", "-v", help="A line for every task that begins, ends or fails, with its worker."
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(help="Worker processes; default: one per core.", min=1, metavar="N")
]
DryRunOption = Annotated[
    bool, flag("--dry-run", help="Print the plan and stop; nothing is written.")
]
StrictOption = Annotated[
    bool, flag("--strict", help="Stop at an image that cannot be decoded, instead of listing it.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        help="Where tasks run, instead of the recipe's cluster.where: local, cuda, slurm, "
        "kubernetes, or tls://HOST:PORT."
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Images, or folders of them, to leave out; * and ? match. May be given several times.",
    ),
]


def _set_option(examples: str) -> Any:
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Use another value for a key of the recipe, in this call: {examples}. May be given "
        "several times.",
    )


SetOption = Annotated[
    list[str] | None, _set_option("--set task.folds=3, --set 'heads.mlp.hidden=[[64]]'")
]
# Extraction reads no task and no heads.
ExtractionSetOption = Annotated[
    list[str] | None,
    _set_option("--set compute.batch_size=16, --set backbones.0.image_size=320"),
]


# The form of progress on the standard error.
ProgressFormat = Literal["auto", "json"]
ProgressOption = Annotated[
    ProgressFormat,
    typer.Option(
        help="auto: a bar on a terminal, otherwise a line with the time now and then; json: lines "
        "of JSON."
    ),
]


def progress_console(
    *, quiet: bool = False, verbose: bool = False, progress_format: ProgressFormat = "auto"
) -> Console:
    """Return the console for progress, on the standard error."""
    json_progress = progress_format == "json"
    return make_console(stderr=True, quiet=quiet, verbose=verbose, json_progress=json_progress)


def print_json(command: str, **fields: Any) -> None:
    """Print a command's object on the standard output, where it prints nothing else with --json.

    command: as in `OUTPUTS`. fields: of its object; for an object in it, headrace's own will do.
    """
    # Imported where it is needed, for pydantic takes a while.
    from headrace.pipelines.cli.json_output import OUTPUTS, print_output

    print_output(OUTPUTS[command].model_validate(fields))


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """End the command with exit code 130 on Ctrl-C, as shells expect, and say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        make_console(stderr=True).print(
            "\nInterrupted. What is finished is kept; the same command goes on from here.",
            soft_wrap=True,
        )
        # 128 + 2, the number of SIGINT.
        raise typer.Exit(130) from None
