"""What each branch of the linear solver wins: the same bank with it and without it.

    python benchmarks/heads_branches.py [--only WORD] [--pairs 4]

Features and classes are those of heads_linear.py, 20 strengths of 5 folds unless the case says
otherwise. Both sides run in turn in one process on one thread; the figure is the median ratio of
CPU seconds without / with the branch, and its range. A branch whose figure is 1.00 should be
deleted.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import heads_linear  # pins the threads before NumPy is imported
import numpy as np

from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear import ridge
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver import (
    bank_problem,
    design,
    dual_form,
    lbfgs,
    path_solver,
    preconditioner,
)
from headrace.heads.spec import FitResult

Patch = tuple[Any, str, Any]  # object, attribute, value that switches the branch off
Fit = Callable[[], list[FitResult]]


def training_data(n_rows: int, n_features: int, n_classes: int, n_folds: int) -> TrainingData:
    X, y = heads_linear.digit_features(n_rows, n_features, max(n_classes, 10))
    fold = np.random.default_rng(1).permutation(n_rows) % n_folds
    return TrainingData(X, (y > 4).astype(np.int64) if n_classes == 2 else y, fold, n_classes)


def logistic(data: TrainingData, strengths: np.ndarray, gap: float = 1e-5) -> Fit:
    specs = [LogisticSpec(float(C)) for C in strengths]
    return lambda: fit_logistic_bank(data, specs, refit=False, gap=gap)


@dataclass(frozen=True)
class Branch:
    """A branch of the solver, a bank that uses it, and how it is switched off."""

    name: str
    fit: Fit
    off: tuple[Patch, ...]
    both_sides: tuple[Patch, ...] = ()


def branches() -> Iterator[Branch]:
    path = heads_linear.STRENGTHS
    few_classes = training_data(5_000, 512, 10, 5)
    few = logistic(few_classes, path)
    many = logistic(training_data(2_000, 768, 100, 3), path)
    dual = logistic(training_data(1_000, 2_048, 10, 5), path)
    no_kernels = [
        (module, "load_compiled_kernels", lambda: None) for module in (design, bank_problem)
    ]
    no_copies: tuple[Patch, ...] = ((design, "PENALTY_PRODUCTS_PER_HEAD", 0),)
    no_renewal = ((path_solver, "ITERATIONS_PER_PRECONDITIONER", 600),)
    load = path_solver.ActiveSet.load

    def load_unshared(self: Any, *arguments: Any) -> None:
        self.shared.clear()
        load(self, *arguments)

    def load_own(self: Any, *arguments: Any) -> None:
        load(self, *arguments[:5])

    def no_directions(lower: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((lower.shape[1], 0)), np.zeros(0)

    slots = path_solver.ActiveSet
    yield Branch("compiled pass", few, tuple(no_kernels))
    yield Branch("whole Hessian", few, ((preconditioner, "MAX_CLASSES_FOR_DENSE", 0),))
    yield Branch("preconditioner shared by folds", few, ((slots, "load", load_unshared),))
    yield Branch("preconditioner of a neighbour", few, ((slots, "load", load_own),))
    yield Branch("transferred pairs", few, ((slots, "transfer_pairs", lambda *_: None),))
    one_strength = logistic(few_classes, np.array([1.0]))
    yield Branch("renewed preconditioner, one strength", one_strength, no_renewal)
    yield Branch("end far below the gap", few, ((lbfgs, "FAR_BELOW_GAP", 0.0),))
    yield Branch("per-fold copies, 100 classes", many, no_copies)
    yield Branch(
        "stored penalty, 100 classes",
        many,
        ((design, "MIN_CLASSES_FOR_STORED_PENALTY", 1 << 30),),
        no_copies,
    )
    yield Branch(
        "pairs in chunks, 100 classes", many, ((lbfgs, "PAIR_COLUMNS_PER_CHUNK", 1 << 40),)
    )
    yield Branch("leading directions", dual, ((dual_form, "_leading_directions", no_directions),))
    many_alphas = [RidgeSpec(float(alpha)) for alpha in np.logspace(-1, 3, 60)]
    few_alphas = many_alphas[::12]
    yield Branch(
        "ridge: eigenvalues, 60 strengths",
        lambda: ridge.fit_ridge_bank(few_classes, many_alphas, refit=False),
        ((ridge, "MIN_STRENGTHS_FOR_EIGENVALUES", 1 << 30),),
    )
    yield Branch(
        "ridge: Cholesky, 5 strengths",
        lambda: ridge.fit_ridge_bank(few_classes, few_alphas, refit=False),
        ((ridge, "MIN_STRENGTHS_FOR_EIGENVALUES", 0),),
    )
    yield Branch(
        "ridge: scores of all heads at once",
        lambda: ridge.fit_ridge_bank(few_classes, many_alphas, refit=False),
        ((ridge, "MAX_OFFSET", 0.0),),
    )


def cpu_seconds(branch: Branch, *, is_off: bool) -> tuple[float, int]:
    """Return the CPU seconds of a bank and the iterations of all its heads."""
    with contextlib.ExitStack() as stack:
        for patch in (*branch.both_sides, *(branch.off if is_off else ())):
            stack.enter_context(mock.patch.object(*patch))
        start = time.process_time()
        results = branch.fit()
        return time.process_time() - start, sum(result.iterations for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="branches whose name contains this")
    parser.add_argument("--pairs", type=int, default=4)
    options = parser.parse_args()
    print(f"{'branch':40}{'without / with':>16}{'range':>16}{'iterations':>16}")
    for branch in branches():
        if options.only not in branch.name:
            continue
        cpu_seconds(branch, is_off=False)  # warm
        ratios = []
        for pair in range(options.pairs):
            sides = {off: cpu_seconds(branch, is_off=off) for off in (pair % 2 == 0, pair % 2 != 0)}
            ratios.append(sides[True][0] / sides[False][0])
        iterations = f"{sides[False][1]} -> {sides[True][1]}"
        interval = f"{min(ratios):.2f} {max(ratios):.2f}"
        print(
            f"{branch.name:40}{np.median(ratios):16.2f}{interval:>16}{iterations:>16}", flush=True
        )


if __name__ == "__main__":
    main()
