"""The temperature of a classifier: what it is fitted to, where it ends, and that it changes no
decision.
"""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from headrace.heads.bank import fit_bank
from headrace.heads.data.task import REFIT, Task
from headrace.heads.discriminant.kind import LDASpec
from headrace.heads.evaluate.metrics import score
from headrace.heads.evaluate.temperature import (
    FLOOR,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    PRIOR_STD,
    cross_fitted,
    fit_temperature,
    fit_temperatures,
    with_temperature,
)
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.link import tempered
from headrace.heads.neighbors.kind import CentroidSpec, KNNSpec
from headrace.heads.networks.kind import ConvSpec, MLPSpec
from headrace.heads.persist import check_temperature
from headrace.heads.predict import predict_head, probability_floor
from headrace.heads.sklearn.kind import SklearnSpec


def drawn(kind, rows, factor=1.0, seed=0, spread=1.5):
    """Targets, their true probabilities, and those of a head whose log-odds are `factor` times as
    large.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (rows, 3))
    if kind == "multi":
        truth, told = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-factor * logits))
        return (rng.random(truth.shape) < truth).astype(np.uint8), truth, told
    truth, told = np.exp(logits), np.exp(factor * logits)
    truth, told = truth / truth.sum(1, keepdims=True), told / told.sum(1, keepdims=True)
    return (truth.cumsum(1) > rng.random((rows, 1))).argmax(1), truth, told


def penalized_loss(kind, target, told, weight, log_temperature):
    """What `fit_temperature` says it minimizes, written down from its definition."""
    values = np.clip(with_temperature(kind, told, float(np.exp(log_temperature))), FLOOR, 1)
    if kind == "single":
        losses = -np.log(values[np.arange(len(target)), target])
    else:
        losses = -np.log(np.where(target > 0, values, np.clip(1 - values, FLOOR, 1))).sum(1)
    size = losses.size if kind == "single" else target.size
    mean = (weight * losses).sum() / weight.sum()
    return mean * (size if kind == "single" else size / target.shape[1]) + log_temperature**2 / (
        2 * PRIOR_STD**2
    )


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_temperature_undoes_what_was_multiplied(kind, factor):
    """Log-odds that are `factor` times too large give a temperature of `factor`; decisions do not
    change.
    """
    target, truth, told = drawn(kind, 20_000, factor)
    temperature = fit_temperature(kind, target, told)
    assert temperature == pytest.approx(factor, rel=0.04)
    mended = with_temperature(kind, told, temperature)
    assert np.abs(mended - truth).mean() < 0.02
    if kind == "single":
        assert (mended.argmax(1) == told.argmax(1)).all()
    else:
        assert ((mended >= 0.5) == (told >= 0.5)).all()


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("rows", [12, 300])
def test_it_is_the_minimum_that_scipy_finds(kind, rows):
    """Of the log loss of weighted rows with the prior."""
    for seed, factor in enumerate((0.2, 1.0, 5.0)):
        target, _, told = drawn(kind, rows, factor, seed)
        weight = np.random.default_rng(seed).uniform(0.1, 3, rows)
        bounds = float(np.log(MIN_TEMPERATURE)), float(np.log(MAX_TEMPERATURE))
        found = minimize_scalar(
            lambda value, target=target, told=told, weight=weight: penalized_loss(kind, target, told, weight, value),
            bounds=bounds, method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        assert fit_temperature(kind, target, told, weight) == pytest.approx(
            np.exp(found.x), rel=1e-4
        )


def test_it_is_scikit_learns_where_rows_are_many():
    """`CalibratedClassifierCV(method="temperature", ensemble=False)`: out-of-fold predictions, the
    estimator on all rows.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, cross_val_predict

    rng = np.random.default_rng(1)
    X = rng.normal(size=(1500, 60))
    target = (X[:, :3] + rng.normal(0, 2, (1500, 3))).argmax(1)
    for base in (LogisticRegression(C=1e-3), LogisticRegression(C=10)):
        theirs = CalibratedClassifierCV(
            base, method="temperature", ensemble=False, cv=KFold(5)
        ).fit(X, target)
        told = cross_val_predict(base, X, target, cv=KFold(5), method="predict_proba")
        temperature = fit_temperature("single", target, told)
        assert 1 / theirs.calibrated_classifiers_[0].calibrators[0].beta_ == pytest.approx(
            temperature, rel=0.02
        )
        ours = with_temperature("single", base.fit(X, target).predict_proba(X), temperature)
        np.testing.assert_allclose(ours, theirs.predict_proba(X), atol=0.01)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_heads_get_the_temperatures_that_they_would_get_alone(kind):
    """Many at once as each alone; a head that is forty times too unsure among them."""
    target, _, odds = drawn(kind, 400, spread=2)
    heads = np.stack([with_temperature(kind, odds, t) for t in (0.3, 1.0, 3.0, 40.0)])
    found = fit_temperatures(kind, target, heads)
    assert found.tolist() == [fit_temperature(kind, target, head) for head in heads]
    assert found[-1] == pytest.approx(found[1] / 40, rel=0.15)
    assert fit_temperatures("regression", target, heads).tolist() == [1.0] * 4


