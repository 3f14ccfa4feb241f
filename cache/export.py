"""A feature set as files for other programs: `.npy`, Parquet, Zarr. Written under a temporary name, then renamed."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from headrace.cache.errors import CacheError, ExtraMissing
from headrace.cache.feature_set import FeatureSet
from headrace.cache.files import PARTIAL_SUFFIX, publish_bytes


def export_npy(features: FeatureSet, target: Path) -> list[Path]:
    """`target`: features (N, *shape) as `FeatureSet.dtype`; beside it `<stem>.rows.csv`: row, id, content.

    Returns the files written. Raises CacheError when one of them is there, and then writes nothing.
    """
    rows_file = target.with_suffix(".rows.csv")
    for path in (target, rows_file):
        _refuse_existing(path)

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", features.dtype, features.shape)
        for start, stop in _shard_runs(features):
            array[start:stop] = features[start:stop]
        array.flush()

    _write_then_rename(target, write)
    content = [value.decode() for value in features.content().tolist()]
    lines = [
        f"{row},{_csv(sample)},{value}\n"
        for row, (sample, value) in enumerate(zip(features.ids(), content, strict=True))
    ]
    publish_bytes(rows_file, "".join(["row,id,content\n", *lines]).encode())
    return [target, rows_file]


def export_parquet(features: FeatureSet, target: Path) -> list[Path]:
    """One Parquet file: id, content, and `features` as a fixed-size list, a row group per shard.

    The shape of a row and the spec are in the file's metadata under `headrace`. Raises CacheError when it is there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_existing(target)
    values = int(np.prod(features.spec.shape))
    value_type = pa.float16() if features.dtype == np.float16 else pa.float32()
    schema = pa.schema(
        [("id", pa.string()), ("content", pa.string()), ("features", pa.list_(value_type, values))],
        metadata={"headrace": features.spec.to_json()},
    )
    ids, content = features.ids(), features.content().astype("U32").tolist()

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start, stop in _shard_runs(features):
                flat = pa.array(features[start:stop].reshape(-1), value_type)
                lists = pa.FixedSizeListArray.from_arrays(flat, values)
                table = pa.Table.from_arrays(
                    [pa.array(ids[start:stop]), pa.array(content[start:stop]), lists], schema=schema
                )
                writer.write_table(table, row_group_size=max(1, stop - start))

    _write_then_rename(target, write)
    return [target]


def export_zarr(features: FeatureSet, target: Path) -> list[Path]:
    """A Zarr group with the arrays features (N, *shape), id and content, and the spec as attribute `headrace`.

    Raises CacheError when it is there; ExtraMissing without the library zarr.
    """
    try:
        import zarr
    except ImportError as error:
        raise ExtraMissing(
            "exporting to Zarr needs the library zarr, which is not installed: pip install 'headrace[export]'"
        ) from error
    _refuse_existing(target)
    chunk_rows = max([stop - start for start, stop in _shard_runs(features)], default=1)

    def write(temporary: Path) -> None:
        group = zarr.create_group(temporary)
        group.attrs["headrace"] = json.loads(features.spec.to_json())
        array = group.create_array(
            "features", shape=features.shape, chunks=(chunk_rows, *features.spec.shape), dtype=features.dtype
        )
        for start in range(0, features.n_rows, chunk_rows):
            array[start : start + chunk_rows] = features[start : start + chunk_rows]
        # As bytes: fixed-length text is outside the Zarr 3 specification.
        for name, texts in (
            ("id", [text.encode() for text in features.ids()]),
            ("content", features.content().tolist()),
        ):
            width = max((len(text) for text in texts), default=1)
            padded = b"".join(text.ljust(width, b"\0") for text in texts)
            table = np.frombuffer(padded, np.uint8).reshape(len(texts), width)
            array = group.create_array(name, shape=table.shape, chunks=(max(1, len(texts)), width), dtype="uint8")
            array.attrs["encoding"] = "UTF-8 bytes, one text per row, padded with zeros"
            if len(texts):
                array[:] = table

    _write_then_rename(target, write)
    return [target]


EXPORTS: dict[str, Callable[[FeatureSet, Path], list[Path]]] = {
    "npy": export_npy,
    "parquet": export_parquet,
    "zarr": export_zarr,
}


def _shard_runs(features: FeatureSet) -> list[tuple[int, int]]:
    """First and past-the-end row of each shard that has rows."""
    ends = np.cumsum([0, *(entry.rows for entry in features.entries)]).tolist()
    return [(start, stop) for start, stop in pairwise(ends) if stop > start]


def _write_then_rename(target: Path, write: Callable[[Path], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        write(temporary)
        os.rename(temporary, target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise CacheError(f"{path} is there already; give another name, or remove it first")


def _csv(text: str) -> str:
    quoted = text.replace('"', '""')
    return f'"{quoted}"' if any(character in text for character in ',"\r\n') else text
