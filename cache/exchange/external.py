"""External features: files of other programs, kept as a feature set like our own.

Rows of the cache belong to the bytes of images, so every id needs the content hash of its image:
from a column `content` (files that `headrace cache export` wrote have one) or from the caller, who
knows where the images are. Ids are compared as text, in the form of `as_text`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.count_text import count_text
from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.external_files import ExternalFeatures
from headrace.cache.exchange.leaks import find_target_columns
from headrace.cache.feature_set import FeatureSet, list_feature_sets, open_feature_set
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec
from headrace.cache.text import as_text

# Prefix of `FeatureSpec.backbone`: no network of ours made these features.
BACKBONE_PREFIX = "imported:"
_SHARD_ROWS = 4096  # rows of an imported shard


@dataclass(frozen=True)
class ImportResult:
    """Counts of an import, and the feature set it made."""

    features: FeatureSet
    n_rows: int  # kept
    n_unknown: int  # rows whose id belongs to no image
    n_copies: int  # rows left out because another row has the same content hash


def import_features(
    cache_root: Path,
    set_name: str,
    external: ExternalFeatures,
    image_hashes: Mapping[str, str] | None = None,
    *,
    dtype: str = "float32",
    target_table: pd.DataFrame | None = None,
) -> ImportResult:
    """Store external features in the cache under `set_name`; a second call changes nothing.

    image_hashes: {id: content hash} of the images, for a file without hashes.
    dtype: storage dtype, not uint8.
    target_table: what is to be predicted, one or more columns, indexed by content hash. Features
    that repeat a target are refused.

    Raises ExternalFeaturesInvalid when another import has the name, when no id belongs to an image
    or one id belongs to several, for features that are the target (see `find_target_columns`), and
    for values that cannot be stored.
    """
    if not set_name or any(letter in set_name for letter in "/:\\ ") or set_name.startswith("."):
        raise ExternalFeaturesInvalid(
            f"the name {set_name!r}: expected a word without blanks, colons and slashes, such as "
            "dino"
        )
    if dtype not in STORAGE_DTYPES or dtype == "uint8":
        raise ExternalFeaturesInvalid(f"dtype {dtype!r}: expected float32, float16 or bfloat16")
    features = external.features
    if features.ndim not in (2, 4) or features.dtype.kind not in "fiub":
        raise ExternalFeaturesInvalid(
            f"the features are {features.dtype} of shape {features.shape}; expected numbers (rows, "
            "values), or maps (rows, channels, height, width)"
        )
    row_hashes = _hashes_of_rows(external, image_hashes)
    kept_rows, n_copies = _deduplicate_rows(row_hashes)
    n_unknown = sum(value is None for value in row_hashes)
    if not len(kept_rows):
        image_id = next(iter(image_hashes or ()), None)
        raise ExternalFeaturesInvalid(
            f"none of the {count_text(len(external.sample_ids), 'id')} is that of an image, "
            f"the first is {external.sample_ids[0]!r}"
            + (f"; those of the images look like {image_id!r}" if image_hashes else "")
        )
    if target_table is not None:
        _refuse_target_columns(external, row_hashes, target_table)
    # The spec has a digest of the rows: the same import again has the same spec, any other one not.
    spec = _external_spec(set_name, external, row_hashes, kept_rows, dtype)
    for existing_set in external_feature_sets(cache_root, set_name):
        if existing_set.spec != spec:
            raise ExternalFeaturesInvalid(
                f"{set_name!r} is imported already, with {count_text(existing_set.n_rows, 'row')} "
                f"of shape {existing_set.spec.shape}. Another name, or first: headrace cache rm "
                f"{existing_set.spec.fingerprint}"
            )
    directory = create_feature_set(cache_root, spec)
    for start_row in range(0, len(kept_rows), _SHARD_ROWS):
        shard_rows = kept_rows[start_row : start_row + _SHARD_ROWS]
        shard_hashes = [str(row_hashes[row]) for row in shard_rows]
        publish_shard(
            directory,
            # Named by its rows: a second call finds the shards that a killed one has published.
            hashlib.sha256("\n".join(shard_hashes).encode()).hexdigest()[:16],
            features=np.asarray(features[shard_rows], np.float32),
            ids=[external.sample_ids[row] for row in shard_rows],
            content_hashes=shard_hashes,
            failures=[],
        )
    return ImportResult(open_feature_set(directory), len(kept_rows), n_unknown, n_copies)


def external_feature_sets(cache_root: Path, set_name: str | None = None) -> list[FeatureSet]:
    """Return the imported feature sets of a cache: those of one name, or all."""
    return [
        feature_set
        for feature_set in list_feature_sets(cache_root)
        if feature_set.spec.backbone.startswith(BACKBONE_PREFIX)
        and set_name in (None, feature_set.spec.backbone.removeprefix(BACKBONE_PREFIX))
    ]


def _external_spec(
    set_name: str,
    external: ExternalFeatures,
    row_hashes: Sequence[str | None],
    kept_rows: npt.NDArray[np.int64],
    dtype: str,
) -> FeatureSpec:
    """Return the spec of external features.

    Nothing is known of the network that made them, so `weights` is the digest of the rows.
    """
    hasher = hashlib.sha256()
    # `kept_rows` are in the order of their hashes: a file in another order is the same feature set.
    for row in kept_rows:
        hasher.update(f"{row_hashes[row]}|".encode())
        hasher.update(np.ascontiguousarray(external.features[row], np.float32).tobytes())
    row_shape = external.features.shape[1:]
    return FeatureSpec(
        backbone=BACKBONE_PREFIX + set_name,
        weights=hasher.hexdigest(),
        tap=set_name,
        pooling="vector" if len(row_shape) == 1 else "map",
        preprocessing="{}",
        view=json.dumps({"index": 0}, separators=(",", ":")),
        decoder="imported",
        compute_dtype="float32",
        dtype=dtype,
        shape=row_shape,
    )


def _hashes_of_rows(
    external: ExternalFeatures, image_hashes: Mapping[str, str] | None
) -> list[str | None]:
    if external.content_hashes is not None:
        if image_hashes and not set(image_hashes.values()) & set(external.content_hashes):
            raise ExternalFeaturesInvalid(
                f"{external.source_name}: none of its content hashes is that of an image of the "
                "recipe: the features are of other images, or of these before they were changed. "
                "If `content` holds something else (an MD5, say), rename the column, and the ids "
                "count"
            )
        return list(external.content_hashes)
    if image_hashes is None:
        raise ExternalFeaturesInvalid(
            "the file has ids and no content hashes: name the images that the ids belong to, with "
            "--recipe recipe.yaml"
        )
    image_ids = as_text(pd.Series(list(image_hashes), dtype=object))
    image_table = pd.DataFrame({"id": image_ids, "content": list(image_hashes.values())})
    image_table = image_table.drop_duplicates()
    duplicate_ids = image_table["id"][image_table["id"].duplicated()]
    ambiguous_ids = duplicate_ids[duplicate_ids.isin(external.sample_ids)]
    if len(ambiguous_ids):
        raise ExternalFeaturesInvalid(
            f"{external.source_name}: the id {ambiguous_ids.iloc[0]!r} stands for several images "
            "of the recipe, whose names differ in blanks or in the form of their accents alone. "
            "Rename one of them"
        )
    # Ids that are ambiguous, but not in the file, may have any of their hashes here.
    hash_of_id = dict(zip(image_table["id"], image_table["content"], strict=True))
    return [hash_of_id.get(sample_id) for sample_id in external.sample_ids]


def _refuse_target_columns(
    external: ExternalFeatures, row_hashes: Sequence[str | None], target_table: pd.DataFrame
) -> None:
    """Raise ExternalFeaturesInvalid naming the first feature that repeats a target."""
    if external.features.ndim != 2:
        return
    unique_targets = target_table[~target_table.index.duplicated() & target_table.index.notna()]
    for target_name in unique_targets.columns:
        target = unique_targets[target_name].reindex(pd.Index(list(row_hashes), dtype=object))
        if leaking_columns := find_target_columns(external.features, target.reset_index(drop=True)):
            raise ExternalFeaturesInvalid(
                f"{external.source_name}: {external.feature_columns.describe(leaking_columns[0])} "
                f"is the target {str(target_name)!r} under another name: each of its values stands "
                f"for the target's. {external.feature_columns.leave_out(leaking_columns)}"
            )


def _deduplicate_rows(row_hashes: Sequence[str | None]) -> tuple[npt.NDArray[np.int64], int]:
    """Return each hash's first row, in the order of the hashes, and the count of other rows."""
    row_of_hash: dict[str, int] = {}
    n_copies = 0
    for row, content_hash in enumerate(row_hashes):
        if content_hash is not None:
            n_copies += content_hash in row_of_hash
            row_of_hash.setdefault(content_hash, row)
    first_rows = [row for _, row in sorted(row_of_hash.items())]
    return np.array(first_rows, np.int64), n_copies
