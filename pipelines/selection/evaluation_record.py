"""Test-set evaluations: each model that is scored on the test split is put on record, once."""

import dataclasses
import datetime
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.cache.atomic_io import lease, publish_replace
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json
from headrace.heads.arrays import Array
from headrace.heads.data.task import Task
from headrace.heads.evaluate.ensemble import average
from headrace.heads.evaluate.intervals import METHOD, metric_interval
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.evaluate.units import scored_rows, unit_rows
from headrace.heads.link import tempered
from headrace.heads.predict import probability_floor
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.models.reference import ModelRef
from headrace.pipelines.selection.ensemble import Ensemble

# How many of the test images' hashes are kept with each evaluation, to recognize the same images
# when another table lists them.
SKETCH = 256
OLD_RECORD = "test-openings.jsonl"  # the record's name in earlier versions


@dataclass(frozen=True)
class TestResult:
    """The winner's score on the test split, with a 95 % interval over the test images (their
    groups; `metric_interval`).
    """

    metric: str
    value: float
    low: float
    high: float
    images: int
    # how many winners have been evaluated on this test split, this one included
    n_evaluations: int
    metrics: dict[str, float]
    groups: int | None = None  # groups of the images, or distinct images; None: one per image
    units: int | None = None  # units that were scored, each by its images; None: images were


# Returns targets (n, ...) and predictions (n, C) of the test images at the temperature given.
Predict = Callable[[float], tuple[Array, Array]]


class WeightedModel(NamedTuple):
    """A member of an average: its weight, the temperature of its own predictions, and itself."""

    weight: float
    temperature: float
    model: ModelRef


def evaluate_winner(
    record_path: Path,
    winner: ModelRef,
    test: Task,
    train_digest: str,
    metric: str,
    groups: Array | None = None,
    temperature: float = 1.0,
) -> TestResult:
    """Score the winner on the test rows and put the evaluation on record; a repeated call with the
    same winner reads the record.

    temperature: the winner's. At another temperature it is scored again, and its record replaced.
    groups: (rows of the test task,) by default the images' content.
    """
    # Without the temperature (runs of earlier versions had none): at another one the same head
    # makes the same decisions, and no test row had a part in it, so that it is not another winner.
    identity = {"train": train_digest, **_shown_rows(test), **winner.identity()}
    floor = probability_floor(winner.spec, test.kind, len(test.classes))

    def predict(at_temperature: float) -> tuple[Array, Array]:
        return winner.predict_rows(test, temperature=at_temperature)

    return _evaluate_once(record_path, identity, test, metric, groups, predict, temperature, floor)


def evaluate_ensemble(
    record_path: Path,
    ensemble: Ensemble,
    models: Sequence[ModelRef],
    test: Task,
    train_digest: str,
    groups: Array | None = None,
) -> TestResult:
    """Score the ensemble on the test rows, as `evaluate_winner` does the winner.

    models: the members' models, in order.
    """
    members = [
        WeightedModel(member.weight, member.temperature, model)
        for member, model in zip(ensemble.members, models, strict=True)
    ]
    identity = {
        "train": train_digest,
        **_shown_rows(test),
        "ensemble": [
            {"weight": member.weight, "temperature": member.temperature, **member.model.identity()}
            for member in members
        ],
        "temperature": ensemble.temperature,
    }

    def predict(at_temperature: float) -> tuple[Array, Array]:
        return predict_average(members, at_temperature, test)

    return _evaluate_once(
        record_path, identity, test, ensemble.metric, groups, predict, ensemble.temperature, FLOOR
    )


def _shown_rows(test: Task) -> dict[str, str]:
    side = {} if test.side is None else {"side_columns": test.side.fingerprint}
    return {"test": test.digest, **side}


def predict_average(
    members: Sequence[WeightedModel],
    temperature: float,
    test: Task,
    *,
    trust_code: Collection[str] | None = None,
) -> tuple[Array, Array]:
    """Return the targets (n,) and the average's predictions (n, C) of the test rows.

    trust_code: as of `ModelRef.predict_rows`.
    """
    predictions = []
    for member in members:
        target, predicted = member.model.predict_rows(
            test, temperature=member.temperature, trust_code=trust_code
        )
        predictions.append(predicted)
    mean = average(np.array([member.weight for member in members]), np.stack(predictions))
    return target, tempered(mean, test.kind, temperature)


