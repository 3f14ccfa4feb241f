"""How often advice is right where it is known what would help: made worlds, of which the heads are
trained and the advice is asked for. Seeded.

    python benchmarks/advice.py [--seeds 5] [--quick]

Prints a line for each world; the last line is JSON {"right": worlds with the right advice, "of":
worlds asked}. --quick: one seed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.evidence import WORLDS, advice_word, live_in

from headrace.heads.bank import BankJob, train_bank
from headrace.pipelines.advice.measure import advise_on


def train_here(jobs: Sequence[BankJob]) -> None:
    """Train in this process."""
    for job in jobs:
        train_bank(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    right = 0
    for name, world, expected in WORLDS:
        given = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                board, task, feature_paths = live_in(world, Path(folder), seed)
                evidence = Path(folder, "advice")
                advice = advise_on(board, task, feature_paths, evidence, train_here)
            given.append(advice_word(advice))
        right += given.count(expected)
        print(f"{name}: expected {expected}, given {', '.join(given)}")
    print(json.dumps({"right": right, "of": len(WORLDS) * len(seeds)}))


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
