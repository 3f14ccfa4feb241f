"""How often what headrace prints holds: coverage of its intervals, bias of its expectations, false
ensembles. Simulated, seeded.

    python benchmarks/honesty.py [--case test] [--case groups] … [--quick]

Each case prints a table; the last line is JSON {measure: figure}, coverages and shares in per cent,
biases in points. --quick: a fifth of the repetitions. docs/concepts/numbers.md has the table of a
whole run.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from threadpoolctl import threadpool_limits

from headrace.heads.bank import fit_bank
from headrace.heads.data.folds import make_folds
from headrace.heads.data.task import Task, TaskKind, UnitAggregation
from headrace.heads.evaluate.intervals import metric_interval, proportion_interval
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import fit_temperature
from headrace.heads.evaluate.units import aggregate_units
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.predict import predict_head, probability_floor
from headrace.heads.spec import HeadSpec
from headrace.pipelines.recipe.sections import EnsembleSection
from headrace.pipelines.selection.correction import assess_selection
from headrace.pipelines.selection.ensemble import build_ensemble
from headrace.pipelines.selection.estimate import Estimate
from headrace.pipelines.selection.learning_curves import (
    FRACTIONS,
    error_with_more,
    fit_power_law,
    gain_from_more,
    nested_subsets,
    row_draws,
    row_errors,
    weighted_errors,
)
from headrace.pipelines.selection.predictions import validation_rows

Floats = npt.NDArray[np.float64]

ROWS = (37, 55, 100, 250, 1000)
ACCURACIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
CORRELATIONS = (0.0, 0.1, 0.3)
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)
STRENGTHS = (1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Line:
    """One row of a case's table: what was simulated, and percentages, or points where the name says
    so.
    """

    what: str
    figures: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions")
    options = parser.parse_args()
    console = Console(width=120)
    summary: dict[str, float] = {}
    for case in options.case or list(CASES):
        title, simulate = CASES[case]
        with threadpool_limits(1):  # the products are small
            lines = list(simulate(0.2 if options.quick else 1.0))
        names = list(dict.fromkeys(name for line in lines for name in line.figures))
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        for line in lines:
            values = (line.figures.get(name) for name in names)
            table.add_row(line.what, *("" if value is None else f"{value:.1f}" for value in values))
        for name in names:
            values = [line.figures[name] for line in lines if name in line.figures]
            summary[f"{case}: {name}, least"] = round(min(values), 2)
            summary[f"{case}: {name}, most"] = round(max(values), 2)
        console.print(table)
    print(json.dumps(summary))
    return 0


def test_interval(repeats: float) -> Iterator[Line]:
    """Independent images. Exact: every number of right answers by its probability."""
    for rows in ROWS:
        ends = np.array([proportion_interval(np.arange(rows) < hits) for hits in range(rows + 1)])
        figures = {}
        for truth in ACCURACIES:
            inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
            figures[f"{truth:g}"] = 100 * float(
                binom.pmf(np.arange(rows + 1), rows, truth)[inside].sum()
            )
        yield Line(f"{rows:,} images", figures)


def grouped_interval(repeats: float) -> Iterator[Line]:
    """Images in groups of very unlike sizes, fifteen on average; each group has its own accuracy (a
    beta distribution).
    """
    rng = np.random.default_rng(1)
    count = int(1000 * repeats)
    for correlation in CORRELATIONS:
        for rows in ROWS:
            figures = {}
            for truth in ACCURACIES:
                inside = 0
                for _ in range(count):
                    groups = np.repeat(np.arange(rows), rng.geometric(1 / 15, rows))[:rows]
                    share = np.full(rows, truth)
                    if correlation:
                        scale = (1 - correlation) / correlation
                        share = rng.beta(truth * scale, (1 - truth) * scale, rows)
                    low, high = proportion_interval(rng.random(rows) < share[groups], groups)
                    inside += low <= truth <= high
                figures[f"{truth:g}"] = 100 * inside / count
            yield Line(f"correlation {correlation:g}, {rows:,} images", figures)


def unit_interval(repeats: float) -> Iterator[Line]:
    """Units of one to many images, five on average, whose log-odds have a correlation of .3 within
    a unit, or within a group of three units; a unit is predicted by the mean or the largest
    probability of its images. The truth is what 60,000 units score.
    """
    rng = np.random.default_rng(4)

    def draw(
        units: int, distance: float, grouped: bool, how: UnitAggregation
    ) -> tuple[Floats, Floats, Floats]:
        unit = np.repeat(np.arange(units), rng.geometric(1 / 5, units))
        group = np.arange(units) // 3 if grouped else np.arange(units)
        label = rng.integers(0, 2, units)
        shared = rng.normal(0, np.sqrt(0.3), units)[group]
        noise = rng.normal(0, np.sqrt(0.7), len(unit))
        log_odds = 2 * distance * (distance * (2 * label - 1)[unit] + shared[unit] + noise)
        second = 1 / (1 + np.exp(-log_odds))
        images = np.stack([1 - second, second], 1)
        return label, aggregate_units("single", images, unit, how), group

    count = int(500 * repeats)
    for how, grouped in itertools.product(("mean", "max"), (False, True)):
        for units in (37, 100, 250):
            figures = {}
            for distance, metric in (
                (0.4, "accuracy"),
                (0.8, "accuracy"),
                (1.2, "accuracy"),
                (0.8, "balanced_accuracy"),
                (0.8, "auc"),
                (0.8, "log_loss"),
            ):
                target, predicted, _ = draw(60_000, distance, grouped, how)
                truth = score("single", target, predicted, metric)
                inside = 0
                for _ in range(count):
                    target, predicted, group = draw(units, distance, grouped, how)
                    low, high = metric_interval("single", target, predicted, metric, groups=group)
                    inside += low <= truth <= high
                figures[f"{metric} {distance:g}"] = 100 * inside / count
            places = "three in a group" if grouped else "alone"
            yield Line(f"{how}, {places}, {units:,} units", figures)


def other_metrics(repeats: float) -> Iterator[Line]:
    """Three classes of .6, .3 and .1 that overlap, by their own probabilities; and numbers with
    noise of heavy tails. The truth is what 400,000 rows score. Draws in which a metric is
    undefined, for a class is missing, are left out.
    """
    rng = np.random.default_rng(2)
    shares, middles = np.array([0.6, 0.3, 0.1]), np.array([[0.0, 0.0], [1.8, 0.0], [0.0, 2.2]])

    def classes(rows: int) -> tuple[npt.NDArray[Any], Floats]:
        target = rng.choice(3, rows, p=shares)
        seen = middles[target] + rng.standard_normal((rows, 2))
        weight = shares * np.exp(-((seen[:, None] - middles) ** 2).sum(2) / 2)
        return target, weight / weight.sum(1, keepdims=True)

    def numbers(rows: int) -> tuple[npt.NDArray[Any], Floats]:
        told = rng.standard_normal((rows, 1))
        return told + 0.7 * rng.standard_t(5, (rows, 1)), told

    kinds: tuple[tuple[TaskKind, Any, tuple[str, ...]], ...] = (
        ("single", classes, ("balanced_accuracy", "macro_f1", "auc", "log_loss")),
        ("regression", numbers, ("mae", "rmse", "r2")),
    )
    lines: dict[int, dict[str, float]] = {rows: {} for rows in (55, 250, 1000)}
    for kind, draw, metrics in kinds:
        whole = draw(400_000)
        truth = {metric: score(kind, *whole, metric) for metric in metrics}
        for rows, metric in itertools.product(lines, metrics):
            found = [metric_interval(kind, *draw(rows), metric) for _ in range(int(500 * repeats))]
            inside = [low <= truth[metric] <= high for low, high in found if np.isfinite(low)]
            lines[rows][metric] = 100 * float(np.mean(inside))
    for rows, figures in lines.items():
        yield Line(f"{rows:,} images", figures)


def extrapolated_error(repeats: float) -> Iterator[Line]:
    """The error with twice and four times the images, from subsets of real sets; the truth from
    training on so many.
    """
    for name, rows in (("digits", 100), ("digits", 300), ("wine", 40), ("breast_cancer", 100)):
        X, target = real_set(name)
        truth = {times: true_error(X, target, int(0.8 * rows * times), seed=99) for times in (2, 4)}
        worlds = int(60 * repeats)
        inside = {
            f"{kind} ×{times}": 0.0
            for kind in ("error", "gain added to a known error")
            for times in truth
        }
        for seed in range(worlds):
            chosen = np.random.default_rng(seed).permutation(len(target))[:rows]
            today, gains = curve_of(X[chosen], target[chosen], seed)
            for times, gain in gains.items():
                left = error_with_more(today, gain)
                inside[f"error ×{times}"] += left.low <= truth[times] <= left.high
                known = today.value - gain.high <= truth[times] <= today.value - gain.low
                inside[f"gain added to a known error ×{times}"] += known
        yield Line(
            f"{name}, {rows} images", {key: 100 * value / worlds for key, value in inside.items()}
        )


def real_set(name: str) -> tuple[Floats, npt.NDArray[np.int64]]:
    """One of scikit-learn's bundled sets, features standardized."""
    from sklearn import datasets

    X, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    spread = X.std(0)
    return ((X - X.mean(0)) / np.where(spread > 0, spread, 1)).astype(np.float32), target.astype(
        np.int64
    )


