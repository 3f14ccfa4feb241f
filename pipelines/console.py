"""The terminal, as everything of headrace writes to it: the only place where a console is made.

Names of folders, classes, columns and settings are the user's, and stand in most sentences. They
appear as they are: `[draft]` is no colour, `:dog:` is no picture, a name with control characters
moves no cursor, and what the output cannot encode is written as an escape.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_PIPE_COLUMNS = 132  # of tables that no terminal limits
# What a terminal obeys instead of showing it (all but line ends and tabs), and what reverses the
# text after it.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_console(
    *,
    stderr: bool = False,
    quiet: bool = False,
    json_progress: bool = False,
    verbose: bool = False,
    pipe_columns: int = _PIPE_COLUMNS,
) -> Console:
    """A console of the standard output, or of the standard error, for which all text is plain text.

    What is to stand out is given a `style`. json_progress: whether progress is told as lines of
    JSON. verbose: whether every task that begins and ends has a line. pipe_columns: the width of
    tables in a file or a pipe, which have none of their own; wide enough to show whole words.
    """
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return PlainConsole(
        json_progress=json_progress,
        verbose=verbose,
        stderr=stderr,
        quiet=quiet,
        width=None if has_width else pipe_columns,
        markup=False,
        emoji=False,
        highlight=False,
    )


class PlainConsole(Console):
    """A console on which control characters are shown as escapes (`\\x1b`)."""

    def __init__(
        self, *, json_progress: bool = False, verbose: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.json_progress = json_progress
        self.verbose = verbose

    def render_str(self, text: str, **options: Any) -> Text:
        shown = _CONTROLS.sub(
            lambda match: match[0].encode("unicode_escape").decode(), valid_text(text)
        )
        return super().render_str(shown, **options)


def valid_text(text: str) -> str:
    """The text as any UTF-8 output can hold it: a byte of a file name that is no UTF-8 becomes an
    escape (`caf\\xe9.png`).

    Python holds such bytes as lone surrogates; under an ASCII locale those of every name, which are
    whole UTF-8 here again.
    """
    if text.isascii():
        return text
    try:
        named = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # surrogates that stand for no byte, which only a program can have made
        named = text.encode("utf-8", "backslashreplace")
    return named.decode("utf-8", "backslashreplace")


def escape_unencodable() -> None:
    """Let the standard output and error write what their encoding lacks as escapes (`\\xe9`).

    Their encoding is ASCII in many a pipe, container and cron job, and a file name that is no UTF-8
    fits no encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def utf8_stdout() -> Iterator[TextIO]:
    """Give the standard output for data: UTF-8 in any locale, line ends as they are written."""
    sys.stdout.flush()
    stream = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
    try:
        yield stream
        stream.flush()
    finally:
        stream.detach()  # or the standard output would be closed with it
