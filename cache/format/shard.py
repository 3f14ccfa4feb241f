"""Building a shard: its HDF5 file image in memory.

`FORMAT.md` describes the result; `validate.py` reads it back. n rows, m failures, C the first axis
of a row.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from headrace.cache.format.compression import require_hdf5plugin
from headrace.cache.format.encoding import EncodedRows
from headrace.cache.format.memory_file import nameless_file
from headrace.cache.spec import FeatureSpec

FORMAT = "headrace shard"
VERSION = 2

# The user block holds the digest of everything behind it.
USER_BLOCK_BYTES = 4096
_PAGE_BYTES = 4096
_ALIGNMENT_BYTES = 64  # a cache line

BITSHUFFLE_LZ4 = 32008  # registered number of the filter hdf5plugin.Bitshuffle
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
    """A sample without features: its image could not be decoded, or its features not computed."""

    id: str
    content_hash: str  # 32 hex digits
    reason: str


def build_shard(
    spec: FeatureSpec,
    unit: str,
    encoded: EncodedRows,
    sample_ids: Sequence[str],
    content_hashes: Sequence[str],
    failures: Sequence[FailedSample],
    compression: str | None,
) -> tuple[list[bytes | memoryview], str]:
    """Return the file as parts to be written one after the other, and its checksum.

    unit: name of the unit of work that made the rows. compression: "bitshuffle-lz4" or None.

    The bytes depend on nothing but the arguments and the HDF5 version. The features are a part of
    their own and never copied.
    """
    stored_rows = np.ascontiguousarray(encoded.stored)
    # Features of a page or more start on a page, which makes reading them faster (mapping.py).
    on_a_page = stored_rows.nbytes >= _PAGE_BYTES
    alignment = {
        "alignment_threshold": _PAGE_BYTES if on_a_page else 1,
        "alignment_interval": _PAGE_BYTES if on_a_page else _ALIGNMENT_BYTES,
    }
    # No time, host or path goes into the file: the same rows give the same bytes, so an interrupted
    # and an uninterrupted extraction are equal, and two writers of a unit make the same shard.
    with os.fdopen(nameless_file(), "r+b") as memory_file:
        with h5py.File(memory_file, "w", libver="earliest", **alignment) as hdf5_file:
            hdf5_file.attrs["format"] = _fixed_text(FORMAT)
            hdf5_file.attrs["fingerprint"] = _fixed_text(spec.fingerprint)
            hdf5_file.attrs["unit"] = _fixed_text(unit)
            hdf5_file.attrs["version"] = np.int64(VERSION)
            hdf5_file.attrs["spec"] = _fixed_text(spec.to_json())
            # The features come last, so that nothing but headers can follow them in the file.
            _write_array(
                hdf5_file, "content", np.frombuffer("".join(content_hashes).encode(), "S32")
            )
            _write_texts(hdf5_file, "id", sample_ids)
            _write_texts(hdf5_file, "failed_id", [failure.id for failure in failures])
            _write_array(
                hdf5_file,
                "failed_content",
                np.array([failure.content_hash.encode() for failure in failures], "S32"),
            )
            _write_texts(hdf5_file, "failed_reason", [failure.reason for failure in failures])
            data_set = _create_features(hdf5_file, spec, encoded, stored_rows, compression)
            features_start = data_set.id.get_offset()
        if compression is not None or not stored_rows.nbytes:
            memory_file.seek(0)
            body_parts: list[bytes | memoryview] = [memory_file.read()]
        else:
            # HDF5 never writes the range of the features, which takes no memory here: their bytes
            # go from the caller's array to the disk without a copy.
            memory_file.seek(0)
            before_features = memory_file.read(features_start)
            memory_file.seek(features_start + stored_rows.nbytes)
            rows_data = stored_rows.reshape(-1).view(np.uint8).data
            body_parts = [before_features, rows_data, memory_file.read()]
    checksum_state = xxhash.xxh3_128()
    for body_part in body_parts:
        checksum_state.update(body_part)
    return [user_block(checksum_state.hexdigest()), *body_parts], checksum_state.hexdigest()


def _create_features(
    hdf5_file: h5py.File,
    spec: FeatureSpec,
    encoded: EncodedRows,
    stored_rows: npt.NDArray[Any],
    compression: str | None,
) -> h5py.Dataset:
    """Create the data set of the features and its attributes; compressed, also write the rows."""
    if encoded.scale is not None and encoded.offset is not None:
        _write_array(hdf5_file, "scale", encoded.scale)
        _write_array(hdf5_file, "offset", encoded.offset)
    if compression is None:
        features = _create_contiguous(hdf5_file, "features", stored_rows.shape, stored_rows.dtype)
    else:
        features = _create_compressed(hdf5_file, stored_rows)
    axes = ", ".join(["sample", "channel", "y", "x"][: stored_rows.ndim])
    features.attrs["encoding"] = _fixed_text(ENCODINGS[spec.dtype])
    features.attrs["axes"] = _fixed_text(axes)
    features.attrs["units"] = _fixed_text("activation of the network, no physical unit")
    for field_name, value in dataclasses.asdict(encoded.quantization_error).items():
        features.attrs[f"round_off_{field_name}"] = np.float64(value)
    return features


def user_block(checksum: str) -> bytes:
    """Return a shard's first 4096 bytes, whose other bytes have this XXH3-128 (32 hex digits)."""
    header_text = (
        f"{FORMAT} {VERSION}\nxxh3_128 {checksum}\nof all bytes from {USER_BLOCK_BYTES} on; the "
        "rest is HDF5\n"
    )
    return header_text.encode().ljust(USER_BLOCK_BYTES - 1, b" ") + b"\n"


def _create_contiguous(
    parent: h5py.Group,
    data_set_name: str,
    data_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    values: npt.NDArray[Any] | None = None,
) -> h5py.Dataset:
    """Create a contiguous data set: storage reserved at once, not filled, no time stamps."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return parent.create_dataset(
        data_set_name, data_shape, dtype, values, dcpl=properties, fill_time="never"
    )


def _write_array(parent: h5py.Group, data_set_name: str, values: npt.NDArray[Any]) -> None:
    _create_contiguous(parent, data_set_name, values.shape, values.dtype, values)


def _write_texts(parent: h5py.Group, data_set_name: str, texts: Sequence[str]) -> None:
    encoded_texts = list(map(str.encode, texts))
    text_bytes = max(map(len, encoded_texts), default=1)
    text_dtype = h5py.string_dtype("utf-8", max(text_bytes, 1))
    _write_array(parent, data_set_name, np.array(encoded_texts, text_dtype))


def _fixed_text(text: str) -> npt.NDArray[Any]:
    """Return a text for an attribute, of fixed length: variable-length text lies in a heap, which
    `validate_shard` would have to follow.
    """
    data = text.encode()
    return np.array(data, h5py.string_dtype("utf-8", len(data)))


def _create_compressed(parent: h5py.Group, stored_rows: npt.NDArray[Any]) -> h5py.Dataset:
    hdf5plugin = require_hdf5plugin("this recipe stores compressed features")
    row_bytes = max(1, stored_rows[:1].nbytes)
    chunk_rows = max(1, min(len(stored_rows), _CHUNK_BYTES // row_bytes))
    return parent.create_dataset(
        "features",
        data=stored_rows,
        chunks=(chunk_rows, *stored_rows.shape[1:]) if len(stored_rows) else None,
        compression=hdf5plugin.Bitshuffle(cname="lz4") if len(stored_rows) else None,
        track_times=False,
    )
