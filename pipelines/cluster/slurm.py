"""A Dask cluster of SLURM jobs, over TLS. Jobs that end are replaced while there is work."""

import contextlib
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import dask
from dask.distributed import Client
from dask.utils import parse_bytes
from distributed.core import Status

from headrace.pipelines.cluster.dask_client import (
    PRELOAD,
    SETTINGS,
    ClusterError,
    client_of,
    require_extra,
    silenced,
    variables_of,
)
from headrace.pipelines.cluster.tls import folder_security, write_tls
from headrace.pipelines.cluster.worker import GPUS, UNITS_PER_GPU
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.recipe.sections import ClusterSection, SlurmSection

_LOOK_S = 10.0  # seconds between calls of squeue
_ALIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED"
# Workers end by themselves this long before SLURM would kill them, or a tenth of the wall time if
# that is less.
_MARGIN_S = 120
# The run ends when jobs were found ended, or refused for a passing reason, so many times in a row
# while no worker had come.
_PATIENCE = 5
# For each GPU of a job. The rate is limited by decoding: one core decodes some 300 images a second.
# Users set other numbers by `directives`, which come later in the job's script and so take effect.
_CORES_PER_GPU = 8
_MEMORY_PER_GPU = "16 GB"
# Messages of SLURM while its controller is restarted.
_TRANSIENT = ("Unable to contact", "timed out", "Connection refused")
# Words in SLURM's refusals, and the recipe's keys that they are about.
_KEYS_BY_WORD = {
    "partition": "partition (of GPUs: gpu_partition)",
    "account": "account",
    "memory": "memory_per_job",
    "cpu count": "workers_per_job (of GPUs: directives, as --cpus-per-task=4)",
    "time limit": "walltime",
    "node configuration": "workers_per_job, memory_per_job and gpus_per_job",
    "gres": "gpus_per_job",
    "qos": "directives",
}
# By cluster: how many times in a row it had lost jobs and no worker; when squeue was last called.
_failed_starts: dict[str, int] = {}
_looked_at: dict[str, float] = {}


@contextlib.contextmanager
def slurm_client(
    section: ClusterSection, workers: int | None = None, *, on_gpu: bool = False, run_folder: Path
) -> Iterator[Client]:
    """Open a client of a cluster of SLURM jobs, with the scheduler in this process. Needs the extra
    `slurm`.

    A job has `workers_per_job` workers of one core on one node. on_gpu: jobs of the GPU partition,
    with a worker for each GPU and several cores to decode on. run_folder: for certificates (unless
    the recipe names some) and the jobs' logs; every node must see it.
    """
    jobqueue = require_extra("dask_jobqueue", "slurm")
    slurm_options = section.slurm
    workers_per_job = slurm_options.gpus_per_job if on_gpu else slurm_options.workers_per_job
    n_jobs = math.ceil((workers or workers_per_job) / workers_per_job)
    tls_security = folder_security(section.tls or write_tls(RunPaths(run_folder).tls))
    log_folder = RunPaths(run_folder).logs / "slurm"
    log_folder.mkdir(parents=True, exist_ok=True)
    lifetime = lifetime_s(slurm_options.walltime)
    settings = {**SETTINGS, **({GPUS: workers_per_job} if on_gpu else {})}
    export_lines = [f"export {name}={value}" for name, value in variables_of(settings).items()]
    with dask.config.set(SETTINGS), silenced("distributed"):
        cluster = jobqueue.SLURMCluster(
            queue=slurm_options.gpu_partition if on_gpu else slurm_options.partition,
            account=slurm_options.account,
            cores=workers_per_job * (UNITS_PER_GPU if on_gpu else 1),  # threads, of Dask's workers
            processes=workers_per_job,
            memory=_memory(slurm_options, on_gpu),
            job_cpu=workers_per_job * _CORES_PER_GPU if on_gpu else None,
            job_cls=_recording_job(jobqueue.slurm.SLURMJob),
            walltime=slurm_options.walltime,
            interface=slurm_options.interface,
            python=sys.executable,
            job_name="headrace",
            log_directory=str(log_folder),
            # A worker that cannot reach the scheduler gives its node back after a minute.
            death_timeout=60,
            security=tls_security,
            protocol="tls://",
            job_extra_directives=[
                *([f"--gres=gpu:{workers_per_job}"] if on_gpu else []),
                *slurm_options.directives,
            ],
            job_script_prologue=[*export_lines, *slurm_options.prologue],
            # Staggered, so that the jobs of a run do not all end, and queue again, at one moment.
            worker_extra_args=[
                *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{lifetime // 10}s"),
                *("--preload", PRELOAD),
            ],
            scheduler_options={"dashboard_address": "127.0.0.1:0", "dashboard": False},
        )
        cluster.scale(jobs=n_jobs)
        with client_of(cluster) as client:
            yield client


def _memory(slurm_options: SlurmSection, on_gpu: bool) -> str:
    """Return a job's memory: the recipe's; if it gives none for GPUs, what decoding takes."""
    if on_gpu and "memory_per_job" not in slurm_options.model_fields_set:
        return str(slurm_options.gpus_per_job * parse_bytes(_MEMORY_PER_GPU))
    return slurm_options.memory_per_job


def _recording_job(job_class: type) -> type:
    """Return the library's class of jobs with a record of sbatch's refusals."""

    # The library submits jobs in the background, prints a refusal, and waits for workers that never
    # come.
    class RecordingJob(job_class):  # type: ignore[misc]
        refusals: ClassVar[list[Exception]] = []

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError) as error:
                # Without the traceback, whose frames would keep this job alive.
                self.refusals.append(error.with_traceback(None))
                # A running job without an id counts as lost, and the cluster can be closed.
                self.status = Status.running

    return RecordingJob


