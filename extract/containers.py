"""Samples inside larger files: WebDataset tar shards, NumPy and HDF5 arrays, and idx files (the MNIST family)."""

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from headrace.extract.errors import SourceError
from headrace.extract.locate import open_array
from headrace.extract.samples import IMAGE_SUFFIXES, check_unique

_IMAGE_CHANNELS = (1, 3, 4)
_IDX_IMAGES = re.compile(r"(?P<prefix>.*)images[-.]idx\d(-ubyte)?(\.gz)?", re.IGNORECASE)
_KINDS = {".npy": "npy", ".npz": "npz", ".h5": "h5", ".hdf5": "h5", ".hdf": "h5"}


def list_tar(shards: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """One row per image in WebDataset shards: `id`, `path` (a locator), `label` and the scalars of a `.json` member.

    `shards` is an archive, a folder of them, a pattern (`train-*.tar`, `train-{000..031}.tar`) or a list of those.
    Members that share a name up to the first dot are one sample; `.cls` or `.txt` is its label. Only headers are read.
    Raises SourceError for compressed or damaged archives and when there are no images.
    """
    files = _expand([shards] if isinstance(shards, (str, Path)) else list(shards))
    rows = [row for file in files for row in _list_shard(file)]
    if not rows:
        raise SourceError(f"{len(files)} archives hold no images; expected members that end in {_suffixes()}")
    check_unique([row["id"] for row in rows], "the shards")
    frame = pd.DataFrame(rows)
    return frame if "label" in frame else frame.assign(label=None)


def list_array(
    images: str | Path, *, key: str | None = None, labels: str | Path | None = None, labels_key: str | None = None
) -> pd.DataFrame:
    """One row per image of an array: `id` (its index), `path` (a locator) and `label` where there are labels.

    `images` is a `.npy`, `.npz`, HDF5 or idx file (`.gz` or not) of shape (N, H, W), (N, H, W, C) or (N, C, H, W); or a
    folder of idx files named as MNIST's are, whose labels are found beside them and whose `split` is train or test.
    `key` names the array in a `.npz` or HDF5 file; it can be left out where only one has such a shape. `labels` is
    another file of one of these kinds, `labels_key` an array in it, or in the same file. Raises SourceError.
    """
    file = Path(images).expanduser().absolute()
    if file.is_dir():
        return _list_idx_family(file)
    kind = _kind(file)
    key = key if key is not None or kind not in ("npz", "h5") else _only_images(file, kind)
    array = _open(file, kind, key or "")
    if not _is_images(array.shape):
        raise SourceError(
            f"{file}: the array has shape {array.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1, 3 or 4 channels"
        )
    details = f"{key}:" if kind in ("npz", "h5") else ""
    count = len(array)
    width = len(str(count - 1))
    frame = pd.DataFrame(
        {
            "id": [f"{file.name}/{index:0{width}d}" for index in range(count)],
            "path": [f"{file}::{kind}:{details}{index}" for index in range(count)],
        }
    )
    return frame.assign(label=pd.Series(_labels(file, kind, labels, labels_key, count), dtype=object))


def idx_pairs(folder: Path) -> list[tuple[Path, Path | None]]:
    """The idx files of images in a folder, each with that of its labels: `train-images-idx3-ubyte.gz`, `train-labels-idx1-…`."""
    pairs = []
    for file in sorted(folder.iterdir()):
        match = _IDX_IMAGES.fullmatch(file.name)
        if match is not None and file.is_file():
            wanted = re.compile(rf"{re.escape(match['prefix'])}labels[-.]idx\d(-ubyte)?(\.gz)?", re.IGNORECASE)
            pairs.append(
                (file, next((other for other in sorted(folder.iterdir()) if wanted.fullmatch(other.name)), None))
            )
    return pairs


def array_labels(images: Path) -> tuple[str | None, Path | None, str | None]:
    """(key of the images, file of the labels, key of the labels) of an array file, as far as they go without saying.

    In a `.npz` or HDF5 file: the one array of images, and the one array in it that has a value per image; for an idx
    file: the file of labels beside it. Raises SourceError when several arrays could be images.
    """
    file = images.expanduser().absolute()
    kind = _kind(file)
    if kind == "idx":
        return None, dict(idx_pairs(file.parent)).get(file), None
    if kind == "npy":
        return None, None, None
    shapes = _shapes(file, kind)
    key = _only_images(file, kind)
    fitting = [name for name, shape in shapes.items() if shape in ((shapes[key][0],), (shapes[key][0], 1))]
    return key, None, fitting[0] if len(fitting) == 1 else None


def _list_idx_family(folder: Path) -> pd.DataFrame:
    pairs = idx_pairs(folder)
    if not pairs:
        raise SourceError(
            f"{folder}: a folder without idx files of images (…images-idx3-ubyte, .gz or not). "
            "Name an array: a .npy, .npz, HDF5 or idx file"
        )
    parts = [
        list_array(images, labels=labels).assign(split="train" if images.name.lower().startswith("train") else "test")
        for images, labels in pairs
    ]
    samples = pd.concat(parts, ignore_index=True)
    return samples if samples["split"].nunique() > 1 else samples.drop(columns="split")


def _labels(file: Path, kind: str, labels: str | Path | None, labels_key: str | None, count: int) -> list[str | None]:
    if labels is None and labels_key is None:
        return [None] * count
    source = Path(labels).expanduser().absolute() if labels is not None else file
    source_kind = _kind(source) if labels is not None else kind
    if source_kind in ("npz", "h5") and labels_key is None:
        raise SourceError(
            f"{source}: name the array of labels in it with labels_key; it has {_names(source, source_kind)}"
        )
    values = np.asarray(_open(source, source_kind, labels_key or "")[:])
    values = values.reshape(len(values), -1)
    if values.shape != (count, 1):
        raise SourceError(f"{source}: the labels have shape {values.shape} for {count} images; expected one for each")
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values[:, 0].tolist()]


