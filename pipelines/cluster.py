"""Where tasks run: a Dask cluster on this machine, started only when there is work, on loopback only."""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import dask
from dask.distributed import Client, LocalCluster

from headrace.cache import HeadraceError

# Dask's workers are spawned: they start clean, hold no lock or thread of ours, and can use CUDA.
_SETTINGS = {
    "distributed.worker.multiprocessing-method": "spawn",
    # A worker pauses or is killed only when it truly runs out: memory-mapped shards count as its memory but are not.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.90,
    "distributed.worker.memory.terminate": 0.95,
    # Work is retried by us, with a count of our own, after looking at what was published.
    "distributed.scheduler.allowed-failures": 0,
    # Copying a running bank elsewhere would train it twice.
    "distributed.scheduler.work-stealing": False,
    "distributed.comm.timeouts.connect": "60s",
    # A worker that died is started again by its nanny. After this long the cluster would dismiss the nanny too, and on a
    # busy machine the default of 15 s is shorter than a start.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
}


class WorkersDidNotStart(HeadraceError, RuntimeError):
    """The worker processes could not be started."""


def available_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def local_client(workers: int | None = None) -> Iterator[Client]:
    """A client of a new cluster on this machine: one process of one thread per worker, gone at the end of the block.

    Raises WorkersDidNotStart.
    """
    _refuse_while_importing()
    with dask.config.set(_SETTINGS), _quiet("distributed"):
        with _sigint_held_back():
            try:
                cluster = LocalCluster(
                    n_workers=workers or available_cores(),
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",  # any free port: a fixed one would let only one run start here
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                raise WorkersDidNotStart(
                    f"the worker processes did not start ({error}); what they said stands above"
                ) from error
        try:
            with Client(cluster) as client:
                yield client
        finally:
            cluster.close(timeout=10)


def _refuse_while_importing() -> None:
    # A spawned worker first imports the script that started it. One that starts workers as it is imported, as a script
    # without the usual line does, would start workers of its own; multiprocessing then speaks of freezing executables.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkersDidNotStart(
            "This script starts worker processes, and each of them imports the script to begin with. Put the lines that "
            'start work below a line that workers pass over: if __name__ == "__main__":'
        )


def top_up(client: Client) -> None:
    """Start again the workers that were given up for lost, if the client's cluster is ours to do so."""
    cluster: Any = client.cluster
    if hasattr(cluster, "worker_spec"):
        cluster.scale(len(cluster.worker_spec))


@contextlib.contextmanager
def _sigint_held_back() -> Iterator[None]:
    # A terminal sends Ctrl-C to every process of ours, and each worker would print a traceback. Processes and threads
    # inherit the mask of the thread that starts them, so workers never see it; for us it only waits for this block's end.
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started now, for starting it clears the mask of the thread that does so.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    # What a worker's death means is said by us, in our words, once.
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
