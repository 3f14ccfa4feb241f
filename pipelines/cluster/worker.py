"""Setup of every worker process: it ends with its parent, and its memory is limited.

Dask runs `dask_setup` when it starts a worker with `--preload headrace.pipelines.cluster.worker`.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
from typing import Any

import dask

from headrace.extract.cores import available_cores
from headrace.pipelines.cluster.ends_with_driver import STARTED_WITH, die_with_parent
from headrace.pipelines.thread_memory import end_where_no_thread_begins

# Settings in Dask's configuration.
GPUS = "headrace.gpus"  # how many GPUs the workers of this node share; 0 or absent: they use none
# How many cores each of these workers decodes on; absent: an equal share of the process's cores.
CORES_PER_GPU = "headrace.cores-per-gpu"
# Names of the driver's environment variables; the fork server may have others.
DRIVER_VARIABLES = "headrace.variables"
# Work units that a worker with a GPU has at a time: one is decoded and published while the other
# uses the network.
UNITS_PER_GPU = 2


def dask_setup(worker: Any) -> None:
    """Set up the process of a new worker."""
    # Variables that the fork server inherited, but that the driver no longer has.
    for variable_name in STARTED_WITH.difference(dask.config.get(DRIVER_VARIABLES, STARTED_WITH)):
        os.environ.pop(variable_name, None)
    worker.http_server.stop()  # Dask opens its port in any case, and nothing is served there
    worker.services.pop("dashboard", None)
    importlib.import_module("headrace.heads.bank")  # now, so that no task's time is spent on it
    die_with_parent()
    end_where_no_thread_begins(f"a thread of worker {worker.name} found no memory")
    n_gpus = dask.config.get(GPUS, 0)
    limit_bytes = worker.memory_manager.memory_limit
    if n_gpus:
        choose_gpu(str(worker.name), n_gpus)
    elif limit_bytes:
        # Not with a GPU, whose driver reserves more address space than there is memory.
        limit_memory(int(limit_bytes))


def versions() -> dict[str, str]:
    """Return the versions, by package, that features and heads depend on."""
    from headrace.extract.images.decoding import DECODER

    version_by_name = {"decoder": DECODER}
    for package_name in ("headrace", "numpy", "pillow", "torch"):
        try:
            version_by_name[package_name] = importlib.metadata.version(package_name)
        except importlib.metadata.PackageNotFoundError:
            # The code was copied and not installed.
            version_by_name[package_name] = "not installed"
    return version_by_name


def choose_gpu(worker_name: str, n_gpus: int) -> None:
    """Restrict this process to one of its job's GPUs. worker_name: ends in the worker's number."""
    # Otherwise each worker of a job would see all of its GPUs and use the first.
    if n_gpus > 1:
        shown_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible_gpus = (
            shown_gpus.split(",") if shown_gpus else [str(index) for index in range(n_gpus)]
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus[
            int(worker_name.rpartition("-")[2]) % len(visible_gpus)
        ]


def decoding_cores() -> int:
    """Return the number of cores on which this worker decodes, as several may share a node."""
    n_cores = available_cores()
    share: int = dask.config.get(CORES_PER_GPU, 0) or n_cores // max(dask.config.get(GPUS, 0), 1)
    return max(1, min(share, n_cores))


def limit_memory(limit_bytes: int) -> None:
    """Make allocations beyond a limit raise MemoryError (Linux), so that a head that needs too much
    fails with this reason.
    """
    # Dask's own limit kills the worker. It also counts pages of mapped shards, which the system
    # takes back whenever it needs them; this limit counts only what the process allocates.
    if sys.platform == "linux":
        import resource

        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        # An error means that the system has a lower limit, which stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard_limit))
