"""Consoles that print names of files, classes and columns as they are.

All of headrace prints through `make_console`. A plain rich console would take a folder named
`[draft]` for a style and `:dog:` for a picture, would send control characters in a name to the
terminal, and would raise an error for a name that the output cannot encode.
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

_PIPE_COLUMNS = 132  # characters; the width of tables in a file or pipe, which has none of its own
# Control characters but line ends and tabs, and those that change the direction of the text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_console(
    *,
    stderr: bool = False,
    quiet: bool = False,
    json_progress: bool = False,
    verbose: bool = False,
) -> Console:
    """Return a console of the standard output, or of the standard error, without markup in texts.

    json_progress: whether progress is printed as lines of JSON. verbose: whether a line is printed
    when a task begins or ends.
    """
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return PlainConsole(
        json_progress=json_progress,
        verbose=verbose,
        stderr=stderr,
        quiet=quiet,
        width=None if has_width else _PIPE_COLUMNS,
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
    """Return text that can be encoded as UTF-8: a byte of a file name that is not UTF-8 becomes an
    escape (`caf\\xe9.png`).
    """
    if text.isascii():
        return text
    # Python gives such bytes as lone surrogates. Under an ASCII locale it does so with all bytes
    # beyond ASCII, which are decoded as UTF-8 here.
    try:
        named = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Other surrogates stand for no byte, and come from no file name but from a program.
        named = text.encode("utf-8", "backslashreplace")
    return named.decode("utf-8", "backslashreplace")


def escape_unencodable() -> None:
    """Make the standard output and error print characters that they cannot encode as escapes."""
    # In a container or a cron job their encoding is often ASCII.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def utf8_stdout() -> Iterator[TextIO]:
    """Open the standard output for data: UTF-8 in any locale, line ends as written."""
    sys.stdout.flush()
    stream = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
    try:
        yield stream
        stream.flush()
    finally:
        stream.detach()  # else the standard output would be closed when `stream` is deleted
