"""Averages of heads: the greedy choice and its limits."""

import numpy as np
import pytest

from headrace.heads.evaluate.ensemble import (
    EnsembleLimits,
    average,
    element_loss,
    greedy_weights,
    loss_elements,
)
from headrace.heads.evaluate.metrics import score

FREE = EnsembleLimits(members=100, networks=None, min_gain_per_network=0, rounds=12)


def made(kind, heads=7, rows=90, noise=1.0, seed=0):
    """Targets and predictions of heads whose errors are independent."""
    rng = np.random.default_rng(seed)
    if kind == "regression":
        target = rng.normal(size=(rows, 2)) * [1, 50]
        return target, target + rng.normal(0, noise, (heads, rows, 2)) * [1, 50]
    target = rng.integers(0, 3, rows) if kind == "single" else rng.integers(0, 2, (rows, 3))
    logits = (np.eye(3)[target] if kind == "single" else 2 * target - 1) + rng.normal(
        0, noise, (heads, rows, 3)
    )
    odds = np.exp(2 * logits)
    return target, odds / odds.sum(2, keepdims=True) if kind == "single" else odds / (1 + odds)


def one_at_a_time(kind, target, predicted, rounds):
    """Caruana et al. 2004, as the paper says it."""
    picked, best = [], (np.inf, [])
    for _ in range(rounds):
        losses = [
            element_loss(kind, loss_elements(kind, target, predicted[[*picked, k]].mean(0)[None]))[
                0
            ]
            for k in range(len(predicted))
        ]
        picked = [*picked, int(np.argmin(losses))]
        if min(losses) < best[0] * (1 - 1e-6):
            best = (min(losses), picked)
    return np.bincount(best[1], minlength=len(predicted)) / len(best[1])


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_the_batched_choice_is_the_one_at_a_time_choice(kind):
    """The same heads with the same weights; and their average is better than any of them."""
    target, predicted = made(kind)
    elements = loss_elements(kind, target, predicted)
    weights = greedy_weights(kind, elements, [frozenset("a")] * 7, FREE)
    assert weights == pytest.approx(one_at_a_time(kind, target, predicted, 12))
    assert weights.sum() == pytest.approx(1)
    mean = average(weights, predicted)
    own = element_loss(kind, loss_elements(kind, target, mean[None]))[0]
    assert own < element_loss(kind, elements).min()


def test_the_loss_is_the_metric_log_loss():
    """Of one label per row, and of several labels."""
    for kind in ("single", "multi"):
        target, predicted = made(kind)
        losses = element_loss(kind, loss_elements(kind, target, predicted))
        assert losses == pytest.approx(
            [score(kind, target, each, "log_loss") for each in predicted], rel=1e-5
        )


def test_limits_are_kept():
    """The number of heads, the number of networks, and the price of another network."""
    target, predicted = made("single", heads=12)
    elements = loss_elements("single", target, predicted)
    own = [frozenset([f"network {k}"]) for k in range(12)]

    def used(**limits):
        weights = greedy_weights(
            "single", elements, own, EnsembleLimits(**{"min_gain_per_network": 0, **limits})
        )
        return np.count_nonzero(weights)

    assert used(members=3) == 3
    assert used(networks=2) == 2
    assert used(networks=1) == 1
    assert used() > 4
    assert 1 < used(min_gain_per_network=0.05) < used()
    assert used(min_gain_per_network=0.9) == 1


def test_equal_heads_leave_one():
    """An average of copies is no better, so none is made; the first, the cheapest, is kept."""
    target, predicted = made("single", heads=1)
    elements = np.repeat(loss_elements("single", target, predicted), 5, axis=0)
    weights = greedy_weights("single", elements, [frozenset("a")] * 5, FREE)
    assert weights.tolist() == [1, 0, 0, 0, 0]
