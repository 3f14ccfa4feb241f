"""Ensembles: weights of an average of heads, chosen from stored predictions without training.

K heads, N rows, C outputs, E elements. Heads are picked greedily with replacement (Caruana,
Niculescu-Mizil, Crew and Ksikes 2004, "Ensemble selection from libraries of models"): each round
adds the head that lowers the loss of the average most.

The loss of an average needs one number per row and head, its element: the probability of the true
class or of the true value of a label, or the residual.
"""

from collections.abc import Sequence, Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from headrace.heads.arrays import Array, Doubles, Floats
from headrace.heads.data.task import TaskKind

# Probabilities are clipped here, as in the metric log_loss.
_MIN_PROBABILITY = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class EnsembleLimits:
    """Limits of the cost of an ensemble."""

    members: int = 8  # different heads
    networks: int | None = None  # forward passes per image
    # Share by which each network beyond the first must lower the loss.
    min_gain_per_network: float = 0.01
    rounds: int = 30  # picks; the weight of a head is its share of the picks


def loss_elements(task_kind: TaskKind, target: Array, predicted: Array) -> Floats:
    """Return (K, E) elements of predictions (K, N, C): E is N for single labels, else N × C."""
    if task_kind == "single":
        true_class_probability = np.take_along_axis(
            predicted, np.asarray(target, np.int64)[None, :, None], 2
        )[..., 0]
        return np.asarray(true_class_probability / predicted.sum(2), np.float32)
    true_values = np.asarray(target, np.float64).reshape(len(target), -1)
    predicted = predicted.reshape(*predicted.shape[:2], -1)
    if task_kind == "multi":
        return np.asarray(
            np.where(true_values >= 0.5, predicted, 1 - predicted), np.float32
        ).reshape(len(predicted), -1)
    deviation = true_values.std(0)
    residual = (predicted - true_values) / np.where(deviation > 0, deviation, 1)
    return np.asarray(residual, np.float32).reshape(len(predicted), -1)


def element_loss(task_kind: TaskKind, elements: Array) -> Array:
    """Return the loss over the last axis: mean of -log p (nats), or of squared residuals."""
    # The same for any metric: accuracy changes in steps of one row, and the average that is best by
    # it on few rows is mostly luck.
    if task_kind == "regression":
        return np.asarray(np.square(elements).mean(-1, dtype=np.float64))
    return np.asarray(-np.log(np.clip(elements, _MIN_PROBABILITY, 1)).mean(-1, dtype=np.float64))


def greedy_weights(
    task_kind: TaskKind,
    elements: Array,
    networks: Sequence[AbstractSet[str]],
    limits: EnsembleLimits,
) -> Doubles:
    """Return the weights of the heads, (K,), which sum to one and are zero for most heads.

    elements: (K, E), see `loss_elements`.
    networks: names of the networks that each head needs.

    Of equally good heads the first is picked, so order them from cheap to expensive. The average of
    the best round is returned.
    """
    n_heads = len(elements)
    element_sum, pick_counts = np.zeros(elements.shape[1], np.float32), np.zeros(n_heads)
    used_networks: set[str] = set()
    best_loss, best_counts = np.inf, pick_counts
    max_networks = limits.networks or len(set().union(*networks))
    for n_picked in range(limits.rounds):
        n_networks = np.array([len(used_networks | head_networks) for head_networks in networks])
        is_allowed = n_networks <= max_networks
        if np.count_nonzero(pick_counts) >= limits.members:
            is_allowed &= pick_counts > 0
        if not is_allowed.any():
            break
        candidate_rows = np.flatnonzero(is_allowed)
        # The elements of an average are the averages of the elements: all heads are tried at once.
        loss = element_loss(task_kind, (element_sum + elements[candidate_rows]) / (n_picked + 1))
        penalized_loss = loss * (
            1 + limits.min_gain_per_network * np.maximum(n_networks[candidate_rows] - 1, 0)
        )
        best_candidate = int(penalized_loss.argmin())
        picked_head = candidate_rows[best_candidate]
        element_sum, pick_counts = element_sum + elements[picked_head], pick_counts.copy()
        pick_counts[picked_head] += 1
        used_networks |= networks[picked_head]
        # More than rounding, so that equal heads do not make the ensemble longer.
        if penalized_loss[best_candidate] < best_loss * (1 - 1e-6):
            best_loss, best_counts = float(penalized_loss[best_candidate]), pick_counts
    return np.asarray(best_counts / max(best_counts.sum(), 1))


def average(weights: Array, predicted: Array) -> Doubles:
    """Return the weighted mean (N, C) of predictions (K, N, C)."""
    return np.asarray(np.tensordot(weights, predicted.astype(np.float64), 1))