def test_rows_that_all_say_the_same_do_not_drive_it_away():
    """Folds that are all right have their best at 0, a head that knows nothing at infinity, one
    that is always wrong beyond: trackers have temperatures of a million and negative ones. One row
    alone decides next to nothing.
    """
    sure = np.tile([0.8, 0.2], (100, 1))
    assert 0.2 < fit_temperature("single", np.zeros(100, int), sure) < 0.5
    assert 3 < fit_temperature("single", np.arange(100) % 2, sure) < MAX_TEMPERATURE
    assert 5 < fit_temperature("single", np.ones(100, int), sure) < MAX_TEMPERATURE
    for truth in (0, 1):
        assert 0.85 < fit_temperature("single", np.array([truth]), sure[:1]) < 1.3
    assert fit_temperature("single", np.zeros(0, int), sure[:0]) == 1
    assert fit_temperature("single", np.zeros(100, int), sure, np.zeros(100)) == 1
    assert (
        fit_temperature("single", np.zeros(100, int), np.full((100, 2), 0.5)) == 1
    )  # nothing to divide


def test_zeros_of_neighbours_are_numbers():
    """A vote gives classes that no neighbour has a probability of exactly 0, and one neighbour
    gives the others 1 and 0: at its temperature a nearest neighbour that is right nine times in ten
    says so, and never infinity.
    """
    rng = np.random.default_rng(0)
    guess = rng.integers(0, 2, 4000)
    target = np.where(rng.random(4000) < 0.9, guess, 1 - guess)
    told = np.eye(2)[guess]
    temperature = fit_temperature("single", target, told)
    mended = with_temperature("single", told, temperature)
    assert np.isfinite(np.log(mended)).all()
    assert mended.max(1).mean() == pytest.approx(0.9, abs=0.01)
    assert score("single", target, mended, "calibration_error") < 0.01
    assert score("single", target, told, "calibration_error") > 0.09


def test_one_image_that_no_neighbour_is_like_does_not_decide():
    """Votes of nought in five are one in a hundred: with numbers that are all but nothing, the few
    rows whose class none of the neighbours has would make all others far too unsure.
    """
    rng = np.random.default_rng(0)
    share = rng.uniform(0.5, 1, 3000)
    votes = rng.binomial(5, share) / 5
    told = np.stack([votes, 1 - votes], axis=1)
    target = (rng.random(3000) > share).astype(np.int64)
    errors = {}
    for floor in (probability_floor(KNNSpec(5), "single", 2), FLOOR):
        temperature = fit_temperature("single", target, told, None, floor)
        mended = with_temperature("single", told, temperature, floor)
        errors[floor] = score("single", target, mended, "calibration_error")
    assert errors[0.01] < 0.6 * errors[FLOOR]


