"""The leakage section: pairs of images on two sides of a split that are nearly the same."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.cache.manifest import MANIFEST
from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.records import RUN_AGAIN
from headrace.pipelines.report.page.blocks import (
    Block,
    Column,
    Gallery,
    Note,
    Picture,
    Section,
    Table,
)
from headrace.pipelines.report.page.thumbnails import Thumbnails
from headrace.pipelines.selection.cautions import (
    FEATURES_ALIKE,
    PIXELS_ALIKE,
    leaked_images,
    near_duplicates_text,
    sides,
)
from headrace.pipelines.selection.duplicates import similar_pairs, standardised
from headrace.pipelines.selection.signatures import signatures

SHOWN = 18  # pairs with pictures


def leakage_section(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """Return the section: the most similar pairs as pictures, all of them as a table."""
    section_title = "Near-duplicates across splits"
    if isinstance(run.images, str):
        return Section("leakage", section_title, "", (Note(f"Not looked for: {run.images}."),))
    train, test = run.images.dataset.train, run.images.dataset.test
    content_hashes = np.concatenate([train.content, test.content]).astype(str)
    image_ids = np.concatenate([train.ids, test.ids])
    split_side = sides(train, test)
    # One row for each content: exact copies are kept on one side anyway.
    _, first_rows = np.unique(content_hashes, return_index=True)
    first_rows = np.sort(first_rows)
    content_hashes = content_hashes[first_rows]
    image_ids = image_ids[first_rows]
    split_side = split_side[first_rows]
    pair_frame, remarks = _near_duplicates(run, content_hashes, split_side)
    lead_text = (
        "An image that is nearly the same in training and in test is recognised, not understood, "
        "and flatters every score. Compared are small grey copies of all images, and their "
        "features; sides are the test split and the validation folds."
    )
    if pair_frame.empty:
        return Section(
            "leakage",
            section_title,
            lead_text,
            (Note("No two images on different sides are nearly the same.", "good"), *remarks),
        )
    for pair_end in ("first", "second"):
        pair_frame[f"{pair_end}_id"], pair_frame[f"{pair_end}_side"] = (
            image_ids[pair_frame[pair_end]],
            split_side[pair_frame[pair_end]],
        )
    pair_rows = pair_frame["first"].to_numpy(np.int64), pair_frame["second"].to_numpy(np.int64)
    leaked_rows = leaked_images(*pair_rows, split_side)
    warning_text = f"{near_duplicates_text(*pair_rows, split_side)}."
    pair_table = Table(
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
        pair_frame.drop(columns=["first", "second"]),
        filters=("first_side", "second_side"),
        search=True,
    )
    pair_gallery = Gallery(
        "The likest pairs",
        tuple(
            _pair_picture(pair, content_hashes, thumbnails)
            for pair in pair_frame.head(SHOWN).to_dict("records")
        ),
    )
    return Section(
        "leakage",
        section_title,
        lead_text,
        (
            Note(warning_text, "warning" if len(leaked_rows) else "note"),
            pair_gallery,
            pair_table,
            *remarks,
        ),
    )


def _near_duplicates(
    run: FinishedRun, content_hashes: npt.NDArray[np.str_], split_side: npt.NDArray[np.str_]
) -> tuple[pd.DataFrame, list[Block]]:
    """Return the pairs, most similar first, and notes on what was not compared.

    Columns first, second (positions), pixels, features (cosines; nan where not known).
    """
    remarks: list[Block] = []
    vectors_by_name: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = {}
    assert not isinstance(run.images, str)
    grey_copies, available_rows = signatures(
        run.images.image_paths,
        content_hashes.tolist(),
        run.paths.signatures,
        run.recipe.images.pixel_range,
    )
    if len(available_rows) < len(content_hashes):
        moved_text = count_text(
            len(content_hashes) - len(available_rows),
            "image is not where it was: of it",
            "images are not where they were: of them",
        )
        remarks.append(Note(f"{moved_text} only the features were compared."))
    light_values = grey_copies.astype(np.float32)
    vectors_by_name["pixels"] = (
        light_values - light_values.mean(1, keepdims=True),
        np.asarray(available_rows, np.int64),
    )
    try:
        features = _deepest_features(run)
        feature_rows = np.flatnonzero(
            (stored_rows := features.locate(content_hashes.tolist())) >= 0
        )
        if len(feature_rows) < len(content_hashes):
            n_lacking = len(content_hashes) - len(feature_rows)
            remark_text = (
                f"{count_text(n_lacking, 'image has', 'images have')} no features in "
                f"{features.path / MANIFEST} any more: {RUN_AGAIN}."
            )
            remarks.append(Note(remark_text, "warning"))
        if len(feature_rows):
            X = features.read(stored_rows[feature_rows], np.float32)
            vectors_by_name["features"] = X.reshape(len(X), X.shape[1], -1).mean(2), feature_rows
    except (HeadraceError, OSError) as error:
        remarks.append(Note(f"Features were not compared: {error}"))
    pair_frame = pd.DataFrame({"first": np.empty(0, int), "second": np.empty(0, int)})
    min_cosines = {"pixels": PIXELS_ALIKE, "features": FEATURES_ALIKE}
    for measure_name, (image_vectors, image_rows) in vectors_by_name.items():
        if len(image_rows) < 2:
            continue
        pairs = similar_pairs(image_vectors, split_side[image_rows], min_cosines[measure_name])
        found_pairs = pd.DataFrame(
            {"first": image_rows[pairs.first], "second": image_rows[pairs.second]}
        )
        pair_frame = pair_frame.merge(found_pairs, on=["first", "second"], how="outer")
        if pairs.compared < len(image_rows):
            remarks.append(
                Note(
                    f"Of {len(image_rows):,} images, {pairs.compared:,} drawn at random "
                    f"were compared by their {measure_name}."
                )
            )
    # Both cosines of each pair, also of pairs that only one of the measures has found.
    for measure_name in min_cosines:
        pair_frame[measure_name] = (
            _pair_cosines(pair_frame, *vectors_by_name[measure_name])
            if measure_name in vectors_by_name
            else np.nan
        )
    pair_frame = pair_frame.assign(most=pair_frame[["pixels", "features"]].max(axis=1))
    return pair_frame.sort_values(
        ["most", "first", "second"], ascending=[False, True, True], ignore_index=True
    ).drop(columns="most"), remarks


def _pair_cosines(
    pair_frame: pd.DataFrame,
    image_vectors: npt.NDArray[np.float32],
    vector_image_rows: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return the cosine (P,) of each pair of the frame; nan if an image has no vector."""
    X = standardised(image_vectors)
    vector_of_row = dict(
        zip(vector_image_rows.tolist(), range(len(vector_image_rows)), strict=True)
    )
    vector_rows = [
        np.array([vector_of_row.get(int(row), -1) for row in pair_frame[pair_end]], np.int64)
        for pair_end in ("first", "second")
    ]
    has_both = (vector_rows[0] >= 0) & (vector_rows[1] >= 0)
    return (
        np.where(has_both, (X[vector_rows[0]] * X[vector_rows[1]]).sum(1), np.nan)
        if len(X)
        else np.full(len(pair_frame), np.nan)
    )