def scored_predictions(
    test: Task, predict: Predict, temperature: float, floor: float
) -> tuple[Array, Array]:
    """Return the targets and the predictions that a task is scored by: of its images, or of its
    units where it has them.
    """
    if test.units is None:
        return predict(temperature)
    # The temperature of units was fitted on units: their images are predicted without it.
    _, predicted = predict(1.0)
    target, predicted = scored_rows(test, np.arange(len(test.ids)), predicted)
    return target, tempered(predicted, test.kind, temperature, floor)


def _evaluate_once(
    record_path: Path,
    identity: Mapping[str, Any],
    test: Task,
    metric: str,
    groups: Array | None,
    predict: Predict,
    temperature: float,
    floor: float,
) -> TestResult:
    """Return the result of this evaluation from the record; without one, predict, score and record
    it.
    """
    # The lease makes two runs that end at the same time count each other.
    with lease(_lock_path(record_path)):
        recorded = read_test_evaluations(record_path)
        # The smallest hashes (a bottom-k sketch): two test splits that share a good part of their
        # images share some of these.
        sketch = sorted(test.content.astype(str).tolist())[:SKETCH]
        overlapping = [
            evaluation
            for evaluation in recorded
            if not set(evaluation["images"]).isdisjoint(sketch)
        ]
        same_model = [
            evaluation
            for evaluation in overlapping
            if evaluation["winner"] == identity and evaluation["result"]["metric"] == metric
        ]
        # The more winners are evaluated on a test split, the less its score means: another one on
        # the same test images is another evaluation, and the count is part of the result.
        other_models = {
            json.dumps(evaluation["winner"], sort_keys=True) for evaluation in overlapping
        } - {json.dumps(identity, sort_keys=True)}
        for evaluation in same_model:
            same_temperature = _recorded_temperature(evaluation) == temperature
            if evaluation.get("interval") == METHOD and same_temperature:
                return TestResult(n_evaluations=len(other_models) + 1, **evaluation["result"])
        target, predicted = scored_predictions(test, predict, temperature, floor)
        result = _score_predictions(test, target, predicted, metric, groups, len(other_models) + 1)
        # With an interval by an earlier method it keeps its score and gets a new interval; at
        # another temperature it keeps only its date.
        earlier_evaluation = same_model[0] if same_model else {}
        if earlier_evaluation and _recorded_temperature(earlier_evaluation) == temperature:
            earlier = earlier_evaluation["result"]
            result = dataclasses.replace(result, value=earlier["value"], metrics=earlier["metrics"])
        result_fields = dataclasses.asdict(result)
        # How many winners were evaluated changes with each one, so it is counted when asked for.
        del result_fields["n_evaluations"]
        evaluation = {
            "winner": identity,
            "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "images": sketch,
            **earlier_evaluation,
            "result": result_fields,
            "interval": METHOD,
            "temperature": temperature,
        }
        if earlier_evaluation:
            recorded[recorded.index(earlier_evaluation)] = evaluation
        else:
            recorded.append(evaluation)
        _write_test_evaluations(record_path, recorded)
    return result


def _recorded_temperature(evaluation: Mapping[str, Any]) -> float:
    """Return the temperature at which an evaluation was made.

    Records of earlier versions have it only for ensembles, among the fields of "winner".
    """
    return float(evaluation.get("temperature", evaluation["winner"].get("temperature", 1.0)))


def _score_predictions(
    test: Task,
    target: Array,
    predicted: Array,
    metric: str,
    groups: Array | None,
    n_evaluations: int,
) -> TestResult:
    row_groups = np.asarray(test.content if groups is None else groups)
    if test.units is not None:
        row_groups = row_groups[unit_rows(test.units)[0]]
    assert len(row_groups) == len(target)  # rows without features were dropped from the task
    metrics = all_metrics(test.kind, target, predicted)
    low, high = metric_interval(test.kind, target, predicted, metric, groups=row_groups)
    return TestResult(
        metric,
        metrics[metric],
        low,
        high,
        images=len(test.ids),
        n_evaluations=n_evaluations,
        metrics=metrics,
        groups=len(np.unique(row_groups)),
        units=None if test.units is None else len(target),
    )


