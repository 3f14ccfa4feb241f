"""Importing this has the kernel end this process when the driver ends: the first import of the server that workers are
forked from, which has no other way to be told. Workers end with the server.

The kernel takes the thread that started a process for its parent, so it is imported where that is the main thread.
"""

from headrace.pipelines.worker import die_with_parent

die_with_parent()
