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
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported

import numpy as np

from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.task import Task, save_task
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.results import read_bank

ROWS_PER_SHARD = 50_000
N_FOLDS = 5


def write_features(root: Path, n_rows: int, n_features: int, n_classes: int) -> None:
    """Write a feature set and a task of five folds under root."""
    rng = np.random.default_rng(0)
    spectrum = np.logspace(0, -2, n_features, dtype=np.float32)
    rotation = np.linalg.qr(rng.standard_normal((n_features, n_features)))[0].astype(np.float32)
    pool = (rng.standard_normal((8192, n_features), np.float32) * spectrum) @ rotation
    class_means = rng.standard_normal((n_classes, n_features), np.float32) * spectrum * 0.4
    class_means = class_means @ rotation + np.float32(0.5)
    target = rng.integers(0, n_classes, n_rows)
    content_hashes = [hashlib.sha256(str(row).encode()).hexdigest()[:32] for row in range(n_rows)]
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
        (n_features,),
    )
    directory = create_feature_set(root / "cache", spec)
    for shard, start in enumerate(range(0, n_rows, ROWS_PER_SHARD)):
        rows = slice(start, min(start + ROWS_PER_SHARD, n_rows))
        shard_target = target[rows]
        # Sums of two rows of the pool are as many rows as there are pairs.
        row_a, row_b = rng.integers(0, len(pool), (2, len(shard_target)))
        features = (pool[row_a] + pool[row_b]) * np.float32(0.7) + class_means[shard_target]
        publish_shard(
            directory,
            f"{shard:04}",
            features=features.astype(np.float16),
            ids=[str(row) for row in range(rows.start, rows.stop)],
            content_hashes=content_hashes[rows],
            failures=[],
        )
    fold = rng.integers(0, N_FOLDS, n_rows).astype(np.int16)
    ids = np.array([str(row) for row in range(n_rows)])
    class_names = tuple(f"c{k}" for k in range(n_classes))
    content = np.array(content_hashes, "S32")
    save_task(
        Task("single", class_names, ids, content, target, fold, np.ones(n_rows)), root / "task.npz"
    )
    (root / "set.txt").write_text(str(directory))


def run_worker(root: Path, memory_bytes: int, n_strengths: int, kind: str) -> None:
    """Train one bank as a worker does, and print its figures as JSON."""
    results_path = root / f"{time.time_ns()}.h5"
    specs = tuple(
        LogisticSpec(float(C)) if kind == "logistic" else RidgeSpec(float(1 / C))
        for C in np.logspace(-4, 2, n_strengths)
    )
    job = BankJob(
        str(root / "task.npz"),
        ((root / "set.txt").read_text(),),
        specs,
        str(results_path),
        refit=False,
        memory_bytes=memory_bytes,
    )
    cpu_start, wall_start = time.process_time(), time.perf_counter()
    train_bank(job)
    cpu, wall = time.process_time() - cpu_start, time.perf_counter() - wall_start
    table = read_bank(results_path).table
    results_path.unlink()
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "iterations": int(table["iterations"].sum()),
                "objective": table["objective"].tolist(),
                "accuracy": float(table["accuracy"].max()),
                "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
            }
        )
    )


def train_in_process(
    root: Path, *, streamed: bool, n_strengths: int, kind: str = "logistic"
) -> dict[str, Any]:
    """Return the figures of one bank that is trained in a process of its own."""
    memory_bytes = 0 if streamed else 1 << 50
    command = [sys.executable, __file__, "--worker", str(root), memory_bytes, n_strengths, kind]
    completed = subprocess.run(
        [str(argument) for argument in command], check=True, capture_output=True, text=True
    )
    return json.loads(completed.stdout.splitlines()[-1])


