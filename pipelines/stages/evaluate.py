"""The stage that evaluates the selected model on the test split, once."""

from dataclasses import replace

from headrace.cache.atomic_io import lease
from headrace.cache.count_text import count_text
from headrace.pipelines.planning.run_state import RunState
from headrace.pipelines.selection.evaluation_record import (
    TestResult,
    evaluate_ensemble,
    evaluate_winner,
    repair_test_evaluations,
)
from headrace.pipelines.stages.services import Services


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
    return replace(state, test=test_result, notes=(*state.notes, *record_notes))


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
