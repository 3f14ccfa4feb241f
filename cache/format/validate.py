"""Validation of an untrusted shard: all objects are exactly as in FORMAT.md, or nothing is read.

An HDF5 file can point to other files (external links, external storage, virtual data sets), name
filters that load code, and declare terabytes that do not exist. All of that is refused from the
metadata alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from headrace.cache.errors import ShardCorrupt
from headrace.cache.format.encoding import NUMPY_DTYPES, QuantizationError
from headrace.cache.format.shard import BITSHUFFLE_LZ4, FORMAT, USER_BLOCK_BYTES, VERSION
from headrace.cache.spec import FeatureSpec

_ADVICE = (
    "Nothing was read from it. `headrace cache repair` removes it, and the next run extracts its "
    "samples again"
)
# LZ4 cannot shrink data more than this, so a larger declared size is wrong.
_LZ4_RATIO = 255
_MAX_ATTRIBUTE_BYTES = 1 << 20  # bytes of a text in the metadata; a larger one is not ours


@dataclass(frozen=True)
class ShardLayout:
    """Places of a shard's data sets in its file."""

    n_rows: int
    n_failed: int
    is_compressed: bool
    features_start: int  # byte offset in the file; 0 if compressed, or without rows
    # {name of another data set: (byte offset in the file, 0 if empty; number of items; dtype)}
    lists: dict[str, tuple[int, int, str]]


def validate_shard(
    shard_path: Path, spec: FeatureSpec, unit_name: str
) -> tuple[ShardLayout, QuantizationError]:
    """Validate a shard of `spec` named `unit_name`, and return its layout and quantization error.

    Raises ShardCorrupt at the first deviation from the format.
    """
    # Through a Python file. By name HDF5 would lock the shard, which fails on some cluster file
    # systems and is not needed for a file that never changes; and it would refuse a shard that
    # other code of this process has opened with other settings.
    with shard_path.open("rb") as shard_file:
        try:
            with h5py.File(shard_file, "r") as hdf5_file:
                return _validate_objects(
                    hdf5_file, os.fstat(shard_file.fileno()).st_size, spec, unit_name
                )
        except ShardCorrupt as error:
            raise ShardCorrupt(f"{shard_path}: {error}. {_ADVICE}") from None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            # The HDF5 library answers a broken file with any of these.
            raise ShardCorrupt(
                f"{shard_path}: the HDF5 library cannot read it ({error}). {_ADVICE}"
            ) from error


def _open_data_sets(hdf5_file: h5py.File, spec: FeatureSpec, unit_name: str) -> dict[str, Any]:
    """Return the data sets by name, after checking the root's attributes and list of objects."""
    if hdf5_file.userblock_size != USER_BLOCK_BYTES:
        raise ShardCorrupt(
            f"its user block has {hdf5_file.userblock_size} bytes, expected {USER_BLOCK_BYTES}"
        )
    _require_equal("format", _text_attribute(hdf5_file, "format"), FORMAT)
    _require_equal("version", _number_attribute(hdf5_file, "version"), VERSION)
    _require_equal("unit", _text_attribute(hdf5_file, "unit"), unit_name)
    _require_equal("fingerprint", _text_attribute(hdf5_file, "fingerprint"), spec.fingerprint)
    expected_names = {"features", "content", "id", "failed_id", "failed_content", "failed_reason"}
    if spec.dtype == "uint8":
        expected_names |= {"scale", "offset"}
    n_objects = hdf5_file.id.get_num_objs()
    # 16 names at most, because a forged file may declare any number of objects.
    object_names = {
        hdf5_file.id.get_objname_by_idx(index).decode() for index in range(min(n_objects, 16))
    }
    if n_objects > 16 or object_names != expected_names:
        raise ShardCorrupt(
            f"it holds {n_objects} objects, {sorted(object_names)}; expected exactly "
            f"{sorted(expected_names)}"
        )
    return {name: _open_data_set(hdf5_file, name) for name in expected_names}