def make_task(
    target: npt.NDArray[np.int64], fold: npt.NDArray[np.int16], classes: int | None = None
) -> Task:
    """A single-label task without test rows, every row an image of its own."""
    names = np.array([f"{number:032x}" for number in range(len(target))])
    labels = tuple(map(str, range(classes or int(target.max()) + 1)))
    return Task("single", labels, names, names.astype("S32"), target, fold, np.ones(len(target)))


def fit_errors(X: Floats, task: Task) -> npt.NDArray[np.float64]:
    """(K, n) errors of ridge heads of several strengths on the rows that the folds hold out, in the
    task's order.
    """
    fits = fit_bank(X, task, [RidgeSpec(alpha) for alpha in ALPHAS], refit=False)
    errors = np.zeros((len(ALPHAS), len(task.fold)))
    for fit in fits:
        assert fit.validation is not None
        assert isinstance(fit.spec, RidgeSpec)
        held = task.fold == fit.fold
        errors[ALPHAS.index(fit.spec.alpha), held] = row_errors(
            task, task.target[held], fit.validation[None]
        )[0]
    return errors[:, task.fold >= 0]


def true_error(X: Floats, target: npt.NDArray[np.int64], trained: int, seed: int) -> float:
    """Of the best strength trained on so many images, mean over forty draws, on all
    other images.
    """
    found = []
    for draw in range(40):
        order = np.random.default_rng([seed, draw]).permutation(len(target))
        fold = np.zeros(len(target), np.int16)
        fold[order[:trained]] = -2
        found.append(fit_errors(X, make_task(target, fold)).mean(1))
    return float(np.mean(found, axis=0).min())