def lifetime_s(walltime: str) -> int:
    """Return the seconds after which a worker should end by itself, from SLURM's [D-]HH:MM:SS."""
    days, _, clock = walltime.rpartition("-")
    hours, minutes, seconds = (int(clock_part) for clock_part in clock.split(":"))
    total_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    # Less another tenth, by which Dask's --lifetime-stagger may prolong it.
    # Never 0, which Dask takes for no limit.
    return max(1, total_s - min(_MARGIN_S, total_s // 10) - total_s // 10)


def replace_lost_jobs(cluster: Any) -> None:
    """Submit a new job for each that is no longer in the queue, because it reached its wall time,
    was cancelled, or its node died. Raises ClusterError if jobs keep ending without a worker, and
    if SLURM refuses them.
    """
    if time.monotonic() - _looked_at.get(cluster.name, 0.0) < _LOOK_S:
        return
    _looked_at[cluster.name] = time.monotonic()
    job_ids = {name: job.job_id for name, job in list(cluster.workers.items())}
    command = ["squeue", "--noheader", "--format=%A", f"--user={os.getuid()}", f"--states={_ALIVE}"]
    try:
        queued_ids = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return  # the queue will answer later
    lost_workers = [name for name, job_id in job_ids.items() if job_id not in queued_ids]
    if cluster.scheduler_info["workers"]:
        _failed_starts.pop(cluster.name, None)
    elif lost_workers and len(lost_workers) == len(job_ids) and cluster.job_cls.refusals:
        _end_if_refused(cluster)
    elif lost_workers:
        _failed_starts[cluster.name] = _failed_starts.get(cluster.name, 0) + 1
        if _failed_starts[cluster.name] >= _PATIENCE:
            raise ClusterError(
                f"{_PATIENCE} times in a row, SLURM jobs ended before a worker of theirs had come. "
                f"What they said is in {job_logs(cluster)}"
            )
    if lost_workers:
        cluster.loop.add_callback(_replace, cluster, lost_workers)


def queued_jobs_text(cluster: Any) -> str:
    """Return the state of a cluster's jobs, none of which has a worker yet, and what to do."""
    # A copy, because Dask's thread changes it. Jobs that sbatch has not taken have no id.
    job_ids = [job.job_id for job in list(cluster.workers.values()) if job.job_id]
    command = ["squeue", "--noheader", "--format=%T (%r)", f"--jobs={','.join(job_ids)}"]
    squeue_lines: list[str] = []
    states_text = "none"
    try:
        # An empty --jobs lists the jobs of every user.
        if job_ids:
            squeue_lines = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=True
            ).stdout.splitlines()
            states = sorted(Counter(squeue_lines).items())
            states_text = ", ".join(f"{count} {state}" for state, count in states) or "none"
    except (OSError, subprocess.SubprocessError) as error:
        states_text = f"unknown, for squeue does not answer ({error})"
    if any(line.startswith("RUNNING") for line in squeue_lines):
        advice = (
            "Workers of a job that runs have to reach this process (cluster.slurm.interface); what "
            f"they say is in {job_logs(cluster)}"
        )
    else:
        advice = (
            f"squeue --start --jobs={job_ids[0] if job_ids else 'ID'} says when. Jobs that ask for "
            "less begin sooner: walltime, memory_per_job, workers_per_job and partition of "
            "cluster.slurm. Ctrl-C withdraws them and keeps what is finished"
        )
    return f"No worker yet. SLURM jobs of this run: {states_text}. {advice}"


def job_logs(cluster: Any) -> str:
    """Return the folder where a cluster's jobs write their logs."""
    return str(cluster._job_kwargs["log_directory"])  # the library keeps it nowhere else


async def _replace(cluster: Any, worker_names: list[str]) -> None:
    # Their names stay in `worker_spec`: Dask starts a job for each name there without a worker.
    for worker_name in worker_names:
        cluster.workers.pop(worker_name, None)
    cluster.scale(jobs=len(cluster.worker_spec))


def _end_if_refused(cluster: Any) -> None:
    """Raise ClusterError with SLURM's words, unless the refusal may pass."""
    error = cluster.job_cls.refusals[-1]
    slurm_text = str(error).partition("stderr:")[2].strip() or str(error)
    _failed_starts[cluster.name] = _failed_starts.get(cluster.name, 0) + 1
    if isinstance(error, FileNotFoundError):
        raise ClusterError(
            "there is no sbatch on this machine: start the run on a node that submits jobs"
        ) from error
    if any(word in slurm_text for word in _TRANSIENT) and _failed_starts[cluster.name] < _PATIENCE:
        return
    recipe_keys = [
        f"cluster.slurm.{key}" for word, key in _KEYS_BY_WORD.items() if word in slurm_text.lower()
    ]
    raise ClusterError(
        f"SLURM did not take a job: {' '.join(slurm_text.split())}. Look at "
        f"{', '.join(recipe_keys) or 'cluster.slurm'} in the recipe, and at what `sinfo` and "
        "`sacctmgr show associations` say there is"
    ) from error
