"""Metrics and intervals against scikit-learn; folds and splits by their promises."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, binomtest
from sklearn import metrics as sk

from headrace.heads.data.folds import BadSplit, make_folds, split_test, strata
from headrace.heads.data.task import TEST, TRAIN_ONLY
from headrace.heads.errors import HeadError
from headrace.heads.evaluate.intervals import metric_interval, proportion_interval
from headrace.heads.evaluate.metrics import (
    DEFAULT_METRIC,
    METRICS,
    all_metrics,
    metric_names,
    row_hits,
    row_losses,
    score,
    sign,
)

Arrays = np.ndarray[Any, Any]


def predictions(rows: int, classes: int, seed: int) -> tuple[Arrays, Arrays]:
    """Targets and coarse probabilities (with ties) that know something of them."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, classes, rows)
    decision = np.round(generator.normal(size=(rows, classes)), 1)
    decision[np.arange(rows), target] += 1
    probabilities = np.exp(decision)
    return target, (probabilities / probabilities.sum(1, keepdims=True)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 60), classes=st.integers(2, 6), seed=st.integers(0, 999))
def test_single_label_metrics_are_scikit_learns(rows: int, classes: int, seed: int) -> None:
    """Every metric equals scikit-learn's, also when classes are missing from the target or the
    predictions.
    """
    target, p = predictions(rows, classes, seed)
    found = all_metrics("single", target, p)
    guess = p.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(target, guess))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and not in the target
        assert found["balanced_accuracy"] == pytest.approx(
            sk.balanced_accuracy_score(target, guess)
        )
    assert found["log_loss"] == pytest.approx(
        sk.log_loss(target, p / p.sum(1, keepdims=True), labels=np.arange(classes)), rel=1e-4
    )
    assert found["macro_f1"] == pytest.approx(sk.f1_score(target, guess, average="macro"))
    present = [c for c in range(classes) if 0 < (target == c).sum() < rows]
    if classes == 2 and len(present) == 2:
        assert found["auc"] == pytest.approx(sk.roc_auc_score(target, p[:, 1]))
    elif len(present) > 0 and classes > 2:
        expected = np.mean([sk.roc_auc_score(target == c, p[:, c]) for c in present])
        assert found["auc"] == pytest.approx(expected)
    elif not present:
        assert np.isnan(found["auc"])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 60), labels=st.integers(1, 5), seed=st.integers(0, 999))
def test_multi_label_metrics_are_scikit_learns(rows: int, labels: int, seed: int) -> None:
    """Every metric equals scikit-learn's, labels that never or always occur left out where they
    have no meaning.
    """
    generator = np.random.default_rng(seed)
    target = (generator.random((rows, labels)) < 0.4).astype(np.uint8)
    p = np.clip(np.round(generator.random((rows, labels)) * 0.7 + target * 0.2, 1), 0.05, 0.95)
    found = all_metrics("multi", target, p)
    guess = (p >= 0.5).astype(int)
    assert found["accuracy"] == pytest.approx((target == guess).all(1).mean())
    assert found["hamming_accuracy"] == pytest.approx(1 - sk.hamming_loss(target, guess))
    assert found["macro_f1"] == pytest.approx(
        np.mean([sk.f1_score(target[:, j], guess[:, j], zero_division=0) for j in range(labels)])
    )
    losses = [sk.log_loss(target[:, j], p[:, j], labels=[0, 1]) for j in range(labels)]
    assert found["log_loss"] == pytest.approx(np.mean(losses))
    both = [j for j in range(labels) if 0 < target[:, j].sum() < rows]
    if both:
        assert found["auc"] == pytest.approx(
            np.mean([sk.roc_auc_score(target[:, j], p[:, j]) for j in both])
        )
    some = [j for j in range(labels) if target[:, j].any()]
    if some:
        expected = np.mean([sk.average_precision_score(target[:, j], p[:, j]) for j in some])
        assert found["average_precision"] == pytest.approx(expected)