def curve_of(
    X: Floats, target: npt.NDArray[np.int64], seed: int
) -> tuple[Estimate, dict[int, Estimate]]:
    """Today's error and the gains of twice and four times the images, as `headrace advise` has
    them, without files.
    """
    task = make_task(target, make_folds(target, n_folds=5, seed=seed))
    own = np.arange(len(target))
    place = {name: number for number, name in enumerate(task.ids.tolist())}
    _, drawn = nested_subsets(task, range(5), FRACTIONS, seed, own)
    wrong, sizes = [], []
    for smaller in drawn:
        errors = np.zeros((len(ALPHAS), len(target)))
        for fold, small in enumerate(smaller):
            rows = [place[name] for name in small.ids.tolist()]
            errors[:, task.fold == fold] = fit_errors(X[rows], small)
        wrong.append(errors[errors.mean(1).argmin()])
        sizes.append(np.mean([(small.fold == -2).sum() for small in smaller]))
    draws = row_draws(task.fold, own, 400)
    values = weighted_errors(np.stack(wrong), draws)
    law = fit_power_law(np.array(sizes), values)
    today = Estimate(float(values[-1, 0]), values[-1, 1:], proportion_interval(wrong[-1]))
    return today, {times: gain_from_more(law, sizes[-1], times) for times in (2, 4)}


