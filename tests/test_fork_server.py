"""Workers of this machine are forked from one process that has imported what they need, and are as good as started anew."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console
from run_cases import RECIPE, make_photos

from headrace.pipelines import load_recipe, run_recipe
from headrace.pipelines.cluster import local_client

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are spawned here")


def server_of(process):
    """The process that the workers of a driver are forked from."""
    (server,) = [child for child in process.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return server


# As a user's program starts workers: whatever else this process did before does not count.
DRIVER = """
import os, sys, threading
from headrace.pipelines.cluster import local_client
def about():
    return os.getppid(), os.environ.get("SAID"), "torch" in sys.modules
if __name__ == "__main__":
    for said in ("first", "second"):
        os.environ["SAID"] = said
        with local_client(2, imports=["headrace.extract.unit", "timm", "torchvision", "no_such_module"]) as client:
            answers = set(client.run(about).values())
            (server, heard, torch), = answers
            threads = len(os.listdir(f"/proc/{server}/task"))
            print(server, heard, torch, threads)
"""


@pytest.mark.slow
def test_the_server_has_one_thread_and_serves_every_cluster_of_a_process(tmp_path):
    """It has the libraries and one thread, so that forking is safe; workers see the environment of their own cluster."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=True)
    (first, *rest), (second, *others) = (line.split() for line in done.stdout.splitlines())
    assert first == second
    assert rest == ["first", "True", "1"]
    assert others == ["second", "True", "1"]


@pytest.mark.slow
def test_a_server_that_is_killed_is_replaced():
    """Its workers end with it; their nannies start a server and workers again."""
    with local_client(2) as client:
        before = set(client.run(os.getpid).values())
        server = server_of(psutil.Process())
        server.kill()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            now = set(client.run(os.getpid, on_error="ignore").values())
            if len(now) == 2 and not now & before:
                break
            time.sleep(0.2)
        assert len(now) == 2
        assert not now & before
        assert server_of(psutil.Process()) != server


@pytest.mark.slow
def test_the_same_workers_extract_and_train(tmp_path):
    """One cluster serves a whole run: no worker is started between its stages."""
    make_photos(tmp_path / "photos")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = run_recipe(load_recipe(tmp_path / "recipe.yaml"), console=Console(quiet=True))
    (log,) = result.paths.logs.glob("*.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events].count("cluster") == 1
    workers = {stage: set() for stage in ("extract", "bank")}
    for event in events:
        if event["event"] == "started":
            workers[event["task"].partition("-")[0]].add(event["worker"])
    assert workers["extract"] == workers["bank"]
    assert len(workers["bank"]) == 2


@pytest.mark.slow
def test_where_no_server_can_listen_workers_are_spawned(tmp_path):
    """A folder for temporary files whose path is too long for a socket is no reason to fail."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = (
        "from headrace.pipelines.cluster import local_client\n"
        "with local_client(1) as client: print(client.submit(sum, [1, 2]).result())\n"
    )
    variables = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["3"], done.stderr
