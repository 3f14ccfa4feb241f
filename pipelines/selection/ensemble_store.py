"""The ensemble of a run as a model directory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from headrace.heads.data.task import Task
from headrace.heads.unit_rule import UnitRule
from headrace.pipelines.models.ensemble import EnsembleModel
from headrace.pipelines.models.image_parts import ImageParts
from headrace.pipelines.models.reference import ModelRef
from headrace.pipelines.selection.ensemble import Ensemble


def save_ensemble(
    directory: Path,
    ensemble: Ensemble,
    models: Sequence[ModelRef],
    task: Task,
    unit_column: str | None = None,
    image_parts: ImageParts | None = None,
) -> Path:
    """Write the ensemble, and return the path of ensemble.json.

    models: the members' models, in order. unit_column: the column of units (patients, slides),
    where predictions are of units. image_parts: the boxes or tiles of the run, None for whole
    images.
    """
    temperature, rule = ensemble.temperature, None
    if unit_column is not None:
        # The temperature was fitted on units, so it is applied to them and not to their images.
        rule = UnitRule(unit_column, task.unit_aggregation, temperature)
        temperature = 1.0
    pairs, metric = list(zip(ensemble.members, models, strict=True)), ensemble.metric
    members = tuple(
        model.load(task, {f"validation_{metric}": float(member.row[metric])}, member.temperature)
        for member, model in pairs
    )
    columns = tuple(
        {
            "rank": int(member.row["rank"]),
            "inputs": list(model.inputs),
            "kind": model.kind,
            "settings": member.row["settings"],
            "networks": list(member.networks),
        }
        for member, model in pairs
    )
    # JSON has no NaN; a metric that is undefined here is left out.
    metrics = {
        f"validation_{name}": value for name, value in ensemble.metrics.items() if value == value
    }
    return EnsembleModel(
        path=directory,
        task_kind=task.kind,
        classes=task.classes,
        metrics=metrics,
        members=members,
        weights=tuple(member.weight for member in ensemble.members),
        temperature=temperature,
        unit_rule=rule,
        image_parts=image_parts,
        names=tuple(member_name(model.results_path.name, model.spec) for model in models),
        member_columns=columns,
        nested=ensemble.summary(),
    ).save(directory)


def member_name(results_name: str, spec: str) -> str:
    """Return the folder of a member, named by its results file and its settings."""
    digest = hashlib.sha256(f"{results_name} {spec}".encode()).hexdigest()[:16]
    return f"members/{digest}"
