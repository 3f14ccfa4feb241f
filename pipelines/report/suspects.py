"""Pictures to look at: the mistakes that the winner is surest of, and the labels that are likely
wrong.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report.blocks import Block, Column, Gallery, Note, Picture, Section, Table
from headrace.pipelines.report.label_errors import likely_errors_by_label, likely_label_errors
from headrace.pipelines.report.thumbnails import Thumbnails

SHOWN = 24

_ID: tuple[Column, ...] = (Column("id", "image"),)


def suspects(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """The section; every row that is suspected is in its table, the first of them are pictures."""
    kinds = {"single": _single, "multi": _multi}
    blocks = kinds.get(run.task_kind, _regression)(run, thumbnails)
    lead = (
        "Validation images only, each predicted by a head that did not train on it. A picture "
        "often says at once whether the head or the label is wrong."
    )
    return Section("mistakes", "Mistakes and likely label errors", lead, tuple(blocks))


def _single(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    rows, names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[rows].astype(np.int64), run.out_of_fold[rows]
    guess = predicted.argmax(1)
    sure = predicted.max(1)
    wrong = np.flatnonzero(guess != target)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")]
    mistakes = pd.DataFrame(
        {
            "id": run.bank.ids[rows[wrong]],
            "label": names[target[wrong]],
            "predicted": names[guess[wrong]],
            "probability": sure[wrong],
        }
    )
    columns: tuple[Column, ...] = (
        *_ID,
        Column("label", "label"),
        Column("predicted", "predicted"),
        Column("probability", "probability", "share", "of the predicted class"),
    )
    blocks: list[Block] = [
        Gallery(
            f"The {min(SHOWN, len(wrong))} mistakes that the winner is surest of, of "
            f"{len(wrong):,}",
            _pictures(
                run, thumbnails, rows[wrong], mistakes, ("label", "predicted", "probability")
            ),
        ),
        Table(
            "mistakes",
            "Every mistake, the surest first",
            columns,
            mistakes,
            filters=("label", "predicted"),
            search=True,
        ),
    ]
    found = likely_label_errors(target, predicted)
    if not len(found):
        return [*blocks, Note("No label is likely wrong by confident learning.", "good")]
    # The largest class but the label's: where the label itself is the largest, another passes its
    # own threshold more surely.
    others = predicted[found].copy()
    others[np.arange(len(found)), target[found]] = -1
    errors = pd.DataFrame(
        {
            "id": run.bank.ids[rows[found]],
            "label": names[target[found]],
            "suggested": names[others.argmax(1)],
            "of_label": predicted[found, target[found]],
            "of_suggested": others.max(1),
        }
    )
    columns = (
        *_ID,
        Column("label", "label"),
        Column("suggested", "suggested"),
        Column("of_label", "of the label", "share", "predicted probability of the label as it is"),
        Column("of_suggested", "of the suggestion", "share"),
    )
    return [
        *blocks,
        Note(
            f"{len(found):,} of {len(rows):,} labels ({len(found) / len(rows):.1%}) are likely "
            "wrong by confident learning (Northcutt et al. 2021) on the winner's out-of-fold "
            "predictions. A weak head suspects too many: look before you relabel."
        ),
        Gallery(
            f"The {min(SHOWN, len(found))} likeliest label errors",
            _pictures(run, thumbnails, rows[found], errors, ("label", "suggested", "of_suggested")),
        ),
        Table(
            "label-errors",
            "Every likely label error, the likeliest first",
            columns,
            errors,
            filters=("label", "suggested"),
            search=True,
        ),
    ]


def _multi(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    rows, names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[rows], run.out_of_fold[rows]
    columns = (
        *_ID,
        Column("label", "label"),
        Column("given", "given", "yes"),
        Column(
            "probability",
            "probability",
            "share",
            "predicted probability that the image has the label",
        ),
    )

    def table(
        name: str, caption: str, row: npt.NDArray[np.int64], label: npt.NDArray[np.int64]
    ) -> Table:
        frame = pd.DataFrame(
            {
                "id": run.bank.ids[rows[row]],
                "label": names[label],
                "given": target[row, label] > 0,
                "probability": predicted[row, label],
            }
        )
        return Table(name, caption, columns, frame, filters=("label", "given"), search=True)

    row, label = np.nonzero((predicted >= 0.5) != (target > 0))
    order = np.argsort(-np.abs(predicted[row, label] - target[row, label]), kind="stable")
    mistakes = table("mistakes", "Every mistake, the surest first", row[order], label[order])
    row_e, label_e = likely_errors_by_label(target, predicted)
    errors = table("label-errors", "Every likely label error, the likeliest first", row_e, label_e)
    shown = ("label", "given", "probability")
    return [
        Gallery(
            f"The {min(SHOWN, len(row))} mistakes that the winner is surest of, of {len(row):,}",
            _pictures(run, thumbnails, rows[row[order]], mistakes.frame, shown),
        ),
        mistakes,
        Note(
            f"{len(row_e):,} of {target.size:,} labels ({len(row_e) / max(target.size, 1):.1%}) "
            "are likely wrong by confident learning (Northcutt et al. 2021), label by label. A "
            "weak head suspects too many: look before you relabel."
        ),
        Gallery(
            f"The {min(SHOWN, len(row_e))} likeliest label errors",
            _pictures(run, thumbnails, rows[row_e], errors.frame, shown),
        ),
        errors,
    ]


def _regression(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    rows, names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[rows], run.out_of_fold[rows]
    error = predicted - target
    # In units of each target's usual error, so that targets of different scales can be compared;
    # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
    usual = 1.4826 * np.median(np.abs(error - np.median(error, 0)), 0)
    worth = np.abs(error) / np.where(usual > 0, usual, 1)
    order = np.argsort(-worth, axis=None, kind="stable")
    row, column = np.unravel_index(order, worth.shape)
    frame = pd.DataFrame(
        {
            "id": run.bank.ids[rows[row]],
            "target": names[column],
            "true": target[row, column],
            "predicted": predicted[row, column],
            "times": worth[row, column],
        }
    )
    columns = (
        *_ID,
        Column("target", "target"),
        Column("true", "true", "number"),
        Column("predicted", "predicted", "number"),
        Column(
            "times",
            "usual errors",
            "number",
            "the error, in standard deviations of the target's errors (robust)",
        ),
    )
    return [
        Gallery(
            f"The {min(SHOWN, len(frame))} largest errors",
            _pictures(run, thumbnails, rows[row], frame, ("target", "true", "predicted", "times")),
        ),
        Note(
            "An error of many times the usual one is often a value that was written down wrongly."
        ),
        Table("mistakes", "Every error, the largest first", columns, frame, search=True),
    ]


def _pictures(
    run: FinishedRun,
    thumbnails: Thumbnails,
    rows: npt.NDArray[np.int64],
    frame: pd.DataFrame,
    shown: Sequence[str],
) -> tuple[Picture, ...]:
    pictures = []
    titles = {"of_suggested": "probability", "times": "usual errors"}
    for position, (row, values) in enumerate(
        zip(rows[:SHOWN], frame.head(SHOWN).to_dict("records"), strict=True)
    ):
        content = run.bank.content[row].astype(str)
        lines = tuple(
            (titles.get(str(name), str(name)), _said(str(name), values[name])) for name in shown
        )
        said = ", ".join(f"{name} {value}" for name, value in lines)
        pictures.append(
            Picture(
                (thumbnails.get(str(content)),),
                (f"Image {position + 1}: {said}",),
                str(values["id"]),
                lines,
            )
        )
    return tuple(pictures)


def _said(name: str, value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.1%}" if name in ("probability", "of_suggested") else f"{value:.4g}"
    return str(value)
