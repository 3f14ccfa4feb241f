"""The slices section: the winner's score on the images of each value of each column."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Doubles, Index
from headrace.heads.evaluate.intervals import LEVEL, mean_loss_interval, proportion_interval
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import number_text
from headrace.pipelines.report.judged import JudgedSide, one_by_one, side_values, user_columns
from headrace.pipelines.report.leaders import metric_format, metric_title
from headrace.pipelines.report.page.blocks import Block, Column, Note, Section, Table

MAX_VALUES = 30  # distinct values of a sliced column; numbers with more are cut at quartiles
MIN_IMAGES = 10  # of a slice: a score of fewer says nothing
SHOWN_WARNINGS = 3


def slices_section(
    run: FinishedRun, sides: tuple[JudgedSide, ...], measured: pd.DataFrame
) -> Section:
    """Return the section. measured: more columns to slice by, such as brightness, by content
    hash.
    """
    title = "Slices"
    lead = (
        "The winner on parts of the images: each value of each column of few values, quartiles of "
        "numbers. A part that is much worse than the rest is where new images or another look at "
        f"the labels help most.{one_by_one(run)}"
    )
    if isinstance(run.images, str):
        return Section("slices", title, lead, (Note(f"Not looked at: {run.images}."),))
    columns = user_columns(run)
    rows = [row for side in sides for row in _slice_rows(run, side, columns, measured)]
    if not rows:
        text = (
            "No column has between 2 and 30 values, or numbers, with ten images and more of each."
        )
        return Section("slices", title, lead, (Note(text),))
    frame = pd.DataFrame(rows)
    metric = str(frame["metric"].iloc[0])
    lower_is_better = metric == "mae"
    # Among many slices some look bad by chance: Bonferroni's correction of the level.
    corrected_level = 1 - (1 - LEVEL) / len(frame)
    ends = [_interval(metric, row["values"], row["groups"], corrected_level) for row in rows]
    worse = [
        low > row["overall"] if lower_is_better else high < row["overall"]
        for (low, high), row in zip(ends, rows, strict=True)
    ]
    frame["verdict"] = np.where(worse, "worse", "")
    frame = frame.sort_values(
        "value_mean", ascending=not lower_is_better, kind="stable", ignore_index=True
    )
    table = Table(
        "slices",
        f"Each slice by {metric_title(metric)}, the worst first",
        (
            Column("column", "column"),
            Column("value", "value"),
            Column("side", "side"),
            Column("images", "images", "count"),
            Column("value_mean", metric_title(metric), metric_format(metric)),
            Column("low", "95 % from", metric_format(metric)),
            Column("high", "to", metric_format(metric)),
            Column("overall", "all of the side", metric_format(metric)),
            Column(
                "verdict",
                "verdict",
                hint="worse: all of the side lies beyond its interval even at the level at which "
                f"{count_text(len(frame), 'interval holds', 'intervals hold')} together",
            ),
        ),
        frame,
        filters=("column", "side", "verdict"),
        search=True,
        page=15,
    )
    blocks: list[Block] = [*_verdicts(frame, metric), table]
    return Section("slices", title, lead, tuple(blocks))


def _verdicts(frame: pd.DataFrame, metric: str) -> Iterator[Note]:
    worse = frame[frame["verdict"] != ""]
    if worse.empty:
        yield Note(
            f"No slice is worse than the others beyond chance ({len(frame):,} were looked at).",
            "good",
        )
        return
    for row in worse.head(SHOWN_WARNINGS).to_dict("records"):
        value, low, high, overall = (
            number_text(float(row[name]), metric)
            for name in ("value_mean", "low", "high", "overall")
        )
        yield Note(
            f"{row['column']} = {row['value']} is worse than the others: {metric_title(metric)} "
            f"{value} ({low} to {high}) against {overall} on all {row['side']} "
            f"images, {count_text(row['images'], 'image')}.",
            "warning",
        )
    if len(worse) > SHOWN_WARNINGS:
        yield Note(
            f"{count_text(len(worse) - SHOWN_WARNINGS, 'more slice is', 'more slices are')} worse: "
            "see the table."
        )


def _slice_rows(
    run: FinishedRun, side: JudgedSide, columns: pd.DataFrame, measured: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    metric, values = side_values(run, side)
    overall = float(values.mean())
    # The user's columns are known by id, what was measured by the image's content.
    user_values = columns.reindex(side.ids).reset_index(drop=True)
    pixel_measures = measured.reindex(side.content).reset_index(drop=True)
    for name, column in (*user_values.items(), *pixel_measures.items()):
        for word, rows in _slices_of(column):
            slice_values = values[rows]
            low, high = _interval(metric, slice_values, side.groups[rows], LEVEL)
            yield {
                "column": str(name),
                "value": word,
                "side": side.name,
                "images": len(rows),
                "value_mean": float(slice_values.mean()),
                "low": low,
                "high": high,
                "overall": overall,
                "metric": metric,
                "values": slice_values,
                "groups": side.groups[rows],
            }


def _slices_of(column: pd.Series) -> Iterator[tuple[str, Index]]:
    """Yield the slices of a column that have MIN_IMAGES, each as its value and rows: of numbers
    with more than MAX_VALUES the quartiles; none of one value, or of more than MAX_VALUES words.
    """
    is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    # None first: as text, a missing value would be the word nan.
    words = column.astype(object).where(column.notna(), None)
    words = words.map(lambda word: "(none)" if word is None else str(word))
    if is_number and column.nunique() > MAX_VALUES:
        # Quartiles of the numbers that are given; equal numbers stay together.
        cut = pd.qcut(column, 4, duplicates="drop")
        words = cut.map(
            lambda interval: f"{interval.left:.4g} to {interval.right:.4g}", na_action="ignore"
        ).astype(object)
        words = words.where(column.notna(), "(none)")
    elif pd.api.types.is_float_dtype(column):
        words = column.map(lambda value: f"{value:.4g}", na_action="ignore").fillna("(none)")
    # One value divides nothing; of very many, each stands for a few images.
    if not 2 <= words.nunique() <= MAX_VALUES:
        return
    for word, rows in words.groupby(words, sort=True).indices.items():
        if len(rows) >= MIN_IMAGES:
            yield str(word), np.asarray(rows, np.int64)


def _interval(metric: str, values: Doubles, groups: Index, level: float) -> tuple[float, float]:
    if metric == "mae":
        return mean_loss_interval(values, groups, None, level)
    return proportion_interval(values, groups, level)
