"""The ensemble as a model directory: ensemble.json, and each member as a model directory of its
own. No pickle.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from headrace.cache.atomic_io import publish_replace
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.cache.format.sealed import sealed_json
from headrace.extract.spec import BackboneSpec
from headrace.heads.data.task import Task
from headrace.pipelines.selection.ensemble import Ensemble
from headrace.pipelines.selection.winner import TestResult, _evaluate_ensemble, save_winner

FORMAT = 2
DESCRIPTION = "ensemble.json"


def save_ensemble(
    directory: Path,
    ensemble: Ensemble,
    directories: Mapping[str, Sequence[Path]],
    backbones: Mapping[str, BackboneSpec | None],
    task: Task,
) -> Path:
    """Write the members, then ensemble.json, which names them, then remove members of an earlier
    ensemble.

    directories, backbones: of the feature sets by name. Returns the path of ensemble.json.
    """
    members = []
    for member in ensemble.members:
        row = member.row
        key = hashlib.sha256(f"{Path(row['path']).name} {row['spec']}".encode()).hexdigest()[:16]
        features = _features(row, directories)
        made_by = [backbones[name] for name in row["inputs"] for _ in directories[name]]
        save_winner(
            directory / "members" / key,
            row,
            features,
            made_by,
            task,
            ensemble.metric,
            member.temperature,
        )
        members.append(
            {
                "model": f"members/{key}",
                "weight": member.weight,
                "temperature": member.temperature,
                "rank": int(row["rank"]),
                "inputs": list(row["inputs"]),
                "kind": row["kind"],
                "settings": row["settings"],
                "networks": list(member.networks),
            }
        )
    description = {
        "format": FORMAT,
        "kind": "ensemble",
        "members": members,
        "temperature": ensemble.temperature,
        "task_kind": task.kind,
        "classes": list(task.classes),
        "metrics": {
            f"validation_{name}": value
            for name, value in ensemble.metrics.items()
            if value == value
        },
        "nested": ensemble.summary(),
    }
    path = directory / DESCRIPTION
    publish_replace(path, sealed_json(description, indent=2))
    for old in (directory / "members").iterdir():
        if f"members/{old.name}" not in {member["model"] for member in members}:
            with contextlib.suppress(OSError):  # it only takes space
                shutil.rmtree(old)
    return path


def evaluate_ensemble(
    evaluations: Path,
    ensemble: Ensemble,
    directories: Mapping[str, Sequence[Path]],
    test: Task,
    train_digest: str,
    groups: npt.NDArray[Any] | None = None,
) -> TestResult:
    """Show the ensemble the test split, once and on record. groups: as in `evaluate_winner`."""
    members = [
        (member.weight, member.temperature, member.row, _features(member.row, directories))
        for member in ensemble.members
    ]
    return _evaluate_ensemble(
        evaluations, members, ensemble.temperature, test, train_digest, ensemble.metric, groups
    )


def _features(row: pd.Series, directories: Mapping[str, Sequence[Path]]) -> list[FeatureSet]:
    return [open_feature_set(path) for name in row["inputs"] for path in directories[name]]
