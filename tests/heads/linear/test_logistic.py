"""Logistic banks: every head equals scikit-learn's optimum and the head trained alone, whatever the
data.
"""

from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from support.linear import blobs, folds

from headrace.cache.errors import HeadraceError
from headrace.heads.data.task import REFIT, TRAIN_ONLY
from headrace.heads.data.training_data import TrainingData
from headrace.heads.linear import logistic as logistic_module
from headrace.heads.linear.kind import LogisticSpec
from headrace.heads.linear.logistic import fit_logistic_bank
from headrace.heads.linear.solver import design as design_module, path_solver
from headrace.heads.linear.solver.design import make_design
from headrace.heads.linear.solver.lbfgs import Slots
from headrace.heads.linear.solver.path_solver import ActiveSet
from headrace.heads.linear.solver.preconditioner import (
    dense_coordinates,
    dense_pair_products,
    make_preconditioner,
)
from headrace.heads.linear.solver.regularization_path import SolvedHead
from headrace.heads.linear.solver.rotation import PerFoldRotation, Rotation
from headrace.heads.linear.solver.torch_blocks import DeviceBlocks

SLOWLY = settings(
    deadline=None, max_examples=10, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize(("jitter", "dtype"), [(3e-4, np.float16), (1e-6, np.float32)])
def test_nearly_equal_rows_keep_their_digits(jitter, dtype):
    """Fewer rows than features, each with a twin that differs in the last digits and has a label of
    its own: what is stored has the objective that is reported, although directions are divided by
    next to nothing on the way.
    """
    rng = np.random.default_rng(0)
    half = rng.standard_normal((60, 300))
    X = np.concatenate([half, half + jitter * rng.standard_normal(half.shape)]).astype(dtype)
    y, fold = rng.integers(0, 3, 120), np.full(120, TRAIN_ONLY)
    for fit in fit_logistic_bank(
        TrainingData(X, y, fold, 3), [LogisticSpec(1e2), LogisticSpec(1e4)], gap=1e-6
    ):
        assert objective(fit, X, y, fold) == pytest.approx(fit.objective, rel=2e-5)


@contextmanager
def per_fold_copies(enabled):
    """Give folds standardized copies of their rows, as many-class heads have, whatever it costs."""
    with pytest.MonkeyPatch.context() as patch:
        if enabled:
            patch.setattr(design_module, "MANY_FREE_VECTORS", 1)
            patch.setattr(design_module, "PENALTY_PRODUCTS_PER_HEAD", 10**6)
            patch.setattr(design_module, "MAX_COPIED_SCALE_RATIO", 30.0)
        yield


def objective(fit, X, y, fold, sample_weight=None, spec=None):
    """The spec's objective, in float64, from the returned coefficients."""
    spec = spec or fit.spec
    train = fold != fit.fold
    Z, target = X[train].astype(np.float64), y[train]
    present = np.unique(target)
    w = np.ones(len(Z)) if sample_weight is None else sample_weight[train].astype(np.float64)
    if spec.class_weight == "balanced":
        counts = np.bincount(target, w, minlength=len(fit.arrays["bias"]))
        w = w * (counts.sum() / (len(present) * np.maximum(counts, 1e-300)))[target]
    scale = StandardScaler().fit(Z).scale_ if spec.standardize else np.ones(Z.shape[1])
    W, b = fit.arrays["weight"].astype(np.float64), fit.arrays["bias"].astype(np.float64)
    decision = Z @ W.T + b
    top = decision.max(1)
    loss = (
        np.log(np.exp(decision - top[:, None]).sum(1)) + top - decision[np.arange(len(Z)), target]
    )
    V = W[present] * scale
    penalty = np.sum((V[1] - V[0]) ** 2) if len(present) == 2 else np.sum(V**2)
    return w @ loss + penalty / (2 * spec.C)


def scikit_learn(spec, X, y, sample_weight=None):
    """The scaler and the model that one would fit without a bank, to a tight tolerance
    in float64.
    """
    scaler = StandardScaler(with_std=spec.standardize).fit(X.astype(np.float64))
    model = LogisticRegression(
        C=spec.C,
        tol=1e-9,
        max_iter=20000,
        solver="newton-cg",
        class_weight=None if spec.class_weight == "none" else "balanced",
    )
    return scaler, model.fit(scaler.transform(X.astype(np.float64)), y, sample_weight=sample_weight)


@pytest.mark.parametrize("copy_per_fold", [False, True])
@SLOWLY
@given(
    n=st.integers(40, 160),
    d=st.integers(1, 60),
    classes=st.integers(2, 5),
    seed=st.integers(0, 10_000),
    class_weight=st.sampled_from(["none", "balanced"]),
    weighted=st.booleans(),
    train_only=st.booleans(),
)
def test_equals_scikit_learn(
    copy_per_fold, n, d, classes, seed, class_weight, weighted, train_only
):
    """Objective, probabilities and coefficients are scikit-learn's, for D below and above N,
    weights of both kinds.
    """
    X, y = blobs(n, d, classes, seed)
    fold = folds(n, 3, seed)
    if train_only:
        fold[fold == 2] = TRAIN_ONLY
    sw = np.random.default_rng(seed).uniform(0.2, 3, n) if weighted else None
    specs = [LogisticSpec(C, class_weight) for C in (0.01, 1.0)]
    with per_fold_copies(copy_per_fold):
        fits = fit_logistic_bank(
            TrainingData(X, y, fold, classes, sample_weight=sw), specs, gap=1e-9
        )
    for fit in fits:
        train = fold != fit.fold
        if len(np.unique(y[train])) < classes:
            continue
        scaler, model = scikit_learn(
            fit.spec, X[train], y[train], None if sw is None else sw[train]
        )
        theirs = model.coef_ / scaler.scale_
        own = fit.arrays["weight"].astype(np.float64)
        own = own if classes > 2 else own[1:] - own[:1]
        assert np.abs(own - theirs).max() <= 2e-3 * np.abs(theirs).max()
        if fit.fold != REFIT:
            p = model.predict_proba(scaler.transform(X[~train].astype(np.float64)))
            np.testing.assert_allclose(fit.validation, p, atol=1e-3)
        again = objective(fit, X, y, fold, sw)
        assert fit.objective == pytest.approx(again, rel=2e-5)
        assert -1e-12 <= fit.gap < 1e-3


@SLOWLY
@given(
    n=st.integers(60, 120),
    d=st.integers(2, 80),
    classes=st.integers(2, 4),
    copy_per_fold=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_gap_is_a_bound(n, d, classes, copy_per_fold, seed):
    """The reported gap is at least the true one, at any accuracy that was asked for."""
    X, y = blobs(n, d, classes, seed)
    fold = folds(n, 2, seed)
    specs = [LogisticSpec(C) for C in (0.003, 0.3)]
    data = TrainingData(X, y, fold, classes)
    best = fit_logistic_bank(data, specs, gap=1e-11)
    for gap in (1e-1, 1e-3, 1e-6):
        with per_fold_copies(copy_per_fold):
            fits = fit_logistic_bank(data, specs, gap=gap)
        for fit, optimum in zip(fits, best, strict=True):
            assert fit.objective - optimum.objective <= (fit.gap + 1e-5) * optimum.objective
            assert fit.objective >= optimum.objective * (1 - 1e-5)


@pytest.mark.parametrize("far", [1.0, 150.0])
def test_many_class_heads_have_rows_in_their_folds_scales(monkeypatch, far):
    """Heads of 66 classes, which share no pass, are the same with a copy of its rows for each fold,
    and have one unless a row is so far out that the fold which holds it out has other scales.
    """
    made = []

    def recorded(*arguments, **options):
        made.append(make_design(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(logistic_module, "make_design", recorded)
    X, y = blobs(66 * 9, 20, 66, seed=2, spread=3.0)
    fold = folds(len(y), 3)
    X[np.flatnonzero(fold == 0)[0]] = X.mean(0) + far * X.std(0)
    data, specs = TrainingData(X, y, fold, 66), [LogisticSpec(0.1), LogisticSpec(10.0)]
    own = fit_logistic_bank(data, specs, gap=1e-7)
    assert isinstance(made[0].rotation, PerFoldRotation) == (far == 1)
    monkeypatch.setattr(design_module, "MANY_FREE_VECTORS", 1000)
    shared = fit_logistic_bank(data, specs, gap=1e-7)
    assert isinstance(made[-1].rotation, Rotation)
    for one, other in zip(own, shared, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=3e-6)
        assert objective(one, X, y, fold) == pytest.approx(one.objective, rel=2e-5)


def test_batched_equals_one_at_a_time():
    """A bank of strengths, class weights and folds gives what each head gives alone."""
    X, y = blobs(150, 20, 3, seed=1)
    fold = folds(150, 3)
    specs = [
        LogisticSpec(float(C), kind) for C in np.logspace(-3, 1, 7) for kind in ("none", "balanced")
    ]
    bank = {
        (f.spec, f.fold): f for f in fit_logistic_bank(TrainingData(X, y, fold, 3), specs, gap=1e-9)
    }
    assert len(bank) == len(specs) * 4
    for spec in specs[::3]:
        for held in (0, REFIT):
            only = np.where(fold == held, 0, TRAIN_ONLY)
            alone = fit_logistic_bank(
                TrainingData(X, y, only, 3), [spec], refit=held == REFIT, gap=1e-9
            )[-1]
            assert alone.objective == pytest.approx(bank[spec, held].objective, rel=1e-6)
            np.testing.assert_allclose(
                alone.arrays["weight"], bank[spec, held].arrays["weight"], rtol=0.02, atol=2e-4
            )


@pytest.mark.parametrize(("n", "d"), [(400, 30), (80, 200)])
def test_a_whole_path_is_solved_to_the_gap(n, d):
    """Twenty strengths: the objective grows less regularized monotonically, and each head is near
    its float64 optimum.
    """
    X, y = blobs(n, d, 4, seed=3, spread=2.0)
    fold = folds(n, 2)
    specs = [LogisticSpec(float(C)) for C in np.logspace(-4, 2, 20)]
    fits = fit_logistic_bank(TrainingData(X, y, fold, 4), specs, refit=False, gap=1e-6)
    tight = fit_logistic_bank(TrainingData(X, y, fold, 4), specs, refit=False, gap=1e-10)
    for fit, optimum in zip(fits, tight, strict=True):
        again = objective(fit, X, y, fold)
        assert again <= objective(optimum, X, y, fold) * (1 + 1e-4)
    for weak, strong in pairwise(reversed([fit.objective for fit in fits if fit.fold == 0])):
        assert weak <= strong * (1 + 1e-5)


@SLOWLY
@given(
    n=st.integers(40, 90),
    d=st.integers(1, 70),
    labels=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
def test_multi_label_is_independent_binary_problems(n, d, labels, seed):
    """Each label's row is the binary head of that label, weights and objective."""
    X, y = blobs(n, d, 3, seed)
    rng = np.random.default_rng(seed)
    Y = ((y[:, None] == np.arange(labels)) ^ (rng.random((n, labels)) < 0.2)).astype(np.uint8)
    fold = folds(n, 2, seed)
    for kind in ("none", "balanced"):
        specs = [LogisticSpec(0.5, kind)]
        together = fit_logistic_bank(TrainingData(X, Y, fold, labels, "multi"), specs, gap=1e-9)
        alone = [
            fit_logistic_bank(TrainingData(X, Y[:, k].astype(np.int64), fold, 2), specs, gap=1e-9)
            for k in range(labels)
        ]
        for row, fit in enumerate(together):
            assert fit.objective == pytest.approx(
                sum(one[row].objective for one in alone), rel=1e-5, abs=1e-9
            )
            for k, one in enumerate(alone):
                if fit.fold != REFIT:
                    np.testing.assert_allclose(
                        fit.validation[:, k], one[row].validation[:, 1], atol=2e-4
                    )


def test_a_class_missing_from_a_fold_gets_probability_zero():
    """A class whose only sample is held out is left out of that fold, as scikit-learn leaves it
    out, and of no other.
    """
    X, y = blobs(90, 5, 3, seed=5)
    y[y == 2] = 1
    y[7] = 2
    fold = folds(90, 3)
    for fit in fit_logistic_bank(TrainingData(X, y, fold, 3), [LogisticSpec(1.0)], gap=1e-9):
        assert np.isfinite(fit.arrays["weight"]).all()
        if fit.fold == fold[7]:
            assert (fit.validation[:, 2] == 0).all()
            train = fold != fit.fold
            scaler, model = scikit_learn(fit.spec, X[train], y[train])
            p = model.predict_proba(scaler.transform(X[~train].astype(np.float64)))
            np.testing.assert_allclose(fit.validation[:, :2], p, atol=1e-4)
        elif fit.fold != REFIT:
            assert (fit.validation[:, 2] > 0).all()


def test_only_one_class():
    """Training rows of one class give a certain prediction of it, and labels that never vary
    likewise.
    """
    X, _ = blobs(30, 4, 2, seed=0)
    fold = folds(30, 2)
    for fit in fit_logistic_bank(
        TrainingData(X, np.ones(30, np.int64), fold, 3), [LogisticSpec(1.0)]
    ):
        assert fit.objective == fit.gap == 0
        assert fit.validation is None or (fit.validation == [0, 1, 0]).all()
    Y = np.stack([np.zeros(30), np.ones(30), np.arange(30) % 2], axis=1).astype(np.uint8)
    fit = fit_logistic_bank(TrainingData(X, Y, fold, 3, "multi"), [LogisticSpec(1.0)])[0]
    assert (fit.validation[:, 0] == 0).all()
    assert (fit.validation[:, 1] == 1).all()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("d", [6, 90])
def test_scales_and_constant_features(scale, d):
    """Standardized heads do not see the unit of a feature; constant features get no weight, in one
    fold or in all.
    """
    X, y = blobs(80, d, 3, seed=2)
    fold = folds(80, 2)
    X[:, 1] = 5.0
    X[fold == 1, 2] = 1.0  # constant where fold 0's head trains
    X[fold == 0, 2] += 3 * np.arange((fold == 0).sum())
    plain = fit_logistic_bank(TrainingData(X, y, fold, 3), [LogisticSpec(0.3)], gap=1e-9)
    scaled = fit_logistic_bank(
        TrainingData(X * np.float32(scale), y, fold, 3), [LogisticSpec(0.3)], gap=1e-9
    )
    for one, other in zip(plain, scaled, strict=True):
        assert (one.arrays["weight"][:, 1] == 0).all()
        assert one.fold != 0 or np.abs(one.arrays["weight"][:, 2]).max() < 1e-6
        assert other.objective == pytest.approx(one.objective, rel=1e-5)
        np.testing.assert_allclose(
            other.arrays["weight"] * scale, one.arrays["weight"], rtol=0.01, atol=1e-4
        )


def test_unstandardized_heads():
    """standardize=False penalizes raw weights, as LogisticRegression without a scaler does."""
    X, y = blobs(120, 8, 3, seed=8)
    fold = folds(120, 2)
    for fit in fit_logistic_bank(
        TrainingData(X, y, fold, 3), [LogisticSpec(0.1, standardize=False)], gap=1e-9
    ):
        train = fold != fit.fold
        scaler, model = scikit_learn(fit.spec, X[train], y[train])
        assert scaler.scale_ is None
        assert np.abs(fit.arrays["weight"] - model.coef_).max() <= 2e-3 * np.abs(model.coef_).max()


def test_separable_data_at_weak_regularization():
    """The loss goes to nothing; the heads still reach their optimum, and report a bound
    that holds.
    """
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = (
        20 * np.eye(3)[y] @ rng.standard_normal((3, 10)) + 0.1 * rng.standard_normal((90, 10))
    ).astype(np.float32)
    fold = folds(90, 3)
    specs = [LogisticSpec(C) for C in (1.0, 1e3, 1e6)]
    for fit in fit_logistic_bank(TrainingData(X, y, fold, 3), specs):
        train = fold != fit.fold
        scaler, model = scikit_learn(fit.spec, X[train], y[train])
        theirs = type(fit)(
            fit.spec,
            fit.fold,
            {"weight": model.coef_ / scaler.scale_, "bias": model.intercept_ - model.coef_ / scaler.scale_ @ scaler.mean_},
            0.0, 0.0, 0, 0.0, None,
        )  # fmt: skip
        assert objective(fit, X, y, fold) <= objective(theirs, X, y, fold) * 1.01
        assert np.isfinite(fit.gap)


def test_float16_features_and_order_of_rows():
    """Half-precision features are used as they are; permuting the rows changes nothing but
    rounding.
    """
    X, y = blobs(100, 12, 3, seed=4)
    X = (X / np.abs(X).max(0)).astype(np.float16)
    fold = folds(100, 2)
    specs = [LogisticSpec(1.0)]
    order = np.random.default_rng(0).permutation(100)
    first = fit_logistic_bank(TrainingData(X, y, fold, 3), specs, gap=1e-9)
    second = fit_logistic_bank(TrainingData(X[order], y[order], fold[order], 3), specs, gap=1e-9)
    for one, other in zip(first, second, strict=True):
        assert other.objective == pytest.approx(one.objective, rel=1e-6)
        if one.fold != REFIT:
            held = np.flatnonzero(fold == one.fold)
            position = {row: k for k, row in enumerate(held)}
            own = [position[row] for row in order if row in position]
            np.testing.assert_allclose(other.validation, one.validation[own], atol=1e-4)


def test_a_uniform_weight_is_a_strength():
    """Weights that are all c are the same head as C times c without weights."""
    X, y = blobs(80, 6, 3, seed=6)
    fold = folds(80, 2)
    heavy = fit_logistic_bank(
        TrainingData(X, y, fold, 3, sample_weight=np.full(80, 5.0)), [LogisticSpec(0.1)], gap=1e-9
    )
    plain = fit_logistic_bank(TrainingData(X, y, fold, 3), [LogisticSpec(0.5)], gap=1e-9)
    for one, other in zip(heavy, plain, strict=True):
        assert one.objective == pytest.approx(5 * other.objective, rel=1e-6)
        np.testing.assert_allclose(
            one.arrays["weight"], other.arrays["weight"], rtol=0.01, atol=1e-4
        )


def test_weight_zero_leaves_a_row_out():
    """A row of weight 0 has no say in the loss."""
    X, y = blobs(80, 6, 2, seed=6)
    fold = np.full(80, TRAIN_ONLY, np.int16)
    weight = np.ones(80)
    weight[::4] = 0
    specs = [LogisticSpec(0.5, standardize=False)]
    kept = weight > 0
    one = fit_logistic_bank(TrainingData(X, y, fold, 2, sample_weight=weight), specs, gap=1e-9)[0]
    other = fit_logistic_bank(TrainingData(X[kept], y[kept], fold[kept], 2), specs, gap=1e-9)[0]
    assert one.objective == pytest.approx(other.objective, rel=1e-6)


def test_refusals_name_what_is_wrong():
    """NaN is refused with its row and column; wrong shapes, labels, strengths and weights with what
    was expected.
    """
    X, y = blobs(20, 3, 2, seed=0)
    fold = folds(20, 2)
    specs = [LogisticSpec(1.0)]
    for bad in (np.nan, np.inf):
        broken = X.copy()
        broken[13, 2] = bad
        with pytest.raises(ValueError, match="feature 2 of row 13") as refused:
            fit_logistic_bank(TrainingData(broken, y, fold, 2), specs)
        assert not isinstance(refused.value, HeadraceError)  # that would end the whole bank
    with pytest.raises(ValueError, match="target has 19 rows but the features have 20"):
        fit_logistic_bank(TrainingData(X, y[:-1], fold, 2), specs)
    with pytest.raises(ValueError, match=r"0\.\.1, found 0\.\.2"):
        fit_logistic_bank(TrainingData(X, np.where(y == 1, 2, y), fold, 2), specs)
    with pytest.raises(ValueError, match="C must be a positive number"):
        fit_logistic_bank(TrainingData(X, y, fold, 2), [LogisticSpec(0.0)])
    with pytest.raises(ValueError, match="not negative"):
        fit_logistic_bank(TrainingData(X, y, fold, 2, sample_weight=-np.ones(20)), specs)


def test_heads_that_end_early_have_true_bounds(monkeypatch):
    """One iteration in either float type gives every head, with its honest distance to the
    optimum.
    """
    X, y = blobs(150, 20, 3, seed=1)
    fold = folds(150, 3)
    specs = [LogisticSpec(C) for C in (0.01, 1.0)]
    best = fit_logistic_bank(TrainingData(X, y, fold, 3), specs, gap=1e-9)
    for limit in ("MAX_ITERATIONS", "ITERATIONS_PER_PRECONDITIONER"):
        monkeypatch.setattr(path_solver, limit, 1)
    early = fit_logistic_bank(TrainingData(X, y, fold, 3), specs)
    for fit, optimum in zip(early, best, strict=True):
        assert fit.iterations < optimum.iterations
        assert fit.objective - optimum.objective <= fit.gap * optimum.objective * (1 + 1e-5)
        assert fit.gap > 1e-4


@pytest.mark.parametrize("labels", ["single", "binary", "multi"])
def test_torch_products_give_the_same_heads(labels):
    """On a device of torch's (here "cpu:0", its CPU) the bank finds the optimum that
    NumPy finds.
    """
    X, y = blobs(120, 15, 4, seed=9)
    target = {"single": y, "binary": y % 2, "multi": (y[:, None] <= np.arange(3)).astype(np.uint8)}[
        labels
    ]
    target = target[:, :2] if labels == "multi" else target
    classes = {"single": 4, "binary": 2, "multi": 2}[labels]
    specs = [LogisticSpec(C, kind) for C in (0.01, 1.0) for kind in ("none", "balanced")]
    task_kind = "multi" if target.ndim == 2 else "single"
    data = TrainingData(X, target, folds(120, 2), classes, task_kind)
    here = fit_logistic_bank(data, specs, gap=1e-9)
    there = fit_logistic_bank(data, specs, gap=1e-9, device="cpu:0")
    for one, other in zip(here, there, strict=True):
        assert other.objective == pytest.approx(one.objective, rel=1e-6)
        np.testing.assert_allclose(
            other.arrays["weight"], one.arrays["weight"], rtol=0.02, atol=2e-4
        )


def test_rows_are_rotated_where_the_products_run(monkeypatch):
    """Gram matrix and rotation of a million rows would take NumPy longer than a GPU takes for all
    heads. The inner products of the rotated rows are the same wherever they are computed.
    """
    made = []

    def recorded(*arguments, **options):
        made.append((options["device"], make_design(*arguments, **options)))
        return made[-1][1]

    monkeypatch.setattr(logistic_module, "make_design", recorded)
    X, y = blobs(120, 15, 4, seed=9)
    data = TrainingData(X, y, folds(120, 2), 4)
    for device in ("cpu", "cpu:0"):
        fit_logistic_bank(data, [LogisticSpec(0.1)], device=device)
    (here, design), (there, design_there) = made
    assert (here, there) == ("cpu", "cpu:0")
    for block, other in zip(design.row_blocks, design_there.row_blocks, strict=True):
        inner_products = block.values @ block.values.T
        np.testing.assert_allclose(other.values @ other.values.T, inner_products, atol=1e-4)


@pytest.mark.parametrize("rows_per_block", [8, 64])
def test_weights_go_to_a_device_and_gradients_come_back_once_an_evaluation(
    monkeypatch, rows_per_block
):
    """However many blocks there are: the weights, where they belong to, the class factors and, of
    each set of folds, its heads go up; losses and gradients come down.
    """
    monkeypatch.setattr(design_module, "ROWS_PER_BLOCK", rows_per_block)
    moved, evaluations = Counter(), []
    evaluate, upload, cpu = ActiveSet.evaluate, DeviceBlocks.upload, torch.Tensor.cpu

    def evaluate_counted(self, *args):
        moved.clear()
        result = evaluate(self, *args)
        evaluations.append((dict(moved), len(self.problem.trains_on)))
        return result

    def upload_counted(*args):
        moved["up"] += 1
        return upload(*args)

    def cpu_counted(*args):
        moved["down"] += 1
        return cpu(*args)

    monkeypatch.setattr(ActiveSet, "evaluate", evaluate_counted)
    monkeypatch.setattr(DeviceBlocks, "upload", upload_counted)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu_counted)
    X, y = blobs(120, 15, 4, seed=9)
    specs = [LogisticSpec(C, "balanced") for C in (0.01, 1.0)]
    fit_logistic_bank(TrainingData(X, y, folds(120, 2), 4), specs, device="cpu:0")
    assert evaluations
    for counts, n_folds in evaluations:
        assert counts["down"] == 2
        assert 4 <= counts["up"] <= 3 + n_folds


def test_weights_that_a_sample_of_rows_never_meets():
    """Every second row weighs nothing, and those are the ones that steps are scaled by: heads are
    those of the other rows.
    """
    X, y = blobs(8192, 8, 2, 0)
    fold, weight = (
        (np.arange(8192) // 2 % 4).astype(np.int16),
        (np.arange(8192) % 2).astype(np.float64),
    )
    specs = [LogisticSpec(1.0, standardize=False)]
    weighted = fit_logistic_bank(TrainingData(X, y, fold, 2, sample_weight=weight), specs, gap=1e-8)
    odd = fit_logistic_bank(TrainingData(X[1::2], y[1::2], fold[1::2], 2), specs, gap=1e-8)
    for one, other in zip(weighted, odd, strict=True):
        assert one.objective == pytest.approx(other.objective, rel=1e-6)


def test_float32_goes_on_below_the_rounding_of_its_values():
    """A least squares problem whose value at the optimum hides all that is left to gain: gradients
    still show the way.
    """
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.1, 1.0, 40).astype(np.float32)
    optimum = rng.standard_normal(40).astype(np.float32)

    def evaluate(x):
        off = (x - optimum) * scales
        return np.float32(1e4) + 0.5 * np.einsum("ap,ap->a", off, off).astype(np.float64).round(
            2
        ), off * scales

    slots = Slots(1, 40, 8, np.float32, gap=1e-12, max_iterations=200)
    slots.load(0, np.zeros(40, np.float32), None)
    only, ended = np.array([0]), np.array([])
    while not ended.size:
        points = slots.trial_points(only)
        ended = slots.advance(only, points, *evaluate(points), lambda slot, gradient: True)
    end = slots.unload(0)
    assert end.gap_reached
    # 1e-11 of the value, whose rounding is 1e-7 of it
    assert 0.5 * float((((end.point - optimum) * scales) ** 2).sum()) < 1e-7


def test_a_head_that_goes_on_keeps_its_pairs():
    """With a new preconditioner a paused head has the steps and changes of gradient that it had with the old
    one: corrected as another strength's are, heads at weak regularization ended a hundredth above
    the optimum.
    """
    rng = np.random.default_rng(0)
    classes, width, m = 5, 40, 3
    values, weight = rng.standard_normal((200, width)), np.ones(200)
    products = dense_pair_products(values, dense_coordinates(classes, width))
    first, second = (
        make_preconditioner(
            size * rng.standard_normal((classes, width)), values, values**2, products, weight, 0.1
        )
        for size in (0.1, 1)
    )
    active_set = ActiveSet(
        SimpleNamespace(n_outputs=classes, design=SimpleNamespace(n_coordinates=width)), 1
    )
    active_set.preconditioners[0], active_set.l2_strength[0] = second, 0.1
    pairs = rng.standard_normal((2 * m, (classes - 1) * width))
    nothing = np.zeros((classes, width))
    carried = active_set.transfer_pairs(
        0, SolvedHead(nothing, nothing, 0.0, pairs, first, 0.1, 20, False)
    )
    then, now = (both.reshape(2 * m, classes - 1, width) for both in (pairs, carried))
    np.testing.assert_allclose(
        second.from_scaled(now[:m]), first.from_scaled(then[:m]), rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(
        second.gradient_from_scaled(now[m:]),
        first.gradient_from_scaled(then[m:]),
        rtol=1e-6,
        atol=1e-6,
    )
