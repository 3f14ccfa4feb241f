"""Every benchmark of heads by one name: `python benchmarks/heads.py [--case NAME] [--quick]`;
without a name, all of them.

Linear cases are in heads_linear.py, those that read from shards in heads_stream.py, networks and
neighbours in heads_mlp.py; each runs in a process of its own, so that none warms the caches or the
thread pools of another. The last line is JSON: {measure: figure}.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CASES = {
    "heads_linear.py": (
        "logistic-5k",
        "logistic-20k",
        "logistic-100",
        "logistic-wide",
        "ridge",
        "ridge-1000",
        "side-columns",
    ),
    "heads_stream.py": ("stream", "stream-linear", "stream-million"),
    "heads_mlp.py": ("mlp", "mlp-wide", "halving", "knn"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [case for cases in CASES.values() for case in cases]
    parser.add_argument("--case", choices=every, action="append", help="only these (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller samples of the slow side")
    options = parser.parse_args()
    figures = {}
    for case in options.case or every:
        script = next(name for name, cases in CASES.items() if case in cases)
        command = [sys.executable, "-u", str(Path(__file__).with_name(script)), "--case", case]
        last = ""
        with subprocess.Popen(
            [*command, "--quick"] if options.quick else command, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                last = line
        if running.returncode:
            return running.returncode
        figures |= {
            name if name.startswith(case) else f"{case} {name}": value
            for name, value in json.loads(last).items()
        }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
