"""What predictions get right and wrong: confusions, classes, calibration; and the winner's on its
validation folds.

N rows, C classes (or label columns, or regression targets).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.heads.evaluate.metrics import METRICS, score
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.report import figures
from headrace.pipelines.report.blocks import Block, Column, Facts, Figure, Note, Section, Table
from headrace.pipelines.report.leaders import metric_format, metric_title

# A matrix of more classes than this is a picture, with its largest entries as a table.
MATRIX_CLASSES = 15
BINS = 15  # as the calibration error's


def predictions(run: FinishedRun) -> Section:
    """The winner on its validation folds: each row predicted by the head that did not
    train on it.
    """
    rows = run.held_out_rows
    target, predicted = run.bank.target[rows], run.out_of_fold[rows]
    blocks = [
        *outcome(run.task_kind, run.classes, target, predicted, "validation"),
        *_calibration(run, target),
    ]
    lead = (
        f"The winner, {run.winner['kind']} {run.winner['settings']}, on {len(rows):,} validation "
        "images: each predicted by the "
        f"{'network' if run.winner['kind'] == 'finetune' else 'head'} that was trained without its "
        "fold."
    )
    return Section("predictions", "What the winner gets right and wrong", lead, tuple(blocks))


def _calibration(run: FinishedRun, target: npt.NDArray[Any]) -> list[Block]:
    """The reliability diagram again at the temperature that the winner is handed out with, and both
    calibration errors.
    """
    if run.task_kind == "regression":
        return []
    found = run.calibration
    if found is None:
        return [
            Note(
                "The winner has no temperature: `headrace run RECIPE` with this version gives it "
                "one, and trains nothing."
            )
        ]
    facts = Facts(
        (
            (
                "temperature",
                (
                    f"{found['temperature']:.3f}: what `predict` and `export` divide the winner's "
                    "log-odds by"
                ),
            ),
            (
                "calibration error",
                f"{found['error_before']:.3f} without it, {found['error_after']:.3f} with it",
            ),
            (
                "log loss",
                f"{found['loss_before']:.3f} without it, {found['loss_after']:.3f} with it",
            ),
            (
                "fitted on",
                (
                    f"{found['images']:,} validation images; scored fold by fold at the "
                    "temperature of the other folds"
                ),
            ),
        )
    )
    told = run.calibrated_predictions
    if isinstance(told, str):
        return [facts, Note(f"The reliability at this temperature is left out: {told}.", "warning")]
    return [
        facts,
        _reliability(
            run.task_kind, target, told, "validation", "the winner at its temperature", "calibrated"
        ),
    ]


def outcome(
    kind: str,
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    which: str,
    who: str = "the winner",
) -> list[Block]:
    """The blocks that a kind of task has, of these rows; `which` ("validation", "test") is in
    captions and table names.

    who: whose predictions they are.
    """
    if kind == "single":
        return [
            *_confusion(classes, target, predicted, which, who),
            _classes(classes, target, predicted, which, who),
            _reliability(kind, target, predicted, which, who),
        ]
    if kind == "multi":
        return [
            _labels(classes, target, predicted, which),
            _reliability(kind, target, predicted, which, who),
        ]
    return _regression(classes, target, predicted, which)


def _confusion(
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    which: str,
    who: str,
) -> list[Block]:
    C = len(classes)
    guess = predicted.argmax(1)
    counts = np.bincount(target * C + guess, minlength=C * C).reshape(C, C)
    if C <= MATRIX_CLASSES:
        frame = pd.DataFrame(counts, columns=[f"c{number}" for number in range(C)])
        frame.insert(0, "actual", list(classes))
        columns = (
            Column("actual", "actual ↓ predicted →"),
            *(Column(f"c{i}", name, "count") for i, name in enumerate(classes)),
        )
        caption = (
            f"Confusion matrix, {which} images: rows are what the label says, columns what {who} "
            "says"
        )
        return [Table(f"confusion-{which}", caption, columns, frame, sortable=False, shade="rows")]
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[: int((wrong > 0).sum())]
    actual, said = np.unravel_index(order, wrong.shape)
    frame = pd.DataFrame(
        {
            "actual": np.asarray(classes, object)[actual],
            "predicted": np.asarray(classes, object)[said],
            "images": wrong[actual, said],
            "share": wrong[actual, said] / np.maximum(counts.sum(1)[actual], 1),
        }
    )
    columns = (
        Column("actual", "actual"),
        Column("predicted", "predicted"),
        Column("images", "images", "count"),
        Column("share", "of the class", "share"),
    )
    table = Table(
        f"confusion-{which}",
        f"Confusions, the commonest first ({which})",
        columns,
        frame,
        search=True,
    )
    alt = f"Confusion matrix of {C} classes as a colour map; the confusions are in the table below."
    svg = figures.heat(
        counts / np.maximum(counts.sum(1, keepdims=True), 1),
        xlabel="predicted class",
        ylabel="actual class",
    )
    return [
        Figure(svg, alt, f"Confusion matrix, {which} images; classes in alphabetical order.", table)
    ]


def _classes(
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    which: str,
    who: str,
) -> Table:
    C = len(classes)
    guess = predicted.argmax(1)
    support, said = np.bincount(target, minlength=C), np.bincount(guess, minlength=C)
    hits = np.bincount(target[guess == target], minlength=C)
    onehot = target[:, None] == np.arange(C)
    frame = pd.DataFrame(
        {
            "class": list(classes),
            "images": support,
            "predicted": said,
            "recall": _ratio(hits, support),
            "precision": _ratio(hits, said),
            "f1": _ratio(2 * hits, support + said),
            "auc": [score("multi", onehot[:, [i]], predicted[:, [i]], "auc") for i in range(C)],
        }
    )
    columns = (
        Column("class", "class"),
        Column("images", "images", "count"),
        Column("predicted", "predicted", "count", f"images that {who} says are of this class"),
        Column("recall", "recall", "share", "share of the class's images that are found"),
        Column(
            "precision",
            "precision",
            "share",
            "share of the images said to be of the class that are",
        ),
        Column("f1", "F1", "number", "harmonic mean of recall and precision"),
        Column("auc", "AUC", "number", "this class against the rest"),
    )
    return Table(
        f"classes-{which}",
        f"Class by class, {which} images",
        columns,
        frame,
        search=C > MATRIX_CLASSES,
    )


def _labels(
    classes: tuple[str, ...], target: npt.NDArray[Any], predicted: npt.NDArray[Any], which: str
) -> Table:
    truth, guess = target > 0, predicted >= 0.5
    hits, support, said = (truth & guess).sum(0), truth.sum(0), guess.sum(0)
    one = [(target[:, [i]], predicted[:, [i]]) for i in range(len(classes))]
    frame = pd.DataFrame(
        {
            "label": list(classes),
            "images": support,
            "predicted": said,
            "recall": _ratio(hits, support),
            "precision": _ratio(hits, said),
            "f1": _ratio(2 * hits, support + said),
            "average_precision": [score("multi", *pair, "average_precision") for pair in one],
            "auc": [score("multi", *pair, "auc") for pair in one],
        }
    )
    columns = (
        Column("label", "label"),
        Column("images", "images with it", "count"),
        Column("predicted", "predicted", "count", "at a probability of one half or more"),
        Column("recall", "recall", "share"),
        Column("precision", "precision", "share"),
        Column("f1", "F1", "number"),
        Column("average_precision", "average precision", "number"),
        Column("auc", "AUC", "number"),
    )
    return Table(
        f"labels-{which}",
        f"Label by label, {which} images",
        columns,
        frame,
        search=len(classes) > MATRIX_CLASSES,
    )


def _reliability(
    kind: str,
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    which: str,
    who: str,
    name: str = "",
) -> Figure:
    """The diagram, and its table's `name`, by default `which`."""
    if kind == "multi":
        confidence, correct, unit = predicted.ravel(), target.ravel() > 0, "labels"
    else:
        confidence, correct, unit = predicted.max(1), predicted.argmax(1) == target, "images"
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    rows = np.bincount(bins, minlength=BINS)
    there = rows > 0
    mean = np.bincount(bins, weights=confidence, minlength=BINS)[there] / rows[there]
    right = np.bincount(bins, weights=correct, minlength=BINS)[there] / rows[there]
    error = float((rows[there] * np.abs(mean - right)).sum() / max(rows.sum(), 1))
    lean = float((rows[there] * (mean - right)).sum() / max(rows.sum(), 1))
    tends = (
        "too sure of itself"
        if lean > 0.02
        else "less sure than it could be"
        if lean < -0.02
        else "about as sure as it is right"
    )
    frame = pd.DataFrame({"probability": mean, "right": right, "rows": rows[there]})
    columns = (
        Column("probability", "mean predicted probability", "share"),
        Column("right", "share right", "share"),
        Column("rows", unit, "count"),
    )
    return Figure(
        figures.reliability(mean, right, rows[there], unit, who),
        f"Reliability diagram: share of right predictions against predicted probability in {BINS} "
        f"bins. {who.capitalize()} is {tends}; the expected calibration error is {error:.3f}.",
        f"Reliability, {which} images: on the dashed line, 80 % sure is right 80 % of the time. "
        f"{who.capitalize()} is {tends} (expected calibration error {error:.3f}).",
        Table(
            f"reliability-{name or which}",
            f"Reliability, bin by bin ({name or which})",
            columns,
            frame,
            sortable=False,
        ),
    )


