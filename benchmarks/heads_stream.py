"""Banks that read their features from shards on every pass against the same banks on features in
memory.

    python benchmarks/heads_stream.py --case stream|stream-linear|stream-million [--quick]

stream: the same logistic bank with room for its features and without, in turn, at 45, 245 and 495
        columns of products; once more with the shards dropped from the page cache before (cold),
        where the disk is part of the time. stream-linear: streamed CPU time at N, 2 N and 4 N rows,
        divided by N and by the iterations that the solver took. stream-million: 1,000,000 × 1,280
        float16, 100 ridge heads and 100 logistic heads (20 strengths × 5 folds, 2 classes), peak
        memory.

Features are drawn, with a decaying spectrum, an offset and classes that overlap; each side is a
process of its own that does what a worker does (`train_bank`: open, check, train, predict,
publish), one thread. CPU seconds; peak resident memory, in which the pages of mapped shards count
too.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported

import numpy as np

from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.task import Task, save_task
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.results import read_bank

SHARD_ROWS = 50_000


def make_rows(root: Path, rows: int, width: int, classes: int) -> None:
    """A feature set and a task of five folds under root."""
    random = np.random.default_rng(0)
    spectrum = np.logspace(0, -2, width, dtype=np.float32)
    block = random.standard_normal((8192, width), np.float32) * spectrum
    rotation = np.linalg.qr(random.standard_normal((width, width)))[0].astype(np.float32)
    block = block @ rotation
    means = (
        random.standard_normal((classes, width), np.float32) * spectrum * 0.4
    ) @ rotation + np.float32(0.5)
    target = random.integers(0, classes, rows)
    content = [hashlib.sha256(str(row).encode()).hexdigest()[:32] for row in range(rows)]
    (root / "cache").mkdir(parents=True)
    spec = FeatureSpec(
        "python:b",
        "0" * 64,
        "t",
        "avg",
        "{}",
        '{"index": 0}',
        "pillow",
        "float32",
        "float16",
        (width,),
    )
    directory = create_feature_set(root / "cache", spec)
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        part = slice(start, min(start + SHARD_ROWS, rows))
        own = target[part]
        # Sums of two rows of a block are as many rows as there are pairs.
        one, other = random.integers(0, len(block), (2, len(own)))
        features = (block[one] + block[other]) * np.float32(0.7) + means[own]
        publish_shard(
            directory,
            f"{number:04}",
            features=features.astype(np.float16),
            ids=[str(row) for row in range(part.start, part.stop)],
            content_hashes=content[part],
            failures=[],
        )
    fold = random.integers(0, 5, rows).astype(np.int16)
    ids = np.array([str(row) for row in range(rows)])
    names = tuple(f"c{number}" for number in range(classes))
    save_task(
        Task("single", names, ids, np.array(content, "S32"), target, fold, np.ones(rows)),
        root / "task.npz",
    )
    (root / "set.txt").write_text(str(directory))


def worker(root: Path, memory: int, strengths: int, kind: str) -> None:
    """What the child process does; prints JSON."""
    directory = (root / "set.txt").read_text()
    result = root / f"{time.time_ns()}.h5"
    grid = np.logspace(-4, 2, strengths)
    specs = tuple(
        LogisticSpec(float(C)) if kind == "logistic" else RidgeSpec(float(1 / C)) for C in grid
    )
    job = BankJob(
        str(root / "task.npz"), (directory,), specs, str(result), refit=False, memory_bytes=memory
    )
    cpu, wall = time.process_time(), time.perf_counter()
    train_bank(job)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    table = read_bank(result).table
    result.unlink()
    print(
        json.dumps(
            {
                "cpu": seconds[0],
                "wall": seconds[1],
                "iterations": int(table["iterations"].sum()),
                "objective": table["objective"].tolist(),
                "accuracy": float(table["accuracy"].max()),
                "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
            }
        )
    )


def run(root: Path, *, streamed: bool, strengths: int, kind: str = "logistic") -> dict:
    """One bank in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        str(root),
        "0" if streamed else str(1 << 50),
        str(strengths),
        kind,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def drop(root: Path) -> None:
    """Forget the shards' pages, where the operating system can be asked to."""
    for path in root.rglob("*.h5"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def stream_case(quick: bool, root: Path) -> dict[str, float]:
    figures = {}
    rows, repeats = (10_000, 1) if quick else (40_000, 3)
    print(f"{rows:,} × 1,280; medians of {repeats}")
    print(
        f"{'columns':>8}{'memory CPU s':>14}{'streamed':>10}{'ratio':>7}{'wall ratio':>12}{'cold':>7}{'objectives differ':>19}"
    )
    for classes in (10, 50) if quick else (10, 50, 100):
        home = root / str(classes)
        make_rows(home, rows, 1280, classes)
        strengths = {10: 8, 50: 3, 100: 2}[classes]
        run(home, streamed=True, strengths=1)  # pages, byte code
        pairs = []
        for _ in range(repeats):
            memory, streamed = (
                run(home, streamed=side, strengths=strengths) for side in (False, True)
            )
            drop(home)
            pairs.append((memory, streamed, run(home, streamed=True, strengths=strengths)))
        # A head-iteration costs the same on both sides; how many rounding makes it take is chance.
        cpu = [[one["cpu"] / one["iterations"] for one in sides] for sides in pairs]
        ratio = float(np.median([b / a for a, b, _ in cpu]))
        wall = float(np.median([b["wall"] / a["wall"] for a, b, _ in pairs]))
        cold = float(np.median([c["wall"] / b["wall"] for _, b, c in pairs]))
        memory, streamed, _ = pairs[0]
        differ = float(
            np.max(np.abs(np.array(memory["objective"]) / np.array(streamed["objective"]) - 1))
        )
        columns = 5 * (classes - 1)
        print(
            f"{columns:8}{memory['cpu']:14.2f}{streamed['cpu']:10.2f}{ratio:7.2f}{wall:12.2f}{cold:7.2f}{differ:19.1e}"
        )
        figures |= {
            f"ratio_{columns}": ratio,
            f"wall_ratio_{columns}": wall,
            f"cold_{columns}": cold,
        }
        figures[f"differ_{columns}"] = differ
    return figures


def linear_case(quick: bool, root: Path) -> dict[str, float]:
    figures, first = {}, 0.0
    print(
        f"{'rows':>10}{'CPU s':>9}{'iterations':>12}{'µs a row':>10}{'ns a row and iteration':>24}{'against the first':>19}{'GiB':>6}"
    )
    for rows in (10_000, 20_000, 40_000) if quick else (50_000, 100_000, 200_000):
        home = root / str(rows)
        make_rows(home, rows, 1280, 10)
        one = run(home, streamed=True, strengths=4)
        per = one["cpu"] / rows / one["iterations"] * 1e9
        first = first or per
        print(
            f"{rows:10,}{one['cpu']:9.1f}{one['iterations']:12}{per:24.0f}{per / first:19.2f}{one['gib']:6.2f}",
            flush=True,
        )
        figures |= {f"ns_{rows}": per, f"relative_{rows}": per / first, f"gib_{rows}": one["gib"]}
    return figures


def million_case(quick: bool, root: Path) -> dict[str, float]:
    rows = 50_000 if quick else 1_000_000
    make_rows(root / "million", rows, 1280, 2)
    stored = sum(path.stat().st_size for path in root.rglob("*.h5")) / (1 << 30)
    print(
        f"{rows:,} × 1,280 float16, {stored:.2f} GiB of shards, 2 classes, 100 heads of each kind"
    )
    print(
        f"{'kind':10}{'CPU s':>8}{'wall s':>8}{'iterations':>12}{'peak GiB':>10}{'best accuracy':>15}",
        flush=True,
    )
    figures: dict[str, float] = {"rows": rows, "shards_gib": stored}
    for kind in ("ridge", "logistic"):
        one = run(root / "million", streamed=True, strengths=20, kind=kind)
        text = f"{kind:10}{one['cpu']:8.0f}{one['wall']:8.0f}{one['iterations']:12}{one['gib']:10.2f}{one['accuracy']:15.3f}"
        print(text, flush=True)
        figures |= {
            f"{kind}_cpu_s": one["cpu"],
            f"{kind}_wall_s": one["wall"],
            f"{kind}_peak_gib": one["gib"],
        }
    return figures


CASES = {"stream": stream_case, "stream-linear": linear_case, "stream-million": million_case}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--quick", action="store_true", help="fewer rows: shows that it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        figures = CASES[options.case](options.quick, Path(scratch))
    print(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
