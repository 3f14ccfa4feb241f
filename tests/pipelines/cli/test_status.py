"""`headrace status`: what another shell can know of a run."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from headrace.pipelines.cli.status import run_status, show_status
from headrace.pipelines.cluster.task_log import task_log
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.paths import RunPaths

DRIVER = """
import sys
from pathlib import Path
from headrace.pipelines.run_directory import InvalidInput
from headrace.pipelines.paths import RunPaths
from headrace.pipelines.cluster.task_log import task_log
with task_log(RunPaths(Path(sys.argv[1]))) as log:
    log("stage", stage="train", total=100, unit="heads", tasks=10)
    log("started", task="bank-1", worker="tcp://127.0.0.1:1", attempt=1)
    print("there", flush=True)
    sys.stdin.read()
"""


def shown(run):
    """What `headrace status` prints."""
    console = Console(width=200, record=True, file=io.StringIO())
    show_status(console, run)
    return console.export_text()


def test_a_running_driver_a_finished_and_a_failed_one(tmp_path):
    """While it runs: stage, what is done, who works, deaths and time left; afterwards
    how it ended.
    """
    with task_log(RunPaths(tmp_path)) as log:
        log("cluster", where="local", role="train", dashboard="http://127.0.0.1:8787/status")
        log("stage", stage="train", total=100, unit="heads", tasks=10)
        for number in (1, 2, 3):
            log("started", task=f"bank-{number}", worker=f"tcp://127.0.0.1:{number}", attempt=1)
        log("finished", task="bank-1", seconds=1.0, result=None)
        log("died", task="bank-2", worker="tcp://127.0.0.1:2", seconds=1.0, error="its worker died")
        log("progress", done=40, failed=3)
        (status,) = run_status(tmp_path)
        assert (status.state, status.stage, status.done, status.total) == (
            "running",
            "train",
            40,
            100,
        )
        assert (status.unit, status.failed, status.deaths) == ("heads", 3, 1)
        assert status.workers == 1
        assert status.left_s is not None
        text = shown(tmp_path)
        assert "40/100 heads" in text
        assert "dashboard: http://127.0.0.1:8787/status" in text
    (status,) = run_status(tmp_path)
    assert (status.state, status.workers, status.dashboard) == ("finished", 0, None)
    with pytest.raises(OSError, match="full"), task_log(RunPaths(tmp_path)):
        raise OSError("the disk is full")
    assert {status.state for status in run_status(tmp_path)} == {"finished", "failed"}
    assert "OSError: the disk is full" in shown(tmp_path)


def test_a_driver_that_was_killed_is_gone(tmp_path):
    """It is running until it is killed; then it is said to be gone, without anyone having written
    so.
    """
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "there\n"
    assert run_status(tmp_path)[0].state == "running"
    driver.kill()
    driver.communicate()
    (status,) = run_status(tmp_path)
    assert (status.state, status.workers, status.total) == ("gone", 0, 100)
    assert "The last driver was killed" in shown(tmp_path)


def test_a_driver_that_ctrl_c_ended_is_stopped(tmp_path):
    """It is no failure, and what is finished is kept."""
    with pytest.raises(KeyboardInterrupt), task_log(RunPaths(tmp_path)):
        raise KeyboardInterrupt
    (status,) = run_status(tmp_path)
    assert (status.state, status.error) == ("stopped", None)
    assert "The last driver was stopped by Ctrl-C" in shown(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    """The message says what is expected."""
    with pytest.raises(InvalidInput, match=r"Expected a recipe .* or the directory of its run"):
        run_status(tmp_path)
