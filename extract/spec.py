"""The description of a backbone, and everything that follows from it without building the network.

It does not import torch.
"""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from headrace.cache.file_stamps import file_stamp
from headrace.cache.home import expand_home
from headrace.extract.errors import BackboneError, missing_path_message, nearest_names
from headrace.extract.images.decoding import DecodeMode
from headrace.extract.images.opening import MAX_PIXELS
from headrace.extract.images.preprocessing import (
    MAX_BANDS,
    Interpolation,
    PixelDtype,
    PixelRanges,
    ResizeMode,
    check_bands,
    plain_pixel_range,
)

WeightsMatch = Literal["name", "order"]
WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".pth.tar")
PACKAGE_PREFIX = "pypi:"
PREFIXES = ("torchvision:", "timm:", "transformers:", "open_clip:", "onnx:", "python:")


@dataclass(frozen=True)
class BackboneSpec:
    """The description of a backbone. None means the value that belongs to the weights."""

    name: str  # "timm:tf_efficientnet_lite0", "torchvision:resnet50", "python:module:function"
    # None: the library's default tag; a tag; a file; "pypi:PACKAGE"; "random:SEED".
    weights: str | None = None
    # "order": the file has the network's tensors in the same order, under other names.
    weights_match: WeightsMatch = "name"
    image_size: int | None = None  # height and width of the input, pixels
    crop_fraction: float | None = None  # crop / resize: 1.0 keeps the borders
    mean: tuple[float, ...] | None = None  # of each channel; white is 1
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    # Whether the shorter edge or both are resized, or the longer one with a border.
    resize_mode: ResizeMode | None = None
    # (black, white) of images of more than 8 bits, in their own numbers, or a pair for each band;
    # None: by their depth or header.
    pixel_range: PixelRanges | None = None
    # Arguments with which the library builds the network, such as {"reg_tokens": 4}; a mapping is
    # converted to canonical JSON.
    model: Mapping[str, Any] | str | None = None
    # Count of class, register and distillation tokens before the patches; None: as declared.
    prefix_tokens: int | None = None
    # Text before the network's names in the weights file, "student."; None: found by the names.
    weights_prefix: str | None = None
    # Bands of the files, counted from 1, that are the channels of the network's input; its first
    # convolution is adapted to their number. None: grey or colours.
    bands: tuple[int, ...] | None = None
    pixel_dtype: PixelDtype | None = None  # float32: images of more than 8 bits keep their depth
    nodata: Literal["refuse", "mean"] | None = None  # for pixels without a value
    decode: DecodeMode | None = None  # scaled: large JPEGs from their low frequencies, much faster

    def __post_init__(self) -> None:
        """Raise BackboneError for arguments that are no JSON."""
        if self.model is not None:
            object.__setattr__(self, "model", _canonical_arguments(self.model, self.name))

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments with which the library builds the network."""
        return dict(json.loads(self.model)) if isinstance(self.model, str) else {}


def _canonical_arguments(arguments: object, name: str) -> str | None:
    """Return arguments as JSON with sorted keys, None if there are none. Raises BackboneError."""
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping) or not all(
            isinstance(key, str) and key.isidentifier() for key in arguments
        ):
            raise ValueError("no names with values")
        text = json.dumps(arguments, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if len(text) > _MAX_ARGUMENTS_LENGTH:
            raise ValueError(f"{len(text):,} characters")
    except (TypeError, ValueError, RecursionError) as error:
        raise BackboneError(
            f"{name}: model is {str(arguments)[:80]} ({str(error)[:100]}); expected arguments of "
            "plain values, such as model: {img_size: 224, reg_tokens: 4}"
        ) from error
    return text if arguments else None


def backbone_from_fields(fields: Mapping[str, Any]) -> BackboneSpec:
    """Return the spec with these fields, as `dataclasses.asdict` gives them or JSON stores them.

    Raises BackboneError for unknown fields, and for values that a field cannot have.
    """
    known_fields = {field.name for field in dataclasses.fields(BackboneSpec)}
    if not isinstance(fields, Mapping):
        raise BackboneError(
            f"the description of a backbone is {str(fields)[:60]}, expected an object"
        )
    if "name" not in fields or not set(fields) <= known_fields:
        unknown_fields = ", ".join(sorted(set(fields) - known_fields)) or "no name"
        raise BackboneError(
            "the description of a backbone has fields that this version does not know: "
            f"{unknown_fields[:200]}"
        )
    values: dict[str, Any] = {name: _as_tuples(value) for name, value in fields.items()}
    for name, value in values.items():
        if not (
            _VALID_FIELD[name](value) or (value is None and name not in ("name", "weights_match"))
        ):
            raise BackboneError(
                f"the description of a backbone says {name}: {str(value)[:60]}, which cannot be"
            )
    return BackboneSpec(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def check_sizes(value_name: str, *sizes: object) -> None:
    """Raise BackboneError unless each is (height, width) in pixels, within MAX_PIXELS.

    value_name: begins the message.
    """
    for size in sizes:
        if not (
            isinstance(size, tuple)
            and len(size) == 2
            and all(isinstance(edge, int) and edge > 0 for edge in size)
        ):
            raise BackboneError(f"{value_name}: {str(size)[:60]} is no height and width")
        if size[0] * size[1] > MAX_PIXELS:
            raise BackboneError(
                f"{value_name}: {size[0]} x {size[1]} pixels are more than the limit of "
                f"{MAX_PIXELS:,}"
            )


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_tuple_of_numbers(value: object) -> bool:
    return isinstance(value, tuple) and 0 < len(value) <= MAX_BANDS and all(map(_is_number, value))


def _is_pixel_range(value: object) -> bool:
    pairs = (
        value if isinstance(value, tuple) and value and isinstance(value[0], tuple) else (value,)
    )
    return all(_is_tuple_of_numbers(pair) and len(pair) == 2 for pair in pairs)


def _is_bands(value: object) -> bool:
    try:
        check_bands(value)
    except ValueError:
        return False
    return True


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER
    )


_MAX_NUMBER = 1e30  # within float32's range
_MAX_ARGUMENTS_LENGTH = 10_000  # characters of JSON
# {field: whether it may have a value}: descriptions come with model files of strangers too.
_VALID_FIELD: dict[str, Callable[[object], bool]] = {
    "name": lambda value: isinstance(value, str),
    "weights": lambda value: isinstance(value, str) and _can_be_a_path(value),
    "weights_match": lambda value: value in get_args(WeightsMatch),
    "image_size": lambda value: isinstance(value, int) and 0 < value < 1 << 20,
    "crop_fraction": _is_number,
    "mean": _is_tuple_of_numbers,
    "std": _is_tuple_of_numbers,
    "interpolation": lambda value: isinstance(value, str) and value in get_args(Interpolation),
    "resize_mode": lambda value: isinstance(value, str) and value in get_args(ResizeMode),
    "pixel_range": _is_pixel_range,
    "model": lambda value: isinstance(value, str | Mapping),
    "prefix_tokens": lambda value: type(value) is int and 0 <= value < 1 << 20,
    "weights_prefix": lambda value: isinstance(value, str),
    "bands": _is_bands,
    "pixel_dtype": lambda value: value in get_args(PixelDtype),
    "nodata": lambda value: value in ("refuse", "mean"),
    "decode": lambda value: value in get_args(DecodeMode),
}


@dataclass(frozen=True)
class Sample:
    """One image to extract."""

    id: str
    path: str
    content: str  # expected content hash; "" to accept any


def called_code(backbone: BackboneSpec) -> str | None:
    """Return the "module:function" that this backbone imports and calls; None for other backbones.

    Arguments follow as JSON after a blank, because they choose what the function reads and does:
    who allows the code must see them.
    """
    if not backbone.name.startswith("python:"):
        return None
    function_path = backbone.name.removeprefix("python:")
    return f"{function_path} {backbone.model}" if backbone.model else function_path


_NAMED_PATHS = ("onnx:", "transformers:", "timm:local-dir:", "open_clip:local-dir:")


def backbone_path(name: str) -> Path | None:
    """Return the file or folder in a backbone's name, as in `onnx:FILE` or `transformers:/FOLDER`.

    None for networks of a library or a hub.
    """
    for prefix in _NAMED_PATHS:
        rest = name.removeprefix(prefix)
        # Without one of these beginnings, `transformers:ORG/NAME` is a model of the hub.
        if rest != name and (prefix != "transformers:" or rest.startswith(("/", "./", "../", "~"))):
            return expand_home(rest)
    return None


def absolute_name(name: str, base: Path) -> str:
    """Return a backbone's name with its file or folder, if it has one, as an absolute path.

    base: folder of relative paths.
    """
    path = backbone_path(name)
    kind, _, rest = name.partition(":")
    if path is None and kind == "transformers" and (base / rest).is_dir():
        path = Path(rest)
    if path is None:
        return name
    prefix = next(prefix for prefix in _NAMED_PATHS if name.startswith(prefix))
    return f"{prefix}{(base / path).absolute()}"


def is_weights_file(weights: str) -> bool:
    """Return whether a backbone's `weights` means a file rather than a tag of the library."""
    return (
        weights.lower().endswith(WEIGHTS_SUFFIXES)
        or "/" in weights
        or weights.startswith(PACKAGE_PREFIX)
    )


