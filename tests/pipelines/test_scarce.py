"""What a machine may lack: room on its disk, descriptors, memory, links, the right to write."""

import contextlib
import os
import shutil
import subprocess

import pytest
from support.kills import (
    EXPORT_CALL,
    EXTRACT_CALL,
    PREDICT_CALL,
    REPORT_CALL,
    RUN,
    RUN_CALL,
    TRUST,
    result,
)

pytestmark = pytest.mark.slow


GROW_CALL = (
    "predict",
    RUN,
    "../more",
    "--out",
    "more.csv",
    "--update-cache",
    "--workers",
    "1",
    *TRUST,
)


def _can_mount(folder):
    tried = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if tried.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return tried.returncode == 0


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system at the folder, for a while. Needs root."""
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    ("call", "state", "first_kib", "step_kib"),
    [
        (RUN_CALL, "empty", 300, 600),
        (EXTRACT_CALL, "empty", 300, 300),
        (PREDICT_CALL, "finished", 16, 40),
        (GROW_CALL, "finished", 16, 100),
        (REPORT_CALL, "finished", 64, 700),
        (("report", RUN, RUN), "finished", 16, 100),
        (EXPORT_CALL, "finished", 16, 40),
    ],
    ids=["run", "extract", "predict", "predict-into-cache", "report", "comparison", "export"],
)
def test_a_disk_that_is_full_again_and_again(whole_run, call, state, first_kib, step_kib, tmp_path):
    """Each call says so in one sentence and loses nothing; with a little more room the same command
    gets further, to the end.
    """
    if not _can_mount(tmp_path):
        pytest.skip("only root may mount a small disk")
    expected, project = whole_run.reference(call, state), whole_run.project
    source = whole_run.folder / "states" / state
    with mounted(project, "-t", "tmpfs", "-o", "size=100m", "tmpfs"):
        shutil.copytree(source, project, symlinks=True, dirs_exist_ok=True)
        disk = os.statvfs(project)
        room = (disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024 + first_kib
        refused = 0
        while True:
            subprocess.run(["mount", "-o", f"remount,size={room}k", project], check=True)
            done = whole_run.call(call)
            if done.returncode == 0:
                break
            refused += 1
            assert done.returncode == 2, done.stderr
            assert "No space left on device" in done.stderr
            assert "Traceback" not in done.stderr
            assert refused < 40
            room += step_kib
        assert refused >= 1
        found = result(project)
    for name in expected.keys() | found.keys():
        if "/finetune/parts/" not in name:  # they say from which epoch a network went on
            assert found[name] == expected[name], name


def test_a_finished_run_that_nobody_may_write_to(whole_run, tmp_path):
    """predict, export and status work from it; report says where it can write, and what it says to
    type works.
    """
    if not _can_mount(tmp_path):
        pytest.skip("only root may mount read-only")
    whole_run.reference(PREDICT_CALL)  # makes its images
    whole_run.restore("finished", 1)
    project = whole_run.project
    run = project / RUN
    with mounted(run, "--bind", run):
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
        for call in (PREDICT_CALL, EXPORT_CALL, ("status", RUN)):
            done = whole_run.call(call)
            assert done.returncode == 0, done.stderr
        done = whole_run.call(("report", RUN))
        assert done.returncode == 2
        assert f"Type: headrace report {RUN} --out report.html" in done.stderr
        done = whole_run.call(("report", RUN, "--out", "report.html"))
        assert done.returncode == 0, done.stderr
        assert (project / "report.html").stat().st_size > 10_000
        done = whole_run.call(("advise", RUN))
        assert done.returncode == 2
        assert "cannot be written to. Type: cp -r" in done.stderr
        for call in (RUN_CALL, EXTRACT_CALL, ("report", RUN, RUN)):
            done = whole_run.call(call)
            assert done.returncode == 2
            assert "cannot be written to" in done.stderr


NO_LINKS = """\
import errno
import os


def refuse(*_args, **_options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


os.link = os.symlink = refuse
"""
FEW_DESCRIPTORS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"


def test_a_file_system_without_links_and_sixty_four_descriptors(whole_run):
    """Neither hard nor symbolic links, in the workers too, and a quarter of the descriptors that
    macOS gave for years: the same results.
    """
    expected = whole_run.reference(RUN_CALL)
    whole_run.restore("empty", 1)
    done = whole_run.call(RUN_CALL, first=NO_LINKS + FEW_DESCRIPTORS)
    assert done.returncode == 0, done.stderr
    assert result(whole_run.project) == expected
