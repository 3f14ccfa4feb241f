"""What every test is given without asking."""

import multiprocessing
import os

import dask
import distributed
import forks
import pytest

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it: tables would be as narrow as its own terminal


@pytest.fixture(autouse=True)
def own_state_directory(tmp_path_factory, monkeypatch):
    """What a test remembers about this machine (verified shards) stays its own."""
    state = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("state"))}
    monkeypatch.setenv("XDG_CACHE_HOME", state["XDG_CACHE_HOME"])
    with dask.config.set({"distributed.nanny.environ": state}):  # workers that are forked have another's environment
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_workers():
    """Dask's workers are forked from one process that has imported everything, instead of spawned; see `spawned_workers`."""
    multiprocessing.set_forkserver_preload(forks.modules())
    forks.use_forkserver()


@pytest.fixture
def spawned_workers(monkeypatch):
    """Dask's workers are fresh interpreters, as they are for users."""
    for module in (distributed.nanny, distributed.process):
        monkeypatch.setattr(module, "get_mp_context", distributed.utils.get_mp_context)


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
    """A folder with a finished run (runs/single) whose data are out to break a page; nobody changes the run."""
    from report_cases import finished_run, make_data

    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "state"))
        make_data(folder)
        finished_run(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A small project in which every stage occurs, its states, and its results by call when nothing went wrong."""
    from kill_cases import Bench

    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "state"))
        return Bench(folder, forked=True)
