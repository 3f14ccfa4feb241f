"""The winner: chosen on validation folds alone, then shown the test split, which is opened once and on record."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache import FeatureSet, HeadraceError, lease, publish_replace
from headrace.extract import BackboneSpec
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

# Of the test images' hashes, kept with each opening to recognise the same images under another table.
SKETCH = 256


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


class OpeningsDamaged(HeadraceError, ValueError):
    """The record of test openings cannot be read."""


def choose_winner(board: pd.DataFrame, heads: pd.DataFrame) -> pd.Series:
    """The first row of the leaderboard. Raises NoWinner, with the commonest reason, when no head is whole."""
    if board.empty or board.iloc[0]["failed"] or not board.iloc[0]["final"]:
        reasons = heads["error"].dropna().value_counts()
        reason = f"The commonest reason: {reasons.index[0]}" if len(reasons) else "The metric is undefined in some fold"
        raise NoWinner(
            f"no head is whole, with the metric defined in every fold. {reason}. Every head is in heads.parquet and leaderboard.csv"
        )
    return board.iloc[0]


def save_winner(
    directory: Path,
    winner: pd.Series,
    features: Sequence[FeatureSet],
    backbones: Sequence[BackboneSpec | None],
    task: Task,
    metric: str,
) -> Path:
    """Write the winner, trained on every training row, as head.safetensors + head.json in place of an earlier winner.

    backbones: the network that made each of the features, so that the directory can be used away from its run.
    """
    return save_head(
        directory,
        spec=spec_from_json(winner["spec"]),
        task_kind=task.kind,
        arrays=read_bank(winner["path"]).arrays(winner["spec"], FULL),
        classes=task.classes,
        features=[feature.spec for feature in features],
        metrics={f"validation_{metric}": float(winner[metric])},
        backbones=[None if backbone is None else dataclasses.asdict(backbone) for backbone in backbones],
    )


def open_test(
    openings: Path, winner: pd.Series, features: Sequence[FeatureSet], test: Task, train_digest: str, metric: str
) -> TestResult:
    """Score the winner on the test rows and put the opening on record; a repeated call with the same winner reads the record.

    Another winner on the same test images is another opening: the more winners have been shown a test split, the less
    its score means, and so the count is part of the result.
    """
    winner_is = {
        "train": train_digest,
        "test": test.digest,
        "features": [feature.spec.fingerprint for feature in features],
        "bank": Path(winner["path"]).name,
        "inputs": list(winner["inputs"]),
        "spec": winner["spec"],
    }
    with lease(openings.with_suffix(".lock")):  # two runs that end at once both count
        past = [opening for opening in _read_openings(openings) if _overlaps(opening, test)]
        same = [opening for opening in past if opening["winner"] == winner_is]
        others = {json.dumps(opening["winner"], sort_keys=True) for opening in past} - {
            json.dumps(winner_is, sort_keys=True)
        }
        for opening in same:
            if opening["result"]["metric"] == metric:
                return TestResult(openings=len(others) + 1, **opening["result"])
        result = _score(winner, features, test, metric, openings=len(others) + 1)
        opening = {
            "winner": winner_is,
            "opened": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "result": {name: value for name, value in dataclasses.asdict(result).items() if name != "openings"},
            "images": _sketch(test),
        }
        lines = openings.read_text() if openings.exists() else ""
        publish_replace(openings, (lines + json.dumps(opening) + "\n").encode())
    return result


def _score(winner: pd.Series, features: Sequence[FeatureSet], test: Task, metric: str, *, openings: int) -> TestResult:
    spec = spec_from_json(winner["spec"])
    arrays = read_bank(winner["path"]).arrays(winner["spec"], FULL)
    X, kept = load_rows(features, test.content, spatial=spec.kind == "conv")
    target = test.target[kept]
    views = X if X.ndim in (3, 5) else X[None]  # (V, n, D) or (V, n, channels, h, w): several are averaged
    probabilities = np.mean([predict_head(spec, arrays, view, test.kind) for view in views], axis=0)
    metrics = all_metrics(test.kind, target, probabilities)
    low, high = metric_interval(test.kind, target, probabilities, metric)
    return TestResult(metric, metrics[metric], low, high, len(target), openings, metrics)


def _sketch(test: Task) -> list[str]:
    """The smallest content hashes of the test images: two test splits that share a good part of their images share some."""
    return sorted(test.content.astype(str).tolist())[:SKETCH]


def _overlaps(opening: Mapping[str, Any], test: Task) -> bool:
    return not set(opening["images"]).isdisjoint(_sketch(test))


def _read_openings(path: Path) -> list[Mapping[str, Any]]:
    if not path.exists():
        return []
    try:
        openings = [json.loads(line) for line in path.read_text().splitlines()]
        if any(not {"winner", "result", "images"} <= set(opening) for opening in openings):
            raise ValueError("a line is not an opening of this version")
    except (ValueError, TypeError) as error:
        raise OpeningsDamaged(
            f"{path} is damaged ({error}). It says how often the test split was opened: restore it, or remove it "
            "knowing that the count starts again"
        ) from None
    return openings
