"""A run outlives its terminal."""

import os
import pty
import select
import signal
import sys
import time

import pytest
from support.runs import RECIPE, make_photos

from headrace.pipelines.cluster import survive_hangup as terminal


def in_terminal(work):
    """Run `work` in a child whose controlling terminal is a new one; returns the child and our end
    of the terminal.
    """
    pid, ours = pty.fork()
    if pid:
        return pid, ours
    try:
        work()
    finally:
        os._exit(1)


def read_until(ours, text, timeout_s=120.0):
    """What the terminal shows up to and with this text."""
    shown, until = b"", time.monotonic() + timeout_s
    while text not in shown and time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 1 << 16)
    assert text in shown, shown.decode()
    return shown


def exit_of(pid, timeout_s=180.0):
    """The exit code of a child; minus the signal that ended it."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it did not end")


@pytest.mark.parametrize("buffering", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_what_a_lost_terminal_does_not_take_goes_to_the_log(tmp_path, monkeypatch, buffering):
    """Neither the signal nor the error of a closed terminal ends the process; every line after that
    is in the log.
    """
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from headrace.pipelines.cluster.survive_hangup import outlive_terminal\n"
        f"outlive_terminal(Path({str(tmp_path)!r}) / 'logs' / 'terminal.txt')\n"
        "print('before', flush=True)\n"
        "while os.isatty(1): time.sleep(0.01)\n"
        "for line in range(3): print('after', line)\n"
        "print('and errors', file=sys.stderr)\n"
    )
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    pid, ours = in_terminal(
        lambda: os.execv(sys.executable, [sys.executable, *buffering, "-c", script])
    )
    read_until(ours, b"before\r\n")  # all of it, or its end is in the log
    os.close(ours)
    assert exit_of(pid) == 0
    lines = (tmp_path / "logs" / "terminal.txt").read_text().splitlines()
    assert "its terminal is gone" in lines[0]
    assert lines[1:] == ["after 0", "after 1", "after 2", "and errors"]


def test_without_a_terminal_nothing_changes(tmp_path):
    """In a pipe or a file, streams and signals stay what they are."""
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGHUP)
    terminal.outlive_terminal(tmp_path / "log")
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGHUP)) == before


@pytest.mark.slow
def test_a_run_goes_on_when_its_terminal_closes(tmp_path):
    """The terminal closes while images are extracted: the run ends well, its workers too, and its
    last words are kept.
    """
    make_photos(tmp_path / "photos", n=40)
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run():
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-m", "headrace.pipelines", "run", "recipe.yaml"])

    pid, ours = in_terminal(run)
    read_until(ours, b"extract")  # the live view is there
    os.close(ours)
    assert exit_of(pid) == 0
    said = (tmp_path / "headrace-runs" / "recipe" / "logs" / "terminal.txt").read_text()
    assert "its terminal is gone" in said
    assert "Next: headrace report recipe.yaml" in said
    assert (tmp_path / "headrace-runs" / "recipe" / "leaderboard.csv").exists()