def weights_path(weights: str) -> Path:
    """Return the file of `weights`: a path, or for "pypi:PACKAGE" the only weights file in an
    installed Python package.

    Raises BackboneError when the package is not installed, or has no weights file or several.
    """
    if not weights.startswith(PACKAGE_PREFIX):
        return expand_home(weights)
    package = weights.removeprefix(PACKAGE_PREFIX)
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"weights {weights}: the package is not installed. Try: pip install {package}"
        ) from None
    weights_files = [
        Path(str(file.locate())) for file in files if file.name.lower().endswith(WEIGHTS_SUFFIXES)
    ]
    if len(weights_files) != 1:
        raise BackboneError(
            f"weights {weights}: the package holds {len(weights_files)} weights files, expected 1; "
            "give a path"
        )
    return weights_files[0]


def with_absolute_weights(spec: BackboneSpec) -> BackboneSpec:
    """Return the backbone with its weights file, if it has one, as an absolute path."""
    if (
        spec.weights is None
        or not is_weights_file(spec.weights)
        or spec.weights.startswith((PACKAGE_PREFIX, "random:"))
    ):
        return spec
    return dataclasses.replace(spec, weights=str(weights_path(spec.weights).absolute()))


def check_spec(spec: BackboneSpec) -> None:
    """Raise BackboneError for an unknown prefix, a wrong range or seed, or an absent file.

    These are found without importing torch.
    """
    if not spec.name.startswith(PREFIXES):
        raise BackboneError(unknown_prefix_message(spec.name))
    try:
        if spec.bands is not None:
            check_bands(spec.bands)
        if spec.pixel_range is not None:
            plain_pixel_range(spec.pixel_range, spec.bands)
    except ValueError as error:
        raise BackboneError(f"{spec.name}: {error}") from None
    if (path := backbone_path(spec.name)) is not None and not path.exists():
        raise BackboneError(f"{spec.name}: {missing_path_message(path, 'a file or folder')}")
    if spec.weights is None:
        return
    if spec.weights.startswith("random:"):
        if not spec.weights.removeprefix("random:").isdecimal():
            raise BackboneError(
                f"{spec.name}: weights {spec.weights!r}: expected random:SEED with a whole number, "
                "random:0"
            )
    elif is_weights_file(spec.weights):
        require_weights_file(weights_path(spec.weights))


