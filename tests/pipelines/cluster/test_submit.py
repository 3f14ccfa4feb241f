"""Tasks on real Dask workers: every outcome comes back once, whatever happens to the workers."""

from concurrent.futures import CancelledError

import pytest

from headrace.extract.images import decoding as images
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.dask_client import ClusterError
from headrace.pipelines.cluster.submit import MAX_ATTEMPTS, TaskOptions, run_tasks
from headrace.pipelines.cluster.worker import versions

# `eval` is a module-level function that every worker can import, and its job can be anything.
LOG = "open({path!r}, 'a').write('{name}\\n') and "


@pytest.mark.slow
def test_results_errors_and_deaths_all_come_back(tmp_path):
    """A task that raises is not tried again; one that kills its worker is, a few times; the others
    are done exactly once. Where it was raised is told to the log.
    """
    path = str(tmp_path / "log")
    jobs = {f"good{i}": LOG.format(path=path, name=f"good{i}") + f"{i} * {i}" for i in range(20)}
    jobs["raises"] = LOG.format(path=path, name="raises") + "1 / 0"
    jobs["kills"] = LOG.format(path=path, name="kills") + "__import__('os')._exit(1)"
    told = []
    options = TaskOptions(on_event=lambda event, **details: told.append((event, details)))
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
def test_the_crashing_part_of_a_job_is_found(tmp_path):
    """A job that kills its workers is divided until the crashing part is alone; every other part has
    its result.
    """
    kills = "__import__('os')._exit(1)"

    def halves(job):
        parts = job.split(", ")
        middle = len(parts) // 2
        return [
            (part, part)
            for part in (", ".join(parts[:middle]), ", ".join(parts[middle:]))
            if part and middle
        ]

    jobs = [f"1, 2, 3, {kills}, 5, 6, 7, 8", "9, 10"]
    with local_client(2) as client:
        outcomes = list(run_tasks(client, eval, [(job, job) for job in jobs], split=halves))
    assert {outcome.job: outcome.result for outcome in outcomes if not outcome.error} == {
        "1, 2": (1, 2),
        "3": 3,
        "5, 6, 7, 8": (5, 6, 7, 8),
        "9, 10": (9, 10),
    }
    assert [(outcome.job, outcome.fatal) for outcome in outcomes if outcome.error] == [
        (kills, True)
    ]


@pytest.mark.slow
def test_what_never_ends_is_ended(tmp_path):
    """Neither an endless loop nor a frozen worker stops a run: both are tried again elsewhere, and
    the frozen one ends well.
    """
    freeze = f"__import__('os').path.exists({str(tmp_path / 'once')!r}) or ("
    freeze += (
        f"open({str(tmp_path / 'once')!r}, 'x'), __import__('os').kill(__import__('os').getpid(), "
        "19))"
    )
    loop = "all(True for _ in __import__('itertools').count())"
    with local_client(2) as client:
        started = list(client.nthreads())
        outcomes = list(
            run_tasks(
                client,
                eval,
                [(job, job) for job in (loop, freeze, "7")],
                options=TaskOptions(task_timeout_s=1.5),
            )
        )
        assert not set(started) & set(
            client.nthreads()
        )  # none of the workers that hung is there any more
    results = {outcome.job: outcome for outcome in outcomes}
    assert results["7"].result == 7
    assert results[freeze].result is True
    assert results[loop].fatal
    assert "more than 1.5 s" in results[loop].error


@pytest.mark.slow
def test_two_runs_start_on_one_machine():
    """No port is fixed, and all are on loopback."""
    with local_client(1) as one, local_client(1) as other:
        assert one.submit(sum, [1, 2]).result() == other.submit(sum, [1, 2]).result() == 3
        for client in (one, other):
            info = client.scheduler_info()
            assert "127.0.0.1" in info["address"]
            assert all("127.0.0.1" in address for address in info["workers"])


@pytest.mark.slow
def test_workers_of_another_decoder_are_refused(monkeypatch):
    """The run ends with both versions, before a task is given to them."""
    there = images.DECODER
    with local_client(1) as client:
        monkeypatch.setattr(images, "DECODER", "pillow 0")  # of this process; workers are others
        with pytest.raises(
            ClusterError, match=rf"has decoder {there} \(here: pillow 0\)\. Install the same"
        ):
            list(run_tasks(client, eval, [("a", "1 + 1")]))


