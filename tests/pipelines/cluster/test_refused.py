"""What SLURM and GPUs refuse is said in a sentence, tried with stand-ins for SLURM's commands and
for dask-cuda.
"""

import io
import os
import signal
import sys
import time
import types

import dask
import pytest
from rich.console import Console

from headrace.pipelines.cluster import clients as cluster, submit
from headrace.pipelines.cluster.clients import open_client
from headrace.pipelines.cluster.dask_client import ClusterError, require_extra
from headrace.pipelines.cluster.slurm import queued_jobs_text
from headrace.pipelines.cluster.submit import TaskOptions, announced, run_tasks
from headrace.pipelines.cluster.worker import (
    CORES_PER_GPU,
    GPUS as GPUS_SETTING,
    choose_gpu,
    decoding_cores,
)
from headrace.pipelines.recipe.sections import ClusterSection, SlurmSection

GPUS = {"gpu_partition": "gpu", "gpus_per_job": 4}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Makes a folder of commands that stand in for SLURM's; sbatch keeps the script that it is
    given.
    """
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(sbatch, squeue="true"):
        for name, text in (("sbatch", sbatch), ("squeue", squeue), ("scancel", "true")):
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return make


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("invalid partition specified: nosuch", r"cluster\.slurm\.partition"),
        ("Invalid account or account/partition combination specified", r"cluster\.slurm\.account"),
        ("Memory specification can not be satisfied", r"cluster\.slurm\.memory_per_job"),
    ],
)
def test_a_job_that_slurm_refuses_ends_the_run(tmp_path, commands, said, key):
    """SLURM's own words and the recipe's key, within seconds, instead of waiting for workers that
    never come.
    """
    pytest.importorskip("dask_jobqueue")
    commands(f"echo 'sbatch: error: {said}' >&2; exit 1")
    section = ClusterSection(where="slurm", slurm=SlurmSection(partition="nosuch", interface="lo"))
    started = time.monotonic()
    with (
        pytest.raises(ClusterError, match=f"did not take a job: .*{said}.*{key}"),
        open_client(section, "train", run_folder=tmp_path) as client,
    ):
        list(run_tasks(client, eval, [("a", "1 + 1")]))
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_jobs_that_wait_in_the_queue_are_told(tmp_path, commands, monkeypatch):
    """With SLURM's state and reason, once, and what to do."""
    pytest.importorskip("dask_jobqueue")
    queue = """case "$*" in *%T*) echo "PENDING (Resources)";; *) echo 7;; esac"""
    commands("echo Submitted batch job 7", queue)
    monkeypatch.setattr(submit, "_TELL_WAIT_S", 2.0)
    section = ClusterSection(where="slurm", slurm=SlurmSection(interface="lo"))
    reasons, looks, console = [], [], Console(file=io.StringIO())

    def listen(event, **details):
        reasons.append(details["reason"])

    def look(client):
        looks.append(client)
        if len(looks) > 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(submit, "restart_lost_workers", look)
    options = announced(TaskOptions(on_event=listen), console)
    with (
        pytest.raises(KeyboardInterrupt),
        open_client(section, "train", run_folder=tmp_path) as client,
    ):
        list(run_tasks(client, eval, [("a", "1 + 1")], options=options))
    (reason,) = reasons
    assert reason.startswith("No worker yet. SLURM jobs of this run: 1 PENDING (Resources). squeue")
    assert "--jobs=7 " in reason
    assert console.file.getvalue() == reason + "\n"


@pytest.mark.parametrize(
    ("job_ids", "queue", "expected"),
    [
        # What squeue answers to an empty list of jobs: those of everybody.
        ([None], "echo 'RUNNING (None)'", "of this run: none. squeue"),
        (["7", "8"], "echo 'PENDING (Priority)'", "of this run: 1 PENDING (Priority). squeue"),
        (["7"], "exit 1", "of this run: unknown, for squeue does not answer ("),
    ],
)
def test_the_queue_is_asked_for_jobs_of_this_run_alone(job_ids, queue, expected, commands):
    commands("true", queue)
    jobs = {name: types.SimpleNamespace(job_id=job_id) for name, job_id in enumerate(job_ids)}
    cluster = types.SimpleNamespace(workers=jobs, _job_kwargs={"log_directory": "logs"})
    assert expected in queued_jobs_text(cluster)


