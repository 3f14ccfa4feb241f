"""Where tasks run: one small function per kind of cluster, each giving a Dask client, started only
when there is work.
"""

import contextlib
import importlib
import ipaddress
import logging
import os
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import dask
import yaml
from dask.distributed import Client, LocalCluster
from distributed.system import MEMORY_LIMIT

from headrace.cache.atomic_io import publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.integrity.garbage import remove_temporaries
from headrace.pipelines.cluster.fork_server import (
    METHOD,
    is_importing_main,
    sigint_held_back,
    start_server,
)
from headrace.pipelines.cluster.tls import TLSMissing, own_security, security
from headrace.pipelines.cluster.worker import GPUS, VARIABLES
from headrace.pipelines.recipe.sections import ClusterSection

Role = Literal["extract", "train"]

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
# Of a cluster on this machine. Its scheduler's pages get any free port (a fixed one would let only
# one run start on a machine) until `close_pages` takes it away.
_PRIVATE: Mapping[str, Any] = {
    "host": "127.0.0.1",
    "protocol": "tls://",
    "dashboard_address": "127.0.0.1:0",
    "scheduler_kwargs": {"dashboard": False},
}


class ClusterError(HeadraceError, RuntimeError):
    """The cluster that was asked for is not to be had."""


class WorkersDidNotStart(ClusterError):
    """The worker processes could not be started."""


