"""SIGKILL at any moment: 240 kills of real calls, and what the next call makes of it.

    python benchmarks/kills.py [--case NAME] [--quick] [--seed N] [--kills N]

Calls of `headrace run` (extraction, heads, fine-tuning, ensemble, the winner and the test split),
`extract`, `report`, `predict` and `export` on made images are killed, the driver alone or with all its
processes, when the k-th file of some kind appears and a random moment later. Killed calls follow
each other in chains, at whose end the same command is left to end. Then

- it ends with 0, and with the result of a run that nobody killed: shards byte for byte; banks,
  networks, tables, predictions, the report and exported arrays but for times;
- what had been published stands as it was written, and no task was done twice;
- the test split was evaluated once;
- no process of a killed call is left, no lock, no lease; temporaries that a killed call left (made
  two hours old before the last call) are gone: in a run's directory by the next run, in a cache by
  `headrace cache gc`, of predict, export and report by the next call of the same.

`--quick` is a fifth; tests/faults/test_kills.py has a few. A fault keeps the project's folder. The
last line is JSON {measure: figure}.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

QUICK = 48


def main() -> int:
    from support.kills import CASES, KILLS, Bench, shares

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", choices=CASES, action="append", help="this one alone; may be given several times"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} kills instead of {KILLS}")
    parser.add_argument("--kills", type=int, help="so many kills, over the cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills = options.kills or (QUICK if options.quick else KILLS)
    total: Counter[str] = Counter()
    leftovers: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/state"
        benches: dict[str, Bench] = {}
        columns = ("kills", "all", "driver", "calls", "missed", "faults")
        print(
            f"{'case':24}" + "".join(f"{name:>8}" for name in columns) + f"{'s/kill':>8}",
            flush=True,
        )
        for name, share in shares(kills, options.case or tuple(CASES)):
            recipe = CASES[name].recipe
            if recipe not in benches:
                benches[recipe] = Bench(Path(folder, recipe), recipe=recipe)
            bench = benches[recipe]
            tally = bench.kill(CASES[name], share, options.seed + zlib.crc32(name.encode()))
            row = {
                "kills": tally.kills,
                "all": tally.group,
                "driver": tally.kills - tally.group,
                "calls": tally.calls,
                "missed": tally.missed,
                "faults": len(tally.faults),
            }
            total.update(row)
            leftovers.update(tally.leftovers)
            per_kill = tally.seconds / max(1, tally.kills)
            print(
                f"{name:24}" + "".join(f"{row[each]:8}" for each in columns) + f"{per_kill:8.1f}",
                flush=True,
            )
            for fault in tally.faults:
                print(f"    {fault}")
            if tally.faults:
                kept = tempfile.mkdtemp(prefix="headrace-kills-")
                shutil.copytree(bench.project, kept, dirs_exist_ok=True, symlinks=True)
                print(f"    the project is kept in {kept}", flush=True)
    print(f"{'in all':24}" + "".join(f"{total[each]:8}" for each in columns))
    print(f"temporaries that killed calls left, gone afterwards: {sum(leftovers.values())}")
    for kind, count in leftovers.most_common():
        print(f"    {count:4} {kind}")
    print(json.dumps({**total, "temporaries": sum(leftovers.values()), "seed": options.seed}))
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
