"""The object that a command prints with `--json` when it fails."""

import contextlib
import re

import typer

from headrace.pipelines.cli.json_output import ErrorDetail, ErrorOutput, print_output

_PROGRAMS = "headrace|pip install|rm|cp|mv|export|tar|unzip|python|gunzip|djxl|ffmpeg"
# A command in a message is in back-quotes, or follows a colon, up to the end of the sentence.
_COMMAND = re.compile(rf"`((?:{_PROGRAMS}) [^`]+)`|: (?=(?:{_PROGRAMS}) )")
# A word of a shell: between quotes, a path may hold blanks, commas and brackets.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"`,;()])+""")


def commands_in(message: str) -> tuple[str, ...]:
    """Return the commands that a message tells people to type, in order."""
    matches = _COMMAND.finditer(message)
    return tuple(dict.fromkeys(match[1] or _command_at(message, match.end()) for match in matches))


def _command_at(message: str, position: int) -> str:
    """Return the command that starts at `position`: words separated by single blanks, up to one
    that ends in a full stop.
    """
    words: list[str] = []
    while word := _WORD.match(message, position):
        # The words `.` and `..` are folders, and end no sentence.
        is_last = word[0].endswith(".") and word[0].strip(".") != ""
        words.append(word[0][:-1] if is_last else word[0])
        position = word.end() + 1
        if is_last or message[word.end() : position] != " ":
            break
    return " ".join(words)


def error_output(kind: str, message: str, exit_status: int) -> ErrorOutput:
    """Return the error as one object."""
    next_commands = commands_in(message)
    detail = ErrorDetail(kind=kind, message=message, next=next_commands, exit_status=exit_status)
    return ErrorOutput(error=detail)


def print_error(kind: str, message: str, exit_status: int) -> None:
    """Print the error as one object."""
    # The standard output may be closed. The message is printed on the standard error in any case.
    with contextlib.suppress(OSError):
        print_output(error_output(kind, message, exit_status))


def print_exit(end: SystemExit) -> None:
    """Print why click ended the command: wrong arguments, a question that was not answered with
    yes, or Ctrl-C. Print nothing if the command itself ended: it has already printed its object.
    """
    cause = end.__context__
    exit_status = end.code if isinstance(end.code, int) else 0
    if exit_status == 130:
        print_error("KeyboardInterrupt", "Interrupted. What is finished is kept", exit_status)
    elif isinstance(cause, typer.Abort):
        print_error("Abort", "Not confirmed, so that nothing was done; --yes confirms", exit_status)
    # Not by its class: typer may bring a copy of click of its own.
    elif cause is not None and hasattr(cause, "format_message"):
        print_error(type(cause).__name__, cause.format_message(), exit_status)
