"""The section of pictures to look at: confident mistakes of the winner, and likely label errors."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Floats, Index
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report.label_errors import likely_errors_by_label, likely_label_errors
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Gallery,
    Note,
    Picture,
    Section,
    Table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails

SHOWN = 24  # pictures of a gallery

_ID_COLUMN = Column("id", "image")


def suspects_section(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """Return the section: tables of all mistakes and suspects, the first of them as pictures."""
    kinds = {"single": _single_blocks, "multi": _multi_blocks}
    blocks = kinds.get(run.task_kind, _regression_blocks)(run, thumbnails)
    lead = (
        "Validation images only, each predicted by a head that did not train on it. A picture "
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
    mistake_frame = pd.DataFrame(
        {
            "id": run.bank.ids[held_out_rows[wrong_rows]],
            "label": class_names[target[wrong_rows]],
            "predicted": class_names[predicted_class[wrong_rows]],
            "probability": confidence[wrong_rows],
        }
    )
    table_columns = (
        _ID_COLUMN,
        Column("label", "label"),
        Column("predicted", "predicted"),
        Column("probability", "probability", "share", "of the predicted class"),
    )
    caption_columns = ("label", "predicted", "probability")
    return [
        Gallery(
            _mistakes_caption(len(wrong_rows)),
            _make_pictures(
                run, thumbnails, held_out_rows[wrong_rows], mistake_frame, caption_columns
            ),
        ),
        Table(
            "mistakes",
            "Every mistake, the surest first",
            table_columns,
            mistake_frame,
            filters=("label", "predicted"),
            search=True,
        ),
        *_label_error_blocks(run, thumbnails, target, predicted),
    ]


def _mistakes_caption(n_mistakes: int) -> str:
    shown_text = count_text(min(SHOWN, n_mistakes), "mistake")
    return f"The {shown_text} that the winner is surest of, of {n_mistakes:,}"


def _label_error_blocks(
    run: FinishedRun, thumbnails: Thumbnails, target: Index, predicted: Floats
) -> list[Block]:
    held_out_rows, class_names = run.held_out_rows, np.asarray(run.classes, object)
    # Out-of-fold predictions: a head would repeat the wrong label of an image that it trained on.
    suspect_rows = likely_label_errors(target, predicted)
    if not len(suspect_rows):
        return [Note("No label is likely wrong by confident learning.", "good")]
    # The most probable class but the label's: a label can be the most probable class itself, and
    # suspected because another class reaches its threshold.
    other_probabilities = predicted[suspect_rows].copy()
    other_probabilities[np.arange(len(suspect_rows)), target[suspect_rows]] = -1
    suspect_frame = pd.DataFrame(
        {
            "id": run.bank.ids[held_out_rows[suspect_rows]],
            "label": class_names[target[suspect_rows]],
            "suggested": class_names[other_probabilities.argmax(1)],
            "of_label": predicted[suspect_rows, target[suspect_rows]],
            "of_suggested": other_probabilities.max(1),
        }
    )
    table_columns = (
        _ID_COLUMN,
        Column("label", "label"),
        Column("suggested", "suggested"),
        Column("of_label", "of the label", "share", "predicted probability of the label as it is"),
        Column("of_suggested", "of the suggestion", "share"),
    )
    caption_columns = ("label", "suggested", "of_suggested")
    return [
        _suspects_note(
            len(suspect_rows), len(held_out_rows), " on the winner's out-of-fold predictions"
        ),
        Gallery(
            f"The {min(SHOWN, len(suspect_rows))} likeliest label errors",
            _make_pictures(
                run, thumbnails, held_out_rows[suspect_rows], suspect_frame, caption_columns
            ),
        ),
        Table(
            "label-errors",
            "Every likely label error, the likeliest first",
            table_columns,
            suspect_frame,
            filters=("label", "suggested"),
            search=True,
        ),
    ]


def _multi_blocks(run: FinishedRun, thumbnails: Thumbnails) -> list[Block]:
    held_out_rows, label_names = run.held_out_rows, np.asarray(run.classes, object)
    target, predicted = run.bank.target[held_out_rows], run.out_of_fold_predictions[held_out_rows]
    table_columns = (
        _ID_COLUMN,
        Column("label", "label"),
        Column("given", "given", "yes"),
        Column(
            "probability",
            "probability",
            "share",
            "predicted probability that the image has the label",
        ),
    )

    def gallery_and_table(
        caption: str, table_name: str, table_caption: str, rows: Index, labels: Index
    ) -> list[Block]:
        frame = pd.DataFrame(
            {
                "id": run.bank.ids[held_out_rows[rows]],
                "label": label_names[labels],
                "given": target[rows, labels] > 0,
                "probability": predicted[rows, labels],
            }
        )
        caption_columns = ("label", "given", "probability")
        pictures = _make_pictures(run, thumbnails, held_out_rows[rows], frame, caption_columns)
        filters = ("label", "given")
        return [
            Gallery(caption, pictures),
            Table(table_name, table_caption, table_columns, frame, filters=filters, search=True),
        ]

    rows, labels = np.nonzero((predicted >= 0.5) != (target > 0))
    surest_first = np.argsort(
        -np.abs(predicted[rows, labels] - target[rows, labels]), kind="stable"
    )
    suspects = likely_errors_by_label(target, predicted)
    n_suspects = len(suspects[0])
    return [
        *gallery_and_table(
            _mistakes_caption(len(rows)),
            "mistakes",
            "Every mistake, the surest first",
            rows[surest_first],
            labels[surest_first],
        ),
        _suspects_note(n_suspects, target.size, ", label by label"),
        *gallery_and_table(
            f"The {min(SHOWN, n_suspects)} likeliest label errors",
            "label-errors",
            "Every likely label error, the likeliest first",
            *suspects,
        ),
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
    error_row, error_column = np.unravel_index(largest_first, error_ratio.shape)
    error_frame = pd.DataFrame(
        {
            "id": run.bank.ids[held_out_rows[error_row]],
            "target": target_names[error_column],
            "true": target[error_row, error_column],
            "predicted": predicted[error_row, error_column],
            "times": error_ratio[error_row, error_column],
        }
    )
    table_columns = (
        _ID_COLUMN,
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
    caption_columns = ("target", "true", "predicted", "times")
    return [
        Gallery(
            f"The {count_text(min(SHOWN, len(error_frame)), 'largest error')}",
            _make_pictures(run, thumbnails, held_out_rows[error_row], error_frame, caption_columns),
        ),
        Note(
            "An error of many times the usual one is often a value that was written down wrongly."
        ),
        Table(
            "mistakes", "Every error, the largest first", table_columns, error_frame, search=True
        ),
    ]


def _make_pictures(
    run: FinishedRun,
    thumbnails: Thumbnails,
    image_rows: Index,
    image_frame: pd.DataFrame,
    caption_columns: Sequence[str],
) -> tuple[Picture, ...]:
    pictures = []
    # The columns' names are for programs that read the tables.
    caption_titles = {"of_suggested": "probability", "times": "usual errors"}
    for position, (image_row, row_values) in enumerate(
        zip(image_rows[:SHOWN], image_frame.head(SHOWN).to_dict("records"), strict=True)
    ):
        content_hash = str(run.bank.content[image_row].astype(str))
        caption_lines = tuple(
            (
                caption_titles.get(str(column_name), str(column_name)),
                _cell_text(str(column_name), row_values[column_name]),
            )
            for column_name in caption_columns
        )
        alt_text = ", ".join(f"{column_name} {value}" for column_name, value in caption_lines)
        pictures.append(
            Picture(
                (thumbnails.get(content_hash),),
                (f"Image {position + 1}: {alt_text}",),
                str(row_values["id"]),
                caption_lines,
                thumbnails.paths_of(content_hash),
            )
        )
    return tuple(pictures)


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