def expected_score(repeats: float) -> Iterator[Line]:
    """ "Expected on new images" of the best of 18 heads on three taps, ten classes whose shares are
    sampled; the truth is the accuracy of the winner's fold heads on 20,000 new images.
    """
    for name, strengths in (("noise", (0.0, 0.0, 0.0)), ("signal", (0.2, 0.35, 0.5))):
        for rows, worlds in ((150, 60), (500, 40), (2000, 25)):
            found = [world_of_heads(rows, strengths, seed) for seed in range(int(worlds * repeats))]
            raw, expected, truth, inside = (np.array(values) for values in zip(*found, strict=True))
            yield Line(
                f"{name}, {rows:,} images",
                {
                    "coverage": 100 * float(inside.mean()),
                    "bias": 100 * float((expected - truth).mean()),
                    "± s.e.": 100 * float((expected - truth).std() / np.sqrt(len(truth))),
                    "bias as chosen": 100 * float((raw - truth).mean()),
                },
            )


def world_of_heads(
    rows: int, strengths: tuple[float, ...], seed: int
) -> tuple[float, float, float, bool]:
    """The winner's validation accuracy, its expected one, its true one, and whether the interval
    holds that.
    """
    rng = np.random.default_rng([rows, seed])
    classes, width, new = 10, 16, 20_000
    target, later = rng.integers(0, classes, rows), rng.integers(0, classes, new)
    task = make_task(target, make_folds(target, n_folds=5, seed=seed), classes)
    predicted, truths = [], []
    for strength in strengths:
        means = strength * rng.normal(size=(classes, width))
        X = (means[target] + rng.normal(size=(rows, width))).astype(np.float32)
        X_new = (means[later] + rng.normal(size=(new, width))).astype(np.float32)
        for specs in (
            tuple(LogisticSpec(C) for C in STRENGTHS),
            tuple(RidgeSpec(alpha) for alpha in ALPHAS[::2]),
        ):
            for spec, fits in itertools.groupby(
                fit_bank(X, task, specs, refit=False), key=lambda fit: fit.spec
            ):
                out, true = np.zeros((rows, classes), np.float32), []
                for fit in fits:
                    out[task.fold == fit.fold] = fit.validation
                    true.append(
                        (predict_head(spec, fit.arrays, X_new, "single").argmax(1) == later).mean()
                    )
                predicted.append(out)
                truths.append(float(np.mean(true)))
    held = validation_rows(task)
    scores = [
        np.mean([(out.argmax(1) == target)[task.fold == fold].mean() for fold in range(5)])
        for out in predicted
    ]
    order = np.argsort(-np.array(scores), kind="stable")
    board = pd.DataFrame(
        {"accuracy": np.array(scores)[order], "features": width, "rank": np.arange(len(order)) + 1}
    )
    found = assess_selection(
        board, held, "accuracy", blocks=[(np.arange(len(order)), np.stack(predicted)[order])]
    )
    assert found is not None
    truth = truths[order[0]]
    return found.validation, found.expected, truth, found.low <= truth <= found.high


