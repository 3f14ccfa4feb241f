"""The stage that evaluates the selected model on the test split, once, and records that."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array
from headrace.heads.data.task import Task
from headrace.heads.evaluate.ensemble import average
from headrace.heads.evaluate.intervals import METHOD, metric_interval
from headrace.heads.evaluate.metrics import all_metrics
from headrace.heads.evaluate.temperature import FLOOR
from headrace.heads.evaluate.units import scored_rows, unit_rows
from headrace.heads.link import tempered
from headrace.heads.predict import probability_floor
from headrace.pipelines.models.reference import ModelRef
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.ensemble import Ensemble
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

# Returns targets (n, ...) and predictions (n, C) of the test images at the temperature given.
Predict = Callable[[float], tuple[Array, Array]]


class WeightedModel(NamedTuple):
    """A member of an average: its weight, the temperature of its own predictions, and itself."""

    weight: float
    temperature: float
    model: ModelRef


def evaluate(state: RunState, services: Services) -> RunState:
    """Return the state with the score of the selected model on the test split, if there is one.

    The score of a model that was evaluated on these images before is read from the record.
    """
    with services.timed("test") as report_done, lease(state.paths.conclusion_lock):
        record_notes = repair_test_evaluations(state.paths.test_evaluations)
        test_result = _evaluate_on_test(state)
        report_done(
            "no test split" if test_result is None else count_text(test_result.images, "image")
        )
    return dataclasses.replace(state, test=test_result, notes=(*state.notes, *record_notes))


def _evaluate_on_test(state: RunState) -> TestResult | None:
    dataset, selected = state.dataset, state.selected
    assert selected is not None
    if not len(dataset.test.ids):
        return None
    if selected.ensemble is not None and selected.ensemble.chosen:
        return evaluate_ensemble(
            state.paths.test_evaluations,
            selected.ensemble,
            [state.model_of(member.row) for member in selected.ensemble.members],
            dataset.test,
            dataset.train.digest,
            dataset.test_groups,
        )
    return evaluate_winner(
        state.paths.test_evaluations,
        state.model_of(selected.board.iloc[0]),
        dataset.test,
        dataset.train.digest,
        state.metric,
        dataset.test_groups,
        selected.temperature,
    )


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