def read_test_evaluations(record_path: Path) -> list[Mapping[str, Any]]:
    """Return the recorded evaluations, oldest first; from the copy if the record is damaged.

    Raises InvalidInput if both are damaged.
    """
    return _read_record_or_copy(record_path)[0]


def repair_test_evaluations(record_path: Path) -> list[str]:
    """Write the record and its copy again if either is damaged or gone; return notes on that.

    Raises InvalidInput if both are damaged.
    """
    # The loss of both would let a second evaluation pass for the first.
    with lease(_lock_path(record_path)):
        evaluations, damage = _read_record_or_copy(record_path)
        if damage or (evaluations and not _copy_path(record_path).exists()):
            _write_test_evaluations(record_path, evaluations)
    if not damage:
        return []
    return [
        f"{record_path} {damage}: it was written again from its copy, with {len(evaluations):,} "
        "evaluations of the test split. To start the count again, knowing that the test images "
        f"have been seen, remove both: rm {shlex.quote(str(record_path))} "
        f"{shlex.quote(str(_copy_path(record_path)))}"
    ]


def refuse_old_record(record_path: Path) -> None:
    """Raise InvalidInput where the record of an earlier version lies beside `record_path`."""
    # Ignored, it would let the same test images count as never seen.
    for old_record in (record_path.with_name(OLD_RECORD), record_path.with_name(f".{OLD_RECORD}")):
        if old_record.exists():
            raise InvalidInput(
                f"{old_record} is the record of test-set evaluations of an earlier version of "
                "headrace, which this version does not read: run the recipe in another directory "
                "(`out:`), or, knowing that the test images have been seen, remove it: rm "
                f"{shlex.quote(str(old_record))}"
            )


def _read_record_or_copy(record_path: Path) -> tuple[list[Mapping[str, Any]], str]:
    """Return the evaluations, and what is wrong with the record: "" if nothing is."""
    refuse_old_record(record_path)
    record, copied_record = _read_record(record_path), _read_record(_copy_path(record_path))
    if isinstance(copied_record, list) and copied_record:
        if isinstance(record, str):
            return copied_record, record
        # A process that died between the two writes leaves the copy one line behind.
        if copied_record[: len(record)] == record and len(copied_record) > len(record):
            return (
                copied_record,
                f"lacks {len(copied_record) - len(record)} of {len(copied_record)} lines"
                if record
                else "is gone",
            )
        return record, ""
    if isinstance(record, str):
        copy_state = (
            f"its copy {copied_record}" if isinstance(copied_record, str) else "it has no copy"
        )
        raise InvalidInput(
            f"{record_path} {record}, and {copy_state}. It says how often the test split was "
            "evaluated, and how the winner scored: restore it from a backup. Without one, the "
            "count starts again, and the next score is of images that a winner may have seen; if "
            f"you accept that, type: rm {shlex.quote(str(record_path))} "
            f"{shlex.quote(str(_copy_path(record_path)))}"
        )
    return record, ""


def _read_record(record_path: Path) -> list[Mapping[str, Any]] | str:
    """Return the evaluations in a file, [] if there is no file; or a text that says its damage."""
    try:
        record_lines = record_path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    if not record_lines:
        return "is empty"
    evaluations: list[Mapping[str, Any]] = []
    for line_number, line in enumerate(record_lines, 1):
        try:
            evaluation = read_sealed_json(line)
        except SealBroken as error:
            return f"has changed since it was written (line {line_number}: {error})"
        if not {"winner", "result", "images"} <= set(evaluation):
            return (
                f"has changed since it was written, or is of another version (line {line_number} "
                "is no evaluation)"
            )
        evaluations.append(evaluation)
    return evaluations


def _write_test_evaluations(record_path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    # In two files whose lines carry checksums: an evaluation cannot be undone, or made a second
    # time.
    record_bytes = b"".join(sealed_json(evaluation) + b"\n" for evaluation in evaluations)
    publish_replace(record_path, record_bytes)
    publish_replace(_copy_path(record_path), record_bytes)


def _copy_path(record_path: Path) -> Path:
    return record_path.with_name(f".{record_path.name}")


def _lock_path(record_path: Path) -> Path:
    return record_path.with_suffix(".lock")
