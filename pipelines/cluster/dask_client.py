"""Settings, errors and closing of Dask clients, common to all kinds of cluster."""

import contextlib
import importlib
import logging
import signal
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
from headrace.pipelines.cluster.fork_server import START_METHOD

# On Linux an allocation beyond the limit fails (pipelines/cluster/worker.py). Dask instead kills
# workers, and counts mapped shards as their memory; that is for systems without such a limit.
_TERMINATE_AT = False if sys.platform == "linux" else 0.95
# Dask's workers are spawned, not forked: they inherit no lock or thread of this process, and can
# use CUDA. Those of this machine are forked from a server that is as clean
# (pipelines/cluster/fork_server.py).
SETTINGS: Mapping[str, Any] = {
    START_METHOD: "spawn",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": _TERMINATE_AT,
    # Pages over plain HTTP would show paths and errors to every user of the machine. Dask opens
    # their port in any case, but serves nothing without routes.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    # Dask samples a worker's stack a hundred times a second for a page of the dashboard, which
    # costs a twentieth of its time.
    "distributed.worker.profile.enabled": False,
    # `submit.run_tasks` retries tasks itself, after looking at what was published.
    "distributed.scheduler.allowed-failures": 0,
    # Copying a running bank elsewhere would train it twice.
    "distributed.scheduler.work-stealing": False,
    "distributed.comm.timeouts.connect": "60s",
    # A nanny starts its worker again when it died. After this time the cluster gives up the nanny
    # too; the default of 15 s is shorter than a worker's start on a busy machine.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
}
PRELOAD = "headrace.pipelines.cluster.worker"


class ClusterError(HeadraceError, RuntimeError):
    """The cluster that was asked for cannot be used."""


@contextlib.contextmanager
def client_of(cluster: Any) -> Iterator[Client]:
    """Open a client of a cluster that this process started; both are closed after the block."""
    try:
        close_pages(cluster)
        with Client(cluster) as client:
            yield client
    finally:
        # Workers that do not end in time, as those that are just being started on a busy machine,
        # end with this process.
        with contextlib.suppress(TimeoutError):
            # Dask's default would wait without end for a worker that does not answer.
            cluster.close(timeout=30)


def close_pages(cluster: Any) -> None:
    """Close the port of a scheduler's pages if it runs in this process."""
    scheduler: Any = getattr(cluster, "scheduler", None)
    if not hasattr(scheduler, "http_server"):  # it runs elsewhere
        return

    async def close() -> None:
        scheduler.http_server.stop()
        scheduler.services.pop("dashboard", None)
        # Otherwise the cluster would still offer a link to the pages.
        cluster.scheduler_info.get("services", {}).pop("dashboard", None)

    cluster.sync(close)


@contextlib.contextmanager
def silenced(logger_name: str) -> Iterator[None]:
    """Silence a logger in the block; headrace itself reports a worker's death, once."""
    logger = logging.getLogger(logger_name)
    level_before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level_before)


def require_extra(module_name: str, extra: str) -> Any:
    """Return a module of an extra. Raises ClusterError, naming the extra."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ClusterError(
            f"this kind of cluster needs {module_name} ({error}): pip install 'headrace[{extra}]'"
        ) from None
    # dask_jobqueue 0.9 makes Ctrl-C an exit with code 0 in whatever imports it (its issue 696).
    if signal.getsignal(signal.SIGINT) is not handler:
        signal.signal(signal.SIGINT, handler)
    return module


def variables_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return Dask's settings as environment variables, for processes that others start."""
    return {
        "DASK_" + key.replace(".", "__").replace("-", "_").upper(): str(value)
        for key, value in settings.items()
        if key.startswith(("distributed.worker", "distributed.comm", "headrace"))
    }


def write_settings(folder: Path) -> Path:
    """Write SETTINGS into a folder for DASK_CONFIG, for schedulers and workers that the user
    starts.
    """
    nested_settings: dict[str, Any] = {}
    dask.config.set(SETTINGS, config=nested_settings)
    settings_path = folder / "dask.yaml"
    remove_temporaries(settings_path)
    publish_replace(settings_path, yaml.safe_dump(nested_settings).encode())
    return settings_path
