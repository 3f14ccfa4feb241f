"""A thread that finds no memory to begin with."""

import subprocess
import sys

PROGRAM = """\
import threading
from headrace.pipelines.thread_memory import end_where_no_thread_begins


class Poor(threading.Thread):
    def _bootstrap(self):
        raise MemoryError


end_where_no_thread_begins("no memory", "{}")
Poor(daemon=True).start()
"""


def test_a_process_ends_where_a_thread_finds_no_memory():
    """CPython waits for ever for a thread that ends before it says that it has begun."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr, done.stdout) == (2, "Error: no memory\n", "{}")