def _validate_objects(
    hdf5_file: h5py.File, file_bytes: int, spec: FeatureSpec, unit_name: str
) -> tuple[ShardLayout, QuantizationError]:
    data_sets = _open_data_sets(hdf5_file, spec, unit_name)
    features = data_sets["features"]
    n_rows, n_failed = _count_rows(data_sets["content"]), _count_rows(data_sets["failed_content"])
    is_contiguous = features.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    if is_contiguous:
        features_start = _contiguous_start(
            features, "features", (n_rows, *spec.shape), NUMPY_DTYPES[spec.dtype], file_bytes
        )
    else:
        _validate_compressed(features, (n_rows, *spec.shape), NUMPY_DTYPES[spec.dtype], file_bytes)
        features_start = 0

    def place(name: str, n_items: int, dtype: str) -> tuple[int, int, str]:
        start = _contiguous_start(data_sets[name], name, (n_items,), np.dtype(dtype), file_bytes)
        return start, n_items, dtype

    lists = {}
    for name in ("content", "id", "failed_id", "failed_content", "failed_reason"):
        text_bytes = 32 if name.endswith("content") else data_sets[name].get_type().get_size()
        n_texts = n_failed if name.startswith("failed_") else n_rows
        lists[name] = place(name, n_texts, f"S{text_bytes}")
    if spec.dtype == "uint8":
        lists |= {name: place(name, spec.shape[0], "<f4") for name in ("scale", "offset")}
    layout = ShardLayout(n_rows, n_failed, not is_contiguous, features_start, lists)
    data_set = h5py.Dataset(features)  # of h5py, whose attributes are read by name
    quantization_error = QuantizationError(
        float(_number_attribute(data_set, "round_off_largest")),
        float(_number_attribute(data_set, "round_off_squared_error")),
        float(_number_attribute(data_set, "round_off_squared")),
    )
    return layout, quantization_error


def _require_equal(attribute_name: str, stored_value: object, expected_value: object) -> None:
    if stored_value != expected_value:
        raise ShardCorrupt(f"its {attribute_name} is {stored_value!r}, expected {expected_value!r}")


def _open_data_set(hdf5_file: h5py.File, data_set_name: str) -> Any:
    # Links are looked at before they are followed: opening a soft or external one would open what
    # it points to.
    link_type = hdf5_file.id.links.get_info(data_set_name.encode()).type
    if link_type != h5py.h5l.TYPE_HARD:
        raise ShardCorrupt(
            f"{data_set_name!r} is a link to somewhere else, expected a data set of this file"
        )
    if h5py.h5o.get_info(hdf5_file.id, data_set_name.encode()).type != h5py.h5o.TYPE_DATASET:
        raise ShardCorrupt(f"{data_set_name!r} is not a data set")
    return h5py.h5d.open(hdf5_file.id, data_set_name.encode())


def _count_rows(data_set: Any) -> int:
    extent = data_set.get_space().get_simple_extent_dims()
    if len(extent) != 1:
        raise ShardCorrupt(f"a list of content hashes has {len(extent)} axes, expected 1")
    return int(extent[0])


def _contiguous_start(
    data_set: Any,
    data_set_name: str,
    expected_shape: tuple[int, ...],
    expected_dtype: np.dtype[Any],
    file_bytes: int,
) -> int:
    """Return a data set's offset in the file, 0 for an empty one; it must lie inside the file."""
    properties = data_set.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise ShardCorrupt(f"{data_set_name!r} is not stored contiguously")
    _validate_type(data_set, data_set_name, expected_shape, expected_dtype)
    if properties.get_external_count():
        raise ShardCorrupt(f"{data_set_name!r} is stored in other files")
    if properties.get_nfilters():
        raise ShardCorrupt(f"{data_set_name!r} passes through a filter")
    expected_bytes = int(np.prod(expected_shape, dtype=np.uint64)) * expected_dtype.itemsize
    if not expected_bytes:
        return 0
    stored_bytes, data_offset = data_set.get_storage_size(), data_set.get_offset()
    if stored_bytes != expected_bytes or data_offset is None:
        raise ShardCorrupt(
            f"{data_set_name!r} has {stored_bytes} stored bytes, expected {expected_bytes}"
        )
    if data_offset < USER_BLOCK_BYTES or data_offset + expected_bytes > file_bytes:
        raise ShardCorrupt(
            f"{data_set_name!r} lies at bytes {data_offset} to {data_offset + expected_bytes} of a "
            f"file of {file_bytes} (truncated, or forged)"
        )
    # The features are mapped as an array of their dtype, which must be aligned; texts may lie
    # anywhere.
    if data_set_name == "features" and data_offset % expected_dtype.itemsize:
        raise ShardCorrupt(
            f"{data_set_name!r} starts at byte {data_offset}, which is no multiple of its item size"
        )
    return int(data_offset)