@pytest.mark.parametrize(
    "changes", [{}, {"memory_per_job": "200 GB", "directives": ("--cpus-per-task=3",)}]
)
def test_a_gpu_job_asks_for_cores_and_memory_of_each_gpu(tmp_path, commands, changes):
    """Eight cores and 16 GB for each GPU by default; what the recipe says comes last,
    and counts.
    """
    pytest.importorskip("dask_jobqueue")
    script = tmp_path / "script"
    commands(f"cp $1 {script}.part; mv {script}.part {script}; echo Submitted batch job 7")
    section = ClusterSection(where="slurm", slurm=SlurmSection(**GPUS, **changes, interface="lo"))
    with open_client(section, "extract", device="cuda", run_folder=tmp_path):
        until = time.monotonic() + 30
        while not script.exists() and time.monotonic() < until:
            time.sleep(0.1)
    text = script.read_text()
    asked = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "--gres=gpu:4" in asked
    cores = [line for line in asked if line.startswith("--cpus-per-task")]
    assert cores[-1] == ("--cpus-per-task=3" if changes else "--cpus-per-task=32")
    assert ("--mem=187G" if changes else "--mem=60G") in asked
    assert "--nthreads 2" in text  # two work units at a time
    assert "--nworkers 4" in text
    assert "export DASK_HEADRACE__GPUS=4" in text


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ({}, 32),
        ({GPUS_SETTING: 4}, 8),
        ({GPUS_SETTING: 1, CORES_PER_GPU: 5}, 5),
        ({CORES_PER_GPU: 64}, 32),
    ],
)
def test_a_worker_with_a_gpu_decodes_on_its_share_of_the_cores(monkeypatch, settings, cores):
    """Of a job's cores by the number of its GPUs; of a machine's, as its cluster says."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    with dask.config.set(settings):
        assert decoding_cores() == cores


@pytest.mark.parametrize(("shown", "seen"), [(None, ["0", "1", "2"]), ("4,6,7", ["4", "6", "7"])])
def test_each_worker_of_a_job_sees_its_own_gpu(monkeypatch, shown, seen):
    """Whatever names SLURM gives the GPUs of a job, or none; a worker that is started again has the
    same one.
    """
    chosen = []
    for number in (0, 1, 2):
        if shown is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        choose_gpu(f"SLURMCluster-5-{number}", 3)
        chosen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert chosen == seen


def test_ctrl_c_stays_what_it_was(tmp_path, monkeypatch):
    """Whatever a cluster's library makes of it when it is imported, as dask_jobqueue 0.9 does."""
    (tmp_path / "takes_ctrl_c.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: exit())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    require_extra("takes_ctrl_c", "slurm")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_of_one_gpu_is_left_as_it_is(monkeypatch):
    """There is nothing to choose."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    choose_gpu("SLURMCluster-5", 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_workers_are_at_most_the_gpus(tmp_path, monkeypatch):
    """`compute.workers` is a number of processes for heads: more of them than GPUs is no error; no
    GPU is a sentence.
    """
    asked = []

    class LocalCUDACluster:
        def __init__(self, *, n_workers, **options):
            asked.append((n_workers, options["protocol"], options["security"].require_encryption))
            raise ClusterError("enough seen")

    monkeypatch.setitem(
        sys.modules, "dask_cuda", types.SimpleNamespace(LocalCUDACluster=LocalCUDACluster)
    )
    section = ClusterSection(where="cuda")
    for gpus, workers in ((2, 16), (2, 1), (2, None)):
        monkeypatch.setattr(cluster, "_visible_gpus", lambda gpus=gpus: gpus)
        with (
            pytest.raises(ClusterError),
            open_client(section, "extract", workers=workers, device="cuda", run_folder=tmp_path),
        ):
            pass
    assert asked == [(2, "tls://", True), (1, "tls://", True), (2, "tls://", True)]
    monkeypatch.setattr(cluster, "_visible_gpus", lambda: 0)
    with (
        pytest.raises(ClusterError, match="sees none here: say `where: local`"),
        open_client(section, "extract", device="cuda", run_folder=tmp_path),
    ):
        pass
