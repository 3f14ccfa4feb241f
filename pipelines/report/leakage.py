"""The leakage section: pairs of images on two sides of a split that are nearly the same."""

from typing import Any

import numpy as np
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.cache.manifest import MANIFEST
from headrace.heads.arrays import Doubles, Floats, Index, Strings
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
from headrace.pipelines.selection.duplicates import similar_pairs, standardized
from headrace.pipelines.selection.signatures import signatures

SHOWN = 18  # pairs with pictures


def leakage_section(run: FinishedRun, thumbnails: Thumbnails) -> Section:
    """Return the section: the most similar pairs as pictures, all of them as a table."""
    section_title = "Near-duplicates across splits"
    if isinstance(run.images, str):
        return Section("leakage", section_title, "", (Note(f"Not looked for: {run.images}."),))
    train, test = run.images.dataset.train, run.images.dataset.test
    content_hashes = np.concatenate([train.content, test.content]).astype(str)
    # One row for each content: exact copies are kept on one side anyway.
    first_rows = np.sort(np.unique(content_hashes, return_index=True)[1])
    content_hashes = content_hashes[first_rows]
    image_ids = np.concatenate([train.ids, test.ids])[first_rows]
    split_side = sides(train, test)[first_rows]
    pair_frame, remarks = _near_duplicates(run, content_hashes, split_side)
    lead_text = (
        "An image that is nearly the same in training and in test is recognized, not understood, "
        "and flatters every score. Compared are small grey copies of all images, and their "
        "features; sides are the test split and the validation folds."
    )
    if pair_frame.empty:
        note = Note("No two images on different sides are nearly the same.", "good")
        return Section("leakage", section_title, lead_text, (note, *remarks))
    pair_rows = pair_frame["first"].to_numpy(np.int64), pair_frame["second"].to_numpy(np.int64)
    for pair_end, rows in zip(("first", "second"), pair_rows, strict=True):
        pair_frame[f"{pair_end}_id"] = image_ids[rows]
        pair_frame[f"{pair_end}_side"] = split_side[rows]
        pair_frame[f"{pair_end}_content"] = content_hashes[rows]
    # Pairs between folds flatter the validation scores alone: a note, and no warning.
    has_leaked = len(leaked_images(*pair_rows, split_side)) > 0
    note_text = f"{near_duplicates_text(*pair_rows, split_side)}."
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
        pair_frame,
        filters=("first_side", "second_side"),
        search=True,
    )
    pair_gallery = Gallery(
        "The likest pairs",
        tuple(
            _pair_picture(pair, thumbnails) for pair in pair_frame.head(SHOWN).to_dict("records")
        ),
    )
    note = Note(note_text, "warning" if has_leaked else "note")
    return Section("leakage", section_title, lead_text, (note, pair_gallery, pair_table, *remarks))


def _near_duplicates(
    run: FinishedRun, content_hashes: Strings, split_side: Strings
) -> tuple[pd.DataFrame, list[Block]]:
    """Return the pairs, most similar first, and notes on what was not compared.

    Columns first, second (positions), pixels, features (cosines; nan where not known).
    """
    remarks: list[Block] = []
    vectors_by_name: dict[str, tuple[Floats, Index]] = {}
    assert not isinstance(run.images, str)
    grey_copies, available_rows = signatures(
        run.images.image_paths,
        content_hashes.tolist(),
        run.paths.signatures,
        run.recipe.images.pixel_range,
    )
    if n_unread := len(content_hashes) - len(available_rows):
        unread_text = count_text(n_unread, "image is", "images are")
        remarks.append(
            Note(f"{unread_text} gone or have changed: only their features were compared.")
        )
    light_values = grey_copies.astype(np.float32)
    # Without its mean: two images are not alike for being equally bright.
    light_values -= light_values.mean(1, keepdims=True)
    vectors_by_name["pixels"] = light_values, np.asarray(available_rows, np.int64)
    try:
        features = _deepest_features(run)
        stored_rows = features.locate(content_hashes.tolist())
        feature_rows = np.flatnonzero(stored_rows >= 0)
        if n_lacking := len(content_hashes) - len(feature_rows):
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
        # Outer: a pair may be alike in its pixels, or in its features alone.
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
    pair_frame: pd.DataFrame, image_vectors: Floats, vector_image_rows: Index
) -> Doubles:
    """Return the cosine (P,) of each pair of the frame; nan if an image has no vector."""
    X = standardized(image_vectors)
    if not len(X):
        return np.full(len(pair_frame), np.nan)
    vector_of_row = pd.Index(vector_image_rows)
    first, second = (
        vector_of_row.get_indexer(pd.Index(pair_frame[end])) for end in ("first", "second")
    )
    return np.where((first >= 0) & (second >= 0), (X[first] * X[second]).sum(1), np.nan)


def _deepest_features(run: FinishedRun) -> FeatureSet:
    """Return the last pooled tap of the recipe, mostly the deepest: it says most about the
    content.
    """
    specs = run.feature_specs
    pooled_names = [name for name, views in specs.items() if len(views[0].shape) == 1]
    return run.open_features((pooled_names or list(specs))[-1])[0]


def _pair_picture(pair: dict[Any, Any], thumbnails: Thumbnails) -> Picture:
    contents = [pair["first_content"], pair["second_content"]]
    alt_texts = tuple(f"{pair[f'{end}_id']}, {pair[f'{end}_side']}" for end in ("first", "second"))
    # A likeness is nan where an image is gone, or has no features.
    caption_lines = tuple(
        (name, f"{pair[name]:.3f}") for name in ("pixels", "features") if pd.notna(pair[name])
    )
    return thumbnails.picture(contents, alt_texts, " · ".join(alt_texts), caption_lines)
