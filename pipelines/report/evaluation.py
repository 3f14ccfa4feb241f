"""The test section: the selected model's score, its confusions, every evaluation on record."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.cache.count_text import count_text
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import utc_text
from headrace.pipelines.recipe.finetune_spec import model_spec
from headrace.pipelines.recipe.settings_text import settings_text
from headrace.pipelines.report.leaders import metric_title
from headrace.pipelines.report.outcome import outcome_blocks
from headrace.pipelines.report.page.blocks import Block, Column, Note, Section, Table, make_table
from headrace.pipelines.report.selected_model import SelectedModel, TestPredictions


def test_section(
    run: FinishedRun, selected: SelectedModel, tested: TestPredictions | str
) -> Section:
    """Return the section.

    tested: the selected model's, from `test_predictions`; a text says why there are none.
    """
    evaluation = selected.test_evaluation
    evaluations_table = _evaluations_table(run)
    if evaluation is None:
        note = Note(
            f"{selected.name.capitalize()} has not been shown a test split: set "
            "task.test_fraction, or a split column with test rows, and run again."
        )
        if selected.damage:
            note = Note(f"Which model is selected is not known: {selected.damage}", "warning")
        tables = () if evaluations_table is None else (evaluations_table,)
        return Section("test", "Test split", "", (note, *tables))
    result = evaluation["result"]
    blocks: list[Block] = [_evaluation_count(run, evaluation, selected)]
    if evaluations_table is not None:
        blocks.append(evaluations_table)
    blocks.append(_metric_table(run, selected, result["metrics"]))
    if isinstance(tested, str):
        blocks.append(Note(f"No confusions of the test split: {tested}."))
    else:
        blocks += outcome_blocks(
            run.task_kind, run.classes, tested.target, tested.predicted, "test", selected.name
        )
    rows_text = count_text(result["images"], "image")
    if (n_units := result.get("units")) is not None:
        rows_text = f"{count_text(n_units, 'unit')} ({run.recipe.task.unit}) of {rows_text}"
    ensemble_text = ""
    if selected.ensemble is not None:
        ensemble_text = f"They were shown to the ensemble of {selected.heads}, not to the winner. "
    lead = (
        f"{rows_text} that no head was trained or chosen on. {ensemble_text}The rows and "
        "predictions below are those of the evaluation on record; this report adds none."
    )
    return Section("test", "Test split", lead, tuple(blocks))


def _metric_table(run: FinishedRun, selected: SelectedModel, test: Mapping[str, float]) -> Table:
    """Return every metric of the selected model, on validation rows and on the test images (test:
    by name).
    """
    if selected.ensemble is None:
        fold_heads = run.heads[
            (run.heads["spec"] == run.winner.spec)
            & (run.heads["inputs"] == run.winner.inputs)
            & (run.heads["fold"] != REFIT)
        ]
        names = [name for name in test if name in fold_heads]
        folds = fold_heads[names]
        means = dict(zip(names, folds.mean().tolist(), strict=True))
        # of one fold the standard deviation is nan, and so the error
        spread = (folds.std(ddof=1) / np.sqrt(len(folds))).tolist()
        hint = "mean over the validation folds"
    else:
        scored = selected.ensemble["metrics"]
        means = {
            name: float(scored[f"validation_{name}"])
            for name in test
            if f"validation_{name}" in scored
        }
        # Its validation score is of all folds together, so that it has no error over folds.
        spread = None
        hint = "on validation images that had no part in picking its heads, all folds together"
    columns: dict[Column, Any] = {
        Column("metric", "metric"): [metric_title(name) for name in means],
        Column("validation", "validation", "number", hint): list(means.values()),
    }
    if spread is not None:
        hint = "standard error of the mean over the folds"
        columns[Column("spread", "± s.e.", "number", hint)] = spread
    columns[Column("test", "test", "number")] = [test[name] for name in means]
    return make_table("metrics", f"Every metric of {selected.name}", columns, sortable=False)


def _evaluation_count(run: FinishedRun, evaluation: Any, selected: SelectedModel) -> Note:
    # By image, and not by split: another seed draws another test split from the same images.
    images = set(evaluation["images"])
    winners = {
        str(past["winner"])
        for past in run.test_evaluations
        if not images.isdisjoint(past["images"])
    }
    if len(winners) == 1:
        return Note(
            "The test split has been evaluated once, for "
            + ("this winner." if selected.ensemble is None else "this ensemble."),
            "good",
        )
    return Note(
        f"{len(winners)} different winners have been shown these test images. Each time, the score "
        "says a little less about new images: whoever picks the best of them has chosen on the "
        "test split.",
        "warning",
    )


def _evaluations_table(run: FinishedRun) -> Table | None:
    if not run.test_evaluations:
        return None
    evaluations = run.test_evaluations
    dates = [utc_text(evaluation.get("evaluated", "")) for evaluation in evaluations]
    results = [evaluation["result"] for evaluation in evaluations]
    columns = {
        Column("evaluated", "evaluated"): dates,
        Column("shown", "what was shown it"): [_shown_text(one["winner"]) for one in evaluations],
        Column("metric", "metric"): [metric_title(result["metric"]) for result in results],
        Column("value", "value", "number"): [result["value"] for result in results],
        Column("low", "95 % from", "number"): [result["low"] for result in results],
        Column("high", "to", "number"): [result["high"] for result in results],
        Column("images", "images", "count"): [result["images"] for result in results],
    }
    caption = "Every evaluation of the test split, oldest first"
    return make_table("test-evaluations", caption, columns, sortable=False, wide=True)


def _shown_text(winner: Mapping[str, Any]) -> str:
    # An ensemble's record names its members instead of one spec.
    if "ensemble" in winner:
        return f"an ensemble of {len(winner['ensemble'])} members"
    spec = model_spec(winner["spec"])
    return f"{spec.kind} {settings_text(spec)} on {' + '.join(winner['inputs'])}"