def test_regression_metrics_are_scikit_learns() -> None:
    """r2, rmse and mae over several targets, one of them constant."""
    generator = np.random.default_rng(0)
    target = generator.normal(size=(50, 3))
    target[:, 2] = 4
    predicted = target + 0.3 * generator.normal(size=(50, 3))
    found = all_metrics("regression", target, predicted)
    assert found["r2"] == pytest.approx(sk.r2_score(target, predicted))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(target, predicted))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(target, predicted))
    assert score("regression", target[:, 0], predicted[:, 0], "mae") == pytest.approx(
        np.abs(target - predicted)[:, 0].mean()
    )


def test_a_prediction_that_is_not_finite_counts() -> None:
    """In one class or one target of several, which the mean over them must not leave out."""
    probabilities = np.full((4, 3), 1 / 3)
    probabilities[0, 0] = np.nan
    assert np.isnan(score("single", np.array([0, 1, 2, 1]), probabilities, "auc"))
    target = np.arange(8.0).reshape(4, 2)
    predicted = target.copy()
    predicted[0, 0] = np.inf
    assert score("regression", target, predicted, "rmse") == np.inf
    assert score("regression", target, predicted, "r2") == -np.inf


def test_calibration_error_is_what_it_says() -> None:
    """Zero for confidence that comes true, the excess for overconfidence."""
    p = np.tile([[0.8, 0.2]], (100, 1))
    target = np.repeat([0, 1], [80, 20])
    assert score("single", target, p, "calibration_error") == pytest.approx(0, abs=1e-9)
    assert score("single", np.repeat([0, 1], [50, 50]), p, "calibration_error") == pytest.approx(
        0.3
    )
    assert score(
        "multi", np.ones((10, 1)), np.full((10, 1), 0.6), "calibration_error"
    ) == pytest.approx(0.4)


def test_unknown_metrics_are_refused_with_the_known_ones() -> None:
    """The message lists the metrics of that kind of task; every default is one of them."""
    with pytest.raises(HeadError, match="accuracy, balanced_accuracy"):
        score("single", np.array([0]), np.array([[1.0, 0.0]]), "acuracy")
    with pytest.raises(HeadError, match="r2, rmse, mae"):
        score("regression", np.array([0.0]), np.array([[1.0]]), "accuracy")
    assert all(metric in metric_names(kind) for kind, metric in DEFAULT_METRIC.items())
    assert sign("accuracy") == 1
    assert sign("log_loss") == -1
    assert METRICS["auc"].higher_is_better


def test_a_proportion_has_the_exact_interval() -> None:
    """Clopper and Pearson's, as scipy has it; a test without a mistake is no proof of none."""
    for hits, rows in ((37, 37), (54, 55), (80, 100), (0, 12)):
        right = np.arange(rows) < hits
        expected = binomtest(hits, rows).proportion_ci(method="exact")
        np.testing.assert_allclose(
            proportion_interval(right), (expected.low, expected.high), atol=1e-9
        )
        p = np.stack([1.0 - right, right], axis=1)
        assert metric_interval("single", np.ones(rows, int), p, "accuracy") == proportion_interval(
            right
        )
    with pytest.raises(ValueError, match="needs rows"):
        metric_interval("single", np.zeros(0, int), np.zeros((0, 2)), "accuracy")


def exact_coverage(rows: int, truth: float) -> float:
    """Over all that can be seen of so many independent rows, by how likely each is."""
    ends = [proportion_interval(np.arange(rows) < hits) for hits in range(rows + 1)]
    inside = np.array([low <= truth <= high for low, high in ends])
    return float(binom.pmf(np.arange(rows + 1), rows, truth)[inside].sum())


@pytest.mark.parametrize("rows", [37, 55, 100])
def test_the_interval_of_an_accuracy_covers_it(rows: int) -> None:
    """At least 95 %, also where few images meet few mistakes; the percentile bootstrap covered 31
    to 67 % at .98 and .99.
    """
    for truth in (0.6, 0.8, 0.9, 0.95, 0.98, 0.99):
        assert exact_coverage(rows, truth) >= 0.95


