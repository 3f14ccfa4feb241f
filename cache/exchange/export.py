"""Export of a feature set for other programs: `.npy`, Parquet, Zarr.

A file is written under a temporary name and then renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cache.atomic_io import publish_bytes, temporary_name
from headrace.cache.errors import CacheError, HeadraceError
from headrace.cache.feature_set import FeatureSet
from headrace.cache.ids import content_hashes_by_id
from headrace.cache.integrity.garbage import remove_temporaries

# Rows of a selection that are read and written together, so that not all are in memory.
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class RowSelection:
    """Rows of a feature set in the order of a list of images, with the ids of that list.

    Copies of an image share a row, which then occurs twice.
    """

    rows: npt.NDArray[np.int64]  # (n,) positions
    ids: list[str]  # n
    missing: list[str]  # ids of images that have no row


def select_rows(
    feature_set: FeatureSet, sample_ids: Sequence[str], content_hashes: Sequence[str | None]
) -> RowSelection:
    """Select the rows of images by content hash, under the ids that the images have now.

    sample_ids: n ids.
    content_hashes: n, None for an image that cannot be read.
    """
    hash_array = np.array([content_hash or "" for content_hash in content_hashes], "S32")
    row_positions = feature_set.locate(hash_array) if len(hash_array) else np.zeros(0, np.int64)
    has_row = row_positions >= 0
    return RowSelection(
        row_positions[has_row],
        list(compress(sample_ids, has_row)),
        list(compress(sample_ids, ~has_row)),
    )


def find_ambiguous_ids(feature_set: FeatureSet) -> list[str]:
    """Return the ids under which a feature set has several images (several content hashes)."""
    hashes_of_id = content_hashes_by_id(feature_set.ids(), feature_set.content_hashes())
    return [sample_id for sample_id, hashes in hashes_of_id.items() if len(hashes) > 1]


def export_npy(
    feature_set: FeatureSet, target_path: Path, selection: RowSelection | None = None
) -> list[Path]:
    """Write features (N, *shape) in `FeatureSet.dtype` to `target_path`, and a table beside it.

    The table `<stem>.rows.csv` has the columns row, id and content. Rows follow `selection`, by
    default all of them. Return the files written. Raises CacheError, and writes neither, when the
    array exists, or another table.
    """
    rows_path = target_path.with_suffix(".rows.csv")
    _refuse_existing(target_path)
    sample_ids, content_hashes = _ids_and_content(feature_set, selection)
    id_fields = map(_csv_field, sample_ids)
    csv_lines = [
        f"{row},{id_field},{content_hash}\n"
        for row, (id_field, content_hash) in enumerate(zip(id_fields, content_hashes, strict=True))
    ]
    rows_text = "".join(["row,id,content\n", *csv_lines]).encode()
    # The table before the array: a call that is killed in between can be repeated, because it finds
    # the very same table.
    target_path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(rows_path)
    is_new_table = publish_bytes(rows_path, rows_text)
    if not is_new_table and rows_path.read_bytes() != rows_text:
        _refuse_existing(rows_path)

    def write(temporary_path: Path) -> None:
        array_file = np.lib.format.open_memmap(
            temporary_path, "w+", feature_set.dtype, (len(sample_ids), *feature_set.spec.shape)
        )
        for start_row, stop_row, feature_rows in _row_chunks(feature_set, selection):
            array_file[start_row:stop_row] = feature_rows
        array_file.flush()

    try:
        _write_then_rename(target_path, write)
    except BaseException:
        # An array that is not there must not leave the table of its rows behind.
        if is_new_table:
            rows_path.unlink(missing_ok=True)
        raise
    return [target_path, rows_path]


def export_parquet(
    feature_set: FeatureSet, target_path: Path, selection: RowSelection | None = None
) -> list[Path]:
    """Write one Parquet file with id, content and `features` as lists of one length.

    The shape of a row and the spec are in the file's metadata under `headrace`. Rows follow
    `selection`, by default all of them. Raises CacheError when the file exists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_existing(target_path)
    values_per_row = int(np.prod(feature_set.spec.shape))
    value_type = pa.float16() if feature_set.dtype == np.float16 else pa.float32()
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("content", pa.string()),
            ("features", pa.list_(value_type, values_per_row)),
        ],
        metadata={"headrace": feature_set.spec.to_json()},
    )
    sample_ids, content_hashes = _ids_and_content(feature_set, selection)

    def write(temporary_path: Path) -> None:
        with pq.ParquetWriter(temporary_path, schema) as writer:
            for start_row, stop_row, feature_rows in _row_chunks(feature_set, selection):
                flat_values = pa.array(feature_rows.reshape(-1), value_type)
                columns = [
                    pa.array(sample_ids[start_row:stop_row]),
                    pa.array(content_hashes[start_row:stop_row]),
                    pa.FixedSizeListArray.from_arrays(flat_values, values_per_row),
                ]
                row_group = pa.Table.from_arrays(columns, schema=schema)
                writer.write_table(row_group)

    _write_then_rename(target_path, write)
    return [target_path]


