"""ROC and precision-recall curves, one class against the rest.

n images, C classes or labels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.heads.evaluate.metrics import score
from headrace.pipelines.report.page.blocks import Curve, CurveSet

MAX_CLASSES = 200  # whose curves are shown, those of the least area
_MOST_POINTS, _FEW_POINTS = 256, 96  # of each curve; the latter where there are many classes
_MANY_CLASSES = 20


def curve_set(
    task_kind: str,
    classes: tuple[str, ...],
    target: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    split_name: str,
    model_name: str,
) -> CurveSet:
    """The curves of one side: of two classes the second's, of more each class's against the rest.

    target, predicted: as of `outcome_blocks`, as are the names. Of more than 200
    classes, those of the least area are shown.
    """
    truth = target[:, None] == np.arange(len(classes)) if task_kind == "single" else target > 0
    scores = np.asarray(predicted, np.float32)
    shown = range(1, 2) if task_kind == "single" and len(classes) == 2 else range(len(classes))
    points = _MOST_POINTS if len(classes) <= _MANY_CLASSES else _FEW_POINTS
    curves = [
        one_curve(classes[at], truth[:, at], scores[:, at], points)
        for at in shown
        if 0 < truth[:, at].sum() < len(truth)
    ]
    worst_first = sorted(curves, key=lambda curve: curve.auc)
    if len(curves) > MAX_CLASSES:
        curves = worst_first[:MAX_CLASSES]
    chosen = curves.index(worst_first[0]) if curves else 0
    caption = (
        f"ROC and precision-recall curves of {model_name}, {split_name}"
        + ("" if len(shown) == 1 else ": one class against the rest, the hardest one first")
        + ". Move the threshold to see what it finds and what it costs"
    )
    return CurveSet(f"curves-{split_name}", caption, tuple(curves), chosen)


def one_curve(
    name: str, is_class: npt.NDArray[np.bool_], scores: npt.NDArray[Any], max_points: int
) -> Curve:
    """The counts at the distinct scores, highest first; of more than `max_points`, those kept are
    spread over the ranks, close together at both ends.

    is_class, scores: (n,). Each point is one of scikit-learn's `roc_curve` and
    `precision_recall_curve` at the same threshold.
    """
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], is_class[order]
    last_of_score = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores) - 1)
    found = np.cumsum(hits)[last_of_score]
    false = last_of_score + 1 - found
    # The point of one half is kept too: there is where the winner decides.
    half = np.flatnonzero(sorted_scores[last_of_score] >= 0.5)[-1:]
    kept = np.union1d(_spread(len(last_of_score), max_points), half)
    column, target = scores[:, None], is_class[:, None]
    return Curve(
        name,
        np.asarray(sorted_scores[last_of_score[kept]], np.float32),
        np.asarray(found[kept], np.uint32),
        np.asarray(false[kept], np.uint32),
        int(is_class.sum()),
        int((~is_class).sum()),
        score("multi", target, column, "auc"),
        score("multi", target, column, "average_precision"),
    )


def _spread(n: int, most: int) -> npt.NDArray[np.int64]:
    """Positions 0 to n - 1, at most `most` of them: half evenly, a quarter geometrically from each
    end, where a curve turns.
    """
    if n <= most:
        return np.arange(n)
    even = np.linspace(0, n - 1, most // 2)
    near = np.geomspace(1, n, most // 4) - 1
    return np.unique(np.round(np.concatenate([even, near, n - 1 - near])).astype(np.int64))