def test_the_interval_of_an_accuracy_covers_it_in_groups() -> None:
    """Fifteen images of a patient, their mistakes correlated at .3: single images would
    cover 60 %.
    """
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 15)
    for truth in (0.8, 0.95):
        inside, apart = 0, 0
        for _ in range(300):
            share = generator.beta(truth * 0.7 / 0.3, (1 - truth) * 0.7 / 0.3, 16)
            right = generator.random(240) < share[groups]
            low, high = proportion_interval(right, groups)
            inside += low <= truth <= high
            low, high = proportion_interval(right)
            apart += low <= truth <= high
        assert inside >= 0.93 * 300
        assert apart <= 0.75 * 300


def test_groups_count_as_their_images_do() -> None:
    """Groups that are right or wrong as one are as many independent images as there are groups;
    images that vary apart in many groups are nearly as many as there are; a test without a mistake
    counts groups, since how alike their mistakes are cannot be seen.
    """
    groups = np.repeat(np.arange(20), 6)
    whole = proportion_interval(np.repeat(np.arange(20) < 14, 6), groups)
    np.testing.assert_allclose(whole, proportion_interval(np.arange(20) < 14), atol=1e-9)
    apart = proportion_interval(np.arange(120) % 6 < 4, groups)
    assert np.diff(apart) < 1.3 * np.diff(proportion_interval(np.arange(120) % 6 < 4))
    assert proportion_interval(np.ones(120), groups) == proportion_interval(np.ones(20))
    assert proportion_interval(np.ones(12), np.zeros(12))[0] < 0.1


def test_the_interval_of_any_metric_holds_its_value() -> None:
    """Of any kind of task, with groups and without; never a point, also where all is right."""
    target, p = predictions(300, 4, 1)
    perfect = np.eye(4)[target] * 0.96 + 0.01
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (60, 3))
    told = np.clip(labels + generator.normal(0, 0.5, labels.shape), 0.01, 0.99)
    numbers = generator.normal(size=(60, 2))
    cases = [
        ("single", target, p),
        ("single", target, perfect),
        ("multi", labels, told),
        ("regression", numbers, numbers + generator.normal(0, 0.5, numbers.shape)),
    ]
    for kind, truth, predicted in cases:
        for metric in metric_names(kind):
            value = score(kind, truth, predicted, metric)
            low, high = metric_interval(kind, truth, predicted, metric)
            assert low <= value + 1e-9, (kind, metric)
            assert value <= high + 1e-9, (kind, metric)
            if metric != "calibration_error":
                assert low < high, (kind, metric)
            wide = metric_interval(
                kind, truth, predicted, metric, groups=np.arange(len(truth)) // 4
            )
            assert np.isfinite(wide).all(), (kind, metric)
            if metric not in ("r2", "rmse", "mae", "calibration_error"):
                assert wide[1] - wide[0] > 0.8 * (high - low), (kind, metric)
    assert metric_interval("single", target, perfect, "balanced_accuracy")[0] < 0.99
    assert np.isnan(metric_interval("single", np.zeros(5, int), p[:5, :2], "auc")).all()


def test_row_values_average_to_the_metric() -> None:
    """Of hits and of losses."""
    target, p = predictions(300, 4, 1)
    for metric, rows in (("accuracy", row_hits), ("log_loss", row_losses)):
        np.testing.assert_allclose(
            rows("single", target, p, metric).mean(), score("single", target, p, metric)
        )
    labels, told = p[:, :3] > 0.3, p[:, 1:]
    for metric, rows in (
        ("accuracy", row_hits),
        ("hamming_accuracy", row_hits),
        ("log_loss", row_losses),
    ):
        np.testing.assert_allclose(
            rows("multi", labels, told, metric).mean(), score("multi", labels, told, metric)
        )
    np.testing.assert_allclose(row_losses("regression", p, told[:, [0, 1, 2, 0]], "mae").mean(),
                               score("regression", p, told[:, [0, 1, 2, 0]], "mae"))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=80), st.integers(2, 6), st.integers(0, 99))
def test_folds_are_balanced_in_size_and_in_every_class(
    labels: list[int], n_folds: int, seed: int
) -> None:
    """Fold sizes, and the counts of every class in them, differ by at most one; every row is held
    out once.
    """
    target = np.array(labels)
    fold = make_folds(target, n_folds=n_folds, seed=seed)
    assert fold.dtype == np.int16
    assert np.ptp(np.bincount(fold, minlength=n_folds)) <= 1
    for value in set(labels):
        assert np.ptp(np.bincount(fold[target == value], minlength=n_folds)) <= 1
    np.testing.assert_array_equal(fold, make_folds(target, n_folds=n_folds, seed=seed))


