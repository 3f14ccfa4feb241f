"""The data section: sizes of the splits, left-out and failed images, rare classes, notes."""

from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.heads.arrays import Array, Index
from headrace.heads.data.task import Task
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import read_table
from headrace.pipelines.report.page import figures
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Facts,
    Figure,
    Note,
    Section,
    Table,
    make_table,
)

# Images of the largest class per image of the smallest, from which on accuracy says little about
# the small one.
_IMBALANCE_RATIO = 5
_FIGURE_CLASSES = 30  # bars, as many as a page can show; more are a table alone


def data_section(run: FinishedRun) -> Section:
    listed = run.images
    blocks: list[Block] = []
    test: Task | None = None
    if isinstance(listed, str):  # why the images cannot be listed any more
        blocks.append(Note(f"Counts are of the validation images only: {listed}."))
    else:
        train, test = listed.dataset.train, listed.dataset.test
        folds_text = count_text(train.n_folds, "validation fold")
        content = np.concatenate([train.content, test.content])
        facts = {
            "images listed": f"{len(listed.samples):,}",
            "to train and choose on": f"{len(train.ids):,}, in {folds_text}",
            "test": f"{len(test.ids):,}",
            "distinct images": f"{len(np.unique(content)):,}",
        }
        blocks.append(Facts(facts))
        blocks += [Note(f"{note[0].upper()}{note[1:]}.") for note in listed.dataset.notes]
    blocks += [*_left_out_blocks(run), *_failed_blocks(run), *_balance_blocks(run, test)]
    lead = "Which images the numbers are about, and what was wrong with some."
    return Section("data", "Data", lead, tuple(blocks))


def _left_out_blocks(run: FinishedRun) -> list[Block]:
    """Account for every entry of the source: used, or left out for a reason."""
    accounting = run.accounting
    if accounting is None:
        text = "Which entries of the source were left out was not recorded: there is no"
        return [Note(f"{text} {run.paths.accounting.name}.")]
    blocks: list[Block] = [Note(f"{accounting.sentence()}.")]
    if accounting.left_out:
        left_out = accounting.left_out
        columns = {
            Column("count", "entries", "count"): [item.count for item in left_out],
            Column("reason", "what they are"): [item.reason for item in left_out],
            Column("examples", "such as"): [", ".join(item.examples) for item in left_out],
        }
        blocks.append(make_table("left-out", "Left out", columns))
    return blocks


def _failed_blocks(run: FinishedRun) -> list[Block]:
    path = run.paths.failed_images
    # Without keep_default_na an image with the id "None" would lose its name.
    frame = (
        pd.read_csv(read_table(path), dtype=str, keep_default_na=False)
        if path.exists()
        else pd.DataFrame()
    )
    if frame.empty:
        return [Note("Every image could be read.", "good")]
    columns = (Column("id", "image"), Column("reason", "reason"), Column("path", "file"))
    unread_text = count_text(
        len(frame), "image could not be read and is", "images could not be read and are"
    )
    return [
        Note(f"{unread_text} in no number of this report.", "warning"),
        Table("failed-images", "Images that could not be read", columns, frame, search=True),
    ]


def _balance_blocks(run: FinishedRun, test: Task | None) -> list[Block]:
    # Numbers have no classes to be counted.
    if run.task_kind == "regression":
        return _target_blocks(run, test)
    train_counts = _class_counts(run.task_kind, run.bank.target, len(run.classes))
    counts_by_split = {"training and validation": train_counts.tolist()}
    shares = train_counts / max(len(run.bank.target), 1)
    word = "class" if run.task_kind == "single" else "label"
    columns: dict[Column, Any] = {
        Column("class", word): list(run.classes),
        Column("train", "training and validation", "count"): train_counts,
        Column("share", "share", "share"): shares,
    }
    if test is not None and len(test.ids):
        test_counts = _class_counts(run.task_kind, test.target, len(run.classes))
        columns[Column("test", "test", "count")] = test_counts
        counts_by_split["test"] = test_counts.tolist()
    are_many = len(run.classes) > _FIGURE_CLASSES
    table = make_table("balance", f"Images by {word}", columns, search=are_many)
    blocks: list[Block] = []
    largest, smallest = int(train_counts.argmax()), int(train_counts.argmin())
    ratio = train_counts[largest] / max(int(train_counts[smallest]), 1)
    if run.task_kind == "single" and ratio >= _IMBALANCE_RATIO:
        blocks.append(
            Note(
                f"Lopsided: {count_text(train_counts[largest], 'image')} of "
                f"{run.classes[largest]} and {train_counts[smallest]:,} of "
                f"{run.classes[smallest]}. Accuracy mostly tells of the large classes; look at "
                "recall by class, and try task.metric: balanced_accuracy and class_weight: [none, "
                "balanced].",
                "warning",
            )
        )
    if are_many:
        return [*blocks, table]
    svg = figures.bar_chart(list(run.classes), counts_by_split, xlabel="images")
    class_sizes = zip(run.classes, train_counts, strict=True)
    sizes = ", ".join(f"{name} {count:,}" for name, count in class_sizes)
    alt = f"Bar chart of the images of each {word}: {sizes}."
    return [*blocks, Figure(svg, alt, f"Images by {word}.", table)]


def _class_counts(kind: str, target: Array, n_classes: int) -> Index:
    """Return (C,) the number of images of each class or label; target: (N,), or (N, C) of 0/1."""
    return np.bincount(target, minlength=n_classes) if kind == "single" else (target > 0).sum(0)


def _target_blocks(run: FinishedRun, test: Task | None) -> list[Block]:
    rows = []
    sides = {"training and validation": run.bank.target}
    if test is not None and len(test.ids):
        sides["test"] = test.target
    for side, target in sides.items():
        for column, name in enumerate(run.classes):
            # Each target by itself: their units differ.
            values = np.asarray(target[:, column], float)
            rows.append(
                {
                    "target": name,
                    "side": side,
                    "images": len(values),
                    "min": values.min(),
                    "median": float(np.median(values)),
                    "max": values.max(),
                    "deviation": values.std(),
                }
            )
    columns = (
        Column("target", "target"),
        Column("side", "side"),
        Column("images", "images", "count"),
        Column("min", "least", "number"),
        Column("median", "median", "number"),
        Column("max", "largest", "number"),
        Column("deviation", "standard deviation", "number"),
    )
    return [Table("balance", "What the targets are", columns, pd.DataFrame(rows))]
