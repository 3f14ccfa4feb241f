"""Decoding in processes: the pixels of threads, whatever becomes of the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support.accelerators import cuda_on_cpu

from headrace.cache.errors import HeadraceError
from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Augmentation
from headrace.extract.run import decode_processes as processes_module, work_unit as unit_module
from headrace.extract.run.decode_ahead import PixelBatch, decoded_batches
from headrace.extract.run.decode_processes import DecodeProcesses
from headrace.extract.run.plan import ExtractJob
from headrace.extract.run.rendering import Rendering
from headrace.extract.run.work_unit import run_work_unit
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.describe import feature_specs
from headrace.extract.taps.resolve import resolve_taps

GREY = (0.5, 0.5, 0.5)
RENDERINGS = [
    Rendering(
        Preprocessing((size, size), (size, size), "shortest", "bilinear", GREY, GREY),
        view,
        Augmentation(),
    )
    for size, view in ((32, 0), (48, 0), (32, 1))
]


@pytest.fixture
def processes() -> Iterator[DecodeProcesses]:
    pool = DecodeProcesses(2)
    yield pool
    pool.shutdown()
    assert not children()


def children() -> list[psutil.Process]:
    """The processes that decode, zombies included."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() == psutil.STATUS_ZOMBIE or "import serve" in " ".join(child.cmdline())
    ]


