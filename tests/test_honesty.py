"""A small seeded share of benchmarks/honesty.py, and the corrections that it measures, each with
its right value.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.evidence import task_of

from headrace.heads.evaluate.temperature import with_temperature
from headrace.pipelines.selection.correction import is_stratified, no_narrower, share_optimism
from headrace.pipelines.selection.predictions import validation_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import honesty


def sampled(rows, classes, seed):
    return np.random.default_rng(seed).integers(0, classes, rows)


@pytest.mark.slow
def test_a_head_that_names_the_largest_class_is_too_good_by_its_luck():
    """Ten equal classes, 150 rows: the largest has 14 % of the rows that a head is scored on, and
    10 % of the new ones. A head that does not look at the shares gains nothing by them; nor does a
    score that weighs all classes alike.
    """
    rng = np.random.default_rng(0)
    found, spreads, largest = [], [], []
    for seed in range(12):
        held = validation_rows(task_of(sampled(150, 10, seed)))
        shares = np.bincount(held.target, minlength=10) / 150
        optimism, spread = share_optimism(held, np.tile(shares, (150, 1)), "accuracy")
        found.append(optimism)
        spreads.append(spread)
        largest.append(shares.max())
        sure = with_temperature(
            "single", np.eye(10)[rng.permutation(held.target)] * 0.9 + 0.01, 0.1
        )
        assert abs(share_optimism(held, sure, "accuracy")[0]) < 0.008
        balanced = share_optimism(held, np.tile(shares, (150, 1)), "balanced_accuracy")
        assert np.abs(balanced).max() < 0.008
    assert np.mean(found) == pytest.approx(np.mean(largest) - 0.1, abs=0.01)
    assert np.mean(spreads) == pytest.approx(np.std(largest), rel=0.3)


def test_shares_that_differ_by_more_than_chance_are_the_populations():
    """Nine in ten are of one class: saying so is right of new images too."""
    target = (np.arange(400) % 10 == 0).astype(int)
    held = validation_rows(task_of(target))
    optimism, _ = share_optimism(held, np.tile([0.9, 0.1], (400, 1)), "accuracy")
    assert abs(optimism) < 0.003


def test_only_folds_that_are_stratified_are_corrected_for_it():
    """A user's own folds hold what they hold."""
    task = task_of(sampled(200, 4, 0))
    assert is_stratified(validation_rows(task))
    mixed = np.random.default_rng(0).permutation(task.fold)
    assert not is_stratified(
        validation_rows(type(task)(*[*vars(task).values()][:5], mixed, task.weight))
    )


def test_a_perfect_validation_is_not_taken_for_certain():
    """All of 60 rows right: new images need not be."""
    target = sampled(60, 3, 0)
    held = validation_rows(task_of(target))
    low, high = no_narrower(held, np.eye(3)[target], "accuracy", 1.0, (1.0, 1.0))
    assert high == 1.0
    assert 0.93 < low < 0.95


def test_the_expected_score_of_noise_is_that_of_noise():
    """Eighteen heads, ten classes, 150 images, labels that are noise: the best is chosen for 17 %,
    and is worth 10 %.
    """
    found = [honesty.world_of_heads(150, (0.0, 0.0, 0.0), seed) for seed in range(5)]
    raw, expected, truth, inside = (np.array(values) for values in zip(*found, strict=True))
    error = (expected - truth).std(ddof=1) / np.sqrt(len(truth))
    assert (raw - truth).mean() > 0.04
    assert abs((expected - truth).mean()) < 3 * error
    assert inside.mean() >= 0.75


def test_an_extrapolated_error_holds_the_error_with_more_images():
    """Wine, 40 images: the error that 160 images have lies in its interval; it did in one of four
    with the gain's alone.
    """
    X, target = honesty.real_set("wine")
    truth = honesty.true_error(X, target, 128, seed=99)
    inside = 0
    for seed in range(8):
        chosen = np.random.default_rng(seed).permutation(len(target))[:40]
        today, gains = honesty.curve_of(X[chosen], target[chosen], seed)
        left = honesty.error_with_more(today, gains[4])
        assert 0 <= left.low <= left.value <= left.high
        inside += left.low <= truth <= left.high
    assert inside >= 7