def require_weights_file(path: Path) -> None:
    """Raise BackboneError, naming the nearest files, unless the weights file exists."""
    if not path.is_file():
        if {"http:", "https:"} & set(path.parts):
            raise BackboneError(
                f"{path}: an address, and not a file. Download it, and name the file: weights: "
                f"{path.name}"
            )
        folder = path.absolute().parent
        near = "(no such folder)"
        if folder.is_dir():
            near = nearest_names(
                path.name, sorted(entry.name for entry in folder.iterdir() if entry.is_file())
            )
        raise BackboneError(f"{path}: no such weights file. Files there: {near}.")


def unknown_prefix_message(name: str) -> str:
    """Return the message for a backbone's name without a known prefix."""
    bare_name = name.split(":")[-1].removeprefix("//huggingface.co/").strip("/")
    if "/" in bare_name:  # ORG/NAME, or the address of a model of the Hugging Face hub
        advice = f"For a model of the Hugging Face hub: transformers:{bare_name[:80]}"
    else:
        advice = f"Search with: headrace backbones {bare_name[:12] or 'resnet'}"
    return (
        f"backbone {name!r}: expected torchvision:NAME, timm:NAME, transformers:ID_OR_FOLDER, "
        f"open_clip:NAME, onnx:FILE or python:MODULE:FUNCTION. {advice}"
    )


def weights_stamp(spec: BackboneSpec) -> tuple[int, ...] | None:
    """Return size, times and inode of every file from which the network is loaded, or None.

    They change when a file is replaced.
    """
    # Size and modification time are not enough: weights of one architecture have one size, and a
    # copy can keep the modification time.
    files = []
    if (
        spec.weights is not None
        and not spec.weights.startswith("random:")
        and is_weights_file(spec.weights)
    ):
        files.append(weights_path(spec.weights))
    if (path := backbone_path(spec.name)) is not None:
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        return tuple(number for file in files for number in file_stamp(file)) or None
    except OSError:
        return None  # the error comes when the file is read
