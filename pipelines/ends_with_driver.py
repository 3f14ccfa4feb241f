"""Importing this into the server that workers are forked from has the kernel end it when the driver ends; workers end with it.

It is the server's first import, for there is no other way to tell it; elsewhere the import does nothing. The kernel takes the
thread that started a process for its parent, so the driver asks for this where that is its main thread.
"""

import sys

from headrace.pipelines.worker import die_with_parent

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    die_with_parent()