def test_the_floor_is_of_votes_alone():
    """Of a thousand classes it is a tenth in all; what tells log-odds has next to none, and boosted
    trees tell log-odds.
    """
    assert probability_floor(KNNSpec(5), "single", 10) == 0.01
    assert probability_floor(KNNSpec(5), "single", 1000) == pytest.approx(1e-4)
    assert probability_floor(KNNSpec(5), "multi", 1000) == 0.01
    assert (
        probability_floor(SklearnSpec("sklearn.ensemble.RandomForestClassifier"), "single", 3)
        == 0.01
    )
    for spec in (
        SklearnSpec("sklearn.ensemble.GradientBoostingClassifier"),
        LogisticSpec(1.0),
        CentroidSpec(),
    ):
        assert probability_floor(spec, "single", 3) == FLOOR


def test_a_weight_of_two_is_a_row_that_is_there_twice():
    """And a weight of nought one that is not there; all weights times a number are the same
    weights.
    """
    target, _, told = drawn("single", 200, 3.0)
    weight = np.tile([1.0, 2.0, 0.0, 1.0], 50)
    copied = np.repeat(np.arange(200), weight.astype(int))
    expected = fit_temperature("single", target[copied], told[copied])
    assert fit_temperature("single", target, told, weight) == pytest.approx(expected, rel=1e-6)
    assert fit_temperature("single", target, told, 7 * weight) == pytest.approx(expected, rel=1e-6)


def test_a_score_is_of_rows_that_the_temperature_has_not_seen():
    """Cross-fitted, what is predicted for a part does not depend on that part's targets."""
    target, _, told = drawn("single", 90, 3.0)
    part = np.arange(90) % 3
    found = cross_fitted("single", target, told, part)
    other = np.where(part == 1, (target + 1) % 3, target)
    again = cross_fitted("single", other, told, part)
    assert (found[part == 1] == again[part == 1]).all()
    assert (found[part != 1] != again[part != 1]).any()
    outside = fit_temperature("single", target[part != 1], told[part != 1])
    assert (found[part == 1] == with_temperature("single", told[part == 1], outside)).all()
    assert score("single", target, found, "log_loss") < score("single", target, told, "log_loss")


def test_regression_has_no_temperature():
    """Values are left as they are."""
    values = np.random.default_rng(0).normal(size=(20, 2))
    assert fit_temperature("regression", values, values + 1) == 1
    assert (with_temperature("regression", values, 2.0) == values).all()
    assert (cross_fitted("regression", values, values, np.arange(20) % 2) == values).all()


KINDS = [
    *(
        (spec, kind)
        for spec in (RidgeSpec(10.0), MLPSpec((8,), epochs=3), KNNSpec(5))
        for kind in ("single", "multi")
    ),
    *((ConvSpec((4,), (5,), epochs=2), kind) for kind in ("single", "multi")),
    *((LogisticSpec(10.0), kind) for kind in ("single", "multi", "three")),
    (KNNSpec(5, "euclidean", "distance"), "three"),
    (CentroidSpec(), "three"),
    (LDASpec(0.3), "three"),
    (SklearnSpec("sklearn.naive_bayes.GaussianNB"), "three"),
]


def fitted_head(spec, kind, rows=90):
    """The task, a head on all of its rows, and 4,000 rows more."""
    rng = np.random.default_rng(3)
    shape = (rows, 6, 4, 4) if spec.kind == "conv" else (rows, 12)
    X = rng.normal(3, 2, shape).astype(np.float32)
    value = X.reshape(rows, -1)
    target = {"single": (value[:, 0] > 3).astype(np.int64), "multi": (value[:, :2] > 3).astype(np.uint8),
              "three": value[:, :3].argmax(1)}[kind]  # fmt: skip
    content = np.array([f"{n:032d}" for n in range(rows)], "S32")
    names = ("a", "b", "c") if kind == "three" else ("a", "b")
    fold = (np.arange(rows) % 2).astype(np.int16)
    task = Task(
        "multi" if kind == "multi" else "single",
        names,
        content.astype(str),
        content,
        target,
        fold,
        np.ones(rows),
    )
    (full,) = [fit for fit in fit_bank(X, task, [spec]) if fit.fold == REFIT]
    assert full.error is None
    return task, full, rng.normal(3, 2, (4000, *shape[1:])).astype(np.float32)


