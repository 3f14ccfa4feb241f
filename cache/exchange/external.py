"""Features that other programs made: `.npy`, `.npz`, tables or HDF5 with ids, kept as a feature set
like our own.

Rows of the cache belong to the bytes of images, and so every id needs the content hash of its
image: from a column `content` (files that `headrace cache export` wrote have one) or from the
caller, who knows where the images are. Ids are compared as text, in the form of `as_text`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import ExternalFeaturesInvalid
from headrace.cache.exchange.external_files import ExternalFeatures, read_external_features
from headrace.cache.exchange.leaks import find_target_columns
from headrace.cache.feature_set import FeatureSet, feature_set_directories, open_feature_set
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec
from headrace.cache.text import as_text

__all__ = [
    "PREFIX",
    "ExternalFeatures",
    "ExternalFeaturesInvalid",
    "ImportResult",
    "external_feature_sets",
    "import_features",
    "read_external_features",
]

PREFIX = "imported:"  # of `FeatureSpec.backbone`: no network of ours made these
_SHARD_ROWS = 4096


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    features: FeatureSet
    rows: int  # kept
    unknown: int  # rows whose id belongs to no image
    copies: int  # rows of images that are copies of one another: one row is kept


def import_features(
    cache_root: Path,
    name: str,
    foreign: ExternalFeatures,
    known: Mapping[str, str] | None = None,
    *,
    dtype: str = "float32",
    targets: pd.DataFrame | None = None,
) -> ImportResult:
    """Keep features under a name; `known` is {id: content hash} of the images, for a file without
    hashes.

    targets: what is to be predicted, one or more columns, indexed by content hash: features that
    say it are refused. Doing it twice changes nothing. Raises ExternalFeaturesInvalid when another
    import has the name, when no id belongs to an image or one to several, for features that are the
    target (see `find_target_columns`), and for values that cannot be stored.
    """
    if not name or any(letter in name for letter in "/:\\ ") or name.startswith("."):
        raise ExternalFeaturesInvalid(
            f"the name {name!r}: expected a word without blanks, colons and slashes, such as dino"
        )
    if dtype not in STORAGE_DTYPES or dtype == "uint8":
        raise ExternalFeaturesInvalid(f"dtype {dtype!r}: expected float32, float16 or bfloat16")
    features = foreign.features
    if features.ndim not in (2, 4) or features.dtype.kind not in "fiub":
        raise ExternalFeaturesInvalid(
            f"the features are {features.dtype} of shape {features.shape}; expected numbers (rows, "
            "values), or maps (rows, channels, height, width)"
        )
    content = _contents(foreign, known)
    rows, copies = _first_of_each(content)
    unknown = sum(value is None for value in content)
    if not len(rows):
        raise ExternalFeaturesInvalid(
            (
                f"none of the {len(foreign.ids):,} ids is that of an image, the first is "
                f"{foreign.ids[0]!r}"
            )
            + (f"; those of the images look like {next(iter(known))!r}" if known else "")
        )
    if targets is not None:
        _refuse_targets(foreign, content, targets)
    spec = _spec(name, foreign, content, rows, dtype)
    for other in external_feature_sets(cache_root, name):
        if other.spec != spec:
            raise ExternalFeaturesInvalid(
                f"{name!r} is imported already, with {other.n_rows:,} rows of shape "
                f"{other.spec.shape}. Another name, or first: headrace cache rm "
                f"{other.spec.fingerprint}"
            )
    directory = create_feature_set(cache_root, spec)
    for start in range(0, len(rows), _SHARD_ROWS):
        chosen = rows[start : start + _SHARD_ROWS]
        hashes = [str(content[row]) for row in chosen]
        publish_shard(
            directory,
            hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16],
            features=np.asarray(features[chosen], np.float32),
            ids=[foreign.ids[row] for row in chosen],
            content_hashes=hashes,
            failures=[],
        )
    return ImportResult(open_feature_set(directory), len(rows), unknown, copies)


def external_feature_sets(cache_root: Path, name: str | None = None) -> list[FeatureSet]:
    """The feature sets of a cache that were imported, under this name or any."""
    found = [open_feature_set(path) for path in feature_set_directories(cache_root)]
    wanted = PREFIX + (name or "")
    return [
        each
        for each in found
        if each.spec.backbone.startswith(wanted) and (not name or each.spec.backbone == wanted)
    ]


def _spec(
    name: str,
    foreign: ExternalFeatures,
    content: Sequence[str | None],
    rows: npt.NDArray[np.int64],
    dtype: str,
) -> FeatureSpec:
    hasher = hashlib.sha256()
    for row in rows:  # whole rows, whatever order they came in
        hasher.update(f"{content[row]}|".encode())
        hasher.update(np.ascontiguousarray(foreign.features[row], np.float32).tobytes())
    shape = foreign.features.shape[1:]
    return FeatureSpec(
        backbone=PREFIX + name,
        weights=hasher.hexdigest(),
        tap=name,
        reduction="vector" if len(shape) == 1 else "map",
        preprocessing="{}",
        view=json.dumps({"index": 0}, separators=(",", ":")),
        decoder="imported",
        compute_dtype="float32",
        dtype=dtype,
        shape=shape,
    )


def _contents(foreign: ExternalFeatures, known: Mapping[str, str] | None) -> list[str | None]:
    if foreign.content is not None:
        if known and not set(known.values()) & set(foreign.content):
            raise ExternalFeaturesInvalid(
                f"{foreign.source}: none of its content hashes is that of an image of the recipe: "
                "the features are of other images, or of these before they were changed. If "
                "`content` holds something else (an MD5, say), rename the column, and the ids "
                "count"
            )
        return list(foreign.content)
    if known is None:
        raise ExternalFeaturesInvalid(
            "the file has ids and no content hashes: name the images that the ids belong to, with "
            "--recipe recipe.yaml"
        )
    images = pd.DataFrame(
        {"id": as_text(pd.Series(list(known), dtype=object)), "content": list(known.values())}
    )
    images = images.drop_duplicates()
    twice = images["id"][images["id"].duplicated()]
    wanted = twice[twice.isin(foreign.ids)]
    if len(wanted):
        raise ExternalFeaturesInvalid(
            f"{foreign.source}: the id {wanted.iloc[0]!r} stands for several images of the recipe, "
            "whose names differ in blanks or in the form of their accents alone. Rename one of "
            "them"
        )
    content_of = dict(zip(images["id"], images["content"], strict=True))
    return [content_of.get(name) for name in foreign.ids]


def _refuse_targets(
    foreign: ExternalFeatures, content: Sequence[str | None], targets: pd.DataFrame
) -> None:
    """Raises ExternalFeaturesInvalid naming the first feature that says a target."""
    if foreign.features.ndim != 2:
        return
    by_content = targets[~targets.index.duplicated() & targets.index.notna()]
    for name in by_content.columns:
        target = (
            by_content[name].reindex(pd.Index(list(content), dtype=object)).reset_index(drop=True)
        )
        if found := find_target_columns(foreign.features, target):
            raise ExternalFeaturesInvalid(
                f"{foreign.source}: {foreign.columns.describe(found[0])} is the target "
                f"{str(name)!r} under another name: each of its values stands for the target's. "
                f"{foreign.columns.leave_out(found)}"
            )


def _first_of_each(content: Sequence[str | None]) -> tuple[npt.NDArray[np.int64], int]:
    """Rows with a content hash in the order of the hashes, each once; and how many were copies."""
    first: dict[str, int] = {}
    copies = 0
    for row, value in enumerate(content):
        if value is not None:
            copies += value in first
            first.setdefault(value, row)
    return np.array([first[value] for value in sorted(first)], np.int64), copies
