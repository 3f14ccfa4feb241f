"""`headrace doctor`: each check passes here, and says what to do when what it looks at fails."""

import errno
import importlib.metadata
import sys
import time

import pytest

from headrace.pipelines.cli import doctor as command
from headrace.pipelines.cli.main import main
from headrace.pipelines.doctor import disk, machine, network, software


def fails(error):
    """A function that raises it, whatever it is given."""

    def raises(*_args, **_options):
        raise error

    return raises


def older(name):
    return "1.0" if name == "timm" else importlib.metadata.version(name)


def absent(name):
    if name == "xxhash":
        raise importlib.metadata.PackageNotFoundError(name)
    return importlib.metadata.version(name)


NMS = RuntimeError("operator torchvision::nms does not exist")
FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")

CASES = {
    "an old Python": (lambda _: software.check_python((3, 9, 1)), "fail", "3.9.1", "3.11"),
    "a 32-bit Python": (lambda _: software.check_python((3, 12, 0), 32), "fail", "32 bit", "64-bit"),
    "an old library": (lambda _: software.check_libraries(older), "fail", "timm 1.0, expected >=1.0.12", "pip install"),
    "an absent library": (lambda _: software.check_libraries(absent), "fail", "xxhash (absent)", "pip install"),
    "a torchvision of another torch": (
        lambda _: software.check_torch(fails(NMS)), "fail", "nms", "pip install --force-reinstall torch torchvision",
    ),
    "a broken torch": (lambda _: software.check_torch(fails(ImportError("libc10.so"))), "fail", "libc10.so", "torch"),
    "a GPU that torch does not see": (lambda _: software.check_cuda(lambda: (2, False, "2.15.0+cpu")), "fail", "2 there", "+cpu"),
    "a torch that cannot be asked": (lambda _: software.check_cuda(fails(NMS)), "note", "RuntimeError", "torch"),
    "a container with a quota": (lambda _: machine.check_threads(16, 3.5, {}), "note", "3.5", "--workers 3"),
    "more OpenMP threads than cores": (
        lambda _: machine.check_threads(2, 8.0, {"OMP_NUM_THREADS": "64"}), "note", "64", "unset OMP_NUM_THREADS",
    ),
    "no compiler": (lambda _: machine.check_heads(lambda: None), "note", "NumPy", "C compiler"),
    "no memory": (lambda _: machine.check_memory(1e9, 2), "fail", "1.0 GB", "1.5 GB"),
    "memory for some workers": (lambda _: machine.check_memory(8e9, 16), "note", "8.0 GB", "--workers 5"),
    "a folder that cannot be written": (lambda at: disk.check_disk(at, fails(DENIED)), "fail", "Permission denied", "--folder"),
    "a full disk": (lambda at: disk.check_disk(at, lambda _: (1e9, 1e9), lambda _: 1e6), "fail", "0 GB", "make room"),
    "a slow disk": (lambda at: disk.check_disk(at, lambda _: (5e6, 1e9), lambda _: 1e12), "note", "5 MB/s", "local disk"),
    "no hard links": (lambda at: disk.check_locking(at, fails(OSError(errno.EPERM, "no"))), "note", "no hard links", "nothing"),
    "a clock that is off": (lambda at: disk.check_locking(at, read_clock=lambda: time.time() - 60), "note", "+60 s", "NTP"),
    "a folder that is gone": (lambda at: disk.check_locking(at / "gone"), "fail", "ENOENT", "file system"),
    "no loopback": (lambda _: network.check_ports(fails(DENIED)), "fail", "Permission denied", "loopback"),
    "a file system without locks": (
        lambda at: disk.check_hdf5(at, fails(BlockingIOError(errno.EAGAIN, "unable to lock file"))),
        "fail", "unable to lock file", "unset HDF5_USE_FILE_LOCKING",
    ),
    "other plugins": (lambda at: disk.check_hdf5(at, environment={"HDF5_PLUGIN_PATH": "x"}), "note", "plugins", "unset"),
    "a server out of reach": (
        lambda _: network.check_weights(fails(DENIED), lambda: ["https://weights.example/a"]), "note", "weights.example", "pypi:",
    ),
    "a recipe with a mistake": (lambda at: command.check_recipe(at / "recipe.yaml"), "fail", "no such recipe", "--dry-run"),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_a_failure_says_what_to_do(tmp_path, what):
    """What was found, and the next thing to do."""
    check, state, said, advice = CASES[what]
    found = check(tmp_path)
    assert (found.state, said in found.observation, advice in found.advice) == (
        state,
        True,
        True,
    ), found


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    """The check ends, and says so."""
    monkeypatch.setattr(network, "_ASK_S", 0.05)
    found = network.check_weights(lambda _: time.sleep(30), lambda: ["https://weights.example/a"])
    assert (found.state, "no answer" in found.observation) == ("note", True)


def test_two_holders_of_one_lock_are_found(tmp_path, monkeypatch):
    """A file system that lets two writers hold one lock fails."""
    from contextlib import nullcontext

    monkeypatch.setattr("headrace.cache.atomic_io.lease", lambda path: nullcontext())
    found = disk.check_locking(tmp_path)
    assert (found.state, found.observation) == ("fail", "two threads held one lock")


def run_doctor(monkeypatch, capsys, *arguments):
    """(exit code, what was printed) of the command."""
    monkeypatch.setattr(sys, "argv", ["headrace", "doctor", *map(str, arguments)])
    monkeypatch.setattr(network, "_ask", fails(OSError("no network in tests")))
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out


def test_this_machine_passes(tmp_path, monkeypatch, capsys):
    """Every line is there; notes do not fail, and nothing is left behind."""
    monkeypatch.setattr(machine, "_available_bytes", lambda: 64e9)
    monkeypatch.setattr(software, "_gpus", lambda: (0, False, ""))
    code, out = run_doctor(monkeypatch, capsys, "--folder", tmp_path)
    assert code in (0, None), out
    names = [
        "Python",
        "libraries",
        "torch",
        "GPU",
        "threads",
        "heads",
        "memory",
        "disk",
        "locking",
        "ports",
        "HDF5",
        "weights",
    ]
    assert [
        line.split()[1] for line in out.splitlines() if line.startswith(("ok", "note", "FAIL"))
    ] == names
    assert list(tmp_path.iterdir()) == []


def test_a_failing_line_ends_in_exit_code_one(tmp_path, monkeypatch, capsys):
    """So that a job script can stop; the arrow says what to do."""
    monkeypatch.setattr(network, "_talk", fails(DENIED))
    code, out = run_doctor(monkeypatch, capsys, tmp_path / "absent.yaml", "--folder", tmp_path)
    assert code == 1
    assert "FAIL  ports" in out
    assert "→ Dask needs to listen" in out
    assert "FAIL  recipe" in out
    assert "2 things to mend" in out


def test_the_pair_that_is_installed_is_tried_as_an_import_would():
    """The versions are the packages' own, the operator is torchvision's compiled one, and so is the
    weights' address.
    """
    import torch
    import torchvision
    from torchvision.models import ResNet18_Weights

    assert (
        software.check_torch().observation
        == f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
    assert ResNet18_Weights.DEFAULT.url.startswith(network.WEIGHTS_SERVER)


def test_a_torchvision_for_another_torch_is_found_by_what_it_says(monkeypatch):
    """Before anything of it is loaded."""
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: ["torch==1.0.0"])
    found = software.check_torch()
    assert (found.state, "built for torch==1.0.0" in found.observation) == ("fail", True)
    assert "together" in found.advice
