"""Dask clients: one function for each kind of cluster."""

import contextlib
import ipaddress
import logging
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import dask
from dask.distributed import Client, LocalCluster
from distributed.system import MEMORY_LIMIT

from headrace.extract.cores import available_cores
from headrace.pipelines.cluster.dask_client import (
    PRELOAD,
    SETTINGS,
    ClusterError,
    client_of,
    require_extra,
    silenced,
    variables_of,
)
from headrace.pipelines.cluster.fork_server import (
    START_METHOD,
    is_importing_main,
    lacks_main_line,
    sigint_held_back,
    start_server,
)
from headrace.pipelines.cluster.slurm import queued_jobs_text, replace_lost_jobs, slurm_client
from headrace.pipelines.cluster.tls import folder_security, own_security
from headrace.pipelines.cluster.worker import CORES_PER_GPU, DRIVER_VARIABLES, GPUS, UNITS_PER_GPU
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.sections import ClusterSection

Role = Literal["extract", "train"]

# Settings of a cluster on this machine, which the network cannot reach. The port of the scheduler's
# pages is any free one, because a fixed one would allow one run per machine; `close_pages` closes
# it.
_PRIVATE: Mapping[str, Any] = {
    "host": "127.0.0.1",
    "protocol": "tls://",
    "dashboard_address": "127.0.0.1:0",
    "scheduler_kwargs": {"dashboard": False},
}


@contextlib.contextmanager
def open_client(
    section: ClusterSection,
    role: Role,
    *,
    workers: int | None = None,
    device: str = "cpu",
    run_folder: Path,
    module_names: Sequence[str] = (),
) -> Iterator[Client]:
    """Open a client of the cluster that the recipe names, for one role. Workers that are started
    for it end with the block.

    workers: number of all; None for the default of the kind of cluster. device: of extraction.
    run_folder: for logs and certificates. module_names: of the tasks, see `local_client`. Raises
    HeadraceError.
    """
    # Heads are trained on CPUs, one process per core, even if networks run on GPUs.
    on_gpu = role == "extract" and device != "cpu"
    if section.where == "local" or (section.where == "cuda" and not on_gpu):
        client_context = local_client(workers, section.memory, module_names)
    elif section.where == "cuda":
        client_context = cuda_client(workers)
    elif section.where == "slurm":
        client_context = slurm_client(section, workers, on_gpu=on_gpu, run_folder=run_folder)
    elif section.where == "kubernetes":
        client_context = kubernetes_client(section, workers)
    else:
        client_context = scheduler_client(section)
    with client_context as client:
        yield client


