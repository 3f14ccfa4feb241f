"""Logistic and ridge banks against scikit-learn, one head at a time and by its own path search.

    python benchmarks/heads_linear.py --case
    logistic-5k|logistic-20k|logistic-100|logistic-wide|ridge|ridge-1000|side-columns [--quick]

Features: the handwritten digits of scikit-learn (public, in the package), rotated, scaled, shifted
and with noise, through fixed random convolutions, rounded to float16; `logistic-100` puts two
digits side by side, 100 classes. Grid: 20 inverse strengths from 1e-4 to 1e2, 5 stratified folds,
features standardized on each fold's training rows.

`side-columns` puts four numbers beside them, and compares banks with and without missing values.

Everything is counted on both sides: standardizing, training, predicting the held-out rows. One
thread, sides in turn, CPU and wall seconds. Every head's objective is recomputed in float64 from
the returned coefficients; gaps are relative to the best objective that any side, or the bank at a
tight gap, found for that head. --quick measures scikit-learn on fold 0 at every fourth strength and
multiplies its seconds by 20; without it every head is fitted, and LogisticRegressionCV too.
"""

import argparse
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported, so that every library is pinned alike

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from headrace.heads.data.side_columns import SideColumn, SideColumns, side_blocks
from headrace.heads.data.training_data import TrainingData
from headrace.heads.discriminant.bank import fit_discriminant_bank
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.ridge import fit_ridge_bank
from headrace.heads.linear.solver.design import MANY_FREE_VECTORS
from headrace.heads.spec import FitResult

CASES = {  # rows, features, classes
    "logistic-5k": (5_000, 512, 10),
    "logistic-20k": (20_000, 1_280, 10),
    "logistic-100": (5_000, 1_280, 100),
    "logistic-wide": (1_000, 2_048, 10),
    "ridge": (20_000, 1_280, 10),
    "ridge-1000": (20_000, 1_280, 10),
    "side-columns": (20_000, 1_280, 10),
}
GAPS = {"logistic-100": (4e-5, 1e-5, 1e-7)}  # that the bank is asked for, where not 1e-5 and 3e-7
STRENGTHS = np.logspace(-4, 2, 20)
N_FOLDS = 5
CpuAndWall = tuple[float, float]  # seconds


def digit_features(n_rows: int, n_features: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return X (rows, features) float16 and y (rows,) int64, 10 or 100 classes."""
    torch.set_num_threads(1)
    rng, weight_rng = np.random.default_rng(0), torch.Generator().manual_seed(1)
    digits = load_digits()

    def draw_digits() -> tuple[torch.Tensor, np.ndarray]:
        drawn = rng.integers(0, len(digits.images), n_rows)
        images = torch.tensor(digits.images[drawn], dtype=torch.float32)[:, None] / 16
        angle = torch.tensor(rng.uniform(-0.35, 0.35, n_rows), dtype=torch.float32)
        size = torch.tensor(rng.uniform(0.8, 1.25, n_rows), dtype=torch.float32)
        shift = torch.tensor(rng.uniform(-0.2, 0.2, (n_rows, 2)), dtype=torch.float32)
        x_row = torch.stack([angle.cos() * size, -angle.sin() * size, shift[:, 0]], dim=1)
        y_row = torch.stack([angle.sin() * size, angle.cos() * size, shift[:, 1]], dim=1)
        grid = F.affine_grid(
            torch.stack([x_row, y_row], dim=1), [n_rows, 1, 16, 16], align_corners=False
        )
        labels = digits.target[drawn].astype(np.int64)
        return F.grid_sample(images, grid, align_corners=False), labels

    images, y = draw_digits()
    pooled_shape = (2, 2)
    if n_classes == 100:
        right_images, right_digit = draw_digits()
        images, y = torch.cat([images, right_images], dim=3), 10 * y + right_digit
        pooled_shape = (2, 4)
    images = images + 0.25 * torch.tensor(rng.standard_normal(images.shape), dtype=torch.float32)
    n_hidden, n_channels = n_features // 16, n_features // (pooled_shape[0] * pooled_shape[1])
    conv1 = torch.randn(n_hidden, 1, 5, 5, generator=weight_rng) / 5
    conv2 = torch.randn(n_channels, n_hidden, 3, 3, generator=weight_rng) / (9 * n_hidden) ** 0.5
    features = []
    for start in range(0, n_rows, 500):
        hidden = F.max_pool2d(F.relu(F.conv2d(images[start : start + 500], conv1, padding=2)), 2)
        hidden = F.relu(F.conv2d(hidden, conv2, padding=1))
        features.append(F.adaptive_avg_pool2d(hidden, pooled_shape).flatten(1).numpy())
    return np.concatenate(features).astype(np.float16), y


def timed(work: Callable[[], Any]) -> tuple[Any, CpuAndWall]:
    """Return the result of `work`, with its CPU and wall seconds."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.process_time() - cpu_start, time.perf_counter() - wall_start)


def gemm_peak() -> float:
    """Return GF/s of a large square float32 product on this thread, the best of five."""
    a = np.random.default_rng(0).standard_normal((1536, 1536)).astype(np.float32)
    return max(2 * 1536**3 / timed(lambda: a @ a)[1][0] / 1e9 for _ in range(5))


def logistic_objective(
    X: np.ndarray, y: np.ndarray, W: np.ndarray, b: np.ndarray, C: float
) -> float:
    """Return scikit-learn's objective of raw coefficients W (C, D), in float64.

    On features standardized by these rows.
    """
    X64 = X.astype(np.float64)
    decisions = X64 @ W.T.astype(np.float64) + b
    top = decisions.max(axis=1)
    log_total = np.log(np.exp(decisions - top[:, None]).sum(axis=1)) + top
    loss = log_total - decisions[np.arange(len(y)), y]
    return float(loss.sum() + np.sum((W * X64.std(axis=0)) ** 2) / (2 * C))


def fit_one_head(
    X: np.ndarray, y: np.ndarray, fold: np.ndarray, held_out: int, C: float, **options: Any
) -> tuple[Any, Any]:
    """Scale, fit and predict the held-out rows as people write it today; return raw coefficients."""
    train = fold != held_out
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, **options))
    model.fit(X[train].astype(np.float32), y[train]).predict_proba(X[~train].astype(np.float32))
    scaler, head = model[0], model[1]
    W = head.coef_ / scaler.scale_
    return W, head.intercept_ - W @ scaler.mean_


