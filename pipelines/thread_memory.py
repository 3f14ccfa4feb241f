"""What a process does when a new thread finds no memory to begin with."""

import os
import sys
from typing import Any


def end_where_no_thread_begins(message: str) -> None:
    """End this process, with the message and exit code 2, once a new thread finds no memory.

    Whoever started the thread would wait for it for ever (CPython's issue 140746).
    """
    report_others = sys.unraisablehook
    last_words = f"Error: {message}\n".encode()  # while there is memory

    def end_or_report(unraisable: Any) -> None:
        if unraisable.exc_type is MemoryError and "thread started by" in (unraisable.err_msg or ""):
            os.write(2, last_words)
            os._exit(2)
        report_others(unraisable)

    sys.unraisablehook = end_or_report
