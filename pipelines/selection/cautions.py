"""Notes on a result for a careful reader: classes that a good accuracy hides, a winner on the edge
of its grid, images that are nearly the same on two sides of a split.

Each function returns sentences or None. Nothing is trained, and no network is run.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.feature_set import open_feature_set
from headrace.extract.images.content_hashes import hash_sample
from headrace.extract.images.locators import read_bytes
from headrace.extract.images.raw_pixels import PixelRange
from headrace.heads.arrays import Array, Floats, Index, Strings
from headrace.heads.data.task import Task
from headrace.heads.evaluate.intervals import metric_interval
from headrace.heads.evaluate.metrics import score
from headrace.heads.kinds import HEAD_KINDS
from headrace.pipelines.selection.duplicates import similar_pairs, standardized
from headrace.pipelines.selection.predictions import ValidationRows, read_predictions
from headrace.pipelines.selection.signatures import grey_of_file, grey_signature

# A note is written where balanced accuracy lies this far below accuracy, and its 95 % interval
# below it too.
MIN_ACCURACY_GAP = 0.10
# Cosines from which two images count as nearly the same, by their features and by the pixels of
# their small grey copies. Re-encoded, resized and brightened copies have pixels above it; features
# find what pixels cannot, such as a mirrored copy. docs/report.md has the measurement.
FEATURES_ALIKE = 0.985
PIXELS_ALIKE = 0.97
MAX_COMPARED = 10_000  # images; their products take a second
MIN_IMAGES = 20  # standardized features of fewer images say nothing
MIN_AFFECTED_SHARE = 0.05  # of the images; fewer do not move a score by what anybody would act on
_DIRECTIONS, _BLOCK = 128, 1024  # columns of the random projection; rows of one product
# Images read, length of each run of neighbours, bytes read: together a second or two.
MAX_READ, RUN_LENGTH, MAX_READ_BYTES = 400, 20, 64_000_000
GROUP_ADVICE = (
    "If they show one thing twice, scores are too good: name what they have in common in "
    "task.group (a patient, a scene, a module), and its images stay on one side"
)


def hidden_classes(board: pd.DataFrame, validation: ValidationRows, metric: str) -> str | None:
    """Return a note if the winner's accuracy says little about the rare classes, else None.

    board: complete heads, best first.
    """
    if validation.task.kind != "single" or metric != "accuracy":
        return None
    predicted = next((block[0] for _, block in read_predictions(board.iloc[:1], validation)), None)
    if predicted is None:
        return None
    accuracy = score("single", validation.target, predicted, "accuracy")
    balanced = score("single", validation.target, predicted, "balanced_accuracy")
    _, balanced_high = metric_interval(
        "single", validation.target, predicted, "balanced_accuracy", groups=validation.groups
    )
    if accuracy - balanced < MIN_ACCURACY_GAP or balanced_high >= accuracy:
        return None
    is_right = predicted.argmax(1) == validation.target
    class_counts = np.bincount(validation.target, minlength=len(validation.task.classes))
    right_counts = np.bincount(validation.target, is_right, len(class_counts))
    recall = right_counts / np.maximum(class_counts, 1)
    rows_text = "images" if validation.task.units is None else "units"
    worst_class = int(np.where(class_counts > 0, recall, np.inf).argmin())
    return (
        f"balanced accuracy is much lower than accuracy: {100 * balanced:.1f} % against "
        f"{100 * accuracy:.1f} %; class {validation.task.classes[worst_class]} is found in "
        f"{100 * recall[worst_class]:.0f} % of its {class_counts[worst_class]:,} {rows_text}. To "
        "choose by all classes alike, task.metric: balanced_accuracy; to train for them, "
        "class_weight: [none, balanced] under heads"
    )


def grid_edges(board: pd.DataFrame, metric: str) -> list[str]:
    """Return a note for each setting of which the winner has the largest or smallest value tried,
    and scores better with it than with the neighbouring value.

    board: the complete heads of a leaderboard, best first, as `rank_heads` gives it.
    """
    winner = board.iloc[0]
    kind, spec = winner["kind"], json.loads(winner["spec"])
    if kind not in HEAD_KINDS:  # a fine-tuned network
        return []
    settings = _settings(spec)
    same_head_type = board[(board["kind"] == kind) & (board["inputs"] == winner["inputs"])]
    other_settings = [_settings(json.loads(text)) for text in same_head_type["spec"]]
    notes = []
    for setting_name in HEAD_KINDS[kind].open_ended:
        value = settings.get(setting_name)
        if not _is_number(value):
            continue
        # The heads that differ from the winner in this setting alone.
        scores = {
            other[setting_name]: score_of_other
            for other, score_of_other in zip(other_settings, same_head_type[metric], strict=True)
            if _is_number(other.get(setting_name)) and {**other, setting_name: value} == settings
        }
        grid_values = sorted(scores)
        if len(grid_values) < 2 or value not in (grid_values[0], grid_values[-1]):
            continue
        at_largest = value == grid_values[-1]
        neighbour = grid_values[-2] if at_largest else grid_values[1]
        next_value = _beyond(value, neighbour)
        # Where the neighbour is as good, nothing speaks for going on.
        if next_value is None or scores[value] == scores[neighbour]:
            continue
        suggested_values = [*grid_values, next_value] if at_largest else [next_value, *grid_values]
        section = "parameters: " if kind == "sklearn" else f"heads.{kind}."
        notes.append(
            f"the winner lies on the edge of its grid: {setting_name}={value:g} is the "
            f"{'largest' if at_largest else 'smallest'} of {len(grid_values)} that were tried, and "
            f"a better one may lie beyond. In the recipe: {section}{setting_name}: "
            f"[{', '.join(f'{suggested:g}' for suggested in suggested_values)}]"
        )
    return notes


def near_duplicates(
    train: Task,
    test: Task,
    feature_paths: Mapping[str, Sequence[Path]],
    image_paths: Mapping[str, str],
    pixel_range: PixelRange | None = None,
) -> str | None:
    """Return a note on images on two sides of the split that are nearly the same; None where they
    are too few to matter (MIN_AFFECTED_SHARE).

    Each image is compared with the nearest one, by features, on another side. The two count as
    nearly the same if their features or their small grey copies are.

    image_paths: by content hash. At most MAX_READ images are read, those of the pairs with the most
    similar features.
    """
    opened_sets = [open_feature_set(views[0]) for views in feature_paths.values()]
    pooled_sets = [features for features in opened_sets if len(features.spec.shape) == 1]
    if not pooled_sets:
        return None
    content, first_index = np.unique(
        np.concatenate([train.content, test.content]).astype(str), return_index=True
    )
    if len(content) < MIN_IMAGES:
        return None
    side_of_image = sides(train, test)[first_index]
    if len(content) > MAX_COMPARED:
        drawn = np.random.default_rng(0).choice(len(content), MAX_COMPARED, replace=False)
        content, side_of_image = content[np.sort(drawn)], side_of_image[np.sort(drawn)]
    features = pooled_sets[-1]
    pairs, pair_cosines = _nearest_across(
        features.read(features.locate(content.tolist()), np.float32), side_of_image
    )
    closest_pairs = pairs[: MAX_READ // 2]
    grey_images = {
        index: grey_of_file(
            image_paths.get(str(content[index]), ""), str(content[index]), pixel_range
        )
        for index in np.unique(closest_pairs).tolist()
    }
    readable_grey = {index: grey for index, grey in grey_images.items() if grey is not None}
    is_alike = pair_cosines >= FEATURES_ALIKE
    if len(readable_grey) >= MIN_IMAGES:
        brightness = np.stack(list(readable_grey.values())).astype(np.float32)
        pixels = standardized(brightness - brightness.mean(1, keepdims=True))
        pixels_of = dict(zip(readable_grey, pixels, strict=True))
        for pair_index, (i, j) in enumerate(closest_pairs.tolist()):
            if i in pixels_of and j in pixels_of:
                is_alike[pair_index] |= pixels_of[i] @ pixels_of[j] >= PIXELS_ALIKE
    first, second = pairs[is_alike].T
    leaked_tests = leaked_images(first, second, side_of_image)
    n_tests = int((side_of_image == "test").sum())
    affected_share = (
        len(leaked_tests) / n_tests if n_tests else len(np.unique(pairs[is_alike])) / len(content)
    )
    if affected_share < MIN_AFFECTED_SHARE:
        return None
    return near_duplicates_text(first, second, side_of_image, may_be_more=True)


def _nearest_across(vectors: Floats, side_of_image: Strings) -> tuple[Index, Floats]:
    """Return pairs (P, 2) of each row and its nearest row of another side, the most similar first,
    and their cosines (P,).
    """
    X = standardized(vectors)
    projected = X
    # A random projection keeps distances well enough to find the nearest row; the cosines returned
    # are those of all columns.
    if X.shape[1] > _DIRECTIONS:
        directions = np.random.default_rng(0).normal(size=(X.shape[1], _DIRECTIONS))
        projected = X @ directions.astype(np.float32)
        projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
    side_codes = np.unique(side_of_image, return_inverse=True)[1]
    nearest = np.empty(len(X), np.int64)
    for start in range(0, len(X), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = projected[block] @ projected.T
        cosines[side_codes[block, None] == side_codes[None]] = -np.inf
        nearest[block] = cosines.argmax(1)
    pairs = np.unique(np.sort(np.stack([np.arange(len(X)), nearest], 1), axis=1), axis=0)
    # Where all rows are on one side, argmax over -inf has paired each with row 0.
    pairs = pairs[side_codes[pairs[:, 0]] != side_codes[pairs[:, 1]]]
    cosines = (X[pairs[:, 0]] * X[pairs[:, 1]]).sum(1)
    closest_first = np.argsort(-cosines, kind="stable")
    return pairs[closest_first], cosines[closest_first]


def near_copies(samples: pd.DataFrame, group_column: str | None = None) -> str | None:
    """Return a note on images whose small grey copies are nearly the same, before anything is
    extracted; else None. At most MAX_READ images and MAX_READ_BYTES are read.

    samples: columns id, path. group_column: images with one value of it are not compared, since
    they stay on one side of a split in any case.
    """
    sampled = samples
    if len(samples) > MAX_READ:
        # Runs of neighbours: the frames of a video or the photos of a scene are listed side by
        # side.
        starts = np.linspace(0, len(samples) - RUN_LENGTH, MAX_READ // RUN_LENGTH).astype(int)
        sampled = samples.iloc[np.unique((starts[:, None] + np.arange(RUN_LENGTH)).ravel())]
    # By content: the run reports exact copies itself, and keeps them on one side.
    grey_by_content: dict[str, npt.NDArray[np.uint8]] = {}
    image_names, side_of_image, n_bytes = [], [], 0
    for row_index, (image_name, image_path) in enumerate(
        sampled[["id", "path"]].itertuples(index=False)
    ):
        # The run itself names images that cannot be read, with the reason.
        with contextlib.suppress(Exception):
            file_bytes = read_bytes(image_path)
            n_bytes += len(file_bytes)
            if n_bytes > MAX_READ_BYTES:
                break
            content_hash = hash_sample(image_path, file_bytes)
            if content_hash not in grey_by_content:
                grey_by_content[content_hash] = grey_signature(image_path, file_bytes)
                image_names.append(str(image_name))
                # Without groups each image is a side of its own.
                groups = None if group_column is None else sampled[group_column]
                side_of_image.append(str(row_index if groups is None else groups.iloc[row_index]))
    if len(grey_by_content) < MIN_IMAGES:
        return None
    brightness = np.stack(list(grey_by_content.values())).astype(np.float32)
    copy_pairs = similar_pairs(
        brightness - brightness.mean(1, keepdims=True), np.array(side_of_image), PIXELS_ALIKE
    )
    n_copies = len(np.unique(np.concatenate([copy_pairs.first, copy_pairs.second])))
    if n_copies < MIN_AFFECTED_SHARE * len(grey_by_content):
        return None
    return (
        f"{n_copies:,} of {len(grey_by_content):,} images that were looked at are "
        f"nearly the same as another, such as {image_names[int(copy_pairs.first[0])]!r} and "
        f"{image_names[int(copy_pairs.second[0])]!r}, and a split may put them on different sides. "
        f"{GROUP_ADVICE}"
    )


def sides(train: Task, test: Task) -> Strings:
    """Return the side of each row, training rows first: "fold 0" …, "training", "test"."""
    side_names = [f"fold {fold}" if fold >= 0 else "training" for fold in train.fold]
    return np.array([*side_names, *["test"] * len(test.ids)])


def near_duplicates_text(
    first: Array, second: Array, side_of_image: Strings, *, may_be_more: bool = False
) -> str:
    """Return the sentence on pairs of nearly the same images, first (P,) and second (P,).

    side_of_image: (N,) the sides of the compared images, as from `sides`. may_be_more: whether
    there may be more pairs than these.
    """
    leaked_tests = leaked_images(first, second, side_of_image)
    n_tests = int((side_of_image == "test").sum())
    share = (
        f"; {len(leaked_tests):,} of {count_text(n_tests, 'test image')} "
        f"({100 * len(leaked_tests) / max(n_tests, 1):.1f} %) have such a partner among the images "
        "that heads are trained on"
    )
    return (
        f"{'at least ' if may_be_more else ''}{count_text(len(first), 'pair')} of images on "
        f"different sides of the split are nearly the same{share if n_tests else ''}. "
        f"{GROUP_ADVICE}"
    )


def leaked_images(first: Array, second: Array, side_of_image: Strings) -> Index:
    """Return the positions of test images that are paired with an image outside the test split.

    first, second: (P,) positions of the two images of each pair.
    """
    is_test = side_of_image == "test"
    across_test = is_test[first] != is_test[second]
    return np.unique(np.where(is_test[first], first, second)[across_test]).astype(np.int64)


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec's settings by name, with a scikit-learn estimator's parameters among them."""
    # A spec keeps the parameters of an estimator as JSON text.
    parameters = json.loads(spec["parameters"]) if isinstance(spec.get("parameters"), str) else {}
    return {**spec, "parameters": None, **parameters}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(value: float, neighbour: float) -> float | None:
    """Return the value beyond the end of a geometric grid, rounded to one digit; None if there is
    none.

    The step is that of the grid's last two values, and a decade at most.
    """
    if value <= 0:
        return None
    ratio = value / neighbour if neighbour > 0 else 10.0
    # A grid such as [0, 1e-6, 1] has steps that lead too far at once.
    next_value = float(f"{value * min(max(ratio, 0.1), 10.0):.1g}")
    if isinstance(value, int) and isinstance(neighbour, int):
        next_value = round(next_value)
    return next_value if next_value > 0 and next_value != value else None
