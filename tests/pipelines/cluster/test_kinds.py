"""Clusters that are not this machine's cores: what they need, what they refuse, and a run on a
scheduler over TLS.
"""

import os
import shlex
import subprocess
import sys
import time

import dask
import pytest
from dask.distributed import Client, Security
from rich.console import Console
from support.runs import RECIPE, headrace, make_photos

from headrace.pipelines.cluster.clients import open_client
from headrace.pipelines.cluster.dask_client import SETTINGS, ClusterError
from headrace.pipelines.cluster.tls import write_tls
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.recipe.sections import ClusterSection
from headrace.pipelines.run import run_recipe


@pytest.mark.parametrize(
    ("where", "module", "extra"),
    [
        ("cuda", "dask_cuda", "cuda"),
        ("kubernetes", "dask_kubernetes.operator", "kubernetes"),
        ("slurm", "dask_jobqueue", "slurm"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, where, module, extra):
    """A kind of cluster whose library is absent says what to install."""
    monkeypatch.setitem(
        sys.modules, module, None
    )  # an import of it fails, whether it is installed or not
    with (
        pytest.raises(ClusterError, match=rf"needs {module} .*pip install 'headrace\[{extra}\]'"),
        open_client(ClusterSection(where=where), "extract", device="cuda", run_folder=tmp_path),
    ):
        pass


def test_off_this_machine_only_with_tls(tmp_path):
    """A plain address of another machine is refused before anything is sent to it, and so is TLS
    without a certificate.
    """
    for section, message in (
        (ClusterSection(where="tcp://198.51.100.7:8786"), "headrace cluster tls"),
        (ClusterSection(where="tls://198.51.100.7:8786"), "holds no key.pem"),
        (ClusterSection(where="tls://198.51.100.7:8786", tls=tmp_path), "holds no key.pem"),
    ):
        with (
            pytest.raises(InvalidInput, match=message),
            open_client(section, "train", run_folder=tmp_path),
        ):
            pass


@pytest.fixture
def over_tls(tmp_path):
    """(address, folder) of a scheduler with two workers, started with the commands that `headrace
    cluster tls` prints.
    """
    folder = tmp_path / "tls"
    said = headrace("cluster", "tls", folder, cwd=tmp_path).stdout.splitlines()
    commands = [shlex.split(line) for line in said if " dask " in line]
    started = []

    def start(command):
        settings = dict([command.pop(0).split("=", 1)])
        log = tmp_path / f"{command[1]}.log"
        with log.open("w") as file:
            program = [sys.executable, "-m", f"distributed.cli.dask_{command[1]}", *command[2:]]
            started.append(subprocess.Popen(program, stderr=file, env=os.environ | settings))
        return log

    scheduler, worker = commands
    scheduler[scheduler.index("8786")] = "0"
    scheduler += ["--dashboard-address", "127.0.0.1:0"]  # any port, of pages that are off
    log = start([*scheduler, "--host", "127.0.0.1"])
    address, until = "", time.monotonic() + 60
    while not address and time.monotonic() < until:
        time.sleep(0.1)
        address = next(
            (word for word in log.read_text().split() if word.startswith("tls://127.0.0.1")), ""
        )
    worker[worker.index("tls://HOST:8786")] = address
    worker[worker.index("auto")] = "2"
    start(worker)
    yield address, folder
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait(60)


@pytest.mark.slow
def test_a_run_on_a_scheduler_over_tls(over_tls, tmp_path):
    """Extraction and heads run on workers that were started by hand; who has no certificate is not
    let in.
    """
    address, folder = over_tls
    with pytest.raises(OSError, match=r"Timed out|Connection reset"):
        Client(address.replace("tls://", "tcp://"), timeout="3s", security=Security())
    other = ClusterSection(where=address, tls=write_tls(tmp_path / "other"))
    with (
        pytest.raises(ClusterError, match="the same certificate"),
        open_client(other, "train", run_folder=tmp_path),
    ):
        pass
    make_photos(tmp_path / "photos", n=40)
    section = f"cluster:\n  where: {address}\n  tls: {folder}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE + section)
    result = run_recipe(load_recipe(tmp_path / "recipe.yaml"), console=Console(quiet=True))
    assert result.failed_heads == 0
    (log,) = result.paths.logs.glob("*.jsonl")
    assert "tls://" in log.read_text()
    assert "tcp://" not in log.read_text()
    with open_client(
        ClusterSection(where=address, tls=folder), "train", run_folder=tmp_path
    ) as client:
        assert len(client.nthreads()) == 2  # the run left them where they were
        # They have the settings of workers that a run starts itself: they are never paused, and
        # only the kernel limits them.
        for key in [key for key in SETTINGS if key.startswith("distributed.worker")]:
            assert set(map(str, client.run(dask.config.get, key).values())) == {str(SETTINGS[key])}
