"""Runs of many small heads on made features, without images or networks, and heads that misbehave.

As a script, `python faults.py FOLDER BANKS WORKERS SECONDS` is a driver that can be killed.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.tree import DecisionTreeClassifier
from support.caches import make_spec

from headrace.cache.feature_set import open_feature_set
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.pipelines.api import train_heads

ROWS = 40
FITS = 2  # of one bank of one spec: one per fold


class Slow(DecisionTreeClassifier):
    """Takes a moment, and writes down that it was fitted: one line per fit, with its number and
    process.
    """

    def __init__(self, number=0, log="", seconds=0.03, random_state=0):
        super().__init__(random_state=random_state)
        self.number, self.log, self.seconds = number, log, seconds

    def fit(self, X, y, **options):
        with Path(self.log).open("a") as file:
            file.write(f"{self.number} {os.getpid()}\n")
        time.sleep(self.seconds)
        return super().fit(X, y, **options)


class Segfault(DecisionTreeClassifier):
    """Takes its process down."""

    def fit(self, X, y, **options):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hog(DecisionTreeClassifier):
    """Takes memory until there is no more; forgets nothing."""

    def fit(self, X, y, **options):
        self.hoard = []
        while True:
            self.hoard.append(np.ones(1 << 22))


class Endless(DecisionTreeClassifier):
    """Never ends."""

    def fit(self, X, y, **options):
        while True:
            pass


class Frozen(DecisionTreeClassifier):
    """Stops its process, as a machine does that swaps or hangs, the first time that it
    is fitted.
    """

    def __init__(self, mark=""):
        super().__init__()
        self.mark = mark

    def fit(self, X, y, **options):
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().fit(X, y, **options)


def samples():
    """Rows with a label, and the content hashes of images that there never were."""
    content = [hashlib.sha256(f"row {row}".encode()).hexdigest()[:32] for row in range(ROWS)]
    return pd.DataFrame(
        {
            "id": [str(row) for row in range(ROWS)],
            "path": [f"{row}.png" for row in range(ROWS)],
            "label": ["a", "b"] * (ROWS // 2),
            "content": content,
        }
    )


def features(folder):
    """A feature set of these rows."""
    table = samples()
    directory = create_feature_set(Path(folder) / "cache", make_spec(shape=(4,)))
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    values[:, 0] += np.arange(ROWS) % 2
    publish_shard(
        directory,
        unit="u0",
        features=values,
        ids=table["id"].tolist(),
        content_hashes=table["content"].tolist(),
        failures=[],
    )
    return {"made": open_feature_set(directory)}


def slow(folder, banks, seconds=0.03):
    """Banks of one slow head each, as the recipe's section for scikit-learn has them."""
    log = [str(Path(folder) / "fits.log")]
    return [
        {
            "estimator": "support.faults.Slow",
            "parameters": {"number": [number], "log": log, "seconds": [seconds]},
            "inputs": [["made"]],
        }
        for number in range(banks)
    ]


def misbehaving(name, **parameters):
    """One head of another class of this module."""
    return {
        "estimator": f"support.faults.{name}",
        "parameters": {key: [value] for key, value in parameters.items()},
        "inputs": [["made"]],
    }


def train(folder, heads, workers=2, options=None):
    """The whole second half of a run."""
    return train_heads(
        features(folder),
        samples(),
        heads={"sklearn": heads},
        task={"folds": FITS},
        out=Path(folder) / "run",
        workers=workers,
        options=options,
    )


def fits(folder):
    """The numbers of the slow heads in the order in which workers began to fit them."""
    log = Path(folder) / "fits.log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def number_of(spec):
    """Which slow head a spec is."""
    return json.loads(json.loads(spec)["parameters"]).get("number")


if __name__ == "__main__":
    place, count, processes, seconds = sys.argv[1:5]
    train(place, slow(place, int(count), float(seconds)), int(processes))
