"""The processor cores of this process."""

import os


def available_cores() -> int:
    """Return how many cores this process may use, which a container or job may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
