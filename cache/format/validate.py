"""Looking at a shard without trusting it: every object must be exactly what FORMAT.md says, or
nothing is read.

HDF5 can point out of the file (external links, external storage, virtual data sets), run filters
that load code, and declare terabytes that are not there. All of that is refused from the metadata
alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from headrace.cache.errors import ShardCorrupt
from headrace.cache.format.encoding import STORED_DTYPES, QuantizationError
from headrace.cache.format.shard import BITSHUFFLE_LZ4, FORMAT, USER_BLOCK_BYTES, VERSION
from headrace.cache.spec import FeatureSpec

_ADVICE = (
    "Nothing was read from it. `headrace cache repair` removes it, and the next run extracts its "
    "samples again"
)
# LZ4 cannot shrink more than this, so a larger declared size is a lie.
_LZ4_RATIO = 255
_LARGEST_ATTRIBUTE = 1 << 20


@dataclass(frozen=True)
class ShardLayout:
    """Where things are in a shard: byte offsets from the start of the file, and widths of
    fixed-length strings.

    An offset is 0 where there is nothing to read (no rows, no failures) or nothing to map
    (compressed features).
    """

    rows: int
    failed: int
    compressed: bool
    features: int
    content: int
    id: int
    id_bytes: int
    failed_id: int
    failed_id_bytes: int
    failed_content: int
    failed_reason: int
    failed_reason_bytes: int
    scale: int = 0
    offset: int = 0


def validate_shard(
    path: Path, spec: FeatureSpec, unit: str
) -> tuple[ShardLayout, QuantizationError]:
    """The layout of a shard of `spec` named `unit`.

    Raises ShardCorrupt at the first thing that is not as it must.
    """
    # Through a Python file, not by name: HDF5 would lock it, which works on no cluster file system
    # and is not needed for what never changes, or would refuse it because somebody else in this
    # process has opened it otherwise.
    with path.open("rb") as bytes_of_it:
        try:
            with h5py.File(bytes_of_it, "r") as file:
                return _inspect(file, os.fstat(bytes_of_it.fileno()).st_size, spec, unit)
        except ShardCorrupt as error:
            raise ShardCorrupt(f"{path}: {error}. {_ADVICE}") from None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            # The HDF5 library answers a broken file with any of these.
            raise ShardCorrupt(
                f"{path}: the HDF5 library cannot read it ({error}). {_ADVICE}"
            ) from error


def _inspect(
    file: h5py.File, file_bytes: int, spec: FeatureSpec, unit: str
) -> tuple[ShardLayout, QuantizationError]:
    if file.userblock_size != USER_BLOCK_BYTES:
        raise ShardCorrupt(
            f"its user block has {file.userblock_size} bytes, expected {USER_BLOCK_BYTES}"
        )
    _expect("format", _text(file, "format"), FORMAT)
    _expect("version", _number(file, "version"), VERSION)
    _expect("unit", _text(file, "unit"), unit)
    _expect("fingerprint", _text(file, "fingerprint"), spec.fingerprint)
    names = {"features", "content", "id", "failed_id", "failed_content", "failed_reason"}
    if spec.dtype == "uint8":
        names |= {"scale", "offset"}
    count = file.id.get_num_objs()
    found = {file.id.get_objname_by_idx(index).decode() for index in range(min(count, 16))}
    if count > 16 or found != names:
        raise ShardCorrupt(
            f"it holds {count} objects, {sorted(found)}; expected exactly {sorted(names)}"
        )
    sets = {name: _open(file, name) for name in names}

    features = sets["features"]
    rows, failed = _rows(sets["content"]), _rows(sets["failed_content"])
    plain = features.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    if plain:
        features_at = _contiguous(
            features, "features", (rows, *spec.shape), STORED_DTYPES[spec.dtype], file_bytes
        )
    else:
        _check_compressed(features, (rows, *spec.shape), STORED_DTYPES[spec.dtype], file_bytes)
        features_at = 0

    def at(name: str, shape: tuple[int, ...], dtype: Any) -> int:
        return _contiguous(sets[name], name, shape, np.dtype(dtype), file_bytes)

    widths = {
        name: sets[name].get_type().get_size() for name in ("id", "failed_id", "failed_reason")
    }
    layout = ShardLayout(
        rows=rows,
        failed=failed,
        compressed=not plain,
        features=features_at,
        content=at("content", (rows,), "S32"),
        id=at("id", (rows,), f"S{widths['id']}"),
        id_bytes=widths["id"],
        failed_id=at("failed_id", (failed,), f"S{widths['failed_id']}"),
        failed_id_bytes=widths["failed_id"],
        failed_content=at("failed_content", (failed,), "S32"),
        failed_reason=at("failed_reason", (failed,), f"S{widths['failed_reason']}"),
        failed_reason_bytes=widths["failed_reason"],
        scale=at("scale", spec.shape[:1], "<f4") if spec.dtype == "uint8" else 0,
        offset=at("offset", spec.shape[:1], "<f4") if spec.dtype == "uint8" else 0,
    )
    attributes = h5py.Dataset(features)
    quantization_error = QuantizationError(
        float(_number(attributes, "round_off_largest")),
        float(_number(attributes, "round_off_squared_error")),
        float(_number(attributes, "round_off_squared")),
    )
    return layout, quantization_error


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ShardCorrupt(f"its {what} is {found!r}, expected {expected!r}")


def _open(file: h5py.File, name: str) -> Any:
    kind = file.id.links.get_info(name.encode()).type
    if kind != h5py.h5l.TYPE_HARD:
        raise ShardCorrupt(
            f"{name!r} is a link to somewhere else, expected a data set of this file"
        )
    if h5py.h5o.get_info(file.id, name.encode()).type != h5py.h5o.TYPE_DATASET:
        raise ShardCorrupt(f"{name!r} is not a data set")
    return h5py.h5d.open(file.id, name.encode())


def _rows(data_set: Any) -> int:
    extent = data_set.get_space().get_simple_extent_dims()
    if len(extent) != 1:
        raise ShardCorrupt(f"a list of content hashes has {len(extent)} axes, expected 1")
    return int(extent[0])


def _contiguous(
    data_set: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], file_bytes: int
) -> int:
    """Offset of the data in the file, 0 when there is none; every byte of it must be inside the
    file.
    """
    properties = data_set.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS:
        raise ShardCorrupt(f"{name!r} is not stored contiguously")
    _check_type(data_set, name, shape, dtype)
    if properties.get_external_count():
        raise ShardCorrupt(f"{name!r} is stored in other files")
    if properties.get_nfilters():
        raise ShardCorrupt(f"{name!r} passes through a filter")
    expected = int(np.prod(shape, dtype=np.uint64)) * dtype.itemsize
    if not expected:
        return 0
    stored, start = data_set.get_storage_size(), data_set.get_offset()
    if stored != expected or start is None:
        raise ShardCorrupt(f"{name!r} has {stored} stored bytes, expected {expected}")
    if start < USER_BLOCK_BYTES or start + expected > file_bytes:
        raise ShardCorrupt(
            f"{name!r} lies at bytes {start} to {start + expected} of a file of {file_bytes} "
            "(truncated, or forged)"
        )
    if start % min(dtype.itemsize, 8) and name == "features":
        raise ShardCorrupt(
            f"{name!r} starts at byte {start}, which is no multiple of its item size"
        )
    return int(start)


def _check_type(data_set: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    extent = data_set.get_space().get_simple_extent_dims()
    if tuple(extent) != shape:
        raise ShardCorrupt(f"{name!r} has shape {tuple(extent)}, expected {shape}")
    stored_type = data_set.get_type()
    if stored_type.get_class() == h5py.h5t.STRING:
        fixed = (
            not stored_type.is_variable_str() and stored_type.get_strpad() == h5py.h5t.STR_NULLPAD
        )
        if dtype.kind != "S" or not fixed or stored_type.get_size() != dtype.itemsize:
            raise ShardCorrupt(f"{name!r} holds text of another kind, expected {dtype}")
    elif not stored_type.equal(h5py.h5t.py_create(dtype)):
        raise ShardCorrupt(f"{name!r} has another type than the expected {dtype}")


def _check_compressed(
    data_set: Any, shape: tuple[int, ...], dtype: np.dtype[Any], file_bytes: int
) -> None:
    properties = data_set.get_create_plist()
    if properties.get_layout() != h5py.h5d.CHUNKED:
        raise ShardCorrupt(
            "'features' is virtual or compact, expected contiguous or chunked storage in this file"
        )
    _check_type(data_set, "features", shape, dtype)
    filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    if filters != [BITSHUFFLE_LZ4]:
        raise ShardCorrupt(
            f"'features' passes through the filters {filters}, expected only bitshuffle "
            f"({BITSHUFFLE_LZ4})"
        )
    declared = int(np.prod(shape, dtype=np.uint64)) * dtype.itemsize
    if declared > _LZ4_RATIO * file_bytes:
        raise ShardCorrupt(
            f"'features' declares {declared} bytes, which a file of {file_bytes} bytes cannot hold"
        )
    chunk = properties.get_chunk()
    expected = -(-shape[0] // chunk[0]) if tuple(chunk[1:]) == shape[1:] else -1
    if data_set.get_num_chunks() != expected:
        raise ShardCorrupt(
            f"'features' has {data_set.get_num_chunks()} stored chunks, expected {expected}"
        )


def _attribute(parent: h5py.HLObject, name: str) -> Any:
    attribute = h5py.h5a.open(parent.id, name.encode())
    if attribute.get_storage_size() > _LARGEST_ATTRIBUTE:
        raise ShardCorrupt(f"attribute {name!r} has {attribute.get_storage_size()} bytes")
    return attribute


def _text(parent: h5py.HLObject, name: str) -> str:
    stored_type = _attribute(parent, name).get_type()
    if stored_type.get_class() != h5py.h5t.STRING or stored_type.is_variable_str():
        raise ShardCorrupt(f"attribute {name!r} is not fixed-length text")
    return str(
        parent.attrs[name].decode() if isinstance(parent.attrs[name], bytes) else parent.attrs[name]
    )


def _number(parent: h5py.HLObject, name: str) -> Any:
    if _attribute(parent, name).get_type().get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        raise ShardCorrupt(f"attribute {name!r} is not a number")
    return parent.attrs[name]
