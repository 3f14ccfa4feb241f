"""Files in memory: the image of a shard, and pixels that two processes share."""

import os
import tempfile


def nameless_file() -> int:
    """Return the descriptor of an empty file without a name, freed with its last user.

    It is in memory on Linux. Ranges that were never written take no space, and are zero.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("headrace")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