def export_zarr(
    feature_set: FeatureSet, target_path: Path, selection: RowSelection | None = None
) -> list[Path]:
    """Write a Zarr group with the arrays features (N, *shape), id and content; the spec is its
    attribute `headrace`.

    Rows follow `selection`, by default all of them. Raises CacheError when the group exists, and
    HeadraceError without the library zarr.
    """
    try:
        import zarr
    except ImportError as error:
        raise HeadraceError(
            "exporting to Zarr needs the library zarr, which is not installed: pip install "
            "'headrace[export]'"
        ) from error
    _refuse_existing(target_path)
    sample_ids, content_hashes = _ids_and_content(feature_set, selection)
    # As many rows as the largest shard has: rows are read in pieces as large as they were stored.
    chunk_rows = max([1, *(entry.rows for entry in feature_set.entries)])

    def write(temporary_path: Path) -> None:
        zarr_group = zarr.create_group(temporary_path)
        zarr_group.attrs["headrace"] = json.loads(feature_set.spec.to_json())
        zarr_array = zarr_group.create_array(
            "features",
            shape=(len(sample_ids), *feature_set.spec.shape),
            chunks=(chunk_rows, *feature_set.spec.shape),
            dtype=feature_set.dtype,
        )
        for start_row in range(0, len(sample_ids), chunk_rows):
            row_slice = slice(start_row, start_row + chunk_rows)
            zarr_array[row_slice] = (
                feature_set[row_slice]
                if selection is None
                else feature_set.read(selection.rows[row_slice], None)
            )
        # Text as bytes, because fixed-length text is outside the Zarr 3 specification.
        for array_name, encoded_texts in (
            ("id", [text.encode() for text in sample_ids]),
            ("content", [text.encode() for text in content_hashes]),
        ):
            text_bytes = max(map(len, encoded_texts), default=1)
            padded_bytes = b"".join(text.ljust(text_bytes, b"\0") for text in encoded_texts)
            shape = (len(encoded_texts), text_bytes)
            chunks = (max(1, len(encoded_texts)), text_bytes)
            zarr_array = zarr_group.create_array(
                array_name, shape=shape, chunks=chunks, dtype="uint8"
            )
            zarr_array.attrs["encoding"] = "UTF-8 bytes, one text per row, padded with zeros"
            if encoded_texts:
                zarr_array[:] = np.frombuffer(padded_bytes, np.uint8).reshape(shape)

    _write_then_rename(target_path, write)
    return [target_path]


EXPORTS: dict[str, Callable[[FeatureSet, Path, RowSelection | None], list[Path]]] = {
    "npy": export_npy,
    "parquet": export_parquet,
    "zarr": export_zarr,
}


def _ids_and_content(
    feature_set: FeatureSet, selection: RowSelection | None
) -> tuple[list[str], list[str]]:
    content_hashes = feature_set.content_hashes()
    if selection is None:
        return feature_set.ids(), content_hashes.astype("U32").tolist()
    return selection.ids, content_hashes[selection.rows].astype("U32").tolist()


def _row_chunks(
    feature_set: FeatureSet, selection: RowSelection | None
) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """Yield (start row, stop row, features): shard by shard, or in chunks of a selection."""
    if selection is None:
        for start_row, stop_row in _shard_row_ranges(feature_set):
            yield start_row, stop_row, feature_set[start_row:stop_row]
        return
    for start_row in range(0, len(selection.rows), _CHUNK_ROWS):
        stop_row = min(len(selection.rows), start_row + _CHUNK_ROWS)
        yield start_row, stop_row, feature_set.read(selection.rows[start_row:stop_row], None)


def _shard_row_ranges(feature_set: FeatureSet) -> list[tuple[int, int]]:
    """Return (start row, stop row) of each shard that has rows."""
    row_offsets = np.cumsum([0, *(entry.rows for entry in feature_set.entries)]).tolist()
    return [(start, stop) for start, stop in pairwise(row_offsets) if stop > start]


def _write_then_rename(target_path: Path, write_file: Callable[[Path], None]) -> None:
    target_path.parent.mkdir(parents=True, exist_ok=True)
    # Temporary files of killed exports, which may be as large as the whole feature set.
    remove_temporaries(target_path)
    temporary_path = temporary_name(target_path)
    try:
        write_file(temporary_path)
        os.rename(temporary_path, target_path)
    except BaseException:
        if temporary_path.is_dir():
            shutil.rmtree(temporary_path)
        else:
            temporary_path.unlink(missing_ok=True)
        raise


def _refuse_existing(target_path: Path) -> None:
    if target_path.exists():
        raise CacheError(f"{target_path} is there already; give another name, or remove it first")


def _csv_field(field_text: str) -> str:
    # Not the module csv, which leaves a carriage return unquoted where lines end with a newline.
    if not set(field_text) & set(',"\r\n'):
        return field_text
    quoted_text = field_text.replace('"', '""')
    return f'"{quoted_text}"'