def false_ensembles(repeats: float) -> Iterator[Line]:
    """Twenty heads that know nothing: how often their average becomes the selected model.

    At most 5 % by the level that is printed.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.evidence import stored

    for name, common in (("independent heads", 0.0), ("heads that share the hard images", 0.8)):
        for rows in (150, 500):
            chosen = 0
            count = int(60 * repeats)
            for seed in range(count):
                rng = np.random.default_rng([rows, seed])
                target, hard = rng.integers(0, 2, rows), rng.normal(size=rows)
                logits = common * hard + np.sqrt(1 - common**2) * rng.normal(size=(20, rows))
                outputs = [
                    np.stack([1 / (1 + np.exp(1.5 * z)), 1 / (1 + np.exp(-1.5 * z))], axis=1)
                    for z in logits
                ]
                with tempfile.TemporaryDirectory() as folder:
                    board, task = stored(
                        Path(folder), "single", "accuracy", outputs, target, folds=5
                    )
                    found = build_ensemble(
                        board, validation_rows(task), "accuracy", EnsembleSection()
                    )
                chosen += found is not None and found.chosen
            yield Line(f"{name}, {rows} images", {"chosen": 100 * chosen / count})


def calibration(repeats: float) -> Iterator[Line]:
    """Real sets and heads that are too sure, or not sure enough: the expected calibration error on
    rows that nobody has seen, without a temperature and with the one that the fold heads give; and
    how many of the splits the temperature harms.
    """
    kinds: dict[str, tuple[HeadSpec, ...]] = {
        "logistic, C = 100": (LogisticSpec(100.0),),
        "ridge": (RidgeSpec(10.0),),
        "neighbours": (KNNSpec(5),),
        "centroids": (CentroidSpec(),),
    }
    for name, rows in (
        ("digits", 150),
        ("digits", 900),
        ("wine", 90),
        ("breast_cancer", 60),
        ("breast_cancer", 300),
    ):
        X, target = real_set(name)
        for kind, (spec,) in kinds.items():
            found = []
            for seed in range(max(2, int(20 * repeats))):
                order = np.random.default_rng([rows, seed]).permutation(len(target))
                own, new = order[:rows], order[rows:]
                task = make_task(
                    target[own],
                    make_folds(target[own], n_folds=5, seed=seed),
                    int(target.max()) + 1,
                )
                fits = fit_bank(X[own], task, [spec])
                out = np.zeros((rows, len(task.classes)), np.float32)
                for fit in fits[:-1]:
                    out[task.fold == fit.fold] = fit.validation
                temperature = fit_temperature(
                    "single",
                    task.target,
                    out,
                    None,
                    probability_floor(spec, "single", len(task.classes)),
                )
                said = [
                    predict_head(spec, fits[-1].arrays, X[new], "single", own_t)
                    for own_t in (1.0, temperature)
                ]
                found.append([score("single", target[new], each, metric)
                              for metric in ("calibration_error", "log_loss") for each in said])  # fmt: skip
            error, told, loss, told_loss = np.array(found).T
            yield Line(
                f"{name}, {rows} images, {kind}",
                {
                    "error without": 100 * float(error.mean()),
                    "error with": 100 * float(told.mean()),
                    "worst split without": 100 * float(error.max()),
                    "worst split with": 100 * float(told.max()),
                    "log loss is worse with it in": 100 * float((told_loss > loss).mean()),
                },
            )


CASES: dict[str, tuple[str, Callable[[float], Iterator[Line]]]] = {
    "test": (
        "Coverage (%) of the 95 % interval of a test accuracy, by the true accuracy",
        test_interval,
    ),
    "groups": (
        "The same with images in groups, by the correlation of mistakes within a group",
        grouped_interval,
    ),
    "units": (
        "Coverage (%) of the 95 % interval of scores of units, by metric and distance of the classes",
        unit_interval,
    ),
    "metrics": ("Coverage (%) of the 95 % interval of other metrics", other_metrics),
    "expected": (
        "The expected score of the winner: coverage (%) of its 95 % interval, bias (points)",
        expected_score,
    ),
    "ensembles": ("Ensembles that are chosen on labels that are noise (%)", false_ensembles),
    "calibration": (
        "The calibration error (points) on new images, without a temperature and with it",
        calibration,
    ),
    "advice": (
        "Coverage (%) of the 95 % interval of the error with more images",
        extrapolated_error,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