def _deepest_features(run: FinishedRun) -> FeatureSet:
    """Return the last pooled tap of the recipe, mostly the deepest: it says most about the
    content.
    """
    pooled_names = [
        feature_name
        for feature_name, views in run.feature_specs.items()
        if len(views[0].shape) == 1
    ] or list(run.feature_specs)
    return run.open_features(pooled_names[-1])[0]


def _pair_picture(
    pair: dict[object, object], content_hashes: npt.NDArray[np.str_], thumbnails: Thumbnails
) -> Picture:
    picture_uris = tuple(
        thumbnails.get(str(content_hashes[int(str(pair[pair_end]))]))
        for pair_end in ("first", "second")
    )
    caption_lines = tuple(
        (measure_name, f"{float(str(pair[measure_name])):.3f}")
        for measure_name in ("pixels", "features")
        if pair[measure_name] == pair[measure_name]
    )
    alt_texts = tuple(
        f"{pair[f'{pair_end}_id']}, {pair[f'{pair_end}_side']}" for pair_end in ("first", "second")
    )
    paths = tuple(
        thumbnails.paths.get(str(content_hashes[int(str(pair[pair_end]))]), "")
        for pair_end in ("first", "second")
    )
    return Picture(
        picture_uris, alt_texts, f"{alt_texts[0]} · {alt_texts[1]}", caption_lines, paths
    )