def _open(file: Path, kind: str, key: str) -> Any:
    try:
        return open_array(str(file), kind, key)
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error


def _kind(file: Path) -> str:
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    suffix = file.suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if re.search(r"idx\d|\.idx", file.name):
        return "idx"
    raise SourceError(
        f"{file}: arrays end in .npy, .npz, .h5 or .hdf5, or are idx files (…-idx3-ubyte, .gz); found {suffix}"
    )


def _is_images(shape: tuple[int, ...]) -> bool:
    if len(shape) == 3:
        return True
    return len(shape) == 4 and (shape[3] in _IMAGE_CHANNELS or shape[1] in _IMAGE_CHANNELS)


def _only_images(file: Path, kind: str) -> str:
    shapes = _shapes(file, kind)
    fitting = [name for name, shape in shapes.items() if _is_images(shape)]
    if len(fitting) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no arrays"
        raise SourceError(f"{file}: {len(fitting)} arrays could be images; name one with key. It has: {listed}")
    return fitting[0]


def _names(file: Path, kind: str) -> str:
    return ", ".join(_shapes(file, kind))


def _shapes(file: Path, kind: str) -> dict[str, tuple[int, ...]]:
    try:
        if kind == "npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: _npz_shape(archive, name) for name in archive.files}
        found: dict[str, tuple[int, ...]] = {}
        with h5py.File(file, "r") as opened:
            opened.visititems(
                lambda name, item: found.update({name: item.shape} if isinstance(item, h5py.Dataset) else {})
            )
        return found
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read as {kind}: {error}") from error


def _npz_shape(archive: Any, name: str) -> tuple[int, ...]:
    with archive.zip.open(f"{name}.npy") as member:  # the header alone
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = read(member)[0]
        return shape


def _expand(shards: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for entry in shards:
        path = Path(entry).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        else:
            texts = _braces(str(path))
            found = [Path(match) for text in texts for match in (sorted(glob.glob(text)) or [text])]
        if not found:
            raise SourceError(f"{entry}: a folder without .tar files")
        files += found
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise SourceError(f"{missing[0]}: no such archive ({len(missing)} of {len(files)} are missing)")
    return [file.absolute() for file in files]


def _braces(text: str) -> list[str]:
    """ "a-{000..003}.tar" names four shards, as WebDataset writes them."""
    parts: list[list[str]] = []
    last = 0
    for match in re.finditer(r"\{(\d+)\.\.(\d+)\}", text):
        first, final = match[1], match[2]
        parts += [[text[last : match.start()]], [f"{n:0{len(first)}d}" for n in range(int(first), int(final) + 1)]]
        last = match.end()
    parts.append([text[last:]])
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _list_shard(file: Path) -> list[dict[str, Any]]:
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{extension.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                    sample.setdefault("id", f"{file.name}/{member.name}")
                    sample.setdefault("path", f"{file}::tar:{member.offset_data}:{member.size}:{member.name}")
                elif extension in ("cls", "txt", "json") and member.size < 2**20:
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular member
                    sample.update(_sidecar(extension, stream.read()))
    except tarfile.ReadError as error:
        raise SourceError(f"{file}: {_tar_problem(file, error)}") from error
    # The columns id and path come first, whatever order the members have
    return [{"id": row["id"], "path": row["path"], **row} for row in samples.values() if "path" in row]


def _sidecar(extension: str, data: bytes) -> dict[str, Any]:
    text = data.decode(errors="replace").strip()
    if extension != "json":
        return {"label": text}
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        name: value
        for name, value in values.items()
        if name not in ("id", "path", "content", "_content") and isinstance(value, (str, int, float, bool))
    }


def _tar_problem(file: Path, error: tarfile.ReadError) -> str:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic[:2] == b"\x1f\x8b" or magic[:3] == b"BZh" or magic == b"\xfd7zX" or magic == b"\x28\xb5\x2f\xfd":
        return "a compressed archive cannot be read at random. Unpack it first, for example: gunzip FILE.tar.gz"
    return f"not a whole tar archive ({error}). Fetch it again, or leave it out."


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
