"""What Dask clients of every kind of cluster share: settings, errors, and their end."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import yaml
from dask.distributed import Client

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.pipelines.cluster.fork_server import METHOD

# Linux refuses an allocation beyond the limit (pipelines/cluster/worker.py). Dask's way, to kill,
# is for systems that cannot: it counts mapped shards as the worker's memory.
_ENDS_AT = False if sys.platform == "linux" else 0.95
# Dask's workers are spawned: they start clean, hold no lock or thread of ours, and can use CUDA.
# Those of this machine are forked from a server that is as clean
# (pipelines/cluster/fork_server.py).
SETTINGS: Mapping[str, Any] = {
    METHOD: "spawn",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": _ENDS_AT,
    # Pages over plain HTTP, of paths and errors, for every user of the machine: Dask opens a port
    # for them in any case.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    # Looking at a worker's stack a hundred times a second, for one page of the dashboard, costs a
    # twentieth of its time.
    "distributed.worker.profile.enabled": False,
    # Work is retried by us, with a count of our own, after looking at what was published.
    "distributed.scheduler.allowed-failures": 0,
    # Copying a running bank elsewhere would train it twice.
    "distributed.scheduler.work-stealing": False,
    "distributed.comm.timeouts.connect": "60s",
    # A worker that died is started again by its nanny. After this long the cluster would dismiss
    # the nanny too, and on a busy machine the default of 15 s is shorter than a start.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
}
PRELOAD = "headrace.pipelines.cluster.worker"


class ClusterError(HeadraceError, RuntimeError):
    """The cluster that was asked for is not to be had."""


class WorkersDidNotStart(ClusterError):
    """The worker processes could not be started."""


@contextlib.contextmanager
def client_of(cluster: Any) -> Iterator[Client]:
    """Give a client of a cluster that this process started; both are gone after the block."""
    try:
        close_pages(cluster)
        with Client(cluster) as client:
            yield client
    finally:
        # What does not end in time, as workers that are being started on a busy machine, ends with
        # this process.
        with contextlib.suppress(TimeoutError):
            cluster.close(timeout=30)


def close_pages(cluster: Any) -> None:
    """Close the port for pages of a scheduler in this process; nothing is served there."""
    scheduler: Any = getattr(cluster, "scheduler", None)
    if not hasattr(scheduler, "http_server"):  # it runs elsewhere
        return

    async def close() -> None:
        scheduler.http_server.stop()
        scheduler.services.pop("dashboard", None)
        # or there would still be a link to it
        cluster.scheduler_info.get("services", {}).pop("dashboard", None)

    cluster.sync(close)


@contextlib.contextmanager
def silenced(logger_name: str) -> Iterator[None]:
    """Silence a logger in the block: what a worker's death means is said by headrace, once."""
    logger = logging.getLogger(logger_name)
    level_before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level_before)


def require_extra(module_name: str, extra: str) -> Any:
    """Return a module of an extra. Raises ClusterError, naming the extra."""
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ClusterError(
            f"this kind of cluster needs {module_name} ({error}): pip install 'headrace[{extra}]'"
        ) from None


def variables_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings of Dask as variables, for processes that this one does not start itself."""
    return {
        "DASK_" + key.replace(".", "__").replace("-", "_").upper(): str(value)
        for key, value in settings.items()
        if key.startswith(("distributed.worker", "distributed.comm", "headrace"))
    }


def write_settings(folder: Path) -> Path:
    """Write our settings into a folder, as DASK_CONFIG for schedulers and workers of others."""
    nested_settings: dict[str, Any] = {}
    dask.config.set(SETTINGS, config=nested_settings)
    settings_path = folder / "dask.yaml"
    remove_temporaries(settings_path)
    publish_replace(settings_path, yaml.safe_dump(nested_settings).encode())
    return settings_path
