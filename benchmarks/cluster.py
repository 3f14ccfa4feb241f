"""What running heads as Dask tasks costs, and what planning costs as runs grow.

    python benchmarks/cluster.py [--case overhead|memory|planning|repeat|model] [--quick]

overhead   1,000 heads in banks on two workers: the share of the workers' wall time that is not
           spent inside tasks (target <= 5 %), and two workers' throughput over one's (target >= 1.8
           on two free cores)
memory     resident memory of the driver, which holds the scheduler, after as many tasks as a run of
           so many heads has
planning   seconds to plan 100,000 heads (target <= 10 s)
repeat     a second call of a finished run of 10,000 heads (target <= 5 s)
model      the cost model of pipelines/planning/cost_model.py, with rates measured at one size,
           against banks at three sizes

Features are random numbers with a signal. Starting workers is counted apart: it is paid once per
run. The last line is JSON: {measure: figure}.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np
import pandas as pd
import psutil

from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.heads.bank import BankJob, train_bank
from headrace.heads.data.task import Task, save_task
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.networks.kind import MLPSpec
from headrace.pipelines.api import train_heads
from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.submit import run_tasks
from headrace.pipelines.planning.cost_model import Rates, bank_seconds
from headrace.pipelines.planning.plan import FeaturePlan, plan_run
from headrace.pipelines.recipe.grid import requested_heads
from headrace.pipelines.recipe.heads import Heads

FOLDS = 5


def made(folder: Path, rows: int, width: int, classes: int) -> tuple[Path, Path, pd.DataFrame]:
    """A feature set, a task, and the rows as a table."""
    generator = np.random.default_rng(rows + width)
    target = np.arange(rows) % classes
    X = generator.normal(size=(rows, width)).astype(np.float32)
    X[:, :classes] += np.eye(classes, dtype=np.float32)[target]
    content = [hashlib.sha256(f"{rows} {row}".encode()).hexdigest()[:32] for row in range(rows)]
    spec = FeatureSpec(
        "made", f"{rows}", "tap", "avg", "{}", "{}", "none", "float32", "float16", (width,)
    )
    directory = create_feature_set(folder / "cache", spec)
    ids = [str(row) for row in range(rows)]
    publish_shard(directory, unit="u0", features=X, ids=ids, content_hashes=content, failures=[])
    fold = (np.arange(rows) // classes % FOLDS).astype(np.int16)
    names = tuple(str(number) for number in range(classes))
    task = Task(
        "single", names, np.array(ids), np.array(content, "S32"), target, fold, np.ones(rows)
    )
    path = folder / f"task-{rows}-{width}.npz"
    save_task(task, path)
    return (
        directory,
        path,
        pd.DataFrame({"id": ids, "path": ids, "content": content, "label": target.astype(str)}),
    )


def banks(
    folder: Path, name: str, features: Path, task: Path, count: int, specs: int
) -> list[tuple[str, BankJob]]:
    """So many banks of logistic heads."""
    jobs = []
    for number in range(count):
        strengths = np.geomspace(1e-4, 1, specs) * (1 + number / 1000)
        chosen = tuple(LogisticSpec(C=float(c)) for c in strengths)
        result = str(folder / name / f"{number}.h5")
        jobs.append((f"{name}-{number}", BankJob(str(task), (str(features),), chosen, result)))
    return jobs


def overhead(quick: bool) -> dict[str, float]:
    """Wall time outside tasks, and two workers over one."""
    # An even number of banks: the last of an odd one would leave a worker idle, which says nothing
    # about Dask.
    count, specs = (6, 8) if quick else (20, 10)
    figures: dict[str, float] = {}
    rates = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        features, task, _ = made(folder, 4000, 512, 10)
        for workers in (2, 1):
            with local_client(workers) as client:
                warm = banks(folder, f"warm{workers}", features, task, workers, 2)
                list(run_tasks(client, train_bank, warm))
                started = time.perf_counter()
                outcomes = list(
                    run_tasks(
                        client,
                        train_bank,
                        banks(folder, f"w{workers}", features, task, count, specs),
                    )
                )
                wall = time.perf_counter() - started
            inside = sum(outcome.result.seconds for outcome in outcomes if outcome.result)
            rates[workers] = count / wall
            share = 1 - inside / (wall * workers)
            print(
                f"{workers} workers: {count * specs * FOLDS:,} heads in {count} banks of "
                f"{inside / count:.2f} s, wall {wall:.1f} s; outside tasks {share:.1%} (the last "
                "banks' waiting for each other included)",
                flush=True,
            )
            figures[f"outside_tasks_{workers}"] = round(share, 4)
    figures["two_over_one"] = round(rates[2] / rates[1], 3)
    print(
        f"two workers over one: {figures['two_over_one']:.2f} x, with {psutil.getloadavg()[0]:.1f} "
        "others' load here"
    )
    return figures


def memory(quick: bool) -> dict[str, float]:
    """Memory of driver and scheduler by the number of tasks that have gone through."""
    figures: dict[str, float] = {}
    with local_client(2) as client:
        # Keys as banks have them: the scheduler keeps a record of each name in front of a hash.
        keys = [
            f"bank-{hashlib.sha256(b'%d' % number).hexdigest()[:16]}" for number in range(2_050)
        ]
        list(run_tasks(client, abs, [(key, -1) for key in keys[2_000:]]))
        process = psutil.Process()
        done = 0
        for heads in (1_000, 10_000) if quick else (1_000, 10_000, 100_000):
            tasks = heads // 50  # ten specs in five folds make a bank
            for outcome in run_tasks(client, abs, ((keys[i], -i) for i in range(done, tasks))):
                assert outcome.error is None
            done = tasks
            megabytes = process.memory_info().rss / 1e6
            known = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            print(
                f"{heads:>7,} heads, {tasks:,} tasks: {megabytes:,.0f} MB, {known} tasks known to "
                "the scheduler",
                flush=True,
            )
            figures[f"driver_mb_{heads}"] = round(megabytes, 1)
    return figures


def planning(quick: bool) -> dict[str, float]:
    """Planning from the recipe's lists to banks."""
    heads = 10_000 if quick else 100_000
    names = [f"layer{number}.avg" for number in range(20)]
    values = heads // FOLDS // (len(names))
    row = np.arange(1000)
    classes = tuple(f"class {number}" for number in range(10))
    ids, content, fold = row.astype(str), row.astype("S32"), (row % FOLDS).astype(np.int16)
    task = Task("single", classes, ids, content, row % 10, fold, np.ones(1000))
    started = time.perf_counter()
    grid = Heads.model_validate(
        {"ridge": {"alpha": np.geomspace(1, 1e4, values).tolist(), "inputs": ["each"]}}
    )
    features = [
        FeaturePlan(
            name,
            (FeatureSpec("b", "w", name, "avg", "{}", "{}", "d", "float32", "float16", (512,)),),
            1000,
            1000,
            0,
        )
        for name in names
    ]
    plan = plan_run(
        features=features,
        units=[],
        images=1000,
        requested=requested_heads(grid, names),
        task=task,
        trained=lambda group: {},
    )
    seconds = time.perf_counter() - started
    print(f"{plan.heads_new:,} heads planned in {len(plan.banks):,} banks: {seconds:.2f} s")
    return {f"plan_{heads}_s": round(seconds, 3)}


