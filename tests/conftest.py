"""What every test is given without asking."""

import itertools
import os
import sys

import pytest
from support import forks

from headrace.pipelines.cluster.fork_server import start_server

# The files that take longest, in this order first: then two processes end together.
LONGEST = (
    "demo",
    "kills",
    "slurm",
    "cluster_faults",
    "tutorial",
    "notebooks",
    "gallery",
    "docs",
    "readme",
    "run",
)

STATE_NUMBERS = itertools.count()

os.environ.pop(
    "COLUMNS", None
)  # pytest-xdist sets it: tables would be as narrow as its own terminal


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def own_state_directory(tmp_path_factory, monkeypatch):
    """A test begins with no memory of this machine (verified shards) and no command's settings."""
    # by number: `mktemp` lists what thousands of tests have left, 2 ms each
    state = tmp_path_factory.getbasetemp() / f"state-{next(STATE_NUMBERS)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(state))
    # A command that was called in this process has set it for the processes that it would start.
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


@pytest.fixture(scope="session", autouse=True)
def no_umap():
    """UMAP compiles for 8 s in every process that draws a map; report/test_map.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "umap", None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_server_for_all_workers():
    """The process that workers are forked from has imported everything, not only what its first
    cluster needs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "headrace.pipelines.cluster.clients.start_server",
            lambda _: start_server(forks.modules()),
        )
        yield


@pytest.fixture
def one_thread():
    """Torch on one thread, as a worker has it: sums are then the same from call to call."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """A folder with a finished run (runs/single) whose data are out to break a page; nobody changes
    the run.
    """
    from support.reports import finished_run, make_data

    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "state"))
        make_data(folder)
        finished_run(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A small project in which every stage occurs, its states, and its results by call when nothing
    went wrong.
    """
    from support.kills import Bench

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "state"))
        return Bench(folder, forked=True)
