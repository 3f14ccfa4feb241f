"""The test section: the selected model's score, its confusions, every evaluation on record."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.data.task import REFIT
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import utc_text
from headrace.pipelines.recipe.finetune_spec import model_spec
from headrace.pipelines.recipe.settings_text import settings_text
from headrace.pipelines.report.leaders import metric_title
from headrace.pipelines.report.outcome import outcome_blocks
from headrace.pipelines.report.page.blocks import Block, Column, Note, Section, Table
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
        text = (
            f"{selected.name.capitalize()} has not been shown a test split: set "
            "task.test_fraction, or a split column with test rows, and run again."
        )
        tables = () if evaluations_table is None else (evaluations_table,)
        return Section("test", "Test split", "", (Note(text), *tables))
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
    frame = pd.DataFrame(
        {
            "metric": [metric_title(name) for name in means],
            "validation": list(means.values()),
            "spread": spread,
            "test": [test[name] for name in means],
        }
    )
    columns = [
        Column("metric", "metric"),
        Column("validation", "validation", "number", hint),
        Column("spread", "± s.e.", "number", "standard error of the mean over the folds"),
        Column("test", "test", "number"),
    ]
    if spread is None:
        del columns[2]
    caption = f"Every metric of {selected.name}"
    return Table("metrics", caption, tuple(columns), frame, sortable=False)


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
    rows = []
    for evaluation in run.test_evaluations:
        winner, result = evaluation["winner"], evaluation["result"]
        # An ensemble's record names its members instead of one spec.
        if "ensemble" in winner:
            model_text = f"an ensemble of {len(winner['ensemble'])} members"
        else:
            spec = model_spec(winner["spec"])
            model_text = f"{spec.kind} {settings_text(spec)} on {' + '.join(winner['inputs'])}"
        rows.append(
            {
                "evaluated": utc_text(evaluation.get("evaluated", "")),
                "shown": model_text,
                "metric": metric_title(result["metric"]),
                **{name: result[name] for name in ("value", "low", "high", "images")},
            }
        )
    columns = (
        Column("evaluated", "evaluated"),
        Column("shown", "what was shown it"),
        Column("metric", "metric"),
        Column("value", "value", "number"),
        Column("low", "95 % from", "number"),
        Column("high", "to", "number"),
        Column("images", "images", "count"),
    )
    return Table(
        "test-evaluations",
        "Every evaluation of the test split, oldest first",
        columns,
        pd.DataFrame(rows),
        sortable=False,
        wide=True,
    )