def repeat(quick: bool) -> dict[str, float]:
    """The second call of a finished run."""
    heads = 1_000 if quick else 10_000
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        directory, _, table = made(folder, 500, 32, 2)
        grid = {
            "ridge": {"alpha": np.geomspace(1, 1e4, heads // FOLDS).tolist(), "inputs": ["all"]}
        }
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            features = {"made": open_feature_set(directory)}
            train_heads(
                features, table, heads=grid, task={"folds": FOLDS}, out=folder / "run", workers=2
            )
            seconds.append(time.perf_counter() - started)
    print(f"{heads:,} heads: first call {seconds[0]:.1f} s, second call {seconds[1]:.2f} s")
    return {f"second_call_{heads}_s": round(seconds[1], 2)}


def model(quick: bool) -> dict[str, float]:
    """Banks predicted from a small one of their kind, CPU seconds."""
    sizes = (
        ((1000, 256, 5), (4000, 256, 5), (4000, 512, 10))
        if quick
        else ((1000, 256, 5), (4000, 512, 10), (16000, 512, 10))
    )
    kinds = {
        "logistic": tuple(LogisticSpec(C=float(c)) for c in np.geomspace(1e-4, 1, 8)),
        "ridge": tuple(RidgeSpec(alpha=float(alpha)) for alpha in np.geomspace(1, 1e4, 16)),
        "mlp": tuple(MLPSpec(hidden=(64,), epochs=5, patience=5, seed=seed) for seed in range(4)),
    }
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, specs in kinds.items():
            ratios = []
            for rows, width, classes in sizes:
                directory, task, _ = made(folder, rows, width, classes)
                for name, chosen in (("warm", specs[:1]), ("whole", specs)):
                    started = time.process_time()
                    result = folder / f"{kind}-{rows}-{width}-{name}.h5"
                    train_bank(BankJob(str(task), (str(directory),), chosen, str(result)))
                    seconds = time.process_time() - started
                assumed = bank_seconds(specs, (rows, width, classes, FOLDS), Rates())
                ratios.append(seconds / assumed)
                print(
                    f"{kind:<9} {rows:>6,} x {width}, {classes} classes: {seconds:.2f} s, assumed "
                    f"{assumed:.2f} s",
                    flush=True,
                )
            # What a call knows after the middle size, about the largest.
            figures[f"{kind}_error_after_measuring"] = round(ratios[1] / ratios[2] - 1, 3)
        figures |= extraction_model(folder, quick)
    return figures


def extraction_model(folder: Path, quick: bool) -> dict[str, float]:
    """Units predicted from a smaller number of images, CPU seconds:

    ResNet-18 at 96 pixels, two taps.
    """
    from PIL import Image

    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.images.content_hashes import content_hashes
    from headrace.extract.run.plan import BackboneFeatures, plan_work_units
    from headrace.extract.run.work_unit import run_work_unit
    from headrace.extract.sources.samples import list_folder
    from headrace.extract.spec import BackboneSpec
    from headrace.extract.taps.describe import feature_specs
    from headrace.extract.taps.resolve import resolve_taps

    spec = BackboneSpec("torchvision:resnet18", "random:0", image_size=96, crop_fraction=1.0)
    backbone = load_backbone(spec)
    specs = feature_specs(backbone, resolve_taps(backbone, ["layer3.avg", "layer4.avg"]))
    seconds = []
    counts = (64, 128, 256) if quick else (128, 512, 1024)
    generator = np.random.default_rng(0)
    for count in (16, *counts):  # the first is the warm-up
        images = folder / f"images{count}"
        images.mkdir()
        for number in range(count):
            pixels = generator.integers(0, 256, (12, 16, 3), np.uint8)
            Image.fromarray(pixels).resize((320, 240)).save(images / f"{number}.jpg")
        samples = list_folder(images)
        samples["content"] = list(content_hashes(samples, folder / f"{count}.parquet").hashes)
        jobs = plan_work_units(
            samples,
            [BackboneFeatures(spec, specs, [set()] * 2)],
            cache_root=folder / f"cache{count}",
        )
        started = time.process_time()
        for job in jobs:
            run_work_unit(job)
        seconds.append(time.process_time() - started)
        print(
            f"extraction {count:>6,} images: {seconds[-1]:.2f} s, {seconds[-1] / count * 1e3:.1f} "
            "ms each",
            flush=True,
        )
    predicted = seconds[2] / counts[1] * counts[2]
    return {"extraction_error_after_measuring": round(predicted / seconds[3] - 1, 3)}


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "overhead": overhead,
    "memory": memory,
    "planning": planning,
    "repeat": repeat,
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for name, case in CASES.items():
        if options.case in (name, "all"):
            figures |= case(options.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
