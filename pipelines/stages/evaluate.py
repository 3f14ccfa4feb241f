"""The stage that evaluates the selected model on the test split, once, and records that."""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array
from headrace.heads.data.task import Task
from headrace.heads.evaluate.intervals import METHOD, metric_interval
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.evaluate.units import unit_rows
from headrace.pipelines.models.reference import ModelAverage
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.evaluation_record import (
    TestResult,
    lock_path,
    read_test_evaluations,
    repair_test_evaluations,
    write_test_evaluations,
)
from headrace.pipelines.stages.services import Services

# How many of the test images' hashes are kept with each evaluation, to recognize the same images
# when another table lists them.
SKETCH = 256


def evaluate(state: RunState, services: Services) -> RunState:
    """Return the state with the score of the selected model on the test split, if there is one.

    The score of a model that was evaluated on these images before is read from the record.
    """
    with services.timed("test") as report_done, lease(state.paths.conclusion_lock):
        record_notes = repair_test_evaluations(state.paths.test_evaluations)
        dataset, test_result = state.dataset, None
        if len(dataset.test.ids):
            assert state.selected is not None
            test_result = evaluate_model(
                state.paths.test_evaluations,
                state.selected.model,
                dataset.test,
                dataset.train.digest,
                state.metric,
                dataset.test_groups,
            )
        report_done(
            "no test split" if test_result is None else count_text(test_result.images, "image")
        )
    return dataclasses.replace(state, test=test_result, notes=(*state.notes, *record_notes))


def evaluate_model(
    record_path: Path,
    model: ModelAverage,
    test: Task,
    train_digest: str,
    metric: str,
    groups: Array | None = None,
) -> TestResult:
    """Score a model on the test rows and put the evaluation on record; a repeated call with the
    same model reads the record. At another temperature it is scored again, and its record replaced.

    groups: (rows of the test task,) by default the images' content.
    """
    side = {} if test.side is None else {"side_columns": test.side.fingerprint}
    identity = {"train": train_digest, "test": test.digest, **side, **model.identity()}
    temperature = model.fitted_temperature
    # The lease makes two runs that end at the same time count each other.
    with lease(lock_path(record_path)):
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
        target, predicted, _ = model.predict_scored(test)
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
        write_test_evaluations(record_path, recorded)
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
