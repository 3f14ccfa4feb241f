"""Near-duplicates across the split: pairs that pixels or features find all but equal."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RUN_AGAIN
from headrace.pipelines.report.blocks import Block, Column, Gallery, Note, Picture, Section, Table
from headrace.pipelines.report.thumbnails import Thumbnails
from headrace.pipelines.selection.cautions import (
    FEATURES_ALIKE,
    PIXELS_ALIKE,
    leaked_images,
    near_duplicates_text,
    sides,
)
from headrace.pipelines.selection.duplicates import LikePairs, like_pairs, standardised
from headrace.pipelines.selection.signatures import signatures

SHOWN = 18


def leakage(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """The section: how many pairs stand on two sides, the likest as pictures, all of them as a
    table.
    """
    title = "Near-duplicates across splits"
    if isinstance(run.images, str):
        return Section("leakage", title, "", (Note(f"Not looked for: {run.images}."),))
    train, test = run.images.dataset.train, run.images.dataset.test
    content = np.concatenate([train.content, test.content]).astype(str)
    ids = np.concatenate([train.ids, test.ids])
    side = sides(train, test)
    _, first = np.unique(content, return_index=True)  # exact copies are on one side already
    first = np.sort(first)
    content, ids, side = content[first], ids[first], side[first]
    pairs, remarks = _pairs(run, content, side)
    lead = (
        "An image that is nearly the same in training and in test is recognised, not understood, "
        "and flatters every score. Compared are small grey copies of all images, and their "
        "features; sides are the test split and the validation folds."
    )
    if pairs.empty:
        return Section(
            "leakage",
            title,
            lead,
            (Note("No two images on different sides are nearly the same.", "good"), *remarks),
        )
    for end in ("first", "second"):
        pairs[f"{end}_id"], pairs[f"{end}_side"] = ids[pairs[end]], side[pairs[end]]
    ends = pairs["first"].to_numpy(np.int64), pairs["second"].to_numpy(np.int64)
    leaked = leaked_images(*ends, side)
    text = f"{near_duplicates_text(*ends, side)}."
    table = Table(
        "near-duplicates",
        "Every pair, the likest first",
        (
            Column("first_id", "image"),
            Column("first_side", "side"),
            Column("second_id", "other image"),
            Column("second_side", "other side"),
            Column("pixels", "pixels", "number", "likeness of the small grey copies; 1 is equal"),
            Column("features", "features", "number", "likeness of the features; 1 is equal"),
        ),
        pairs.drop(columns=["first", "second"]),
        filters=("first_side", "second_side"),
        search=True,
    )
    gallery = Gallery(
        "The likest pairs",
        tuple(_picture(pair, content, thumbnails) for pair in pairs.head(SHOWN).to_dict("records")),
    )
    return Section(
        "leakage",
        title,
        lead,
        (Note(text, "warning" if len(leaked) else "note"), gallery, table, *remarks),
    )


def _pairs(
    run: FinishedRun, content: npt.NDArray[np.str_], side: npt.NDArray[np.str_]
) -> tuple[pd.DataFrame, list[Block]]:
    """first, second (positions), pixels, features (likeness, nan where not known); and what could
    not be compared.
    """
    remarks: list[Block] = []
    found: list[tuple[str, LikePairs, npt.NDArray[np.int64]]] = []
    vectors: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = {}
    assert not isinstance(run.images, str)
    grey, there = signatures(
        run.images.image_paths,
        content.tolist(),
        run.paths.signatures,
        run.recipe.images.pixel_range,
    )
    if len(there) < len(content):
        remarks.append(
            Note(
                f"{len(content) - len(there):,} images are not where they were: of them only the "
                "features were compared."
            )
        )
    light = grey.astype(np.float32)
    vectors["pixels"] = light - light.mean(1, keepdims=True), np.asarray(there, np.int64)
    try:
        features = _features(run)
        where = np.flatnonzero((rows := features.locate(content.tolist())) >= 0)
        if len(where) < len(content):
            text = (
                f"{len(content) - len(where):,} images have no features in {features.path} any "
                f"more: {RUN_AGAIN}."
            )
            remarks.append(Note(text, "warning"))
        if len(where):
            X = features.read(rows[where], np.float32)
            vectors["features"] = X.reshape(len(X), X.shape[1], -1).mean(2), where
    except (HeadraceError, OSError) as error:
        remarks.append(Note(f"Features were not compared: {error}"))
    for name, alike in (("pixels", PIXELS_ALIKE), ("features", FEATURES_ALIKE)):
        if name in vectors and len(vectors[name][1]) > 1:
            values, where = vectors[name]
            found.append((name, like_pairs(values, side[where], alike), where))
    frame = pd.DataFrame({"first": np.empty(0, int), "second": np.empty(0, int)})
    for name, pairs, where in found:
        own = pd.DataFrame(
            {"first": where[pairs.first], "second": where[pairs.second], name: pairs.likeness}
        )
        frame = frame.merge(own, on=["first", "second"], how="outer")
        if pairs.compared < len(where):
            remarks.append(
                Note(
                    f"Of {len(where):,} images, {pairs.compared:,} drawn at random were compared "
                    f"by their {name}."
                )
            )
    for name in ("pixels", "features"):
        frame[name] = _likeness(frame, *vectors[name]) if name in vectors else np.nan
    frame = frame.assign(most=frame[["pixels", "features"]].max(axis=1))
    return frame.sort_values(
        ["most", "first", "second"], ascending=[False, True, True], ignore_index=True
    ).drop(columns="most"), remarks


def _likeness(
    frame: pd.DataFrame, values: npt.NDArray[np.float32], where: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The cosine of every pair of the frame, also of those that the other measure has found."""
    X = standardised(values)
    place = dict(zip(where.tolist(), range(len(where)), strict=True))
    ends = [
        np.array([place.get(int(row), -1) for row in frame[end]], np.int64)
        for end in ("first", "second")
    ]
    known = (ends[0] >= 0) & (ends[1] >= 0)
    return (
        np.where(known, (X[ends[0]] * X[ends[1]]).sum(1), np.nan)
        if len(X)
        else np.full(len(frame), np.nan)
    )


def _features(run: FinishedRun) -> FeatureSet:
    """Of the last pooled tap, which is the deepest in most recipes: it knows most about what is in
    the picture.
    """
    pooled = [
        name for name, views in run.feature_specs.items() if len(views[0].shape) == 1
    ] or list(run.feature_specs)
    return run.open_features(pooled[-1])[0]


def _picture(
    pair: dict[object, object], content: npt.NDArray[np.str_], thumbnails: Thumbnails
) -> Picture:
    uris = tuple(thumbnails.get(str(content[int(str(pair[end]))])) for end in ("first", "second"))
    lines = tuple(
        (name, f"{float(str(pair[name])):.3f}")
        for name in ("pixels", "features")
        if pair[name] == pair[name]
    )
    alt = tuple(f"{pair[f'{end}_id']}, {pair[f'{end}_side']}" for end in ("first", "second"))
    return Picture(uris, alt, f"{alt[0]} · {alt[1]}", lines)
