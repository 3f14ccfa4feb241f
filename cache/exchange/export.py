"""A feature set as files for other programs:

`.npy`, Parquet, Zarr. Written under a temporary name, then renamed.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import PARTIAL_SUFFIX, publish_bytes
from headrace.cache.errors import CacheError, HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.cache.ids import content_hashes_by_id
from headrace.cache.integrity.garbage import remove_temporaries

_CHUNK_ROWS = 4096  # of a selection, read and written together


@dataclass(frozen=True)
class RowSelection:
    """Some rows of a feature set under the ids of those who ask, in their order; an image with
    copies may stand there twice.
    """

    rows: npt.NDArray[np.int64]  # (n,) positions
    ids: list[str]  # n
    missing: list[str]  # ids of images that have no row


def select_rows(
    features: FeatureSet, ids: Sequence[str], content: Sequence[str | None]
) -> RowSelection:
    """The rows of images by their content hashes (None: an image that cannot be read), with the ids
    that they have now.
    """
    hashes = np.array([value or "" for value in content], "S32")
    rows = features.locate(hashes) if len(hashes) else np.zeros(0, np.int64)
    found = rows >= 0
    return RowSelection(
        rows[found],
        [name for name, there in zip(ids, found.tolist(), strict=True) if there],
        [name for name, there in zip(ids, found.tolist(), strict=True) if not there],
    )


def find_ambiguous_ids(features: FeatureSet) -> list[str]:
    """The ids that stand for several images in a feature set; `content` tells these apart."""
    return [
        name
        for name, found in content_hashes_by_id(features.ids(), features.content_hashes()).items()
        if len(found) > 1
    ]


def export_npy(
    features: FeatureSet, target: Path, selection: RowSelection | None = None
) -> list[Path]:
    """`target`: features (N, *shape) as `FeatureSet.dtype`; beside it `<stem>.rows.csv`: row, id,
    content.

    selection: these rows, in their order; default: all. Returns the files written. Raises
    CacheError when one of them is there, and then writes nothing.
    """
    rows_file = target.with_suffix(".rows.csv")
    _refuse_existing(target)
    ids, content = _ids_and_content(features, selection)
    lines = [
        f"{row},{_csv(sample)},{value}\n"
        for row, (sample, value) in enumerate(zip(ids, content, strict=True))
    ]
    text = "".join(["row,id,content\n", *lines]).encode()
    # First, so that a call that is killed before the array is there can be repeated: it finds the
    # very same table.
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(rows_file)
    made = publish_bytes(rows_file, text)
    if not made and rows_file.read_bytes() != text:
        _refuse_existing(rows_file)

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(
            temporary, "w+", features.dtype, (len(ids), *features.spec.shape)
        )
        for start, stop, rows in _chunks(features, selection):
            array[start:stop] = rows
        array.flush()

    try:
        _write_then_rename(target, write)
    except BaseException:
        if made:
            rows_file.unlink(missing_ok=True)
        raise
    return [target, rows_file]


def export_parquet(
    features: FeatureSet, target: Path, selection: RowSelection | None = None
) -> list[Path]:
    """One Parquet file: id, content, and `features` as a fixed-size list, a row group per shard.

    The shape of a row and the spec are in the file's metadata under `headrace`. selection: these
    rows, in their order;
    default: all. Raises CacheError when the file is there.
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
    ids, content = _ids_and_content(features, selection)

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start, stop, rows in _chunks(features, selection):
                flat = pa.array(rows.reshape(-1), value_type)
                lists = pa.FixedSizeListArray.from_arrays(flat, values)
                table = pa.Table.from_arrays(
                    [pa.array(ids[start:stop]), pa.array(content[start:stop]), lists], schema=schema
                )
                writer.write_table(table, row_group_size=max(1, stop - start))

    _write_then_rename(target, write)
    return [target]


def export_zarr(
    features: FeatureSet, target: Path, selection: RowSelection | None = None
) -> list[Path]:
    """A Zarr group with the arrays features (N, *shape), id and content, and the spec as attribute
    `headrace`.

    selection: these rows, in their order; default: all. Raises CacheError when it is there;
    HeadraceError without the library zarr.
    """
    try:
        import zarr
    except ImportError as error:
        raise HeadraceError(
            "exporting to Zarr needs the library zarr, which is not installed: pip install "
            "'headrace[export]'"
        ) from error
    _refuse_existing(target)
    ids, content = _ids_and_content(features, selection)
    chunk_rows = max([stop - start for start, stop in _shard_runs(features)], default=1)

    def write(temporary: Path) -> None:
        group = zarr.create_group(temporary)
        group.attrs["headrace"] = json.loads(features.spec.to_json())
        array = group.create_array(
            "features",
            shape=(len(ids), *features.spec.shape),
            chunks=(chunk_rows, *features.spec.shape),
            dtype=features.dtype,
        )
        for start in range(0, len(ids), chunk_rows):
            rows = slice(start, start + chunk_rows)
            array[rows] = (
                features[rows] if selection is None else features.read(selection.rows[rows], None)
            )
        # As bytes: fixed-length text is outside the Zarr 3 specification.
        for name, texts in (
            ("id", [text.encode() for text in ids]),
            ("content", [text.encode() for text in content]),
        ):
            width = max((len(text) for text in texts), default=1)
            padded = b"".join(text.ljust(width, b"\0") for text in texts)
            table = np.frombuffer(padded, np.uint8).reshape(len(texts), width)
            array = group.create_array(
                name, shape=table.shape, chunks=(max(1, len(texts)), width), dtype="uint8"
            )
            array.attrs["encoding"] = "UTF-8 bytes, one text per row, padded with zeros"
            if len(texts):
                array[:] = table

    _write_then_rename(target, write)
    return [target]


EXPORTS: dict[str, Callable[[FeatureSet, Path, RowSelection | None], list[Path]]] = {
    "npy": export_npy,
    "parquet": export_parquet,
    "zarr": export_zarr,
}


def _ids_and_content(
    features: FeatureSet, selection: RowSelection | None
) -> tuple[list[str], list[str]]:
    content = features.content_hashes()
    if selection is None:
        return features.ids(), content.astype("U32").tolist()
    return selection.ids, content[selection.rows].astype("U32").tolist()


def _chunks(
    features: FeatureSet, selection: RowSelection | None
) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """First and past-the-end row of the file, and the features there: shard by shard, or some rows
    of a selection.
    """
    if selection is None:
        for start, stop in _shard_runs(features):
            yield start, stop, features[start:stop]
        return
    for start in range(0, len(selection.rows), _CHUNK_ROWS):
        stop = min(len(selection.rows), start + _CHUNK_ROWS)
        yield start, stop, features.read(selection.rows[start:stop], None)


def _shard_runs(features: FeatureSet) -> list[tuple[int, int]]:
    """First and past-the-end row of each shard that has rows."""
    ends = np.cumsum([0, *(entry.rows for entry in features.entries)]).tolist()
    return [(start, stop) for start, stop in pairwise(ends) if stop > start]


def _write_then_rename(target: Path, write: Callable[[Path], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(target)
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
