"""What a run promises when workers, drivers and heads go wrong, on real Dask processes."""

import contextlib
import os
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
from PIL import Image
from rich.console import Console
from support import forks
from support.caches import make_spec
from support.faults import FITS, fits, misbehaving, number_of, slow, train
from support.runs import make_photos

from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import feature_set_path
from headrace.extract.run.plan import ExtractJob
from headrace.extract.spec import BackboneSpec, Sample
from headrace.heads.bank import BankJob
from headrace.heads.data.task import REFIT
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.results import read_bank
from headrace.pipelines.cluster import clients as cluster
from headrace.pipelines.cluster.submit import TaskOptions
from headrace.pipelines.recipe.load import load_recipe
from headrace.pipelines.run import run_recipe
from headrace.pipelines.stages.extract import _record_failed_images
from headrace.pipelines.stages.train import split_bank

pytestmark = pytest.mark.slow
HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers and drivers find the misbehaving heads."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def workers_of(process):
    """The worker processes below a process: children of the server that they are forked from, which
    support/forks.py forks from itself.
    """
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            if re.search(r"multiprocessing\.forkserver|forks\.py", " ".join(child.cmdline())):
                found += child.children()
    return found


def failures(result):
    """{estimator: reason} of the heads that failed."""
    failed = result.heads[result.heads["error"].notna() & (result.heads["fold"] != REFIT)]
    return {
        row["spec"].split("support.faults.")[1].split('"')[0]: row["error"]
        for _, row in failed.iterrows()
    }


def test_workers_killed_once_a_second_lose_nothing(tmp_path):
    """SIGKILL of a random worker every second during 90 banks: all results, and no more executions
    than banks and kills.
    """
    kills, over = 0, threading.Event()

    def kill():
        nonlocal kills
        rng = random.Random(0)
        while kills < 8 and not over.wait(1.0):
            if fits(tmp_path) and (
                victims := workers_of(psutil.Process())
            ):  # once the cluster is up
                rng.choice(victims).kill()
                kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = train(tmp_path, slow(tmp_path, 90, seconds=0.06), workers=4)
    finally:
        over.set()
        killer.join()
    assert kills > 3
    assert result.failed_heads == 0
    assert {number_of(spec) for spec in result.board["spec"]} == set(range(90))
    assert (
        len(fits(tmp_path)) <= FITS * (90 + kills) + 1
    )  # the winner is fitted once more, to be shown the test split


def test_heads_that_misbehave_fail_alone(tmp_path, monkeypatch):
    """A segfault, an endless loop and a hunger for memory are failed rows with their reasons; a
    freeze is tried again.
    """
    monkeypatch.setattr(cluster, "MEMORY_LIMIT", 4 << 30)  # 2 GiB for each of two workers
    heads = [
        misbehaving("Segfault"),
        misbehaving("Hog"),
        misbehaving("Endless"),
        misbehaving("Frozen", mark=str(tmp_path / "frozen")),
        *slow(tmp_path, 10),
    ]
    result = train(tmp_path, heads, options=TaskOptions(task_timeout_s=6))
    failed = failures(result)
    assert set(failed) == {"Segfault", "Hog", "Endless"}
    assert "its worker died" in failed["Segfault"]
    assert "MemoryError" in failed["Hog"] or "worker died" in failed["Hog"]
    assert "more than 6 s" in failed["Endless"]
    assert (tmp_path / "frozen").exists()
    good = result.board[result.board["failed"] == 0]["spec"]
    assert sum(number_of(spec) is not None for spec in good) == 10
    assert Counter(fits(tmp_path)).most_common(1)[0][1] <= FITS + 1


def test_a_bank_is_divided_into_parts_of_its_group(tmp_path):
    """The halves of a bank have all its specs once, under names of their own that the run finds;
    one spec has no halves.
    """
    specs = tuple(LogisticSpec(C=float(c)) for c in range(1, 6))
    bank = BankJob("task", ("features",), specs, str(tmp_path / "group-key.h5"))
    parts = [part for _, part in split_bank(bank)]
    assert [spec for part in parts for spec in part.specs] == list(specs)
    names = {key for key, _ in split_bank(bank)} | {"bank-group-key"}
    assert len(names) == 3
    assert all(Path(part.result).match("group-*.h5") for part in parts)
    assert split_bank(parts[0])
    assert split_bank(split_bank(parts[0])[0][1]) == []


IMAGES = """\
images:
  folder: photos
task:
  folds: 2
backbones:
  - name: python:support.deadly_networks:on_white
    taps: [pool.avg]
heads:
  ridge:
    alpha: [1]
compute:
  workers: 2
  images_per_shard: 4
"""


