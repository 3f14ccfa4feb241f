"""Small feature sets for the cache tests."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.cache.format.shard import FailedSample
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec


def make_spec(
    dtype: str = "float16", shape: tuple[int, ...] = (12,), **changes: Any
) -> FeatureSpec:
    fields: dict[str, Any] = {
        "backbone": "timm:tf_efficientnet_lite0",
        "weights": "5" * 64,
        "tap": "blocks.4",
        "pooling": "avg" if len(shape) == 1 else "map",
        "preprocessing": '{"crop":224,"resize":232}',
        "view": '{"index":0}',
        "decoder": "pillow 13.0.0",
        "compute_dtype": "float32",
        "dtype": dtype,
        "shape": shape,
    }
    return FeatureSpec(**{**fields, **changes})


def hashes(first: int, n: int) -> list[str]:
    """Content hashes of n made-up images."""
    return [
        hashlib.sha256(f"image {index}".encode()).hexdigest()[:32]
        for index in range(first, first + n)
    ]


def unit_arguments(
    spec: FeatureSpec, number: int, rows: int = 8, failed: int = 1
) -> dict[str, Any]:
    """What extraction hands to `publish_shard` for unit `number`: the same every time."""
    values = np.random.default_rng(number).normal(size=(rows, *spec.shape)).astype(np.float32)
    first = number * 1000
    return {
        "unit": unit_name(number),
        "features": values,
        "ids": [f"Zelle {index} è.png" for index in range(first, first + rows)],
        "content_hashes": hashes(first, rows),
        "failures": [
            FailedSample(
                f"bad {number}/{index}",
                hashes(first + 500 + index, 1)[0],
                "truncated: 12 bytes are missing",
            )
            for index in range(failed)
        ],
    }


def unit_name(number: int) -> str:
    return f"u{number:04d}"


def make_feature_set(
    root: Path, units: int = 3, spec: FeatureSpec | None = None, **arguments: Any
) -> Path:
    """A published feature set of `units` units."""
    spec = spec or make_spec()
    directory = create_feature_set(root, spec)
    for number in range(units):
        publish_shard(directory, **unit_arguments(spec, number), **arguments)
    return directory


def given(spec: FeatureSpec, units: Sequence[int]) -> tuple[np.ndarray, list[str], list[str]]:
    """All features, ids and content hashes that `unit_arguments` makes for these units."""
    parts = [unit_arguments(spec, number) for number in units]
    return (
        np.concatenate([part["features"] for part in parts]),
        [sample for part in parts for sample in part["ids"]],
        [value for part in parts for value in part["content_hashes"]],
    )


def shard_bytes(directory: Path) -> dict[str, bytes]:
    """Every shard by name."""
    return {path.name: path.read_bytes() for path in sorted((directory / "shards").glob("*.h5"))}


def leftovers(directory: Path) -> list[str]:
    """Hidden files: temporaries and locks; what lies in a temporary folder goes with it."""
    hidden = [path.relative_to(directory).parts for path in directory.rglob(".*")]
    return sorted(
        parts[-1] for parts in hidden if not any(part.startswith(".") for part in parts[:-1])
    )


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)
