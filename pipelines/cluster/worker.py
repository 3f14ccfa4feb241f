"""What every worker process of ours does first: it will not outlive its parent, and it takes no
more memory than it has.

Dask runs `dask_setup` when it starts a worker with `--preload headrace.pipelines.cluster.worker`.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
from typing import Any

import dask

from headrace.pipelines.cluster.ends_with_driver import STARTED_WITH, die_with_parent
from headrace.pipelines.thread_memory import end_where_no_thread_begins

# a setting of Dask's: how many GPUs the workers of this node share; 0 or absent: they use none
GPUS = "headrace.gpus"
# and how many cores of the node each of them may decode on; absent: its share of the process's own
CORES = "headrace.cores-per-gpu"
# Units of images that a worker with a GPU has at a time: one is decoded and published while the
# other has the network.
UNITS_PER_GPU = 2
# and names of the variables that the driver has: the server of forks may have more
VARIABLES = "headrace.variables"


def dask_setup(worker: Any) -> None:
    """Arm the process of a new worker."""
    for variable_name in STARTED_WITH.difference(dask.config.get(VARIABLES, STARTED_WITH)):
        os.environ.pop(variable_name, None)
    worker.http_server.stop()  # Dask opens a port for pages that nobody is shown
    worker.services.pop("dashboard", None)
    importlib.import_module("headrace.heads.bank")  # now, so that no task's time is spent on it
    die_with_parent()
    end_where_no_thread_begins(f"a thread of worker {worker.name} found no memory")
    n_gpus = dask.config.get(GPUS, 0)
    limit_bytes = worker.memory_manager.memory_limit
    if n_gpus:
        choose_gpu(str(worker.name), n_gpus)
    elif limit_bytes:
        # not beside a GPU: its driver reserves more address space than there is memory
        limit_memory(int(limit_bytes))


def versions() -> dict[str, str]:
    """Return the versions, by name, that features and heads depend on: two processes that differ in
    one make different ones.
    """
    from headrace.extract.images.decoding import DECODER

    version_by_name = {"decoder": DECODER}
    for package_name in ("headrace", "numpy", "pillow", "torch"):
        try:
            version_by_name[package_name] = importlib.metadata.version(package_name)
        except importlib.metadata.PackageNotFoundError:
            # as where the code was copied and not installed
            version_by_name[package_name] = "not installed"
    return version_by_name


def choose_gpu(worker_name: str, n_gpus: int) -> None:
    """Show this process only its own of a job's GPUs. worker_name: ends in the worker's number.

    A job's workers all see all of its GPUs, and each would use the first.
    """
    if n_gpus > 1:
        shown_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible_gpus = (
            shown_gpus.split(",") if shown_gpus else [str(index) for index in range(n_gpus)]
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus[
            int(worker_name.rpartition("-")[2]) % len(visible_gpus)
        ]


def decoding_cores() -> int:
    """Return the cores on which this worker decodes for its GPU: several workers share a node."""
    n_cores = len(os.sched_getaffinity(0))
    share: int = dask.config.get(CORES, 0) or n_cores // max(dask.config.get(GPUS, 0), 1)
    return max(1, min(share, n_cores))


def limit_memory(limit_bytes: int) -> None:
    """Refuse allocations beyond a limit (Linux), so that a head that wants too much fails with its
    reason.

    Dask's own limit counts the pages of mapped shards as the worker's memory, though the system
    takes them back whenever it needs them, and it kills. Here only what a process allocates counts,
    and it meets a MemoryError.
    """
    if sys.platform == "linux":
        import resource

        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        # a system that has set a lower limit keeps it
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard_limit))
