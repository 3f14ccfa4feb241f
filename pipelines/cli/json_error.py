"""The object that a command prints with `--json` when it ends without its result."""

import contextlib
import re

import typer

from headrace.pipelines.cli.json_output import ErrorDetail, ErrorOutput, print_json

_PROGRAMS = "headrace|pip install|rm|cp|mv|export|tar|unzip|python|gunzip|djxl|ffmpeg"
# Between back-quotes, or after a colon up to the end of its sentence or brackets.
_COMMAND = re.compile(rf"`((?:{_PROGRAMS}) [^`]+)`|: (?=(?:{_PROGRAMS}) )")
# As shells have it: within quotes a path may hold blanks, commas and brackets.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"`,;()])+""")


def commands_in(message: str) -> tuple[str, ...]:
    """Return the commands that a message tells people to type, in its order."""
    matches = _COMMAND.finditer(message)
    return tuple(dict.fromkeys(match[1] or _command_at(message, match.end()) for match in matches))


def _command_at(message: str, place: int) -> str:
    """Return the words from a place on, up to one with a full stop behind it or something between
    words that is no blank.
    """
    words: list[str] = []
    while word := _WORD.match(message, place):
        # but `.` and `..` are folders
        is_last = word[0].endswith(".") and word[0].strip(".") != ""
        words.append(word[0][:-1] if is_last else word[0])
        place = word.end() + 1
        if is_last or message[word.end() : place] != " ":
            break
    return " ".join(words)


def error_output(kind: str, message: str, exit_status: int) -> ErrorOutput:
    """Return the error as one object."""
    next_commands = commands_in(message)
    detail = ErrorDetail(kind=kind, message=message, next=next_commands, exit_status=exit_status)
    return ErrorOutput(error=detail)


def print_error(kind: str, message: str, exit_status: int) -> None:
    """Print the error as one object; where the standard output cannot be written to, nothing, for
    the standard error says it too.
    """
    with contextlib.suppress(OSError):
        print_json(error_output(kind, message, exit_status))


def print_exit(end: SystemExit) -> None:
    """Print why click ended the command: arguments that are none of its own, a question that was
    not answered with yes, or Ctrl-C. Print nothing where the command ended itself: it has printed
    its object.
    """
    cause = end.__context__
    exit_status = end.code if isinstance(end.code, int) else 0
    if exit_status == 130:
        print_error("KeyboardInterrupt", "Interrupted. What is finished is kept", exit_status)
    elif isinstance(cause, typer.Abort):
        print_error("Abort", "Not confirmed, so that nothing was done; --yes confirms", exit_status)
    elif cause is not None and hasattr(cause, "format_message"):  # click's errors, wherever from
        print_error(type(cause).__name__, cause.format_message(), exit_status)
