"""Identity of a feature set: everything that changes its bytes, and nothing that does not."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

from headrace.cache.errors import SpecMismatch

STORAGE_DTYPES = ("float16", "float32", "bfloat16", "uint8")


# Rows are keyed by the content hash of an image, never by its position, path or id. So re-ordering,
# renaming or relabelling images computes nothing, a changed image is a new row, and copies are
# stored once. Nothing of the data set is therefore part of the spec.
@dataclass(frozen=True)
class FeatureSpec:
    """Identity of a feature set: one backbone, preprocessing, tap and view, stored in one dtype.

    Batch size, device, worker count and shard size are not part of it: they change no bytes beyond
    the tolerance that floating point leaves between machines.
    """

    # "timm:tf_efficientnet_lite0", "torchvision:resnet50", "python:module:function"
    backbone: str
    # SHA-256 (hex) over every tensor of the state dict (name, dtype, shape, bytes), and over
    # code and arguments that change what is done with them
    weights: str
    tap: str  # node of the network, "blocks.4"
    pooling: str  # "avg", "max", "gem", "grid2", "map", "cls", ...
    # Canonical JSON: resize, interpolation, antialias, crop, colour, mean, std
    preprocessing: str
    # Canonical JSON: {"index": 0} is the evaluation crop, otherwise an augmentation, or a symmetry
    # of it
    view: str
    decoder: str  # "pillow 13.0.0"
    compute_dtype: str  # dtype of the forward pass, "float32"
    dtype: str  # storage dtype, one of STORAGE_DTYPES
    shape: tuple[int, ...]  # of one row

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"storage dtype {self.dtype!r} is not one of {', '.join(STORAGE_DTYPES)}"
            )

    @property
    def name(self) -> str:
        """The tap as a user writes it, "blocks.4.avg"."""
        return f"{self.tap}.{self.pooling}"

    @property
    def fingerprint(self) -> str:
        """Name of the directory: 24 hex digits of the canonical JSON's SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:24]

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no white space."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, spec_json: str) -> Self:
        """Return the spec that `to_json` wrote.

        Raises SpecMismatch for other fields than this version's; ValueError, TypeError,
        AttributeError or RecursionError for text that is not the JSON of a spec.
        """
        values: dict[str, Any] = json.loads(spec_json)
        field_names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != field_names:
            differing_fields = sorted(set(values) ^ field_names)
            raise SpecMismatch(
                "the spec has other fields than this version of headrace knows: "
                f"{', '.join(differing_fields)}. Another version wrote it: give another cache "
                "directory, or remove this feature set with `headrace cache rm`"
            )
        row_shape = values.pop("shape")
        if not all(isinstance(value, str) for value in values.values()):
            raise SpecMismatch("the spec has fields that are no text")
        if not (
            isinstance(row_shape, list)
            and all(isinstance(edge, int) and edge >= 0 for edge in row_shape)
        ):
            raise SpecMismatch(f"the spec's shape is {str(row_shape)[:60]}, expected sizes")
        return cls(**values, shape=tuple(row_shape))


def spec_difference(stored_spec: FeatureSpec, expected_spec: FeatureSpec) -> str | None:
    """Describe the first field in which two specs differ, with both values; None if equal."""
    for field in dataclasses.fields(FeatureSpec):
        expected_value = getattr(expected_spec, field.name)
        stored_value = getattr(stored_spec, field.name)
        if expected_value != stored_value:
            return f"{field.name}: found {stored_value!r}, expected {expected_value!r}"
    return None