@contextlib.contextmanager
def local_client(
    workers: int | None = None, memory: str | None = None, module_names: Sequence[str] = ()
) -> Iterator[Client]:
    """Open a client of a new cluster on this machine: workers are processes of one thread, on
    loopback and over TLS, with a certificate of this cluster alone.

    module_names: modules that tasks need and that take long to import; on Linux they are imported
    once for all workers. Raises ClusterError.
    """
    # A spawned worker first imports the script that started it. If the script starts workers when
    # it is imported, for lack of the usual line, so would each worker; multiprocessing's own
    # message then speaks of freezing executables.
    if is_importing_main() or lacks_main_line():
        raise ClusterError(
            "This script starts worker processes, and each of them imports the script to begin "
            "with. Put the lines that start work below a line that workers pass over: if __name__ "
            '== "__main__":'
        )
    n_workers = workers or available_cores()
    # Given explicitly, because workers forked by a server that was started earlier would have the
    # variables of that moment.
    worker_variables = dict(os.environ)
    local_settings = {
        START_METHOD: start_server(module_names),
        "distributed.worker.preload": [PRELOAD],
        DRIVER_VARIABLES: sorted(os.environ),
    }
    with dask.config.set({**SETTINGS, **local_settings}), silenced("distributed"):
        with sigint_held_back():
            try:
                cluster = LocalCluster(
                    n_workers=n_workers,
                    threads_per_worker=1,
                    processes=True,
                    **_PRIVATE,
                    security=own_security(),
                    memory_limit=memory or int(MEMORY_LIMIT / n_workers),
                    env=worker_variables,
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                raise ClusterError(
                    f"the worker processes did not start ({error}); what they said stands above"
                ) from error
        with client_of(cluster) as client:
            yield client


@contextlib.contextmanager
def cuda_client(workers: int | None = None) -> Iterator[Client]:
    """Open a client with a worker for each GPU of this machine (or of the first `workers` GPUs).

    Needs the extra `cuda`. Raises ClusterError if there is no GPU.
    """
    dask_cuda = require_extra("dask_cuda", "cuda")
    n_gpus = _visible_gpus()
    if not n_gpus:
        raise ClusterError(
            "cluster.where: cuda gives each GPU of this machine a worker, and PyTorch sees none "
            "here: say `where: local`, or look at what `nvidia-smi` and CUDA_VISIBLE_DEVICES show"
        )
    n_workers = min(workers or n_gpus, n_gpus)  # `workers` also says how many processes train heads
    # dask-cuda gives each worker all cores near its GPU, so they are divided here.
    settings = {**SETTINGS, GPUS: 1, CORES_PER_GPU: max(1, available_cores() // n_workers)}
    with dask.config.set(settings), silenced("distributed"):
        with sigint_held_back():
            cluster = dask_cuda.LocalCUDACluster(
                n_workers=n_workers,
                threads_per_worker=UNITS_PER_GPU,
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
    """Open a client of a running scheduler, on this machine or over TLS. Its workers are not ended.

    Raises InvalidInput for another machine without TLS, ClusterError if no scheduler answers.
    """
    address = section.where
    is_encrypted = address.startswith("tls://")
    if not is_encrypted and not _on_this_machine(address):
        raise InvalidInput(
            f"cluster.where: {address} is another machine, and this is no tls:// address. Start "
            "the scheduler with the files that `headrace cluster tls FOLDER` writes, and give "
            "tls://HOST:PORT and `tls: FOLDER`"
        )
    tls_security = folder_security(section.tls) if is_encrypted else None
    with dask.config.set(SETTINGS), silenced("distributed"):
        try:
            client = Client(address, security=tls_security, timeout="20s")
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} ({error}). Is it running, and with the "
                "same certificate?"
            ) from None
        with client:
            yield client


@contextlib.contextmanager
def kubernetes_client(section: ClusterSection, workers: int | None = None) -> Iterator[Client]:
    """Open a client of a cluster that the Dask operator starts, through the API server, which
    encrypts.

    Needs the extra `kubernetes`, the operator in the cluster, and an image with headrace in it.
    """
    operator = require_extra("dask_kubernetes.operator", "kubernetes")
    pod_options = section.kubernetes
    cluster_spec = operator.make_cluster_spec(
        name=f"headrace-{os.getpid()}",
        image=pod_options.image,
        n_workers=workers or 1,
        resources={
            "limits": {"memory": pod_options.memory, "cpu": "1"},
            "requests": {"memory": pod_options.memory, "cpu": "1"},
        },
        worker_command=["dask", "worker", "--nthreads", "1", "--preload", PRELOAD],
        env=variables_of(SETTINGS),
    )
    if pod_options.volume_claim:
        _mount(cluster_spec, pod_options.volume_claim, section)
    with dask.config.set(SETTINGS), silenced("distributed"):
        cluster = operator.KubeCluster(
            custom_cluster_spec=cluster_spec, namespace=pod_options.namespace
        )
        with client_of(cluster) as client:
            yield client


def restart_lost_workers(client: Client) -> None:
    """Start lost workers again, if this process started the cluster."""
    cluster: Any = client.cluster
    if hasattr(cluster, "job_cls"):  # of dask-jobqueue: Slurm
        replace_lost_jobs(cluster)
    elif hasattr(cluster, "worker_spec"):  # a cluster on this machine
        cluster.scale(len(cluster.worker_spec))


def why_no_worker(client: Client) -> str:
    """Return why there is no worker yet, and what to do about it, as a sentence for the user."""
    cluster: Any = client.cluster
    if hasattr(cluster, "job_cls"):
        return queued_jobs_text(cluster)
    if cluster is None:
        return (
            "No worker yet: the scheduler that cluster.where names has none. `headrace cluster tls "
            "FOLDER` prints the command that starts some"
        )
    if hasattr(cluster, "namespace"):  # Kubernetes
        return (
            "No worker yet: its pods have not come up. They are listed by "
            f"kubectl get pods --namespace {cluster.namespace}, and what one waits for by "
            "kubectl describe pod NAME"
        )
    return (
        "No worker yet: they are starting. On a network disk the import of PyTorch can take minutes"
    )


def _on_this_machine(address: str) -> bool:
    host = urllib.parse.urlsplit(address).hostname or ""
    if address.startswith("inproc://") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    # A host name, which may lead to any machine: it counts as another one.
    except ValueError:
        return False


def _mount(cluster_spec: dict[str, Any], volume_claim: str, section: ClusterSection) -> None:
    """Mount the volume of cache and run in every pod, at the path that it has here."""
    volume = {"name": "headrace", "persistentVolumeClaim": {"claimName": volume_claim}}
    for role_name in ("worker", "scheduler"):
        pod = cluster_spec["spec"][role_name]["spec"]
        pod.setdefault("volumes", []).append(volume)
        for container in pod["containers"]:
            container.setdefault("volumeMounts", []).append(
                {"name": "headrace", "mountPath": section.kubernetes.mount_path}
            )