def test_other_targets_have_strata() -> None:
    """Regression folds have like distributions; a rare label is spread over the folds."""
    generator = np.random.default_rng(0)
    values = generator.lognormal(size=200)
    fold = make_folds(values, n_folds=4, seed=0)
    medians = [np.median(values[fold == f]) for f in range(4)]
    assert np.ptp(medians) < 0.35
    labels = np.zeros((90, 3), np.uint8)
    labels[:, 0] = 1
    labels[:6, 2] = 1
    fold = make_folds(labels, n_folds=3, seed=0)
    assert np.bincount(fold[:6]).tolist() == [2, 2, 2]
    assert strata(np.array(["b", "a", "b"])).tolist() == [1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=5, max_size=60),
    st.integers(0, 9),
)
def test_groups_are_never_divided(pairs: list[tuple[int, int]], seed: int) -> None:
    """No group is in two folds or on both sides of the test split, with rare classes and few
    groups, without a warning.
    """
    target, groups = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if len(set(groups.tolist())) < 3:
        with pytest.raises(BadSplit, match=r"groups? cannot make"):
            make_folds(target, n_folds=3, seed=seed, groups=groups)
        return
    fold = make_folds(target, n_folds=3, seed=seed, groups=groups)
    assert set(fold.tolist()) == {0, 1, 2}
    assert all(len(set(fold[groups == g].tolist())) == 1 for g in groups)
    test = split_test(target, fraction=0.3, seed=seed, groups=groups)
    assert all(len(set(test[groups == g].tolist())) == 1 for g in groups)
    assert 0 < test.sum() < len(test)


def test_given_folds_are_taken_as_they_are() -> None:
    """Integers, split names and fold names; gaps, mixtures and unknown codes are refused with what
    to do.
    """
    target = np.zeros(4, int)

    def given_as(*values: Any) -> list[int]:
        return make_folds(target[: len(values)], n_folds=5, seed=0, given=np.array(values)).tolist()

    assert given_as(0, 1, -1, -2) == [0, 1, TEST, TRAIN_ONLY]
    assert given_as("train", "Val", "test", "training") == [TRAIN_ONLY, 0, TEST, TRAIN_ONLY]
    assert given_as("train", "dev", "holdout", "Testing") == [TRAIN_ONLY, 0, TEST, TEST]
    assert given_as("site B", "site A", "test", "site B") == [1, 0, TEST, 1]
    with pytest.raises(BadSplit, match="without gaps"):
        given_as(0, 2)
    with pytest.raises(BadSplit, match="mixes"):
        given_as("val", "site A")
    with pytest.raises(BadSplit, match="fold -5"):
        given_as(-5, 0)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_the_test_split_takes_its_share_of_every_class(fraction: float) -> None:
    """Shares hold per class and in total; a class of one row trains."""
    target = np.repeat([0, 1, 2, 3], [200, 101, 37, 1])
    test = split_test(target, fraction=fraction, seed=0)
    assert abs(test.sum() - fraction * len(target)) <= 1
    for value in range(3):
        assert abs(test[target == value].sum() - fraction * (target == value).sum()) <= 1
    assert not test[target == 3].any()
    many = np.repeat(np.arange(40), 3)
    assert split_test(many, fraction=0.25, seed=0).sum() == 30


def test_impossible_splits_say_what_to_do() -> None:
    """One fold, more folds than rows, an empty side."""
    with pytest.raises(BadSplit, match="at least 2"):
        make_folds(np.arange(5), n_folds=1, seed=0)
    with pytest.raises(BadSplit, match="at most 3 folds"):
        make_folds(np.array([0, 1, 0]), n_folds=5, seed=0)
    with pytest.raises(BadSplit, match="between 0 and 1"):
        split_test(np.array([0, 1]), fraction=1.5, seed=0)
    with pytest.raises(BadSplit, match="each has a class of its own"):
        split_test(np.array([0, 1, 2]), fraction=0.2, seed=0)