def samples_in(folder: Path, count: int = 37) -> list[Sample]:
    """So many images; of every ten one is none, one is gone, one has changed."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(path)
        if index % 10 == 3:
            path.write_bytes(b"no image")
        content = hash_bytes(path.read_bytes())
        if index % 10 == 5:
            path.unlink()
        if index % 10 == 7:
            path.write_bytes(b"something else")
        samples.append(Sample(path.name, str(path), content))
    return samples


def batches(pool: DecodeProcesses | ThreadPoolExecutor, samples: list[Sample]) -> list[PixelBatch]:
    return list(decoded_batches(pool, samples, RENDERINGS, batch_size=20))


def assert_equal(ours: list[PixelBatch], theirs: list[PixelBatch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.rows, one.undecodable, one.unread) == (
            other.rows,
            other.undecodable,
            other.unread,
        )
        for pixels, wanted in zip(one.pixels, other.pixels, strict=True):
            assert torch.equal(pixels, wanted)


def test_pixels_and_reasons_are_those_of_threads(
    tmp_path: Path, processes: DecodeProcesses
) -> None:
    """Of every rendering, images that cannot be decoded or read included."""
    samples = samples_in(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        wanted = batches(threads, samples)
    assert [len(batch.rows) for batch in wanted] == [14, 12]
    assert_equal(batches(processes, samples), wanted)
    assert 1 <= len(children()) <= 2


@pytest.mark.slow
def test_images_of_a_process_that_is_killed_are_decoded_again(
    tmp_path: Path, processes: DecodeProcesses
) -> None:
    """Killed while they decode, and while they wait."""
    samples = samples_in(tmp_path, 100)
    with ThreadPoolExecutor(2) as threads:
        wanted = batches(threads, samples)
    batches(processes, samples[:20])
    for child in children():
        child.kill()
    found = []
    for number, batch in enumerate(decoded_batches(processes, samples, RENDERINGS, batch_size=20)):
        found.append(batch)
        if number == 1:
            for child in children():
                child.kill()
    assert_equal(found, wanted)


DEADLY = """
import os, signal
from headrace.extract.run import decode_processes, rendering
real = rendering._render_one
def deadly(image, sample, *args):
    if sample.id in ("4.png", "21.png"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(image, sample, *args)
rendering._render_one = deadly
"""


@pytest.mark.slow
def test_an_image_that_ends_its_process_is_that_images_failure(
    tmp_path: Path, processes: DecodeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours have their pixels; the reason names the signal."""
    monkeypatch.setattr(
        processes_module,
        "_START",
        "import sys; sys.path[:] = {path}\n" + DEADLY + "decode_processes.serve({fd})\n",
    )
    samples = samples_in(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        wanted = batches(threads, samples)
    found = batches(processes, samples)
    reason = "decoding it ends the process that does (SIGSEGV)"
    failed = dict(pair for batch in found for pair in batch.undecodable)
    assert failed == dict(pair for batch in wanted for pair in batch.undecodable) | {
        4: reason,
        21: reason,
    }
    for one, other in zip(found, wanted, strict=True):
        kept = [place for place, row in enumerate(other.rows) if row not in (4, 21)]
        assert one.rows == [other.rows[place] for place in kept]
        for pixels, others in zip(one.pixels, other.pixels, strict=True):
            assert torch.equal(pixels, others[kept])


def test_processes_that_do_not_start_are_no_fault_of_the_images(
    tmp_path: Path, processes: DecodeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "_START", "raise SystemExit(3)")
    with pytest.raises(HeadraceError, match=r"does not start \(exit code 3\)"):
        batches(processes, samples_in(tmp_path))


@pytest.mark.slow
def test_what_a_library_prints_is_no_reply(
    tmp_path: Path, processes: DecodeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = DEADLY.replace("os.kill(os.getpid(), signal.SIGSEGV)", "os.write(1, b'libtiff: hm')")
    start = "import sys; sys.path[:] = {path}\n" + noisy + "decode_processes.serve({fd})\n"
    monkeypatch.setattr(processes_module, "_START", start)
    samples = samples_in(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        assert_equal(batches(processes, samples), batches(threads, samples))


@pytest.mark.slow
def test_memory_is_that_of_the_samples_in_flight(
    tmp_path: Path, processes: DecodeProcesses
) -> None:
    """However many images there are, each process has room for eight."""
    batches(processes, samples_in(tmp_path, 100))
    room = [process._memory for process in processes._processes]
    assert {len(memory) for memory in room if memory} == {8 * 3 * (32 * 32 + 48 * 48 + 32 * 32)}


DRIVER = """
import sys, json, os, time
sys.path[:] = json.loads(sys.argv[1])
from headrace.extract.run.decode_processes import DecodeProcesses
from test_decode_processes import RENDERINGS, batches, children, samples_in
from pathlib import Path
pool = DecodeProcesses(2)
samples = samples_in(Path(sys.argv[2]), 40)
batches(pool, samples)
print(json.dumps([child.pid for child in children()]), flush=True)
while True:
    batches(pool, samples)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_nothing_is_left_of_a_driver_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle of decoding: its processes end, and their memory had no name."""
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    path = [*sys.path, str(Path(__file__).parent)]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(path), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pids = json.loads(driver.stdout.readline())
    assert pids
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    wait_for(lambda: not any(_is_alive(pid) for pid in pids))
    after = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    assert after <= before


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "threads", "used"),
    [("cuda", 4, True), ("cuda", 3, False), ("cpu", 4, False)],
)
def test_processes_decode_where_threads_would_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, threads: int, used: bool
) -> None:
    """Beside an accelerator, from four cores on; the shards are the same."""
    started = []

    def counted(count: int) -> DecodeProcesses:
        started.append(DecodeProcesses(count))
        return started[-1]

    monkeypatch.setattr(unit_module, "_decode_processes", counted)
    spec = BackboneSpec("timm:test_resnet", "random:0", image_size=32)
    backbone = load_backbone(spec)
    specs = tuple(feature_specs(backbone, resolve_taps(backbone, ["layer2.avg"])))
    job = ExtractJob(
        str(tmp_path / "cache"),
        "unit",
        ((spec, specs),),
        tuple(samples_in(tmp_path, 12)),
        device=device,
        threads=threads,
        batch_size=4,
    )
    with cuda_on_cpu():
        report = run_work_unit(job)
    assert (report.rows, len(report.failed), len(report.unread)) == (9, 1, 2)
    assert bool(started) == used
    for pool in started:
        pool.shutdown()
    torch.set_num_threads(1)