def drop_page_cache(root: Path) -> None:
    """Forget the shards' pages, where the operating system can be asked to."""
    for shard_path in root.rglob("*.h5"):
        descriptor = os.open(shard_path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def stream_case(quick: bool, scratch: Path) -> dict[str, float]:
    figures = {}
    n_rows, n_repeats = (10_000, 1) if quick else (40_000, 3)
    print(f"{n_rows:,} × 1,280; medians of {n_repeats}")
    print(
        f"{'columns':>8}{'memory CPU s':>14}{'streamed':>10}{'ratio':>7}{'wall ratio':>12}"
        f"{'cold':>7}{'objectives differ':>19}"
    )
    for n_classes in (10, 50) if quick else (10, 50, 100):
        root = scratch / str(n_classes)
        write_features(root, n_rows, 1280, n_classes)
        n_strengths = {10: 8, 50: 3, 100: 2}[n_classes]
        train_in_process(root, streamed=True, n_strengths=1)  # pages, byte code
        runs = []
        for _ in range(n_repeats):
            memory, streamed = (
                train_in_process(root, streamed=side, n_strengths=n_strengths)
                for side in (False, True)
            )
            drop_page_cache(root)
            cold = train_in_process(root, streamed=True, n_strengths=n_strengths)
            runs.append((memory, streamed, cold))
        # A head-iteration costs the same on both sides; how many rounding makes it take is chance.
        cpu_ratios = [
            (streamed["cpu"] / streamed["iterations"]) / (memory["cpu"] / memory["iterations"])
            for memory, streamed, _ in runs
        ]
        ratio = float(np.median(cpu_ratios))
        wall_ratio = float(np.median([run[1]["wall"] / run[0]["wall"] for run in runs]))
        cold_ratio = float(np.median([run[2]["wall"] / run[1]["wall"] for run in runs]))
        memory, streamed, _ = runs[0]
        objectives = np.array(memory["objective"]) / np.array(streamed["objective"])
        largest_difference = float(np.abs(objectives - 1).max())
        n_columns = N_FOLDS * (n_classes - 1)
        print(
            f"{n_columns:8}{memory['cpu']:14.2f}{streamed['cpu']:10.2f}{ratio:7.2f}"
            f"{wall_ratio:12.2f}{cold_ratio:7.2f}{largest_difference:19.1e}"
        )
        figures |= {
            f"ratio_{n_columns}": ratio,
            f"wall_ratio_{n_columns}": wall_ratio,
            f"cold_{n_columns}": cold_ratio,
            f"differ_{n_columns}": largest_difference,
        }
    return figures


def linear_case(quick: bool, scratch: Path) -> dict[str, float]:
    figures, first_ns = {}, 0.0
    print(
        f"{'rows':>10}{'CPU s':>9}{'iterations':>12}{'ns a row and iteration':>24}"
        f"{'against the first':>19}{'GiB':>6}"
    )
    for n_rows in (10_000, 20_000, 40_000) if quick else (50_000, 100_000, 200_000):
        root = scratch / str(n_rows)
        write_features(root, n_rows, 1280, 10)
        run = train_in_process(root, streamed=True, n_strengths=4)
        ns = run["cpu"] / n_rows / run["iterations"] * 1e9
        first_ns = first_ns or ns
        print(
            f"{n_rows:10,}{run['cpu']:9.1f}{run['iterations']:12}{ns:24.0f}"
            f"{ns / first_ns:19.2f}{run['gib']:6.2f}",
            flush=True,
        )
        figures |= {
            f"ns_{n_rows}": ns,
            f"relative_{n_rows}": ns / first_ns,
            f"gib_{n_rows}": run["gib"],
        }
    return figures


def million_case(quick: bool, scratch: Path) -> dict[str, float]:
    n_rows = 50_000 if quick else 1_000_000
    root = scratch / "million"
    write_features(root, n_rows, 1280, 2)
    shards_gib = sum(path.stat().st_size for path in root.rglob("*.h5")) / (1 << 30)
    print(
        f"{n_rows:,} × 1,280 float16, {shards_gib:.2f} GiB of shards, 2 classes, 100 heads of each "
        "kind"
    )
    print(
        f"{'kind':10}{'CPU s':>8}{'wall s':>8}{'iterations':>12}{'peak GiB':>10}"
        f"{'best accuracy':>15}",
        flush=True,
    )
    figures: dict[str, float] = {"rows": n_rows, "shards_gib": shards_gib}
    for kind in ("ridge", "logistic"):
        run = train_in_process(root, streamed=True, n_strengths=20, kind=kind)
        print(
            f"{kind:10}{run['cpu']:8.0f}{run['wall']:8.0f}{run['iterations']:12}{run['gib']:10.2f}"
            f"{run['accuracy']:15.3f}",
            flush=True,
        )
        figures |= {
            f"{kind}_cpu_s": run["cpu"],
            f"{kind}_wall_s": run["wall"],
            f"{kind}_peak_gib": run["gib"],
        }
    return figures


CASES = {"stream": stream_case, "stream-linear": linear_case, "stream-million": million_case}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        run_worker(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--quick", action="store_true", help="fewer rows: shows that it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        figures = CASES[options.case](options.quick, Path(scratch))
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
