"""The winner: chosen on validation folds alone, then shown the test split, which is opened once and on record."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache import FeatureSet, HeadraceError, publish_replace
from headrace.heads import (
    FULL,
    Task,
    all_metrics,
    load_rows,
    metric_interval,
    predict_head,
    read_bank,
    save_head,
    spec_from_json,
)


class NoWinner(HeadraceError):
    """No head was trained in every fold."""


@dataclass(frozen=True)
class TestResult:
    """The winner's score on the test split, with a 95 % bootstrap interval over the test images."""

    metric: str
    value: float
    low: float
    high: float
    images: int
    openings: int  # how many winners have been shown this test split, this one included
    metrics: dict[str, float]


def choose_winner(board: pd.DataFrame) -> pd.Series:
    """The first row of the leaderboard. Raises NoWinner, with the commonest reason, when no head is whole."""
    if board.empty or board.iloc[0]["failed"] or not board.iloc[0]["final"]:
        raise NoWinner("no head was trained in every fold; the reasons are in the column `error` of heads.parquet")
    return board.iloc[0]


def save_winner(directory: Path, winner: pd.Series, features: Sequence[FeatureSet], task: Task, metric: str) -> Path:
    """Write the winner, trained on every training row, as head.safetensors + head.json in place of an earlier winner."""
    return save_head(
        directory,
        spec=spec_from_json(winner["spec"]),
        task_kind=task.kind,
        arrays=read_bank(winner["path"]).arrays(winner["spec"], FULL),
        classes=task.classes,
        features=[feature.spec for feature in features],
        metrics={f"validation_{metric}": float(winner[metric])},
    )


def open_test(
    openings: Path, winner: pd.Series, features: Sequence[FeatureSet], test: Task, train_digest: str, metric: str
) -> TestResult:
    """Score the winner on the test rows and put the opening on record; a repeated call with the same winner reads the record.

    Another winner on the same test split is another opening: the more winners have been shown a test split, the less
    its score means, and so the count is part of the result.
    """
    key = {
        "test": test.digest,
        "train": train_digest,
        "inputs": list(winner["inputs"]),
        "spec": winner["spec"],
        "metric": metric,
    }
    past = _read_openings(openings, test.digest)
    for number, opening in enumerate(past, start=1):
        if all(opening[name] == value for name, value in key.items()):
            return TestResult(openings=number, **opening["result"])
    spec = spec_from_json(winner["spec"])
    arrays = read_bank(winner["path"]).arrays(winner["spec"], FULL)
    X, kept = load_rows(features, test.content, spatial=spec.kind == "conv")
    target = test.target[kept]
    views = X if X.ndim in (3, 5) else X[None]  # (V, n, D) or (V, n, channels, h, w): several are averaged
    probabilities = np.mean([predict_head(spec, arrays, view, test.kind) for view in views], axis=0)
    metrics = all_metrics(test.kind, target, probabilities)
    low, high = metric_interval(test.kind, target, probabilities, metric)
    result = TestResult(metric, metrics[metric], low, high, len(target), len(past) + 1, metrics)
    opening = {
        **key,
        "opened": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "result": {name: getattr(result, name) for name in ("metric", "value", "low", "high", "images", "metrics")},
    }
    lines = openings.read_text() if openings.exists() else ""
    publish_replace(openings, (lines + json.dumps(opening) + "\n").encode())
    return result


def _read_openings(path: Path, test_digest: str) -> list[Mapping[str, Any]]:
    if not path.exists():
        return []
    return [o for o in map(json.loads, path.read_text().splitlines()) if o["test"] == test_digest]
