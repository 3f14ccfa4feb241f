"""Test-set evaluations: each model that is scored on the test split is put on record, once.

An evaluation cannot be undone, so its record is kept twice, and believed only as it was written.
"""

import dataclasses
import datetime
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import lease, publish_replace
from headrace.cache.errors import HeadraceError
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json
from headrace.heads.data.task import Task
from headrace.heads.evaluate.ensemble import average
from headrace.heads.evaluate.intervals import METHOD, metric_interval
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.link import tempered
from headrace.pipelines.models.reference import ModelRef

# Of the test images' hashes, kept with each evaluation to recognise the same images under another
# table.
SKETCH = 256
OLD_RECORD = "test-openings.jsonl"  # its name until the field's word replaced "opening"


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
    n_evaluations: int  # how many winners have been shown this test split, this one included
    metrics: dict[str, float]
    # the images are of so many groups, or distinct images; None: as many as images
    groups: int | None = None


class EvaluationsDamaged(HeadraceError, ValueError):
    """The record of test evaluations is not the one that was written, and neither is its copy."""


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
    groups: npt.NDArray[Any] | None = None,
    temperature: float = 1.0,
) -> TestResult:
    """Score the winner on the test rows and put the evaluation on record; a repeated call with the
    same winner reads the record.

    temperature: the winner's, as it is handed out. The same head at another one (runs of earlier
    versions had none) is no other winner: its decisions are the same, and no test row had a part in
    it. It is scored again, on the same record.
    groups: (rows of the test task,) by default the images' content. Rows of one group are not
    independent of each other, and the interval is over groups. Another winner on the same test
    images is another evaluation: the more winners have been shown a test split, the less its score
    means, and so the count is part of the result.
    """
    identity = {"train": train_digest, "test": test.digest, **winner.identity()}
    predict = partial(winner.predict_rows, test, temperature=temperature)
    return _evaluated(record_path, identity, test, metric, groups, predict, temperature)


def evaluate_average(
    record_path: Path,
    members: Sequence[WeightedModel],
    temperature: float,
    test: Task,
    train_digest: str,
    metric: str,
    groups: npt.NDArray[Any] | None = None,
) -> TestResult:
    """Score the weighted average of several models, at a temperature, as `evaluate_winner` does."""
    identity = {
        "train": train_digest,
        "test": test.digest,
        "ensemble": [
            {"weight": member.weight, "temperature": member.temperature, **member.model.identity()}
            for member in members
        ],
        "temperature": temperature,
    }
    predict = partial(predict_average, members, temperature, test)
    return _evaluated(record_path, identity, test, metric, groups, predict, temperature)