@pytest.mark.parametrize(
    ("spec", "kind"), KINDS, ids=[f"{spec.kind}-{kind}" for spec, kind in KINDS]
)
def test_no_decision_of_any_kind_of_head_changes(spec, kind):
    """Whatever the temperature: argmax and labels are those without it, also where float32 makes
    two classes equal. Where a probability has digits, it is the power of what it was.
    """
    task, full, X = fitted_head(spec, kind)
    plain = predict_head(spec, full.arrays, X, task.kind)
    for temperature in (0.05, 0.7, 1.3, 20.0):
        told = predict_head(spec, full.arrays, X, task.kind, temperature)
        assert told.dtype == np.float32
        assert np.isfinite(told).all()
        if task.kind == "single":
            assert (told.argmax(1) == plain.argmax(1)).all()
            np.testing.assert_allclose(told.sum(1), 1, atol=1e-6)
        else:
            assert ((told >= 0.5) == (plain >= 0.5)).all()
        clear = ((plain > 1e-3) & (plain < 1 - 1e-3)).all(1)
        floor = probability_floor(spec, task.kind, len(task.classes))
        expected = with_temperature(task.kind, plain[clear], temperature, floor)
        np.testing.assert_allclose(told[clear], expected, atol=1e-3)


def test_neighbouring_numbers_stay_in_order():
    """One float32 apart, at a temperature of 20: rounded, both would be the same, and the first of
    equals would win.
    """
    from headrace.heads.link import tempered

    half = np.float32(0.5)
    above, below = np.nextafter(half, np.float32(1)), np.nextafter(half, np.float32(0))
    rows = np.array([[below, above], [above, below], [half, half]], np.float32)
    assert tempered(rows, "single", 20.0).argmax(1).tolist() == [1, 0, 0]
    assert (tempered(rows, "multi", 20.0) >= 0.5).tolist() == (rows >= 0.5).tolist()


def test_log_odds_beyond_float32_are_divided_themselves():
    """Of a label that is sure to 20, its probability is 1.0, and cannot tell what it is at a
    temperature of 10. What is farther than the smallest probability is as far as that: the fit has
    seen no more.
    """
    arrays = {"weight": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    told = predict_head(
        LogisticSpec(1.0), arrays, np.array([[20, -20], [90, -90]], np.float32), "multi", 10.0
    )
    np.testing.assert_allclose(told[0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], rtol=1e-5)
    np.testing.assert_allclose(
        told[1], with_temperature("multi", np.array([[1.0, 0.0]]), 10.0)[0], rtol=1e-5
    )


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_far_temperatures_of_a_file_give_probabilities(temperature):
    """A file that somebody sends may say one that no fit gives."""
    for kind in ("single", "multi"):
        _, _, told = drawn(kind, 200)
        before = told.astype(np.float32)
        found = tempered(before, kind, temperature)
        assert np.isfinite(found).all()
        if kind == "single":
            np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
            assert (found.argmax(1) == before.argmax(1)).all()
        else:
            assert ((found >= 0.5) == (before >= 0.5)).all()


@pytest.mark.parametrize(
    "value", [0, -1, 1e-300, 1e300, float("nan"), float("inf"), None, "much", [1]]
)
def test_a_temperature_that_nothing_can_be_divided_by_is_refused(value):
    with pytest.raises((ValueError, TypeError)):
        check_temperature(value)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_predictions_that_are_no_numbers_have_no_temperature(kind):
    """And do not make all others as sure as can be."""
    target, _, told = drawn(kind, 50)
    told[7] = np.nan
    assert fit_temperature(kind, target, told) == 1
