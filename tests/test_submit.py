"""Tasks on real Dask workers: every outcome comes back once, whatever happens to the workers."""

import pytest

from headrace.pipelines.cluster import local_client
from headrace.pipelines.submit import MAX_ATTEMPTS, TaskOptions, run_tasks

# `eval` is a module-level function that every worker can import, and its job can be anything.
LOG = "open({path!r}, 'a').write('{name}\\n') and "


@pytest.mark.slow
def test_results_errors_and_deaths_all_come_back(tmp_path):
    """A task that raises is not tried again; one that kills its worker is, a few times; the others are done exactly once.
    Where it was raised is told to the log."""
    path = str(tmp_path / "log")
    jobs = {f"good{i}": LOG.format(path=path, name=f"good{i}") + f"{i} * {i}" for i in range(20)}
    jobs["raises"] = LOG.format(path=path, name="raises") + "1 / 0"
    jobs["kills"] = LOG.format(path=path, name="kills") + "__import__('os')._exit(1)"
    told = []
    options = TaskOptions(tell=lambda event, **details: told.append((event, details)))
    with local_client(2) as client:
        outcomes = list(run_tasks(client, eval, sorted(jobs.items()), options=options))
    (failed,) = [details for event, details in told if event == "failed"]
    assert 'File "<string>", line 1' in failed["traceback"]
    assert sorted(outcome.job for outcome in outcomes) == sorted(jobs.values())
    results = {outcome.job: outcome for outcome in outcomes}
    assert [results[jobs[f"good{i}"]].result for i in range(20)] == [i * i for i in range(20)]
    assert "ZeroDivisionError" in results[jobs["raises"]].error
    assert "its worker died" in results[jobs["kills"]].error
    assert [outcome.fatal for outcome in outcomes].count(True) == 1
    executed = (tmp_path / "log").read_text().split()
    assert executed.count("raises") == 1
    assert executed.count("kills") == MAX_ATTEMPTS
    assert all(executed.count(f"good{i}") == 1 for i in range(20))


@pytest.mark.slow
def test_the_guilty_part_of_a_job_is_found(tmp_path):
    """A job that kills its workers is divided until what is guilty is alone; every other part has its result."""
    kills = "__import__('os')._exit(1)"

    def halves(job):
        parts = job.split(", ")
        middle = len(parts) // 2
        return [(part, part) for part in (", ".join(parts[:middle]), ", ".join(parts[middle:])) if part and middle]

    jobs = [f"1, 2, 3, {kills}, 5, 6, 7, 8", "9, 10"]
    with local_client(2) as client:
        outcomes = list(run_tasks(client, eval, [(job, job) for job in jobs], split=halves))
    assert {outcome.job: outcome.result for outcome in outcomes if not outcome.error} == {
        "1, 2": (1, 2),
        "3": 3,
        "5, 6, 7, 8": (5, 6, 7, 8),
        "9, 10": (9, 10),
    }
    assert [(outcome.job, outcome.fatal) for outcome in outcomes if outcome.error] == [(kills, True)]


@pytest.mark.slow
def test_what_never_ends_is_ended(tmp_path):
    """Neither an endless loop nor a frozen worker stops a run: both are tried again elsewhere, and the frozen one ends well."""
    freeze = f"__import__('os').path.exists({str(tmp_path / 'once')!r}) or ("
    freeze += f"open({str(tmp_path / 'once')!r}, 'x'), __import__('os').kill(__import__('os').getpid(), 19))"
    loop = "all(True for _ in __import__('itertools').count())"
    with local_client(2) as client:
        started = list(client.nthreads())
        outcomes = list(
            run_tasks(client, eval, [(job, job) for job in (loop, freeze, "7")], options=TaskOptions(deadline_s=5))
        )
        assert not set(started) & set(client.nthreads())  # none of the workers that hung is there any more
    results = {outcome.job: outcome for outcome in outcomes}
    assert results["7"].result == 7
    assert results[freeze].result is True
    assert results[loop].fatal
    assert "more than 5 s" in results[loop].error


@pytest.mark.slow
def test_two_runs_start_on_one_machine():
    """No port is fixed, and all are on loopback."""
    with local_client(1) as one, local_client(1) as other:
        assert one.submit(sum, [1, 2]).result() == other.submit(sum, [1, 2]).result() == 3
        for client in (one, other):
            info = client.scheduler_info()
            assert "127.0.0.1" in info["address"]
            assert all("127.0.0.1" in address for address in info["workers"])