def _regression(
    classes: tuple[str, ...], target: npt.NDArray[Any], predicted: npt.NDArray[Any], which: str
) -> list[Block]:
    names = [name for name, metric in METRICS.items() if "regression" in metric.tasks]
    pairs = [(target[:, [i]], predicted[:, [i]]) for i in range(len(classes))]
    frame = pd.DataFrame(
        {
            "target": list(classes),
            **{name: [score("regression", *pair, name) for pair in pairs] for name in names},
        }
    )
    frame["bias"] = (predicted - target).mean(0)
    columns = (
        Column("target", "target"),
        *(Column(name, metric_title(name), metric_format(name)) for name in names),
        Column("bias", "mean error", "number", "predicted less true"),
    )
    blocks: list[Block] = [
        Table(f"targets-{which}", f"Target by target, {which} images", columns, frame)
    ]
    for number, name in enumerate(classes[:4]):
        truth, guess = np.asarray(target[:, number], float), np.asarray(predicted[:, number], float)
        svg = figures.scatter(truth, guess, xlabel=f"true {name}", ylabel=f"predicted {name}")
        alt = f"Predicted against true {name}, {len(truth):,} images; R² {frame['r2'][number]:.3f}."
        blocks.append(
            Figure(
                svg,
                alt,
                f"{name}: predicted against true, {which} images; on the dashed line they are "
                "equal.",
            )
        )
    return blocks


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
