"""A real SLURM on this machine runs extraction and heads, and jobs that end are replaced."""

import time

import pytest
from rich.console import Console
from support.runs import HEADS, RECIPE, make_photos
from support.slurm import jobs, slurm, why_not

from headrace.pipelines.cluster.submit import TaskOptions, run_tasks
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.recipe.sections import ClusterSection, SlurmSection
from headrace.pipelines.run import run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SECTION = """\
cluster:
  where: slurm
  slurm:
    partition: heads
    workers_per_job: 2
    memory_per_job: 4 GB
    interface: lo
"""


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    """SLURM, up."""
    with slurm(tmp_path_factory.mktemp("slurm")):
        yield


def test_images_become_a_leaderboard_on_slurm(controller, tmp_path):
    """Extraction and heads run as jobs of two workers each, over TLS, and no job is left when the
    run ends.
    """
    make_photos(tmp_path / "photos", n=40)
    (tmp_path / "recipe.yaml").write_text(RECIPE + SECTION)
    result = run_recipe(load_recipe(tmp_path / "recipe.yaml"), console=Console(quiet=True))
    assert (result.heads["fold"] >= 0).sum() == HEADS
    assert result.failed_heads == 0
    (log,) = result.paths.logs.glob("*.jsonl")
    assert "tls://" in log.read_text()
    assert "tcp://" not in log.read_text()
    assert len(jobs()) >= 1
    until = time.monotonic() + 30
    while jobs("pending,running") and time.monotonic() < until:
        time.sleep(0.5)
    assert jobs("pending,running") == {}


def test_a_job_that_ends_in_mid_run_is_replaced(controller, tmp_path):
    """Wall time of 15 s, work for longer: every task has its result, from more than one job."""
    from headrace.pipelines.cluster.slurm import slurm_client

    section = ClusterSection(
        where="slurm",
        slurm=SlurmSection(
            walltime="00:00:15", workers_per_job=2, memory_per_job="2 GB", interface="lo"
        ),
    )
    before = set(jobs())
    tasks = [(f"task{i}", f"__import__('time').sleep(1) or {i}") for i in range(40)]
    deaths = []

    def tell(event, **details):
        if event == "died":
            deaths.append(details)

    with slurm_client(section, 2, run_folder=tmp_path) as client:
        outcomes = list(run_tasks(client, eval, tasks, options=TaskOptions(on_event=tell)))
    assert sorted(outcome.result for outcome in outcomes) == list(range(40))
    assert len(set(jobs()) - before) >= 2
    assert deaths
