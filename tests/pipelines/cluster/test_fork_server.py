"""Workers of this machine are forked from one process that has imported what they need, and are as
good as started anew.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.runs import RECIPE, make_photos

from headrace.extract.errors import BackboneError
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.fork_server import call_forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are spawned here")


def server_of(process):
    """The process that the workers of a driver are forked from."""
    (server,) = [
        child
        for child in process.children()
        if "multiprocessing.forkserver" in " ".join(child.cmdline())
    ]
    return server


# As a user's program starts workers: whatever else this process did before does not count.
DRIVER = """
import os, sys, threading
from headrace.pipelines.cluster.clients import local_client
def about():
    return os.getppid(), os.environ.get("SAID"), "torch" in sys.modules, os.environ.get("ONCE")
if __name__ == "__main__":
    for said in ("first", "second"):
        os.environ["SAID"] = said
        os.environ.pop("ONCE", None) or os.environ.update(ONCE="there")
        with local_client(2, module_names=["headrace.extract.run.work_unit", "timm", "torchvision", "no_such_module"]) as client:
            answers = set(client.run(about).values())
            (server, heard, torch, once), = answers
            threads = len(os.listdir(f"/proc/{server}/task"))
            print(server, heard, torch, threads, once)
"""


@pytest.mark.slow
def test_the_server_has_one_thread_and_serves_every_cluster_of_a_process(tmp_path):
    """It has the libraries and one thread, so that forking is safe; workers see the environment of
    their own cluster, and no variable that is gone since.
    """
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=True
    )
    (first, *rest), (second, *others) = (line.split() for line in done.stdout.splitlines())
    assert first == second
    assert rest == ["first", "True", "1", "there"]
    assert others == ["second", "True", "1", "None"]


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


# A whole run, in a process that ends by saying what it has imported.
RUN = """
import sys
from rich.console import Console
from headrace import load_recipe, run_recipe
if __name__ == "__main__":
    run_recipe(load_recipe("recipe.yaml"), console=Console(quiet=True))
    print(sorted({"torch", "torchvision", "sklearn", "scipy.stats"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_the_same_workers_extract_and_train_and_the_driver_needs_no_torch(tmp_path):
    """One cluster serves a whole run: no worker is started between its stages.

    The driver has no network, ever.
    """
    make_photos(tmp_path / "photos")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stderr
    (log,) = (tmp_path / "headrace-runs" / "recipe" / "logs").glob("*.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events].count("cluster") == 1
    workers = {stage: set() for stage in ("extract", "bank")}
    for event in events:
        if event["event"] == "started":
            workers[event["task"].partition("-")[0]].add(event["worker"])
    assert workers["extract"] == workers["bank"]
    assert len(workers["bank"]) == 2


def die_elsewhere(here):
    """The caller's process, where it is called there; another one dies."""
    if os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return "here"


def refuse(name):
    """As a network that is not to be had."""
    raise BackboneError(f"no {name}")


@pytest.mark.slow
def test_what_a_forked_process_says_is_said_here():
    """Its result is returned and its error raised; if it dies, the function is called by the
    process that waits.
    """
    assert call_forked([], os.getppid) == server_of(psutil.Process()).pid
    with pytest.raises(BackboneError, match="no network"):
        call_forked([], refuse, "network")
    assert call_forked([], die_elsewhere, os.getpid()) == "here"


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_is_asked_is_none():
    """It took the request and never answers."""
    call_forked([], os.getpid)
    server = server_of(psutil.Process())
    server.suspend()
    threading.Timer(0.5, server.kill).start()
    assert call_forked([], os.getpid) == os.getpid()
    while server.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    assert call_forked([], os.getpid) != os.getpid()


@pytest.mark.slow
def test_a_process_that_may_start_none_calls_the_function_itself():
    """As those of a user's own pool, which may plan runs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(call_forked, ([], os.getppid)).get(120) == os.getpid()


# Which module a process forked from the server has for a name, and whether it is another process.
LOOK = """
import os, sys
from headrace.pipelines.cluster.fork_server import call_forked
def look():
    return os.getpid(), sys.modules["timm"].__file__, "torchvision" in sys.modules
if __name__ == "__main__":
    process, *found = call_forked(["torchvision", "timm"], look)
    print(process != os.getpid(), *found)
"""


@pytest.mark.slow
def test_the_server_runs_no_module_of_the_current_folder_and_outlives_a_broken_one(tmp_path):
    """Images may come with a `timm.py`.

    The driver's own modules are the server's, and one that raises is passed over.
    """
    for folder in ("program", "photos"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photos" / "timm.py").write_text("raise RuntimeError('run')\n")
    (tmp_path / "program" / "timm.py").write_text("")
    (tmp_path / "program" / "torchvision.py").write_text(
        "raise RuntimeError('its operators are not there')\n"
    )
    (tmp_path / "program" / "look.py").write_text(LOOK)
    done = subprocess.run(
        [sys.executable, "../program/look.py"],
        cwd=tmp_path / "photos",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["True", str(tmp_path / "program" / "timm.py"), "False"], (
        done.stderr
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_nobody_else_can_ask_the_server_for_a_process():
    """Its socket is its owner's, in a folder that is its owner's: whoever is let in there runs code
    as the owner.
    """
    call_forked([], os.getpid)
    (socket,) = [
        Path(end.laddr) for end in server_of(psutil.Process()).net_connections("unix") if end.laddr
    ]
    assert socket.stat().st_mode & 0o077 == 0
    assert socket.parent.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_where_no_server_can_listen_workers_are_spawned(tmp_path):
    """A folder for temporary files whose path is too long for a socket is no reason to fail."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = (
        "from headrace.pipelines.cluster.clients import local_client\n"
        "with local_client(1) as client: print(client.submit(sum, [1, 2]).result())\n"
    )
    variables = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["3"], done.stderr


def test_pythons_own_modules_are_not_taken_from_the_current_folder(tmp_path):
    """Every process that a command starts imports some before it can choose where from; a folder
    of images that somebody sent, or a pupil's first programs, may have such names.
    """
    make_photos(tmp_path / "photos", n=4)
    for name in ("selectors", "types", "queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('run')\n")
    command = [Path(sys.executable).with_name("headrace"), "extract", "photos"]
    command += ["--backbone", "timm:test_resnet", "--weights", "random:0", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "RuntimeError" not in done.stderr
