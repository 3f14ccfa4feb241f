"""What a process does when a new thread finds no memory to begin with."""

import contextlib
import os
import sys
from typing import Any


def end_where_no_thread_begins(message: str, output: str = "") -> None:
    """End this process, with the message and exit code 2, once a new thread finds no memory.

    Whoever started the thread would wait for it for ever (CPython's issue 140746). output: what is
    written on the standard output then.
    """
    report_others = sys.unraisablehook
    # while there is memory
    last_words, last_output = f"Error: {message}\n".encode(), output.encode()

    def end_or_report(unraisable: Any) -> None:
        if unraisable.exc_type is MemoryError and "thread started by" in (unraisable.err_msg or ""):
            os.write(2, last_words)
            with contextlib.suppress(OSError):
                os.write(1, last_output)
            os._exit(2)
        report_others(unraisable)

    sys.unraisablehook = end_or_report
