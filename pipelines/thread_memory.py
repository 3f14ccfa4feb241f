"""The end of a process in which a new thread finds no memory."""

import contextlib
import os
import sys
from typing import Any


def end_where_no_thread_begins(message: str, output: str = "") -> None:
    """From now on, end this process with exit code 2 when a new thread finds no memory to start.

    message, output: for the standard error and the standard output.
    """
    report_others = sys.unraisablehook
    # Encoded now, for then there may be no memory for it.
    last_words, last_output = f"Error: {message}\n".encode(), output.encode()

    def end_or_report(unraisable: Any) -> None:
        # CPython's own words: "Exception ignored in thread started by".
        if unraisable.exc_type is MemoryError and "thread started by" in (unraisable.err_msg or ""):
            os.write(2, last_words)
            # The reader of the standard output may be gone; the exit code still says what happened.
            with contextlib.suppress(OSError):
                os.write(1, last_output)
            # Not sys.exit, which ends only this thread, and runs handlers that need memory.
            os._exit(2)
        report_others(unraisable)

    # `Thread.start` would wait for the thread for ever (CPython's issue 140746).
    sys.unraisablehook = end_or_report