class StubFuture:
    """What a stub's task becomes."""

    def __init__(self):
        self.status, self.value, self.told = "pending", None, []

    def add_done_callback(self, function):
        self.told.append(function) if self.status == "pending" else function(self)

    def end(self, status, value=None):
        self.status, self.value = status, value
        for function in self.told:
            function(self)

    def result(self, timeout=None):
        return self.value

    def exception(self, timeout=None):
        raise CancelledError

    def traceback(self, timeout=None):
        return None

    def release(self):
        pass


class StubClient:
    """A cluster of hosts on which time passes whenever somebody looks: a good worker ends a task in
    `task_ticks`; one on a host called bad dies in one, and is soon back at another port. Workers
    called old have other versions.
    """

    cluster = None

    def __init__(self, workers, task_ticks=5):
        self.workers, self.task_ticks = dict.fromkeys(workers, 1), task_ticks
        self.tick, self.port, self.deaths, self.running, self.back, self.ran = (
            0,
            100,
            0,
            [],
            [],
            set(),
        )

    def nthreads(self):
        self.tick += 1
        for entry in [entry for entry in self.running if entry[0] <= self.tick]:
            self.running.remove(entry)
            _, worker, job, future = entry
            if worker.startswith("tls://bad"):
                del self.workers[worker]
                self.deaths += 1
                self.back.append(self.tick + self.task_ticks)
                future.end("lost")
            else:
                self.ran.add(worker)
                future.end("finished", job)
        while self.back and self.back[0] <= self.tick:
            self.port += 1
            self.workers[f"tls://bad:{self.port}"] = 1
            self.back.pop(0)
        return dict(self.workers)

    def submit(self, function, *jobs, key, workers, **_):
        future = StubFuture()
        if function is versions:
            future.end(
                "finished",
                versions() | ({"torch": "1.0"} if workers[0].startswith("tls://old") else {}),
            )
        else:
            self.running.append(
                (
                    self.tick + (1 if "bad" in workers[0] else self.task_ticks),
                    *workers,
                    *jobs,
                    future,
                )
            )
        return future

    def cancel(self, futures, force):
        pass


def halves(job):
    """Of a tuple of images."""
    middle = len(job) // 2
    return [(str(part), part) for part in (job[:middle], job[middle:]) if middle]


def test_tasks_are_not_blamed_for_a_broken_host(monkeypatch):
    """Its workers die at once and come straight back: every task ends well elsewhere, whole, and
    the host is left alone.
    """
    monkeypatch.setattr("headrace.pipelines.cluster.submit._LOOK_S", 0.001)
    client = StubClient(
        [f"tls://good{number}:1" for number in range(4)]
        + [f"tls://bad:{port}" for port in range(4)]
    )
    jobs = [tuple(range(8 * unit, 8 * unit + 8)) for unit in range(40)]
    told = []
    options = TaskOptions(on_event=lambda event, **details: told.append(event))
    outcomes = list(
        run_tasks(client, None, [(str(job), job) for job in jobs], options=options, split=halves)
    )
    assert sorted(outcome.result for outcome in outcomes) == jobs
    assert not any(outcome.error for outcome in outcomes)
    assert "divided" not in told
    assert client.deaths <= 8
    assert told.count("paused") == 1


def test_a_cluster_of_one_broken_host_ends(monkeypatch):
    """There is nothing to compare it with: its tasks are quarantined, as they would be if they
    were.
    """
    monkeypatch.setattr("headrace.pipelines.cluster.submit._LOOK_S", 0.001)
    client = StubClient(["tls://bad:1"])
    outcomes = list(run_tasks(client, None, [("a", (1, 2))], split=halves))
    assert [outcome.fatal for outcome in outcomes] == [True, True]


def test_a_worker_of_other_versions_is_given_no_task(monkeypatch):
    """The others do its share; what it has is told, beside what is here."""
    monkeypatch.setattr("headrace.pipelines.cluster.submit._LOOK_S", 0.001)
    client = StubClient(["tls://good:1", "tls://old:1"])
    told = []
    options = TaskOptions(on_event=lambda event, **details: told.append((event, details)))
    outcomes = list(run_tasks(client, None, [(str(job), job) for job in range(6)], options=options))
    assert [outcome.result for outcome in outcomes] == list(range(6))
    assert client.ran == {"tls://good:1"}
    (refused,) = [details for event, details in told if event == "refused"]
    assert refused == {"worker": "tls://old:1", "error": f"torch 1.0 (here: {versions()['torch']})"}
