"""Survival of a run when its terminal goes away, as when a laptop closes or ssh breaks.

The kernel then sends SIGHUP to every process of the session, and writing to the terminal fails with
EIO. This process and all that it starts ignore the signal, and output goes to a file of the run
from then on.
"""

import contextlib
import datetime
import errno
import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any


def outlive_terminal(log_path: Path) -> None:
    """Make this process outlive its terminal, if it has one.

    log_path: output is appended here after the terminal is gone.
    """
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    if not terminals or not hasattr(signal, "SIGHUP"):
        return
    # Only the main thread may set a handler; in another thread, as of a notebook, there is no
    # terminal to survive.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # workers inherit it
    descriptors = [stream.fileno() for stream in terminals]
    for stream_name in ("stdout", "stderr"):
        stream = getattr(sys, stream_name)
        if stream in terminals:
            setattr(sys, stream_name, _Outliving(stream, descriptors, log_path))


class _Outliving:
    """A text stream of a terminal; of the log, once writing to the terminal fails."""

    def __init__(self, stream: TextIOWrapper, descriptors: list[int], log: Path) -> None:
        self._stream, self._descriptors, self._log = stream, descriptors, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._go_on_in_log(error)
            # The stream has kept the text in its buffer, except under PYTHONUNBUFFERED.
            return self._stream.write(text if self._stream.write_through else "")

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._go_on_in_log(error)

    def _go_on_in_log(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            raise error
        self._log.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        log_descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(
            log_descriptor,
            f"{now} process {os.getpid()}: its terminal is gone; it goes on here\n".encode(),
        )
        for terminal_descriptor in self._descriptors:
            os.dup2(log_descriptor, terminal_descriptor)
        os.close(log_descriptor)
        self._stream.flush()