def flops_outside_passes(n_rows: int, n_features: int, n_classes: int, n_iterations: int) -> float:
    """Return the flops of the matrix products around the passes over the rows.

    Those of preconditioners and curvature pairs are left out and, where there are fewer rows than
    features, everything.
    """
    if n_rows < n_features:
        return 0.0
    n_free, n_heads = n_classes - 1, N_FOLDS * len(STRENGTHS)
    copied_per_fold = n_free >= MANY_FREE_VECTORS
    # Rows into their eigenbasis, of many-class heads for each fold its own; their Gram matrix, of
    # which half is computed.
    rotation = (2 * (4 if copied_per_fold else 1) + 1) * n_rows * n_features**2
    # Per-fold copies have their fold's scales: penalties and bounds need no product.
    penalties = 0 if copied_per_fold else 4 * n_iterations * n_features**2 * n_free
    raw_and_bounds = 2 * (1 if copied_per_fold else 3) * n_heads * n_classes * n_features**2
    among_classes = 4 * n_iterations * n_free**2 * n_features
    held_out = 2 * n_rows * n_features * n_classes * len(STRENGTHS)
    return float(rotation + penalties + raw_and_bounds + among_classes + held_out)


def logistic_case(name: str, quick: bool) -> dict[str, float]:
    n_rows, n_features, n_classes = CASES[name]
    X, y = digit_features(n_rows, n_features, n_classes)
    fold = stratified_folds(X, y)
    specs = [LogisticSpec(float(C)) for C in STRENGTHS]
    checked_heads = [
        (i, f)
        for i in range(len(STRENGTHS))
        for f in range(N_FOLDS)
        if not quick or (f == 0 and i % 4 == 0)
    ]
    objectives: dict[str, list[float]] = {}
    seconds: dict[str, CpuAndWall] = {}
    figures: dict[str, float] = {}

    def fit_bank(gap: float) -> list[FitResult]:
        return fit_logistic_bank(TrainingData(X, y, fold, n_classes), specs, refit=False, gap=gap)

    def bank_objectives(results: list[FitResult]) -> list[float]:
        by_head = {(specs.index(result.spec), result.fold): result.arrays for result in results}
        return [
            logistic_objective(
                X[fold != f],
                y[fold != f],
                by_head[i, f]["weight"],
                by_head[i, f]["bias"],
                STRENGTHS[i],
            )
            for i, f in checked_heads
        ]

    fit_bank(1e-1)  # warm
    for gap in GAPS.get(name, (1e-5, 3e-7)):
        side = f"bank {gap:.0e}".replace("e-0", "e-")
        runs, peaks = [], [gemm_peak()]
        for _ in range(1 if quick else 5):
            runs.append(timed(lambda gap=gap: fit_bank(gap)))
            peaks.append(gemm_peak())
        results = runs[0][0]
        seconds[side] = median_seconds([run[1] for run in runs])
        objectives[side] = bank_objectives(results)
        n_iterations = sum(result.iterations for result in results)
        pass_flops = n_iterations * 4 * 0.8 * n_rows * n_features * (n_classes - 1)
        flops = pass_flops + flops_outside_passes(n_rows, n_features, n_classes, n_iterations)
        # Against the peak as it was before and after each run: on a shared machine it moves by half
        # within seconds.
        run_peaks = [(before + after) / 2 for before, after in itertools.pairwise(peaks)]
        peak_seconds = [run[1][0] * 1e9 * peak for run, peak in zip(runs, run_peaks, strict=True)]
        figures[f"of_peak {side}"] = float(np.median([pass_flops / s for s in peak_seconds]))
        figures[f"products_of_peak {side}"] = float(np.median([flops / s for s in peak_seconds]))
        figures[f"peak_gflops {side}"] = float(np.median(run_peaks))
        figures[f"head_iterations {side}"] = n_iterations
    for side, options in (("defaults", {}), ("tol 1e-6", {"tol": 1e-6, "max_iter": 10_000})):
        cpu_total = wall_total = 0.0
        objectives[side] = []
        for i, f in checked_heads:
            (W, b), (cpu, wall) = timed(
                lambda i=i, f=f, o=options: fit_one_head(X, y, fold, f, STRENGTHS[i], **o)
            )
            cpu_total, wall_total = cpu_total + cpu, wall_total + wall
            objectives[side].append(
                logistic_objective(X[fold != f], y[fold != f], W, b, STRENGTHS[i])
            )
        share = N_FOLDS * len(STRENGTHS) / len(checked_heads)
        seconds[side] = cpu_total * share, wall_total * share
    if not quick:
        standardized = StandardScaler().fit_transform(X.astype(np.float32))
        splits = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(N_FOLDS)]
        search = LogisticRegressionCV(
            Cs=STRENGTHS, cv=splits, l1_ratios=(0.0,), use_legacy_attributes=False
        )
        seconds["LogisticRegressionCV"] = timed(lambda: search.fit(standardized, y))[1]
    all_objectives = [*objectives.values(), bank_objectives(fit_bank(1e-8))]
    best_objectives = np.minimum.reduce([np.array(values) for values in all_objectives])
    print(
        f"{name}: {n_rows:,} × {n_features:,}, {n_classes} classes, 100 heads; "
        f"{len(checked_heads)} heads checked"
    )
    print(f"{'side':24}{'CPU s':>9}{'wall s':>9}{'gap median':>12}{'p90':>10}{'max':>10}")
    for side, (cpu, wall) in seconds.items():
        text = f"{side:24}{cpu:9.2f}{wall:9.2f}"
        if side in objectives:
            gaps = np.array(objectives[side]) / best_objectives - 1
            text += f"{np.median(gaps):12.1e}{np.quantile(gaps, 0.9):10.1e}{gaps.max():10.1e}"
            figures[f"max_gap {side}"] = float(gaps.max())
        print(text)
    for ours in [side for side in seconds if side.startswith("bank")]:
        for theirs in [side for side in seconds if not side.startswith("bank")]:
            ratio = seconds[theirs][0] / seconds[ours][0]
            figures[f"{ours} vs {theirs}"] = ratio
            line = f"{ours}: {ratio:.1f} × {theirs}"
            if theirs in objectives:
                is_worse = np.array(objectives[ours]) > np.array(objectives[theirs]) * (1 + 1e-6)
                figures[f"{ours} worse than {theirs}"] = int(is_worse.sum())
                line += (
                    f", {int(is_worse.sum())} of {len(checked_heads)} heads worse by more than 1e-6"
                )
            print(line)
        print(
            f"{ours}: {figures[f'products_of_peak {ours}']:.2f} of the GEMM peak "
            f"({figures[f'peak_gflops {ours}']:.0f} GF/s), end to end; "
            f"{figures[f'of_peak {ours}']:.2f} by the products with rows in the passes alone"
        )
    return figures


