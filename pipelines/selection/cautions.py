"""What a careful person would want to be told of a result: classes that a good accuracy hides, a
winner on the edge of its grid, images that are nearly the same on two sides of a split. Each is a
sentence, or none; nothing is trained or forwarded.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet, open_feature_set
from headrace.extract.images.byte_ranges import read_bytes
from headrace.extract.images.content_hashes import hash_bytes
from headrace.extract.images.decoding import PixelRange
from headrace.heads.data.task import Task
from headrace.heads.evaluate.intervals import metric_interval
from headrace.heads.evaluate.metrics import score
from headrace.pipelines.selection.duplicates import like_pairs, standardised
from headrace.pipelines.selection.predictions import ValidationRows, read_predictions
from headrace.pipelines.selection.signatures import grey_signature

# A balanced accuracy that lies so much below the accuracy, and surely below it, is told.
HIDDEN = 0.10
# Features of two images are all but equal from this cosine on, pixels of their small grey copies
# from the other: re-encoded, resized and brightened copies have pixels above it; features find what
# pixels cannot, such as a mirrored copy. docs/report.md has the measurement.
FEATURES_ALIKE = 0.985
PIXELS_ALIKE = 0.97
COMPARED = 10_000  # images at most, a second of products
FEWEST = 20  # of fewer images the standardised features say nothing
NOTABLE = 0.05  # of the images: of fewer, no score moves by what anybody would act on
_DIRECTIONS, _BLOCK = 128, 1024
LOOKED_AT, RUN, LOOKED_BYTES = 400, 20, 64_000_000  # a second or two
GROUP_ADVICE = (
    "If they show one thing twice, scores are too good: name what they have in common in "
    "task.group (a patient, a scene, a module), and its images stay on one side"
)
# Settings of which more and less can be tried, and whole numbers among them.
_ORDERED = {
    "logistic": ("C",),
    "ridge": ("alpha",),
    "mlp": ("learning_rate", "weight_decay"),
    "conv": ("learning_rate", "weight_decay"),
    "knn": ("k",),
    "sklearn": (
        "C",
        "alpha",
        "gamma",
        "n_neighbors",
        "max_depth",
        "max_iter",
        "n_estimators",
        "learning_rate",
    ),
}


def hidden_classes(board: pd.DataFrame, held: ValidationRows, metric: str) -> str | None:
    """Where the winner's accuracy says little of the rare classes. board: of whole heads, best
    first.
    """
    if held.task.kind != "single" or metric != "accuracy":
        return None
    predicted = next((block[0] for _, block in read_predictions(board.iloc[:1], held)), None)
    if predicted is None:
        return None
    accuracy = score("single", held.target, predicted, "accuracy")
    balanced = score("single", held.target, predicted, "balanced_accuracy")
    _, high = metric_interval(
        "single", held.target, predicted, "balanced_accuracy", groups=held.groups
    )
    if accuracy - balanced < HIDDEN or high >= accuracy:
        return None
    hit = predicted.argmax(1) == held.target
    images = np.bincount(held.target, minlength=len(held.task.classes))
    recall = np.bincount(held.target, hit, len(images)) / np.maximum(images, 1)
    worst = int(np.where(images > 0, recall, np.inf).argmin())
    return (
        f"balanced accuracy is much lower than accuracy: {balanced:.1%} against {accuracy:.1%}; "
        f"class {held.task.classes[worst]} is found in {recall[worst]:.0%} of its "
        f"{images[worst]:,} images. To choose by all classes alike, task.metric: "
        "balanced_accuracy; to train for them, class_weight: [none, balanced] under heads"
    )


def grid_edges(board: pd.DataFrame, metric: str) -> list[str]:
    """Where the winner has the largest or smallest value of a setting, and is better there than
    with the next one.

    board: the whole heads of a leaderboard, best first, as `rank_heads` gives it.
    """
    winner = board.iloc[0]
    kind, spec = winner["kind"], json.loads(winner["spec"])
    settings = _settings(spec)
    alike = board[(board["kind"] == kind) & (board["inputs"] == winner["inputs"])]
    others = [_settings(json.loads(text)) for text in alike["spec"]]
    found = []
    for name in _ORDERED.get(kind, ()):
        value = settings.get(name)
        if not _is_number(value):
            continue
        line = [
            (other[name], place)
            for place, other in enumerate(others)
            if _is_number(other.get(name)) and {**other, name: value} == settings
        ]
        values = sorted({each for each, _ in line})
        if len(values) < 2 or value not in (values[0], values[-1]):
            continue
        largest = value == values[-1]
        neighbour = values[-2] if largest else values[1]
        scores = {each: float(alike[metric].iloc[place]) for each, place in line}
        beyond = _beyond(value, neighbour)
        if beyond is None or scores[value] == scores[neighbour]:
            continue
        shown = [*values, beyond] if largest else [beyond, *values]
        key = f"heads.{kind}.{name}" if kind != "sklearn" else f"parameters: {name}"
        found.append(
            f"the winner lies on the edge of its grid: {name}={value:g} is the "
            f"{'largest' if largest else 'smallest'} of {len(values)} that were tried, and a "
            f"better one may lie beyond. In the recipe: {key}: "
            f"[{', '.join(f'{each:g}' for each in shown)}]"
        )
    return found


def near_duplicates(
    train: Task,
    test: Task,
    feature_paths: Mapping[str, Sequence[Path]],
    paths: Mapping[str, str],
    pixel_range: PixelRange | None = None,
) -> str | None:
    """Images on two sides of the split that are nearly the same: of each, the likest by features on
    another side is looked at, and counts where features or small grey copies are all but equal.
    None where they are too few to matter (NOTABLE).

    paths: of images by content. At most LOOKED_AT of them are read, those whose features are the
    likest.
    """
    sets = {name: open_feature_set(views[0]) for name, views in feature_paths.items()}
    pooled = [name for name, features in sets.items() if len(features.spec.shape) == 1]
    if not pooled:
        return None
    content, first = np.unique(
        np.concatenate([train.content, test.content]).astype(str), return_index=True
    )
    if len(content) < FEWEST:
        return None
    side = sides(train, test)[first]
    if len(content) > COMPARED:
        drawn = np.sort(np.random.default_rng(0).choice(len(content), COMPARED, replace=False))
        content, side = content[drawn], side[drawn]
    pairs, cosines = _nearest_across(_read(sets[pooled[-1]], content), side)
    likest = pairs[: LOOKED_AT // 2]
    read = {
        place: _grey(paths.get(str(content[place]), ""), pixel_range)
        for place in np.unique(likest).tolist()
    }
    grey = {place: values for place, values in read.items() if values is not None}
    alike = cosines >= FEATURES_ALIKE
    if len(grey) >= FEWEST:
        light = np.stack(list(grey.values())).astype(np.float32)
        like = standardised(light - light.mean(1, keepdims=True))
        row = {place: number for number, place in enumerate(grey)}
        for number, (one, other) in enumerate(likest.tolist()):
            if one in row and other in row:
                alike[number] |= float(like[row[one]] @ like[row[other]]) >= PIXELS_ALIKE
    found = pairs[alike]
    leaked, tested = leaked_images(found[:, 0], found[:, 1], side), int((side == "test").sum())
    share = len(leaked) / tested if tested else len(np.unique(found)) / len(content)
    if share < NOTABLE:
        return None
    return near_duplicates_text(found[:, 0], found[:, 1], side, least=True)


def _nearest_across(
    vectors: npt.NDArray[np.float32], side: npt.NDArray[np.str_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(P, 2) each row's likest row of another side, each pair once, the likest first; and their
    cosines (P,).
    """
    X = standardised(vectors)
    near = X
    if (
        X.shape[1] > _DIRECTIONS
    ):  # a random projection keeps distances well enough to find the nearest
        near = X @ np.random.default_rng(0).normal(size=(X.shape[1], _DIRECTIONS)).astype(
            np.float32
        )
        near /= np.maximum(np.linalg.norm(near, axis=1, keepdims=True), 1e-12)
    number = np.unique(side, return_inverse=True)[1]
    nearest = np.empty(len(X), np.int64)
    for start in range(0, len(X), _BLOCK):
        rows = slice(start, start + _BLOCK)
        likeness = near[rows] @ near.T
        likeness[number[rows, None] == number[None]] = -np.inf
        nearest[rows] = likeness.argmax(1)
    pairs = np.unique(np.sort(np.stack([np.arange(len(X)), nearest], 1), axis=1), axis=0)
    pairs = pairs[number[pairs[:, 0]] != number[pairs[:, 1]]]  # of one side alone there is none
    cosines = (X[pairs[:, 0]] * X[pairs[:, 1]]).sum(1)
    order = np.argsort(-cosines, kind="stable")
    return pairs[order], cosines[order]


