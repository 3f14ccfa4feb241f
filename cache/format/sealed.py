"""Sealed files: a file that contains its own checksum, in any format (JSON, safetensors, .npz).

The writer puts the text UNSEALED somewhere into the file; `seal` replaces its zeros by the XXH3-128
of all bytes as they were before. So no bit of the file can change unnoticed, except those of the
mark itself, on which no number depends: a file without the mark is taken for one of an earlier
version, which had none.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

_MARK = "headrace-seal:"
UNSEALED = f"{_MARK}{'0' * 32}"
SEAL = "seal"  # key of the seal in a JSON object or in a file's metadata

_DIGEST = re.compile(re.escape(_MARK.encode()) + rb"([0-9a-f]{32})")


class SealBroken(ValueError):
    """The bytes are not those that were sealed."""


def seal(data: bytes) -> bytes:
    """Return the file with its checksum in the place of UNSEALED, which it must contain."""
    digest_position = data.index(UNSEALED.encode()) + len(_MARK)
    return b"".join(
        (
            data[:digest_position],
            xxhash.xxh3_128_hexdigest(data).encode(),
            data[digest_position + 32 :],
        )
    )


def seal_safetensors(data: bytes) -> bytes:
    """Return a safetensors file with its checksum in its metadata, which must have one key."""
    # Not given to the writer, which shuffles its keys: equal files would differ from run to run.
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header["__metadata__"][SEAL] = UNSEALED
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return seal(b"".join((len(text).to_bytes(8, "little"), text, data[8 + header_bytes :])))


def check_seal(data: bytes) -> None:
    """Raise SealBroken unless the bytes are those that `seal` returned, or have no seal."""
    digest_match = _DIGEST.search(data)
    if digest_match is None:
        if _MARK.encode() in data:
            raise SealBroken("the digest that it carries is no digest")
        return
    hasher, view = xxhash.xxh3_128(), memoryview(data)
    for file_part in (view[: digest_match.start(1)], b"0" * 32, view[digest_match.end(1) :]):
        hasher.update(file_part)
    if hasher.hexdigest() != digest_match[1].decode():
        raise SealBroken(
            f"its bytes have the digest {hasher.hexdigest()}, when it was written it was "
            f"{digest_match[1].decode()}"
        )


def tensor_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata texts of a safetensors file.

    Raises ValueError or KeyError for other bytes.
    """
    return dict(_tensor_header(data)["__metadata__"])


def _tensor_header(data: bytes) -> dict[str, Any]:
    # A safetensors file begins with the size of its JSON header in bytes, a uint64.
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def is_sealed_file(file_path: Path) -> bool:
    """Return whether a safetensors file is intact: its seal is right, or an old one without a seal
    has as many bytes as its header says.
    """
    try:
        data = file_path.read_bytes()
        check_seal(data)
        tensor_ends = [
            tensor["data_offsets"][1]
            for name, tensor in _tensor_header(data).items()
            if name != "__metadata__"
        ]
        return 8 + int.from_bytes(data[:8], "little") + max(tensor_ends, default=0) == len(data)
    # ValueError includes SealBroken; the others are what a header that is no table of tensors
    # gives.
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def sealed_json(
    values: Mapping[str, Any],
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> bytes:
    """Return the object as JSON with its seal as the last key.

    default: as in `json.dumps`.
    """
    return seal(json.dumps({**values, SEAL: UNSEALED}, indent=indent, default=default).encode())


def read_sealed_json(data: bytes | str) -> dict[str, Any]:
    """Return the object that `sealed_json` wrote; one of an earlier version has no seal.

    Raises SealBroken, also for bytes that are not a JSON object.
    """
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    check_seal(data)
    try:
        values = json.loads(data)
    # ValueError: not JSON, or not UTF-8. RecursionError: brackets in many thousand levels.
    except (ValueError, RecursionError) as error:
        raise SealBroken(f"it is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise SealBroken(f"it holds a {type(values).__name__}, expected an object")
    values.pop(SEAL, None)
    return values


def sealed_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the arrays as an uncompressed .npz, its seal in the comment of the zip file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = UNSEALED.encode()
    return seal(buffer.getvalue())


def read_sealed_arrays(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `sealed_arrays` wrote; a file of an earlier version has no seal.

    Raises SealBroken, also for bytes that are not an .npz.
    """
    check_seal(data)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:
        # NumPy and zipfile raise anything for bytes that are no archive of arrays
        raise SealBroken(f"it is no .npz ({type(error).__name__}: {error})") from error