def available_cores() -> int:
    """Cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def open_client(
    section: ClusterSection,
    role: Role,
    *,
    workers: int | None = None,
    device: str = "cpu",
    run: Path,
    imports: Sequence[str] = (),
) -> Iterator[Client]:
    """A client of the cluster that the recipe names, for one role; what was started for it is gone
    after the block.

    workers: how many in all; None for what the cluster's kind has by default. device: of
    extraction. run: the run's directory, for logs and certificates. imports: modules of the tasks,
    see `local_client`. Raises HeadraceError.
    """
    on_gpu = role == "extract" and device != "cpu"
    if section.where == "local" or (section.where == "cuda" and not on_gpu):
        opened = local_client(workers, section.memory, imports)
    elif section.where == "cuda":
        opened = cuda_client(workers)
    elif section.where == "slurm":
        from headrace.pipelines.cluster.slurm import slurm_client

        opened = slurm_client(section, workers, on_gpu=on_gpu, run=run)
    elif section.where == "kubernetes":
        opened = kubernetes_client(section, workers)
    else:
        opened = scheduler_client(section)
    with opened as client:
        yield client


@contextlib.contextmanager
def local_client(
    workers: int | None = None, memory: str | None = None, imports: Sequence[str] = ()
) -> Iterator[Client]:
    """A client of a new cluster on this machine: one process of one thread per worker, on loopback
    and over TLS.

    Nobody else is let in: the certificate is the cluster's own, and ends with it. imports: modules
    that tasks will need and that take long to import; on Linux they are imported once for all
    workers. Raises WorkersDidNotStart.
    """
    _refuse_while_importing()
    count = workers or available_cores()
    variables = dict(os.environ)  # a server that is there already has those of an earlier moment
    ours = {
        METHOD: start_server(imports),
        "distributed.worker.preload": [PRELOAD],
        VARIABLES: sorted(os.environ),
    }
    with dask.config.set({**SETTINGS, **ours}), quiet("distributed"):
        with sigint_held_back():
            try:
                cluster = LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    processes=True,
                    **_PRIVATE,
                    security=own_security(),
                    memory_limit=memory or int(MEMORY_LIMIT / count),
                    env=variables,
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                raise WorkersDidNotStart(
                    f"the worker processes did not start ({error}); what they said stands above"
                ) from error
        with client_of(cluster) as client:
            yield client


@contextlib.contextmanager
def cuda_client(workers: int | None = None) -> Iterator[Client]:
    """A client of one worker per GPU of this machine (or of the first `workers` GPUs).

    Needs the extra `cuda`.

    Raises ClusterError where there is no GPU.
    """
    dask_cuda = needed("dask_cuda", "cuda")
    gpus = _visible_gpus()
    if not gpus:
        raise ClusterError(
            "cluster.where: cuda gives each GPU of this machine a worker, and PyTorch sees none "
            "here: say `where: local`, or look at what `nvidia-smi` and CUDA_VISIBLE_DEVICES show"
        )
    with dask.config.set({**SETTINGS, GPUS: 1}), quiet("distributed"):
        with sigint_held_back():
            cluster = dask_cuda.LocalCUDACluster(
                n_workers=min(
                    workers or gpus, gpus
                ),  # `workers` also says how many processes train heads
                threads_per_worker=1,
                **_PRIVATE,
                security=own_security(),
                preload=[PRELOAD],
                silence_logs=logging.CRITICAL,
            )
        with client_of(cluster) as client:
            yield client


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def scheduler_client(section: ClusterSection) -> Iterator[Client]:
    """A client of a scheduler that is running, on this machine or over TLS; its workers stay when
    we go.
    """
    address = section.where
    encrypted = address.startswith("tls://")
    if not encrypted and not _on_this_machine(address):
        raise TLSMissing(
            f"cluster.where: {address} is another machine, and this is no tls:// address. Start "
            "the scheduler with the files that `headrace cluster tls FOLDER` writes, and give "
            "tls://HOST:PORT and `tls: FOLDER`"
        )
    keys = security(section.tls) if encrypted else None
    with dask.config.set(SETTINGS), quiet("distributed"):
        try:
            client = Client(address, security=keys, timeout="20s")
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({error}). Is it running, and with the "
                "same certificate?"
            ) from None
        with client:
            yield client


@contextlib.contextmanager
def kubernetes_client(section: ClusterSection, workers: int | None = None) -> Iterator[Client]:
    """A client of a cluster that the Dask operator starts, reached through the API server (which
    encrypts) on loopback.

    Needs the extra `kubernetes`, the operator in the cluster, and an image with headrace in it.
    """
    operator = needed("dask_kubernetes.operator", "kubernetes")
    wanted = section.kubernetes
    spec = operator.make_cluster_spec(
        name=f"headrace-{os.getpid()}",
        image=wanted.image,
        n_workers=workers or 1,
        resources={
            "limits": {"memory": wanted.memory, "cpu": "1"},
            "requests": {"memory": wanted.memory, "cpu": "1"},
        },
        worker_command=["dask", "worker", "--nthreads", "1", "--preload", PRELOAD],
        env=environment(SETTINGS),
    )
    if wanted.volume_claim:
        _mount(spec, wanted.volume_claim, section)
    with dask.config.set(SETTINGS), quiet("distributed"):
        cluster = operator.KubeCluster(custom_cluster_spec=spec, namespace=wanted.namespace)
        with client_of(cluster) as client:
            yield client


def _refuse_while_importing() -> None:
    # A spawned worker first imports the script that started it. One that starts workers as it is
    # imported, as a script without the usual line does, would start workers of its own;
    # multiprocessing then speaks of freezing executables.
    if is_importing_main():
        raise WorkersDidNotStart(
            "This script starts worker processes, and each of them imports the script to begin "
            "with. Put the lines that "
            'start work below a line that workers pass over: if __name__ == "__main__":'
        )


def top_up(client: Client) -> None:
    """Start again the workers that were given up for lost, where the client's cluster is ours to do
    so.
    """
    cluster: Any = client.cluster
    if hasattr(cluster, "job_cls"):
        from headrace.pipelines.cluster.slurm import replace_lost_jobs

        replace_lost_jobs(cluster)
    elif hasattr(cluster, "worker_spec"):
        cluster.scale(len(cluster.worker_spec))


def needed(module: str, extra: str) -> Any:
    """A module of an extra. Raises ClusterError, naming the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ClusterError(
            f"this kind of cluster needs {module} ({error}): pip install 'headrace[{extra}]'"
        ) from None


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings of Dask as variables for processes that this one does not start itself."""
    return {
        "DASK_" + key.replace(".", "__").replace("-", "_").upper(): str(value)
        for key, value in settings.items()
        if key.startswith(("distributed.worker", "distributed.comm", "headrace"))
    }


def write_settings(folder: Path) -> Path:
    """Write our settings into a folder, as a file for DASK_CONFIG: for schedulers and workers that
    others start.
    """
    nested: dict[str, Any] = {}
    dask.config.set(SETTINGS, config=nested)
    path = folder / "dask.yaml"
    remove_temporaries(path)
    publish_replace(path, yaml.safe_dump(nested).encode())
    return path


def _on_this_machine(address: str) -> bool:
    host = urllib.parse.urlsplit(address).hostname or ""
    if address.startswith("inproc://") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _mount(spec: dict[str, Any], claim: str, section: ClusterSection) -> None:
    """Give every pod the volume that holds the cache and the run, at the path where it
    lies here.
    """
    volume = {"name": "headrace", "persistentVolumeClaim": {"claimName": claim}}
    for part in ("worker", "scheduler"):
        pod = spec["spec"][part]["spec"]
        pod.setdefault("volumes", []).append(volume)
        for container in pod["containers"]:
            container.setdefault("volumeMounts", []).append(
                {"name": "headrace", "mountPath": section.kubernetes.mount_path}
            )


@contextlib.contextmanager
def client_of(cluster: Any) -> Iterator[Client]:
    """A client of a cluster of ours, both gone after the block."""
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
    """Close the port that a scheduler in this process has for its pages; nothing is
    served there.
    """
    scheduler: Any = getattr(cluster, "scheduler", None)
    if not hasattr(scheduler, "http_server"):  # it runs elsewhere
        return

    async def close() -> None:
        scheduler.http_server.stop()
        scheduler.services.pop("dashboard", None)
        cluster.scheduler_info.get("services", {}).pop(
            "dashboard", None
        )  # or there would still be a link to it

    cluster.sync(close)


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """What a worker's death means is said by us, in our words, once."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
