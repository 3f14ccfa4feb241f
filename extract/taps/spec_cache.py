"""A cache of backbones' feature sets: a run with nothing to extract need not build the network.

An entry is found by a key of all that decides it: the backbone's spec, the stamps of its files (see
`weights_stamp`), the taps and options asked for, and the versions of the libraries that build and
decode. A work unit checks its network against the specs anyway.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import read_sealed_json, sealed_json
from headrace.cache.spec import FeatureSpec
from headrace.extract.errors import BackboneError
from headrace.extract.spec import (
    BackboneSpec,
    backbone_from_fields,
    check_spec,
    weights_stamp,
    with_absolute_weights,
)

_FOLDER = "backbones"
_LIBRARIES = ("torch", "torchvision", "timm", "pillow", "headrace")
_EXTRA_LIBRARIES = ("transformers", "open_clip_torch", "onnxruntime")  # which may be absent


class FeatureOptions(TypedDict, total=False):
    """How features are computed and stored, as `feature_specs` takes it."""

    dtype: str
    compute_dtype: str
    views: int
    symmetric: bool


@dataclass(frozen=True)
class TapFeatures:
    """The feature sets of a backbone's taps."""

    specs: tuple[FeatureSpec, ...]  # tap by tap and within a tap view by view
    # tensors that only the weights or only the network have; "" if there are none
    weights_note: str


def build_feature_specs(
    spec: BackboneSpec, taps: str | Sequence[str], options: FeatureOptions
) -> TapFeatures:
    """Build the network, and return the feature sets of its taps. Raises BackboneError."""
    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.taps.describe import feature_specs
    from headrace.extract.taps.left_out import WeightsWarning, left_out_note
    from headrace.extract.taps.resolve import resolve_taps

    backbone = load_backbone(spec)
    with warnings.catch_warnings():
        # The note is shown instead: forked processes and the next call can return it too.
        warnings.simplefilter("ignore", WeightsWarning)
        specs = feature_specs(backbone, resolve_taps(backbone, taps), **options)
    return TapFeatures(specs, left_out_note(backbone))


def load_feature_specs(
    spec: BackboneSpec,
    taps: str | Sequence[str],
    *,
    cache_root: Path,
    build: Callable[..., TapFeatures] = build_feature_specs,
    **options: Unpack[FeatureOptions],
) -> TapFeatures:
    """Return the feature sets of a backbone's taps (see `feature_specs`), from the cache if there.

    Otherwise `build`, which does what `build_feature_specs` does, builds the network. Raises
    BackboneError.
    """
    check_spec(spec)
    cached_features = _read_tap_features(_spec_cache_path(spec, taps, options, cache_root))
    # Of the user's own function nothing tells whether its code has changed.
    if cached_features is None or spec.name.startswith("python:"):
        return build(spec, taps, options)
    return cached_features


# Not a part of `load_feature_specs`, because a dry run writes nothing.
def save_feature_specs(
    spec: BackboneSpec,
    taps: str | Sequence[str],
    features: TapFeatures,
    *,
    cache_root: Path,
    **options: Unpack[FeatureOptions],
) -> None:
    """Write what `load_feature_specs` returned into the cache, unless it is there already."""
    cache_path = _spec_cache_path(spec, taps, options, cache_root)
    if _read_tap_features(cache_path) != features:
        cached_fields = {
            "backbone": dataclasses.asdict(with_absolute_weights(spec)),
            "features": [feature.to_json() for feature in features.specs],
            "weights_note": features.weights_note,
        }
        with contextlib.suppress(OSError):  # it only saves time
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            publish_replace(cache_path, sealed_json(cached_fields))


def find_backbone_spec(cache_root: Path, feature: FeatureSpec) -> BackboneSpec | None:
    """Return the backbone that the cache names for a feature set, or None."""
    for cache_path in sorted((cache_root / _FOLDER).glob("*.json")):
        cached_features = _read_tap_features(cache_path)
        if cached_features is not None and feature in cached_features.specs:
            with contextlib.suppress(BackboneError):  # written by another version
                return backbone_from_fields(read_sealed_json(cache_path.read_bytes())["backbone"])
    return None


def _spec_cache_path(
    spec: BackboneSpec, taps: str | Sequence[str], options: FeatureOptions, cache_root: Path
) -> Path:
    asked = [taps] if isinstance(taps, str) else list(taps)
    key = json.dumps(
        [dataclasses.asdict(spec), weights_stamp(spec), asked, options, _versions()], sort_keys=True
    )
    return cache_root / _FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@functools.cache  # reading one takes milliseconds, and a small run asks for this key some ten times
def _versions() -> list[str]:
    required = [importlib.metadata.version(name) for name in _LIBRARIES]
    return [*required, *map(_version_or_nothing, _EXTRA_LIBRARIES)]


def _version_or_nothing(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read_tap_features(cache_path: Path) -> TapFeatures | None:
    try:
        cached_fields = read_sealed_json(cache_path.read_bytes())
        specs = tuple(FeatureSpec.from_json(text) for text in cached_fields["features"])
        return TapFeatures(specs, cached_fields["weights_note"]) if specs else None
    # ValueError: no UTF-8, no JSON, or the fields of another version.
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # absent or damaged: it only saves time