def ridge_case(name: str, quick: bool) -> dict[str, float]:
    n_rows, n_features, n_classes = CASES[name]
    X, y = digit_features(n_rows, n_features, n_classes)
    fold = stratified_folds(X, y)
    n_strengths = 200 if name == "ridge-1000" else 20
    alphas = np.logspace(-2, 4, n_strengths)
    specs = [RidgeSpec(float(alpha)) for alpha in alphas]
    checked_heads = [(i, f) for i in range(n_strengths) for f in range(N_FOLDS)]
    checked_heads = checked_heads[:: len(checked_heads) // (5 if quick else 50)]
    runs = [
        timed(lambda: fit_ridge_bank(TrainingData(X, y, fold, n_classes), specs, refit=False))
        for _ in range(1 if quick else 5)
    ]
    results = {(specs.index(result.spec), result.fold): result for result in runs[0][0]}
    ours = median_seconds([run[1] for run in runs])
    figures = {"bank_cpu": ours[0]}
    print(
        f"{name}: {n_rows:,} × {n_features:,}, {n_classes} classes, {N_FOLDS * n_strengths} heads; "
        f"RidgeClassifier on {len(checked_heads)} of them, scaled up"
    )
    print(f"{'side':28}{'CPU s':>9}{'wall s':>9}{'ratio':>8}{'max rel. difference':>22}")
    print(f"{'bank (float64 products)':28}{ours[0]:9.2f}{ours[1]:9.2f}")
    for dtype in (np.float32, np.float64):
        cpu_total = wall_total = largest_difference = 0.0
        for i, f in checked_heads:
            train = fold != f

            def fit_one(train: np.ndarray = train, i: int = i, dtype: Any = dtype) -> Any:
                model = make_pipeline(StandardScaler(), RidgeClassifier(alphas[i])).fit(
                    X[train].astype(dtype), y[train]
                )
                model.decision_function(X[~train].astype(dtype))
                return model

            model, (cpu, wall) = timed(fit_one)
            cpu_total, wall_total = cpu_total + cpu, wall_total + wall
            theirs = model[1].coef_ / model[0].scale_
            difference = np.abs(results[i, f].arrays["weight"] - theirs).max()
            largest_difference = max(largest_difference, float(difference / np.abs(theirs).max()))
        share = N_FOLDS * n_strengths / len(checked_heads)
        side = f"RidgeClassifier {np.dtype(dtype).name}"
        figures[f"vs {side}"] = cpu_total * share / ours[0]
        figures[f"max_difference {side}"] = largest_difference
        print(
            f"{side:28}{cpu_total * share:9.2f}{wall_total * share:9.2f}"
            f"{cpu_total * share / ours[0]:8.1f}{largest_difference:22.1e}"
        )
    return figures


def side_columns_case(name: str, quick: bool) -> dict[str, float]:
    """Print what missing numbers, which each fold imputes by its own mean, cost a bank."""
    n_rows, n_features, n_classes = (5_000, 512, 10) if quick else CASES[name]
    X, y = digit_features(n_rows, n_features, n_classes)
    fold = stratified_folds(X, y)
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((n_rows, 4)) + 0.3 * y[:, None]
    is_missing = rng.random(numbers.shape) < 0.15
    data = {}
    for side, values in (("none", numbers), ("15 %", np.where(is_missing, np.nan, numbers))):
        columns = tuple(SideColumn(f"number {k}", None, side != "none") for k in range(4))
        inputs = SideColumns(columns, values).as_inputs()
        rows = np.concatenate([X, inputs], axis=1, dtype=np.float32)
        blocks = side_blocks(columns, n_features)
        data[side] = TrainingData(rows, y, fold, n_classes, side=blocks)
    banks: dict[str, Callable[[TrainingData], Any]] = {
        "logistic": lambda rows: fit_logistic_bank(rows, [LogisticSpec(C) for C in STRENGTHS]),
        "ridge": lambda rows: fit_ridge_bank(rows, [RidgeSpec(alpha) for alpha in STRENGTHS]),
        "lda": lambda rows: fit_discriminant_bank(rows, [LDASpec(s) for s in (0.01, 0.1, 0.5)]),
    }
    figures = {}
    print(f"{name}: {n_rows:,} × {n_features:,} and 4 numbers; CPU s with none and 15 % missing")
    for kind, fit in banks.items():
        runs: dict[str, list[CpuAndWall]] = {side: [] for side in data}
        for _ in range(2 if quick else 5):
            for side, rows in data.items():
                runs[side].append(timed(lambda fit=fit, rows=rows: fit(rows))[1])
        none, some = (median_seconds(runs[side])[0] for side in data)
        figures[f"{kind} missing / none"] = some / none
        print(f"{kind:10}{none:8.2f}{some:8.2f}{some / none:8.2f} times")
    return figures


def stratified_folds(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (N,) int16 folds."""
    fold = np.zeros(len(y), np.int16)
    splitter = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
    for k, (_, held_out) in enumerate(splitter.split(X, y)):
        fold[held_out] = k
    return fold


def median_seconds(runs: list[CpuAndWall]) -> CpuAndWall:
    """Return median CPU and median wall seconds."""
    return float(np.median([cpu for cpu, _ in runs])), float(np.median([wall for _, wall in runs]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument(
        "--quick", action="store_true", help="a sample of scikit-learn's heads, one run of the bank"
    )
    options = parser.parse_args()
    # Defaults stop at 100 iterations: that is what is compared.
    warnings.simplefilter("ignore", ConvergenceWarning)
    run_case = logistic_case
    if options.case == "side-columns":
        run_case = side_columns_case
    elif options.case.startswith("ridge"):
        run_case = ridge_case
    figures = run_case(options.case, options.quick)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