def _grey(path: str, pixel_range: PixelRange | None) -> npt.NDArray[np.uint8] | None:
    try:
        return grey_signature(read_bytes(path), pixel_range)
    except (OSError, HeadraceError):  # it has moved since, or is no image any more
        return None


def near_copies(samples: pd.DataFrame, group: str | None = None) -> str | None:
    """Before anything is extracted: images that small grey copies find all but equal, among
    neighbours in the listing, where the frames of a video or the photos of a scene stand. samples:
    columns id, path. group: a column whose values stay on one side of a split in any case.

    At most LOOKED_AT images are read, and no more than LOOKED_BYTES.
    """
    looked = samples
    if len(samples) > LOOKED_AT:
        starts = np.linspace(0, len(samples) - RUN, LOOKED_AT // RUN).astype(int)
        looked = samples.iloc[np.unique((starts[:, None] + np.arange(RUN)).ravel())]
    # by content: exact copies are told by the run, and kept together
    grey: dict[str, npt.NDArray[np.uint8]] = {}
    names, side, total = [], [], 0
    for place, (name, path) in enumerate(looked[["id", "path"]].itertuples(index=False)):
        with contextlib.suppress(
            Exception
        ):  # what cannot be read is told by the run, with its reason
            data = read_bytes(path)
            total += len(data)
            if total > LOOKED_BYTES:
                break
            content = hash_bytes(data)
            if content not in grey:
                grey[content] = grey_signature(data)
                names.append(str(name))
                side.append(str(place) if group is None else str(looked[group].iloc[place]))
    if len(grey) < FEWEST:
        return None
    light = np.stack(list(grey.values())).astype(np.float32)
    pairs = like_pairs(light - light.mean(1, keepdims=True), np.array(side), PIXELS_ALIKE)
    count = len(np.unique(np.concatenate([pairs.first, pairs.second])))
    if count < NOTABLE * len(grey):
        return None
    return (
        f"{count:,} of {len(grey):,} images that were looked at are nearly the same as another, "
        f"such as {names[int(pairs.first[0])]!r} and {names[int(pairs.second[0])]!r}, and a split "
        f"may put them on different sides. {GROUP_ADVICE}"
    )


def sides(train: Task, test: Task) -> npt.NDArray[np.str_]:
    """(rows of both,) "fold 0" …, "training", "test"."""
    names = [f"fold {fold}" if fold >= 0 else "training" for fold in train.fold]
    return np.array([*names, *["test"] * len(test.ids)])


def near_duplicates_text(
    first: npt.NDArray[Any],
    second: npt.NDArray[Any],
    side: npt.NDArray[np.str_],
    *,
    least: bool = False,
) -> str:
    """What is said of pairs (P,) and (P,) of nearly the same images. side: (N,) as `sides` has
    them, of the images compared.

    least: there may be more of them.
    """
    leaked, tested = leaked_images(first, second, side), int((side == "test").sum())
    share = (
        f"; {len(leaked):,} of {tested:,} test images ({len(leaked) / max(tested, 1):.1%}) have "
        "such a partner among the images that heads are trained on"
    )
    return (
        f"{'at least ' if least else ''}{len(first):,} pairs of images on different sides of the "
        f"split are nearly the same{share if tested else ''}. {GROUP_ADVICE}"
    )


def leaked_images(
    first: npt.NDArray[Any], second: npt.NDArray[Any], side: npt.NDArray[np.str_]
) -> npt.NDArray[np.int64]:
    """Positions of the test images that have a partner outside of the test split, of pairs (P,) and
    (P,) of positions.
    """
    tested = side == "test"
    touching = tested[first] != tested[second]
    return np.unique(np.where(tested[first], first, second)[touching]).astype(np.int64)


def _read(features: FeatureSet, content: npt.NDArray[np.str_]) -> npt.NDArray[np.float32]:
    return features.read(features.locate(content.tolist()), np.float32)


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec's settings by name; an estimator's parameters among them."""
    parameters = json.loads(spec["parameters"]) if isinstance(spec.get("parameters"), str) else {}
    return {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in spec.items()
    } | {
        "parameters": None,
        **parameters,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(value: float, neighbour: float) -> float | None:
    """The next value of a grid beyond its end, in its own steps; None where there is none."""
    if value <= 0:
        return None
    ratio = value / neighbour if neighbour > 0 else 10.0
    following = float(f"{value * min(max(ratio, 0.1), 10.0):.1g}")
    if isinstance(value, int) and isinstance(neighbour, int):
        following = round(following)
    return following if following > 0 and following != value else None
