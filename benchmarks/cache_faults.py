"""Faults of a cache in large numbers: extractions killed at random moments, and random histories.

    python benchmarks/cache_faults.py [--case NAME] [--quick]

kills      extractions that are killed at random moments until 400 have died: no row that was
           acknowledged is lost, finished caches are byte for byte the uninterrupted one, and a kill
           costs at most the work unit that it interrupted
histories  100 random sequences of 25 steps (publish, die at a system call, flip bits, delete and
           swap shards, repair), each compared with a model of what must be in the cache
flips      3,600 single bits of plain and of compressed shards, manifests and specs: each is found by
           a reader and by `verify`, and named

`--quick` is a fifth. tests/faults and tests/cache have a few of each. The first fault ends the program. The last line is JSON {measure: count}.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

KILLS, HISTORIES, STEPS, FLIPS = 400, 100, 25, 3600
QUICK = 5  # the share that --quick runs: one of so many


def main() -> None:
    from support.cache_flips import flip_many
    from support.cache_histories import run_histories
    from support.cache_kills import kill_loop
    from support.caches import make_feature_set, make_spec

    from headrace.cache import atomic_io

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=("kills", "histories", "flips"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    share = QUICK if options.quick else 1
    # A death between creating a lock and writing its owner leaves one that only time can break.
    atomic_io.LEASE_S = 0.15
    counts: dict[str, int] = {}
    if options.case in (None, "kills"):
        with tempfile.TemporaryDirectory() as folder:
            died, started, units = kill_loop(Path(folder), 40, KILLS // share, 1, 0.08)
        assert started <= units + died, f"{started} units begun, {units} needed, {died} kills"
        counts |= {"kills": died, "units": units, "units_begun_again": started - units}
        print(f"{died} kills: {units} work units published, {started - units} of them begun again")
    if options.case in (None, "histories"):
        run_histories(HISTORIES // share, STEPS)
        counts |= {"histories": HISTORIES // share, "steps": STEPS}
        print(f"{HISTORIES // share} histories of {STEPS} steps: all as the model says")
    if options.case in (None, "flips"):
        counts["flips"] = 0
        for compression in (None, "bitshuffle-lz4"):
            with tempfile.TemporaryDirectory() as folder:
                spec = make_spec(shape=(40, 3, 3))
                directory = make_feature_set(Path(folder), 2, spec, compression=compression)
                counts["flips"] += flip_many(directory, FLIPS // 2 // share, 1)
        print(f"{counts['flips']} flipped bits: each found and named")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
