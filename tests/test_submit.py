"""Tasks on real Dask workers: every outcome comes back once, whatever happens to the workers."""

import pytest

from headrace.pipelines.cluster import local_client
from headrace.pipelines.submit import MAX_ATTEMPTS, run_tasks

# `eval` is a module-level function that every worker can import, and its job can be anything.
LOG = "open({path!r}, 'a').write('{name}\\n') and "


@pytest.mark.slow
def test_results_errors_and_deaths_all_come_back(tmp_path):
    """A task that raises is not tried again; one that kills its worker is, a few times; the others are done exactly once."""
    path = str(tmp_path / "log")
    jobs = {f"good{i}": LOG.format(path=path, name=f"good{i}") + f"{i} * {i}" for i in range(20)}
    jobs["raises"] = LOG.format(path=path, name="raises") + "1 / 0"
    jobs["kills"] = LOG.format(path=path, name="kills") + "__import__('os')._exit(1)"
    with local_client(2) as client:
        outcomes = list(run_tasks(client, eval, sorted(jobs.items())))
    assert sorted(outcome.job for outcome in outcomes) == sorted(jobs.values())
    results = {outcome.job: outcome for outcome in outcomes}
    assert [results[jobs[f"good{i}"]].result for i in range(20)] == [i * i for i in range(20)]
    assert "ZeroDivisionError" in results[jobs["raises"]].error
    assert "KilledWorker" in results[jobs["kills"]].error
    executed = (tmp_path / "log").read_text().split()
    assert executed.count("raises") == 1
    assert executed.count("kills") == MAX_ATTEMPTS
    assert all(executed.count(f"good{i}") == 1 for i in range(20))


@pytest.mark.slow
def test_two_runs_start_on_one_machine():
    """No port is fixed, and all are on loopback."""
    with local_client(1) as one, local_client(1) as other:
        assert one.submit(sum, [1, 2]).result() == other.submit(sum, [1, 2]).result() == 3
        for client in (one, other):
            info = client.scheduler_info()
            assert "127.0.0.1" in info["address"]
            assert all("127.0.0.1" in address for address in info["workers"])