def predict_average(
    members: Sequence[WeightedModel],
    temperature: float,
    test: Task,
    *,
    trust_code: Collection[str] | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
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


def _evaluated(
    evaluations: Path,
    identity: Mapping[str, Any],
    test: Task,
    metric: str,
    groups: npt.NDArray[Any] | None,
    predict: Callable[[], tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    temperature: float,
) -> TestResult:
    """The record of this evaluation; if there is none, `predict` gives targets and predictions, and
    it is made.

    A record whose interval is of an earlier method keeps its score and is given the interval of
    this one; one of another temperature keeps its date alone.
    """
    with lease(_lock(evaluations)):  # two runs that end at once both count
        recorded = read_test_evaluations(evaluations)
        past = [evaluation for evaluation in recorded if _overlaps(evaluation, test)]
        same = [evaluation for evaluation in past if evaluation["winner"] == identity]
        others = {json.dumps(evaluation["winner"], sort_keys=True) for evaluation in past} - {
            json.dumps(identity, sort_keys=True)
        }
        for evaluation in same:
            of_now = (
                evaluation.get("interval") == METHOD and _temperature_of(evaluation) == temperature
            )
            if evaluation["result"]["metric"] == metric and of_now:
                return TestResult(n_evaluations=len(others) + 1, **evaluation["result"])
        target, predicted = predict()
        result = _scored(test, target, predicted, metric, groups, len(others) + 1)
        earlier = next(
            (evaluation for evaluation in same if evaluation["result"]["metric"] == metric), None
        )
        if earlier is not None and _temperature_of(earlier) == temperature:
            kept = {name: earlier["result"][name] for name in ("value", "metrics")}
            result = dataclasses.replace(result, **kept)
        evaluation = {
            "winner": identity,
            "evaluated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "images": _sketch(test),
            **(earlier or {}),
            "result": {
                name: value
                for name, value in dataclasses.asdict(result).items()
                if name != "n_evaluations"
            },
            "interval": METHOD,
            "temperature": temperature,
        }
        if earlier is None:
            _write_test_evaluations(evaluations, [*recorded, evaluation])
        else:
            _write_test_evaluations(
                evaluations, [evaluation if each is earlier else each for each in recorded]
            )
    return result


def _temperature_of(evaluation: Mapping[str, Any]) -> float:
    """Of what was scored.

    Records of earlier versions have that of an ensemble in its description, and of a winner none.
    """
    return float(evaluation.get("temperature", evaluation["winner"].get("temperature", 1.0)))


def _scored(
    test: Task,
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    metric: str,
    groups: npt.NDArray[Any] | None,
    n_evaluations: int,
) -> TestResult:
    metrics = all_metrics(test.kind, target, predicted)
    together = np.asarray(test.content if groups is None else groups)
    assert len(together) == len(target)  # rows without features have left the task before
    low, high = metric_interval(test.kind, target, predicted, metric, groups=together)
    count = len(np.unique(together))
    return TestResult(
        metric, metrics[metric], low, high, len(target), n_evaluations, metrics, count
    )


def _sketch(test: Task) -> list[str]:
    """The smallest content hashes of the test images: two test splits that share a good part of
    their images share some.
    """
    return sorted(test.content.astype(str).tolist())[:SKETCH]


def _overlaps(evaluation: Mapping[str, Any], test: Task) -> bool:
    return not set(evaluation["images"]).isdisjoint(_sketch(test))


def read_test_evaluations(path: Path) -> list[Mapping[str, Any]]:
    """The record of evaluations, oldest first, from its copy where it is damaged, emptied or gone.

    Raises EvaluationsDamaged.
    """
    return _read_twice(path)[0]


def repair_test_evaluations(path: Path) -> list[str]:
    """Write the record of evaluations again where it, or its copy, is not as it was written; what a
    careful person is told then.

    An evaluation cannot be undone, so its record is kept twice: with one file lost, neither another
    score nor a second evaluation that looks like the first can come of it. Raises
    EvaluationsDamaged where both are.
    """
    with lease(_lock(path)):
        evaluations, wrong = _read_twice(path)
        if wrong or (evaluations and not _copy(path).exists()):
            _write_test_evaluations(path, evaluations)
    if not wrong:
        return []
    return [
        f"{path} {wrong}: it was written again from its copy, with {len(evaluations):,} "
        "evaluations of "
        "the test split. To start the count again, knowing that the test images have been seen, "
        f"remove both: rm {shlex.quote(str(path))} {shlex.quote(str(_copy(path)))}"
    ]


def refuse_old_record(path: Path) -> None:
    """Raise EvaluationsDamaged where the record of an earlier version lies beside `path`.

    Ignored, it would let the same test images count as never seen.
    """
    for old_record in (path.with_name(OLD_RECORD), path.with_name(f".{OLD_RECORD}")):
        if old_record.exists():
            raise EvaluationsDamaged(
                f"{old_record} is the record of test-set evaluations of an earlier version of "
                "headrace, which this version does not read: run the recipe in another directory "
                "(`out:`), or, knowing that the test images have been seen, remove it: rm "
                f"{shlex.quote(str(old_record))}"
            )


def _read_twice(path: Path) -> tuple[list[Mapping[str, Any]], str]:
    """The evaluations, and what was wrong with the record, "" where nothing was."""
    refuse_old_record(path)
    record, copy = _read_record(path), _read_record(_copy(path))
    if isinstance(copy, list) and copy:
        if isinstance(record, str):
            return copy, record
        # A process that died between the two writes leaves the copy one line behind.
        if copy[: len(record)] == record and len(copy) > len(record):
            return (
                copy,
                f"lacks {len(copy) - len(record)} of {len(copy)} lines" if record else "is gone",
            )
        return record, ""
    if isinstance(record, str):
        second = f"its copy {copy}" if isinstance(copy, str) else "it has no copy"
        raise EvaluationsDamaged(
            f"{path} {record}, and {second}. It says how often the test split was evaluated, and "
            "how the winner scored: restore it "
            "from a backup. Without one, the count starts again, and the next score is of images "
            f"that a winner may have seen; if you accept that, type: rm {shlex.quote(str(path))} "
            f"{shlex.quote(str(_copy(path)))}"
        )
    return record, ""


def _read_record(path: Path) -> list[Mapping[str, Any]] | str:
    """The evaluations in a file, none where it is not there; or what is wrong with it."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    if not lines:
        return "is empty"
    evaluations: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            evaluation = read_sealed_json(line)
        except SealBroken as error:
            return f"has changed since it was written (line {number}: {error})"
        if not {"winner", "result", "images"} <= set(evaluation):
            return (
                f"has changed since it was written, or is of another version (line {number} is no "
                "evaluation)"
            )
        evaluations.append(evaluation)
    return evaluations


def _write_test_evaluations(path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    data = b"".join(sealed_json(evaluation) + b"\n" for evaluation in evaluations)
    publish_replace(path, data)
    publish_replace(_copy(path), data)


def _copy(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
