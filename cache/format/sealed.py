"""A digest that a file carries in itself, whatever its format: JSON, safetensors or .npz.

The writer leaves UNSEALED as a text somewhere in the file; `seal` puts in its place the XXH3-128 of
all bytes as they were before. So no bit of the file can change unseen, but one of the mark itself,
which no number depends on: a file without the mark is taken for one of an earlier version.
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
SEAL = "seal"  # the key of a JSON object, or of a file's metadata, that holds it

_DIGEST = re.compile(re.escape(_MARK.encode()) + rb"([0-9a-f]{32})")


class SealBroken(ValueError):
    """The bytes are not the ones that were sealed."""


def seal(data: bytes) -> bytes:
    """The file with its digest in the place of UNSEALED, which must be in it."""
    place = data.index(UNSEALED.encode()) + len(_MARK)
    return b"".join((data[:place], xxhash.xxh3_128_hexdigest(data).encode(), data[place + 32 :]))


def check_seal(data: bytes) -> None:
    """Raise SealBroken unless the bytes are those that `seal` returned, or have no seal."""
    found = _DIGEST.search(data)
    if found is None:
        if _MARK.encode() in data:
            raise SealBroken("the digest that it carries is no digest")
        return
    hasher, view = xxhash.xxh3_128(), memoryview(data)
    for part in (view[: found.start(1)], b"0" * 32, view[found.end(1) :]):
        hasher.update(part)
    if hasher.hexdigest() != found[1].decode():
        raise SealBroken(
            f"its bytes have the digest {hasher.hexdigest()}, when it was written it was "
            f"{found[1].decode()}"
        )


def tensor_metadata(data: bytes) -> dict[str, str]:
    """The texts that a safetensors file of these bytes carries.

    Raises ValueError, KeyError for what is no such file.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])


def is_sealed_file(path: Path) -> bool:
    """Whether a safetensors file is there and as it was written; one of an earlier version, without
    a seal, if it has its size.
    """
    try:
        data = path.read_bytes()
        check_seal(data)
        tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        ends = [
            tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"
        ]
        return 8 + int.from_bytes(data[:8], "little") + max(ends, default=0) == len(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LookupError):
        return False


def sealed_json(
    values: Mapping[str, Any],
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> bytes:
    """The object as JSON, with its seal as the last key. default: as `json.dumps` takes it."""
    return seal(json.dumps({**values, SEAL: UNSEALED}, indent=indent, default=default).encode())


def read_sealed_json(data: bytes | str) -> dict[str, Any]:
    """Inverse of `sealed_json`; an object of an earlier version has no seal.

    Raises SealBroken, also for no JSON object.
    """
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    check_seal(data)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8
        raise SealBroken(f"it is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise SealBroken(f"it holds a {type(values).__name__}, expected an object")
    values.pop(SEAL, None)
    return values


def sealed_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The arrays as an uncompressed .npz without pickles, with its seal as the comment of the zip
    file.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = UNSEALED.encode()
    return seal(buffer.getvalue())


def read_sealed_arrays(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Inverse of `sealed_arrays`; a file of an earlier version has no seal.

    Raises SealBroken, also for no .npz.
    """
    check_seal(data)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (
        Exception
    ) as error:  # NumPy and zipfile raise anything for bytes that are no archive of arrays
        raise SealBroken(f"it is no .npz ({type(error).__name__}: {error})") from error
