"""How often what headrace prints holds: coverage of its intervals, bias of its expectations, false ensembles. Simulated, seeded.

    python benchmarks/honesty.py [--case test] [--case groups] … [--quick]

Each case prints a table; the last line is JSON {measure: figure}, coverages and shares in per cent, biases in points. --quick:
a fifth of the repetitions. docs/concepts/numbers.md has the table of a whole run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from threadpoolctl import threadpool_limits

from headrace.heads import RidgeSpec, Task, fit_bank, make_folds, proportion_interval
from headrace.pipelines.evidence.curves import (
    FRACTIONS,
    error_with_more,
    fit_power_law,
    gain_from_more,
    nested_subsets,
    row_draws,
    row_errors,
    weighted_errors,
)
from headrace.pipelines.evidence.estimate import Estimate

Floats = npt.NDArray[np.float64]

ROWS = (37, 55, 100, 250, 1000)
ACCURACIES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
CORRELATIONS = (0.0, 0.1, 0.3)
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class Line:
    """One row of a case's table: what was simulated, and percentages, or points where the name says so."""

    what: str
    figures: dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            figures[f"{truth:g}"] = 100 * float(binom.pmf(np.arange(rows + 1), rows, truth)[inside].sum())
        yield Line(f"{rows:,} images", figures)


def grouped_interval(repeats: float) -> Iterator[Line]:
    """Images in groups of very unlike sizes, fifteen on average; each group has its own accuracy (a beta distribution)."""
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


def extrapolated_error(repeats: float) -> Iterator[Line]:
    """The error with twice and four times the images, from subsets of real sets; the truth from training on so many."""
    for name, rows in (("digits", 100), ("digits", 300), ("wine", 40), ("breast_cancer", 100)):
        X, target = real_set(name)
        truth = {times: true_error(X, target, int(0.8 * rows * times), seed=99) for times in (2, 4)}
        worlds = int(60 * repeats)
        inside = {f"{kind} ×{times}": 0.0 for kind in ("error", "gain added to a known error") for times in truth}
        for seed in range(worlds):
            chosen = np.random.default_rng(seed).permutation(len(target))[:rows]
            today, gains = curve_of(X[chosen], target[chosen], seed)
            for times, gain in gains.items():
                left = error_with_more(today, gain)
                inside[f"error ×{times}"] += left.low <= truth[times] <= left.high
                known = today.value - gain.high <= truth[times] <= today.value - gain.low
                inside[f"gain added to a known error ×{times}"] += known
        yield Line(f"{name}, {rows} images", {key: 100 * value / worlds for key, value in inside.items()})


def real_set(name: str) -> tuple[Floats, npt.NDArray[np.int64]]:
    """One of scikit-learn's bundled sets, features standardised."""
    from sklearn import datasets

    X, target = getattr(datasets, f"load_{name}")(return_X_y=True)
    spread = X.std(0)
    return ((X - X.mean(0)) / np.where(spread > 0, spread, 1)).astype(np.float32), target.astype(np.int64)


def make_task(target: npt.NDArray[np.int64], fold: npt.NDArray[np.int16]) -> Task:
    names = np.array([f"{number:032x}" for number in range(len(target))])
    classes = tuple(map(str, range(int(target.max()) + 1)))
    return Task("single", classes, names, names.astype("S32"), target, fold, np.ones(len(target)))


def fit_errors(X: Floats, task: Task) -> npt.NDArray[np.float64]:
    """(K, n) errors of ridge heads of several strengths on the rows that the folds hold out, in the task's order."""
    fits = fit_bank(X, task, [RidgeSpec(alpha) for alpha in ALPHAS], full=False)
    errors = np.zeros((len(ALPHAS), len(task.fold)))
    for fit in fits:
        assert fit.validation is not None
        assert isinstance(fit.spec, RidgeSpec)
        held = task.fold == fit.fold
        errors[ALPHAS.index(fit.spec.alpha), held] = row_errors(task, task.target[held], fit.validation[None])[0]
    return errors[:, task.fold >= 0]


def true_error(X: Floats, target: npt.NDArray[np.int64], trained: int, seed: int) -> float:
    """Of the best strength trained on so many images, mean over forty draws, on all other images."""
    found = []
    for draw in range(40):
        order = np.random.default_rng([seed, draw]).permutation(len(target))
        fold = np.zeros(len(target), np.int16)
        fold[order[:trained]] = -2
        found.append(fit_errors(X, make_task(target, fold)).mean(1))
    return float(np.mean(found, axis=0).min())


def curve_of(X: Floats, target: npt.NDArray[np.int64], seed: int) -> tuple[Estimate, dict[int, Estimate]]:
    """Today's error and the gains of twice and four times the images, as `headrace advise` has them, without files."""
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


CASES: dict[str, tuple[str, Callable[[float], Iterator[Line]]]] = {
    "test": ("Coverage (%) of the 95 % interval of a test accuracy, by the true accuracy", test_interval),
    "groups": ("The same with images in groups, by the correlation of mistakes within a group", grouped_interval),
    "advice": ("Coverage (%) of the 95 % interval of the error with more images", extrapolated_error),
}

if __name__ == "__main__":
    sys.exit(main())
