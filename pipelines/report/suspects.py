"""The section of pictures to look at: confident mistakes of the winner, and likely label errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Floats, Index
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report.label_errors import likely_errors_by_label, likely_label_errors
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Gallery,
    Note,
    Section,
    make_table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails

SHOWN = 24  # pictures of a gallery
# Name and caption of the tables.
_ALL_MISTAKES = "mistakes", "Every mistake, the surest first"
_ALL_LABEL_ERRORS = "label-errors", "Every likely label error, the likeliest first"


def suspects_section(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """Return the section: tables of all mistakes and suspects, the first of them as pictures."""
    kinds = {"single": _single_blocks, "multi": _multi_blocks}
    blocks = kinds.get(run.task_kind, _regression_blocks)(run, thumbnails)
    lead = (
        "Validation images only, each predicted by a model that did not train on it. A picture "
        "often says at once whether the head or the label is wrong."
    )
    return Section("mistakes", "Mistakes and likely label errors", lead, tuple(blocks))


def _single_blocks(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    held_out_rows, class_names = run.held_out_rows, np.asarray(run.classes, object)
    target = run.bank.target[held_out_rows].astype(np.int64)
    predicted = run.out_of_fold_predictions[held_out_rows]
    predicted_class = predicted.argmax(1)
    confidence = predicted.max(1)
    wrong_rows = np.flatnonzero(predicted_class != target)
    # A mistake that the winner is sure of is most worth a look: the label may be wrong.
    wrong_rows = wrong_rows[np.argsort(-confidence[wrong_rows], kind="stable")]
    probability = Column("probability", "probability", "share", "of the predicted class")
    mistakes = _gallery_and_table(
        run,
        thumbnails,
        held_out_rows[wrong_rows],
        _mistakes_caption(len(wrong_rows)),
        {
            Column("label", "label"): class_names[target[wrong_rows]],
            Column("predicted", "predicted"): class_names[predicted_class[wrong_rows]],
            probability: confidence[wrong_rows],
        },
        ("label", "predicted", "probability"),
        _ALL_MISTAKES,
        filters=("label", "predicted"),
    )
    return [*mistakes, *_label_error_blocks(run, thumbnails, target, predicted)]


def _mistakes_caption(n_mistakes: int) -> str:
    shown_text = count_text(min(SHOWN, n_mistakes), "mistake")
    return f"The {shown_text} that the winner is surest of, of {n_mistakes:,}"


def _label_error_blocks(
    run: FinishedRun, thumbnails: Thumbnails, target: Index, predicted: Floats
) -> list[Block]:
    held_out_rows, class_names = run.held_out_rows, np.asarray(run.classes, object)
    # Out-of-fold predictions: a head would repeat the wrong label of an image that it trained on.
    rows = likely_label_errors(target, predicted)
    if not len(rows):
        return [Note("No label is likely wrong by confident learning.", "good")]
    # The most probable class but the label's: a label can be the most probable class itself, and
    # suspected because another class reaches its threshold.
    other_probabilities = predicted[rows].copy()
    other_probabilities[np.arange(len(rows)), target[rows]] = -1
    hint = "predicted probability of the label as it is"
    suggested = class_names[other_probabilities.argmax(1)]
    return [
        _suspects_note(len(rows), len(held_out_rows), " on the winner's out-of-fold predictions"),
        *_gallery_and_table(
            run,
            thumbnails,
            held_out_rows[rows],
            f"The {min(SHOWN, len(rows))} likeliest label errors",
            {
                Column("label", "label"): class_names[target[rows]],
                Column("suggested", "suggested"): suggested,
                Column("of_label", "of the label", "share", hint): predicted[rows, target[rows]],
                Column("of_suggested", "of the suggestion", "share"): other_probabilities.max(1),
            },
            ("label", "suggested", "of_suggested"),
            _ALL_LABEL_ERRORS,
            filters=("label", "suggested"),
        ),
    ]


def _multi_blocks(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    held_out_rows, label_names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[held_out_rows], run.out_of_fold_predictions[held_out_rows]
    hint = "predicted probability that the image has the label"
    probability = Column("probability", "probability", "share", hint)

    def gallery_and_table(
        rows: Index, labels: Index, caption: str, name_and_caption: tuple[str, str]
    ) -> list[Block]:
        columns = {
            Column("label", "label"): label_names[labels],
            Column("given", "given", "yes"): target[rows, labels] > 0,
            probability: predicted[rows, labels],
        }
        told = ("label", "given", "probability")
        return _gallery_and_table(
            run,
            thumbnails,
            held_out_rows[rows],
            caption,
            columns,
            told,
            name_and_caption,
            filters=("label", "given"),
        )

    rows, labels = np.nonzero((predicted >= 0.5) != (target > 0))
    surest_first = np.argsort(
        -np.abs(predicted[rows, labels] - target[rows, labels]), kind="stable"
    )
    rows, labels = rows[surest_first], labels[surest_first]
    suspects = likely_errors_by_label(target, predicted)
    n_suspects = len(suspects[0])
    suspects_caption = f"The {min(SHOWN, n_suspects)} likeliest label errors"
    return [
        *gallery_and_table(rows, labels, _mistakes_caption(len(rows)), _ALL_MISTAKES),
        _suspects_note(n_suspects, target.size, ", label by label"),
        *gallery_and_table(*suspects, suspects_caption, _ALL_LABEL_ERRORS),
    ]


def _suspects_note(n_suspects: int, n_labels: int, by: str) -> Note:
    return Note(
        f"{n_suspects:,} of {count_text(n_labels, 'label')} "
        f"({100 * n_suspects / max(n_labels, 1):.1f} %) are likely wrong by confident learning "
        f"(Northcutt et al. 2021){by}. A weak head suspects too many: look before you relabel."
    )


def _regression_blocks(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    held_out_rows, target_names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[held_out_rows], run.out_of_fold_predictions[held_out_rows]
    residual = predicted - target
    # In units of each target's usual error, so that targets of different scales can be compared;
    # 1.4826 makes the median absolute deviation the standard deviation of a normal distribution.
    usual_error = 1.4826 * np.median(np.abs(residual - np.median(residual, 0)), 0)
    error_ratio = np.abs(residual) / np.where(usual_error > 0, usual_error, 1)
    largest_first = np.argsort(-error_ratio, axis=None, kind="stable")
    row, column = np.unravel_index(largest_first, error_ratio.shape)
    hint = "the error, in standard deviations of the target's errors (robust)"
    gallery, table = _gallery_and_table(
        run,
        thumbnails,
        held_out_rows[row],
        f"The {count_text(min(SHOWN, len(row)), 'largest error')}",
        {
            Column("target", "target"): target_names[column],
            Column("true", "true", "number"): target[row, column],
            Column("predicted", "predicted", "number"): predicted[row, column],
            Column("times", "usual errors", "number", hint): error_ratio[row, column],
        },
        ("target", "true", "predicted", "times"),
        ("mistakes", "Every error, the largest first"),
    )
    advice = "An error of many times the usual one is often a value that was written down wrongly."
    return [gallery, Note(advice), table]


def _gallery_and_table(
    run: FinishedRun,
    thumbnails: Thumbnails,
    rows: Index,
    gallery_caption: str,
    columns: Mapping[Column, Any],
    told: Sequence[str],
    name_and_caption: tuple[str, str],
    filters: tuple[str, ...] = (),
) -> list[Block]:
    """Return pictures of the first images, and a table of all.

    rows: (n,) of the run's bank. told: names of the columns that stand below the pictures.
    """
    columns = {Column("id", "image"): run.bank.ids[rows], **columns}
    table = make_table(*name_and_caption, columns, filters=filters, search=True)
    pictures = []
    # The columns' names are for programs that read the tables.
    titles = {"of_suggested": "probability", "times": "usual errors"}
    content_hashes = run.bank.content[rows[:SHOWN]].astype(str).tolist()
    cells_of_row = table.frame.head(SHOWN).to_dict("records")
    for number, (content, cells) in enumerate(zip(content_hashes, cells_of_row, strict=True), 1):
        lines = tuple((titles.get(name, name), _cell_text(name, cells[name])) for name in told)
        alt_text = ", ".join(f"{title} {text}" for title, text in lines)
        alt_texts = [f"Image {number}: {alt_text}"]
        pictures.append(thumbnails.picture([content], alt_texts, str(cells["id"]), lines))
    return [Gallery(gallery_caption, tuple(pictures)), table]


def _cell_text(column_name: str, cell_value: object) -> str:
    if isinstance(cell_value, bool | np.bool_):
        return "yes" if cell_value else "no"
    if isinstance(cell_value, float | np.floating):
        return (
            f"{100 * cell_value:.1f} %"
            if column_name in ("probability", "of_suggested")
            else f"{cell_value:.4g}"
        )
    return str(cell_value)
