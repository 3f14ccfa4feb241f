"""Features that other programs made: `.npy`, `.npz`, Parquet or HDF5 with ids, kept as a feature set like our own.

Rows of the cache belong to the bytes of images, and so every id needs the content hash of its image: from a column
`content` (files that `headrace cache export` wrote have one) or from the caller, who knows where the images are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from headrace.cache.errors import CacheError
from headrace.cache.feature_set import FeatureSet, feature_set_directories, open_feature_set
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import STORAGE_DTYPES, FeatureSpec

PREFIX = "imported:"  # of `FeatureSpec.backbone`: no network of ours made these
_SHARD_ROWS = 4096
_TEXT_KINDS = "OSU"


class ForeignFeatures(CacheError, ValueError):
    """The file does not hold features with ids, as asked."""


@dataclass(frozen=True)
class Foreign:
    """Features as another program left them."""

    ids: list[str]  # N
    features: npt.NDArray[Any]  # (N, *shape)
    content: list[str] | None  # N content hashes, where the file has them


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    features: FeatureSet
    rows: int  # kept
    unknown: int  # rows whose id belongs to no image
    copies: int  # rows of images that are copies of one another: one row is kept


def read_foreign(
    source: Path, *, ids: Path | None = None, key: str | None = None, id_key: str | None = None
) -> Foreign:
    """Read features and ids.

    .npy, .npz: features (N, ...) and a table of ids beside them, `ids` or `<stem>.rows.csv`. Parquet, CSV: a column of ids
    (`id_key`, by default `id`) and either one column of lists (`key`) or all numeric columns. HDF5: a data set of features
    (`key`) and one of ids (`id_key`), or `ids`. Raises ForeignFeatures, saying what the file holds.
    """
    suffix = source.suffix.lower()
    if not source.is_file():
        raise ForeignFeatures(f"{source}: no such file")
    try:
        if suffix in (".npy", ".npz"):
            return _with_table(_numpy(source, key), _id_table(source, ids), source, id_key)
        if suffix in (".parquet", ".pq", ".csv"):
            return _table(source, ids, key, id_key)
        if suffix in (".h5", ".hdf5", ".hdf"):
            return _hdf5(source, ids, key, id_key)
    except ForeignFeatures:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ForeignFeatures(
            f"{source}: cannot be read as {suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from error
    raise ForeignFeatures(f"{source}: expected .npy, .npz, .parquet, .csv, .h5 or .hdf5; found {suffix or 'no suffix'}")


def import_features(
    cache_root: Path, name: str, foreign: Foreign, known: Mapping[str, str] | None = None, *, dtype: str = "float32"
) -> Imported:
    """Keep features under a name; `known` is {id: content hash} of the images, for a file without hashes.

    Doing it twice changes nothing. Raises ForeignFeatures when another import has the name, when no id belongs to an image,
    and for values that cannot be stored.
    """
    if not name or any(letter in name for letter in "/:\\ ") or name.startswith("."):
        raise ForeignFeatures(f"the name {name!r}: expected a word without blanks, colons and slashes, such as dino")
    if dtype not in STORAGE_DTYPES or dtype == "uint8":
        raise ForeignFeatures(f"dtype {dtype!r}: expected float32, float16 or bfloat16")
    features = foreign.features
    if features.ndim not in (2, 4) or features.dtype.kind not in "fiub":
        raise ForeignFeatures(
            f"the features are {features.dtype} of shape {features.shape}; expected numbers (rows, values), or maps (rows, "
            "channels, height, width)"
        )
    content = _contents(foreign, known)
    rows, copies = _first_of_each(content)
    unknown = sum(value is None for value in content)
    if not len(rows):
        raise ForeignFeatures(
            f"none of the {len(foreign.ids):,} ids is that of an image, the first is {foreign.ids[0]!r}"
            + (f"; those of the images look like {next(iter(known))!r}" if known else "")
        )
    spec = _spec(name, foreign, content, rows, dtype)
    for other in imported_sets(cache_root, name):
        if other.spec != spec:
            raise ForeignFeatures(
                f"{name!r} is imported already, with {other.n_rows:,} rows of shape {other.spec.shape}. Another name, or first: "
                f"headrace cache rm {other.spec.fingerprint}"
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
            content=hashes,
            failures=[],
        )
    return Imported(open_feature_set(directory), len(rows), unknown, copies)


def imported_sets(cache_root: Path, name: str | None = None) -> list[FeatureSet]:
    """The feature sets of a cache that were imported, under this name or any."""
    found = [open_feature_set(path) for path in feature_set_directories(cache_root)]
    wanted = PREFIX + (name or "")
    return [
        each for each in found if each.spec.backbone.startswith(wanted) and (not name or each.spec.backbone == wanted)
    ]


def _spec(
    name: str, foreign: Foreign, content: Sequence[str | None], rows: npt.NDArray[np.int64], dtype: str
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


def _contents(foreign: Foreign, known: Mapping[str, str] | None) -> list[str | None]:
    if foreign.content is not None:
        return list(foreign.content)
    if known is None:
        raise ForeignFeatures(
            "the file has ids and no content hashes: name the images that the ids belong to, with --recipe recipe.yaml"
        )
    return [known.get(name) for name in foreign.ids]


def _first_of_each(content: Sequence[str | None]) -> tuple[npt.NDArray[np.int64], int]:
    """Rows with a content hash in the order of the hashes, each once; and how many were copies."""
    first: dict[str, int] = {}
    copies = 0
    for row, value in enumerate(content):
        if value is not None:
            copies += value in first
            first.setdefault(value, row)
    return np.array([first[value] for value in sorted(first)], np.int64), copies


def _with_table(features: npt.NDArray[Any], table: pd.DataFrame, source: Path, id_key: str | None) -> Foreign:
    name = id_key or "id"
    if name not in table:
        raise ForeignFeatures(
            f"the table of ids beside {source} has no column {name!r}; it has {', '.join(table.columns)}"
        )
    return _checked(source, table[name].astype(str).tolist(), features, table.get("content"))


def _id_table(source: Path, ids: Path | None) -> pd.DataFrame:
    file = ids or source.with_suffix(".rows.csv")
    if not file.is_file():
        raise ForeignFeatures(
            f"{source} holds features and no ids: give a table with one row per row, as in --ids rows.csv (column id)"
        )
    suffix = file.suffix.lower()
    if suffix in (".parquet", ".pq"):
        return pd.read_parquet(file)
    if suffix == ".npy":
        return pd.DataFrame({"id": np.load(file, allow_pickle=False).astype(str)})
    if suffix == ".txt":
        return pd.DataFrame({"id": file.read_text(encoding="utf-8").splitlines()})
    return pd.read_csv(file, dtype={"id": str, "content": str})


def _numpy(source: Path, key: str | None) -> npt.NDArray[Any]:
    if source.suffix.lower() == ".npy":
        array: npt.NDArray[Any] = np.load(source, mmap_mode="r", allow_pickle=False)
        return array
    with np.load(source, allow_pickle=False) as archive:
        names = [key] if key else [name for name in archive.files if archive[name].ndim in (2, 4)]
        if len(names) != 1 or names[0] not in archive.files:
            raise ForeignFeatures(f"{source}: name the array of features with --key; it has {', '.join(archive.files)}")
        return np.asarray(archive[names[0]])


def _table(source: Path, ids: Path | None, key: str | None, id_key: str | None) -> Foreign:
    name = id_key or "id"
    frame = pd.read_csv(source, dtype={name: str}) if source.suffix.lower() == ".csv" else pd.read_parquet(source)
    columns = [str(column) for column in frame.columns]
    if ids is None and name not in columns:
        raise ForeignFeatures(f"{source} has no column {name!r} of ids (--id-key); it has {', '.join(columns[:12])}")
    lists = [column for column in columns if len(frame) and isinstance(frame[column].iloc[0], np.ndarray | list)]
    chosen = key or (lists[0] if len(lists) == 1 else None)
    if chosen is not None:
        if chosen not in columns:
            raise ForeignFeatures(f"{source} has no column {chosen!r} (--key); it has {', '.join(columns[:12])}")
        features = np.stack([np.asarray(value, np.float32) for value in frame[chosen]])
        shape = _exported_shape(source)
        features = features.reshape(len(frame), *shape) if shape else features
    else:
        numbers = [
            column for column in columns if column not in (name, "content") and frame[column].dtype.kind in "fiub"
        ]
        if lists or not numbers:
            raise ForeignFeatures(f"{source}: name the column of features with --key; it has {', '.join(columns[:12])}")
        features = frame[numbers].to_numpy(np.float32)
    if ids is not None:
        return _with_table(features, _id_table(source, ids), source, id_key)
    return _checked(source, frame[name].astype(str).tolist(), features, frame.get("content"))


def _exported_shape(source: Path) -> tuple[int, ...] | None:
    """Of one row, in a file that `export_parquet` wrote; Parquet lists are flat."""
    if source.suffix.lower() == ".csv":
        return None
    import pyarrow.parquet as pq

    text = (pq.read_schema(source).metadata or {}).get(b"headrace")
    return FeatureSpec.from_json(text.decode()).shape if text else None


def _hdf5(source: Path, ids: Path | None, key: str | None, id_key: str | None) -> Foreign:
    with h5py.File(source, "r") as file:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        listed = ", ".join(f"{name} {item.shape}" for name, item in found.items()) or "no data sets"
        numbers = [name for name, item in found.items() if item.ndim in (2, 4) and item.dtype.kind == "f"]
        chosen = key or (numbers[0] if len(numbers) == 1 else None)
        if chosen not in found:
            raise ForeignFeatures(f"{source}: name the data set of features with --key; it has {listed}")
        features = np.asarray(found[chosen][()])
        if ids is not None:
            return _with_table(features, _id_table(source, ids), source, None)
        texts = [name for name, item in found.items() if item.ndim == 1 and item.dtype.kind in _TEXT_KINDS]
        named = id_key or ("id" if "id" in texts else texts[0] if len(texts) == 1 else None)
        if named not in found:
            raise ForeignFeatures(
                f"{source}: name the data set of ids with --id-key, or a table with --ids; it has {listed}"
            )
        content = found["content"][()] if "content" in texts else None
        return _checked(
            source, _texts(found[named][()]), features, None if content is None else pd.Series(_texts(content))
        )


def _texts(values: npt.NDArray[Any]) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]


def _checked(source: Path, ids: list[str], features: npt.NDArray[Any], content: pd.Series | None) -> Foreign:
    if len(ids) != len(features):
        raise ForeignFeatures(
            f"{source}: {len(features):,} rows of features and {len(ids):,} ids; expected one for each"
        )
    if not ids:
        raise ForeignFeatures(f"{source}: there are no rows")
    twice = pd.Series(ids).duplicated()
    if twice.any():
        raise ForeignFeatures(
            f"{source}: {int(twice.sum()):,} ids occur more than once, first {ids[int(twice.argmax())]!r}"
        )
    hashes = None if content is None else content.astype(str).tolist()
    if hashes is not None and not all(len(value) == 32 for value in hashes):
        hashes = None  # some other column of this name
    return Foreign(ids, features, hashes)
