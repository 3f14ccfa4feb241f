"""ROC and precision-recall curves, one class against the rest.

n images, C classes or labels.
"""

import numpy as np

from headrace.heads.arrays import Array, Index, Mask
from headrace.heads.evaluate.metrics import score
from headrace.pipelines.report.page.blocks import Curve, CurveSet

MAX_CLASSES = 200  # curves are shown of these many classes, those of the smallest area
# Points of each curve: the second number where there are more than _MANY_CLASSES, for a smaller
# page.
_MOST_POINTS, _FEW_POINTS = 256, 96
_MANY_CLASSES = 20


def curve_set(
    task_kind: str,
    classes: tuple[str, ...],
    target: Array,
    predicted: Array,
    split_name: str,
    model_name: str,
) -> CurveSet:
    """Return the curves of one side: with two classes the second's, else each class's against the
    rest. Of more than MAX_CLASSES classes, those of the smallest area are shown.

    Arguments are those of `outcome_blocks`.
    """
    truth = target[:, None] == np.arange(len(classes)) if task_kind == "single" else target > 0
    # As on the page, where thresholds are 32-bit numbers.
    scores = np.asarray(predicted, np.float32)
    # Of two classes, one curve is the other's mirror image.
    is_binary = task_kind == "single" and len(classes) == 2
    shown_classes = [1] if is_binary else range(len(classes))
    points = _MOST_POINTS if len(classes) <= _MANY_CLASSES else _FEW_POINTS
    curves = [
        one_curve(classes[c], truth[:, c], scores[:, c], points)
        for c in shown_classes
        if 0 < truth[:, c].sum() < len(truth)
    ]
    worst_first = sorted(curves, key=lambda curve: curve.auc)
    if len(curves) > MAX_CLASSES:
        curves = worst_first[:MAX_CLASSES]
    chosen = curves.index(worst_first[0]) if curves else 0
    one_by_one = ": one at a time against the rest, the hardest one first"
    caption = (
        f"ROC and precision-recall curves of {model_name}, {split_name}"
        + ("" if len(shown_classes) == 1 else one_by_one)
        + ". Move the threshold to see what it finds and what it costs"
    )
    return CurveSet(f"curves-{split_name}", caption, tuple(curves), chosen)


def one_curve(name: str, is_class: Mask, scores: Array, max_points: int) -> Curve:
    """Return true and false positives of one class at each distinct score, highest first.

    Of more than `max_points` points, some are kept: spread over the ranks, and closer together at
    both ends. Each is one of scikit-learn's `roc_curve` and `precision_recall_curve` at the same
    threshold.

    is_class, scores: (n,).
    """
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], is_class[order]
    last_of_score = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores) - 1)
    true_positives = np.cumsum(hits)[last_of_score]
    false_positives = last_of_score + 1 - true_positives
    # The threshold 0.5 is kept too: the winner decides there.
    half = np.flatnonzero(sorted_scores[last_of_score] >= 0.5)[-1:]
    shown = np.union1d(_spread(len(last_of_score), max_points), half)
    column, target = scores[:, None], is_class[:, None]
    return Curve(
        name,
        np.asarray(sorted_scores[last_of_score[shown]], np.float32),
        np.asarray(true_positives[shown], np.uint32),
        np.asarray(false_positives[shown], np.uint32),
        int(is_class.sum()),
        int((~is_class).sum()),
        score("multi", target, column, "auc"),
        score("multi", target, column, "average_precision"),
    )


def _spread(n: int, max_points: int) -> Index:
    """Return at most `max_points` positions from 0 to n - 1: half of them evenly spaced, a quarter
    geometrically from each end, where curves bend.
    """
    if n <= max_points:
        return np.arange(n)
    even = np.linspace(0, n - 1, max_points // 2)
    near_end = np.geomspace(1, n, max_points // 4) - 1
    return np.unique(np.round(np.concatenate([even, near_end, n - 1 - near_end])).astype(np.int64))