def test_an_image_that_kills_its_workers_is_a_failed_image(tmp_path):
    """Its unit is divided until it is alone; it is listed with its reason, all others have
    features, and it is not tried again.
    """
    make_photos(tmp_path / "photos", n=12)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "photos" / "fine" / "white.png")
    (tmp_path / "recipe.yaml").write_text(IMAGES)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    result = run_recipe(recipe, console=Console(quiet=True))
    features = result.features(result.names[0])
    assert len(features) == 12
    (failure,) = features.failures()
    assert failure.id == "fine/white.png"
    assert failure.reason.startswith("its worker died, whenever it was tried")
    (row,) = pd.read_csv(result.paths.failed_images).to_dict("records")
    assert (row["id"], row["reason"]) == (failure.id, failure.reason)
    assert (
        run_recipe(recipe, console=Console(quiet=True)).failed_images == 1
    )  # the whole of it: no unit is missing
    log = "".join(path.read_text() for path in result.paths.logs.glob("*.jsonl"))
    assert log.count('"quarantined"') == 1


def test_a_network_that_kills_its_workers_fails_no_image(tmp_path):
    """Where most images end their workers, none is recorded as failed: the call names them and can
    be repeated.
    """
    spec = make_spec(shape=(3,))
    networks = ((BackboneSpec("python:support.deadly_networks:on_white"), (spec,)),)
    samples = [Sample(f"{i}", f"{i}.png", f"{i:032x}") for i in range(3)]
    jobs = [ExtractJob(str(tmp_path), f"u{sample.id}", networks, (sample,)) for sample in samples]
    fatal = [(job, "its worker died") for job in jobs]
    assert [
        message.partition(".png: its worker died")[0] for message in _record_failed_images(fatal, 2)
    ] == [
        "0",
        "1",
        "2",
    ]
    assert list(tmp_path.iterdir()) == []
    assert _record_failed_images(fatal, 3) == []
    failures = open_feature_set(feature_set_path(tmp_path, spec)).failures()
    assert sorted((failure.id, failure.reason) for failure in failures) == [
        (f"{i}", "its worker died") for i in range(3)
    ]


def drive(folder, banks=40, workers=2, seconds=0.03):
    """A driver in a process of its own, which works in the folder."""
    with (folder / "stderr.txt").open("a") as stderr, open(os.devnull, "w") as stdout:
        return forks.start(
            (folder, banks, workers, seconds),
            cwd=folder,
            stdout=stdout,
            stderr=stderr,
            script=HERE / "support" / "faults.py",
        )


def left_over(folder):
    """Processes that belong to a driver, by the folder that they inherited from it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def published(folder):
    """{path: (inode, time)} of results files, and the numbers of the heads in them."""
    files = {path: path.stat() for path in (folder / "run" / "banks").glob("*.h5")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in files.items()}


def test_a_driver_killed_at_any_moment_leaves_no_orphan_and_repeats_nothing(tmp_path):
    """SIGKILL of the driver at four random moments: a bank whose results are published is never
    trained again.
    """
    rng = random.Random(0)
    banks, kills = 120, 4
    done = {}
    # how many fits had begun, and which heads were published, at each kill
    began: list[tuple[int, set[int]]] = []
    while len(began) < kills:
        driver = drive(tmp_path, banks, seconds=0.1)
        deadline, delay = time.monotonic() + 60, rng.uniform(0.0, 1.0)
        before = len(fits(tmp_path))
        if len(began) % 2:  # in mid-work; the other moments are anywhere from its first import on
            while (
                len(fits(tmp_path)) == before
                and driver.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
        else:
            delay *= 5
        time.sleep(delay)
        driver.kill()
        driver.wait()
        now = published(tmp_path)
        assert done.items() <= now.items()
        done = now
        heads = {number_of(spec) for path in now for spec in read_bank(path).table["spec"]}
        began.append((len(fits(tmp_path)), heads))
        assert len(heads) < banks  # or the moments that follow would not be moments of a run
    deadline = time.monotonic() + 30
    while left_over(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(tmp_path) == []
    assert drive(tmp_path, banks, seconds=0.1).wait(300) == 0, (tmp_path / "stderr.txt").read_text()
    order = fits(tmp_path)[:-1]  # the last is the winner's, for the test split
    for position, heads in began:
        # Fits that were under way when the driver died may have been written a moment later.
        assert not set(order[position + 4 :]) & heads
    assert {
        number_of(spec) for path in published(tmp_path) for spec in read_bank(path).table["spec"]
    } == set(range(banks))


def test_a_stopped_worker_dies_with_its_driver(tmp_path):
    """A worker that cannot notice its driver's death, because it is stopped, is ended by the
    kernel.
    """
    driver = drive(tmp_path, banks=200, workers=2)
    deadline = time.monotonic() + 60
    while not fits(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in workers_of(psutil.Process(driver.pid)):
        worker.suspend()
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 30
    while left_over(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_over(tmp_path) == []


def test_two_drivers_share_a_run(tmp_path):
    """Started together on one directory, they do every bank once; only what both began at one
    moment may be done twice.
    """
    drivers = [drive(tmp_path, banks=60) for _ in range(2)]
    for driver in drivers:
        assert driver.wait(300) == 0, (tmp_path / "stderr.txt").read_text()
    counts = Counter(fits(tmp_path))
    assert set(counts) == set(range(60))
    assert (
        sum(counts.values()) <= FITS * (60 + 2) + 2
    )  # a window of two workers, and each driver's look at the winner
    assert list((tmp_path / "run" / "leases").iterdir()) == []