def _validate_type(
    data_set: Any,
    data_set_name: str,
    expected_shape: tuple[int, ...],
    expected_dtype: np.dtype[Any],
) -> None:
    stored_shape = tuple(data_set.get_space().get_simple_extent_dims())
    if stored_shape != expected_shape:
        raise ShardCorrupt(f"{data_set_name!r} has shape {stored_shape}, expected {expected_shape}")
    stored_type = data_set.get_type()
    if stored_type.get_class() == h5py.h5t.STRING:
        is_fixed_length = (
            not stored_type.is_variable_str() and stored_type.get_strpad() == h5py.h5t.STR_NULLPAD
        )
        if (
            expected_dtype.kind != "S"
            or not is_fixed_length
            or stored_type.get_size() != expected_dtype.itemsize
        ):
            raise ShardCorrupt(
                f"{data_set_name!r} holds text of another kind, expected {expected_dtype}"
            )
    elif not stored_type.equal(h5py.h5t.py_create(expected_dtype)):
        raise ShardCorrupt(f"{data_set_name!r} has another type than the expected {expected_dtype}")


def _validate_compressed(
    data_set: Any, expected_shape: tuple[int, ...], expected_dtype: np.dtype[Any], file_bytes: int
) -> None:
    properties = data_set.get_create_plist()
    if properties.get_layout() != h5py.h5d.CHUNKED:
        raise ShardCorrupt(
            "'features' is virtual or compact, expected contiguous or chunked storage in this file"
        )
    _validate_type(data_set, "features", expected_shape, expected_dtype)
    filter_ids = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    if filter_ids != [BITSHUFFLE_LZ4]:
        raise ShardCorrupt(
            f"'features' passes through the filters {filter_ids}, expected only bitshuffle "
            f"({BITSHUFFLE_LZ4})"
        )
    declared_bytes = int(np.prod(expected_shape, dtype=np.uint64)) * expected_dtype.itemsize
    if declared_bytes > _LZ4_RATIO * file_bytes:
        raise ShardCorrupt(
            f"'features' declares {declared_bytes} bytes, which a file of {file_bytes} bytes "
            "cannot hold"
        )
    chunk_rows, *row_shape = properties.get_chunk()
    if tuple(row_shape) != expected_shape[1:]:
        raise ShardCorrupt(f"'features' has chunks of rows {row_shape}, expected whole rows")
    expected_chunks = -(-expected_shape[0] // chunk_rows)
    # HDF5 reads a chunk that is not stored as zeros, without an error.
    if data_set.get_num_chunks() != expected_chunks:
        raise ShardCorrupt(
            f"'features' has {data_set.get_num_chunks()} stored chunks, expected {expected_chunks}"
        )


def _open_attribute(parent: h5py.HLObject, attribute_name: str) -> Any:
    attribute = h5py.h5a.open(parent.id, attribute_name.encode())
    if attribute.get_storage_size() > _MAX_ATTRIBUTE_BYTES:
        raise ShardCorrupt(f"attribute {attribute_name!r} has {attribute.get_storage_size()} bytes")
    return attribute


def _text_attribute(parent: h5py.HLObject, attribute_name: str) -> str:
    stored_type = _open_attribute(parent, attribute_name).get_type()
    if stored_type.get_class() != h5py.h5t.STRING or stored_type.is_variable_str():
        raise ShardCorrupt(f"attribute {attribute_name!r} is not fixed-length text")
    value = parent.attrs[attribute_name]
    return value.decode() if isinstance(value, bytes) else str(value)


def _number_attribute(parent: h5py.HLObject, attribute_name: str) -> Any:
    stored_type = _open_attribute(parent, attribute_name).get_type()
    if stored_type.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        raise ShardCorrupt(f"attribute {attribute_name!r} is not a number")
    return parent.attrs[attribute_name]
