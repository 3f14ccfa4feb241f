"""A run that outlives its terminal: a laptop that closes, an ssh connection that breaks.

A terminal that goes away sends SIGHUP to every process of its session, and answers whoever writes
to it with EIO. The signal is ignored, by us and by all that we start, and what would have been
written goes to a file of the run from then on.
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
    """Let nothing of this process end with its terminal, from now on, if it has one.

    log_path: what is written to the terminal after it is gone is appended here.
    """
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    if not terminals or not hasattr(signal, "SIGHUP"):
        return
    # Only the main thread may; where a notebook's thread runs us, the terminal is not ours.
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
            # Under PYTHONUNBUFFERED nothing has kept the text; otherwise the stream has.
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
