"""A shard as bytes: building its HDF5 image in memory.

`FORMAT.md` describes the result; `validate.py` reads it back.

n rows, m failures, C the first axis of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from headrace.cache.format.compression import require_hdf5plugin
from headrace.cache.format.encoding import EncodedRows
from headrace.cache.format.sparse_file import SparseFile
from headrace.cache.spec import FeatureSpec

FORMAT = "headrace shard"
VERSION = 1

# The user block holds the digest of everything behind it.
USER_BLOCK_BYTES = 4096
_PAGE = 4096
_ALIGNMENT = 64  # a cache line

BITSHUFFLE_LZ4 = 32008  # registered filter of hdf5plugin.Bitshuffle
# Small enough to decompress for one row, large enough for LZ4 to find repetitions.
_CHUNK_BYTES = 1 << 17

ENCODINGS = {
    "float16": "IEEE half precision",
    "float32": "IEEE single precision",
    "bfloat16": "upper 16 bits of an IEEE single: float32 = bits << 16",
    "uint8": "value = offset[c] + scale[c] * stored, c the first axis of a row",
}


@dataclass(frozen=True)
class FailedSample:
    """A sample without features: its image could not be decoded, or its features not be
    computed.
    """

    id: str
    content_hash: str  # 32 hex digits
    reason: str


def build_shard(
    spec: FeatureSpec,
    unit: str,
    encoded: EncodedRows,
    ids: Sequence[str],
    content: Sequence[str],
    failures: Sequence[FailedSample],
    compression: str | None,
) -> tuple[list[bytes | memoryview], str]:
    """The file as parts to be written one after the other, and the digest in it.

    Depends on nothing but the arguments (and the HDF5 version). The features are a part of their
    own, never copied.
    """
    stored = np.ascontiguousarray(encoded.stored)
    image = SparseFile()
    # Features of a page or more start on a page, which makes reading them faster (mapping.py).
    on_a_page = stored.nbytes >= _PAGE
    alignment = {
        "alignment_threshold": _PAGE if on_a_page else 1,
        "alignment_interval": _PAGE if on_a_page else _ALIGNMENT,
    }
    with h5py.File(image, "w", libver="earliest", **alignment) as file:
        for name, value in (("format", FORMAT), ("fingerprint", spec.fingerprint), ("unit", unit)):
            _set_text(file, name, value)
        _set_number(file, "version", np.int64(VERSION))
        _set_text(file, "spec", spec.to_json())
        # Everything else comes first: what follows the features in the file is then nothing.
        _write(file, "content", np.frombuffer("".join(content).encode(), "S32"))
        _write_text(file, "id", ids)
        _write_text(file, "failed_id", [failure.id for failure in failures])
        _write(
            file,
            "failed_content",
            np.array([failure.content_hash.encode() for failure in failures], "S32"),
        )
        _write_text(file, "failed_reason", [failure.reason for failure in failures])
        if encoded.scale is not None and encoded.offset is not None:
            _write(file, "scale", encoded.scale)
            _write(file, "offset", encoded.offset)
        if compression is None:
            features = _create(file, "features", stored.shape, h5py.h5t.py_create(stored.dtype))
        else:
            features = _compressed(file, stored)
        _set_text(features, "encoding", ENCODINGS[spec.dtype])
        _set_text(features, "axes", ", ".join(["sample", "channel", "y", "x"][: stored.ndim]))
        _set_text(features, "units", "activation of the network, no physical unit")
        _set_number(features, "round_off_largest", np.float64(encoded.quantization_error.largest))
        _set_number(
            features,
            "round_off_squared_error",
            np.float64(encoded.quantization_error.squared_error),
        )
        _set_number(features, "round_off_squared", np.float64(encoded.quantization_error.squared))
        start = features.id.get_offset() if compression is None and stored.nbytes else None
    if start is None:
        body: list[bytes | memoryview] = [image.content(0, image.size)]
    else:
        end = start + stored.nbytes
        body = [
            image.content(0, start),
            stored.reshape(-1).view(np.uint8).data,
            image.content(end, max(end, image.size)),
        ]
    digest = xxhash.xxh3_128()
    for part in body:
        digest.update(part)
    return [user_block(digest.hexdigest()), *body], digest.hexdigest()


def user_block(digest: str) -> bytes:
    """The first 4096 bytes of a shard whose remaining bytes have this XXH3-128 (32 hex digits)."""
    text = (
        f"{FORMAT} {VERSION}\nxxh3_128 {digest}\nof all bytes from {USER_BLOCK_BYTES} on; the rest "
        "is HDF5\n"
    )
    return text.encode().ljust(USER_BLOCK_BYTES - 1, b" ") + b"\n"


# What follows speaks to HDF5 itself: h5py's own attributes and assignments make the same bytes and
# take three times as long, which a shard of some megabytes feels.


def _create(parent: h5py.Group, name: str, shape: tuple[int, ...], type_id: Any) -> h5py.Dataset:
    """An empty contiguous data set: storage reserved at once, not filled, no time stamps."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(parent.id, name.encode(), type_id, space, properties))


def _write(parent: h5py.Group, name: str, values: npt.NDArray[Any]) -> None:
    type_id = h5py.h5t.py_create(values.dtype, logical=True)
    data_set = _create(parent, name, values.shape, type_id)
    if values.size:
        data_set.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values), type_id)


def _write_text(parent: h5py.Group, name: str, texts: Sequence[str]) -> None:
    encoded = list(map(str.encode, texts))
    width = max(map(len, encoded), default=1)
    _write(parent, name, np.array(encoded, h5py.string_dtype("utf-8", max(width, 1))))


def _set_text(target: h5py.HLObject, name: str, text: str) -> None:
    # Fixed length: variable-length strings live in a heap that the structure check would have to
    # follow.
    data = text.encode()
    _set(target, name, np.array(data, h5py.string_dtype("utf-8", len(data))))


def _set_number(target: h5py.HLObject, name: str, value: np.int64 | np.float64) -> None:
    _set(target, name, np.asarray(value))


def _set(target: h5py.HLObject, name: str, value: npt.NDArray[Any]) -> None:
    type_id = h5py.h5t.py_create(value.dtype, logical=True)
    h5py.h5a.create(target.id, name.encode(), type_id, h5py.h5s.create_simple(())).write(
        value, type_id
    )


def _compressed(parent: h5py.Group, stored: npt.NDArray[Any]) -> h5py.Dataset:
    hdf5plugin = require_hdf5plugin("this recipe stores compressed features")
    row_bytes = max(1, stored[:1].nbytes)
    rows = max(1, min(len(stored), _CHUNK_BYTES // row_bytes))
    return parent.create_dataset(
        "features",
        data=stored,
        chunks=(rows, *stored.shape[1:]) if len(stored) else None,
        compression=hdf5plugin.Bitshuffle(cname="lz4") if len(stored) else None,
        track_times=False,
    )
