"""One unit of work: decode each image once, one forward pass per network and view, one shard per feature set."""

import functools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.cache import Failure, FeatureSpec, SpecMismatch, create_feature_set, publish_shard
from headrace.extract.backbone import Backbone, BackboneSpec, load_backbone
from headrace.extract.decode import Rendering, Sample, decoded_batches
from headrace.extract.forward import Forward, make_forward
from headrace.extract.fuse import keep_memory
from headrace.extract.plan import ExtractJob
from headrace.extract.taps import Tap
from headrace.extract.views import parse_view

# Measured with EfficientNet-Lite0 at 300 px on one core: 1 image at a time 36/s, 4 40/s, 8 41/s, 16 42/s.
CPU_BATCH = 8
# Beyond these a value becomes infinite in the storage dtype.
_LARGEST = {"float16": 65520.0, "bfloat16": 3.39e38, "float32": float("inf"), "uint8": float("inf")}


@dataclass(frozen=True)
class UnitReport:
    """What a unit did. Seconds are wall time of the thread that runs the network."""

    unit: str
    rows: int  # images that have features now
    failed: tuple[Failure, ...]  # images whose content is no image; recorded in every shard
    unread: tuple[tuple[str, str], ...]  # (id, reason): gone or changed since they were hashed; recorded nowhere
    decode_s: float  # waiting for pixels
    forward_s: float
    publish_s: float


@dataclass(frozen=True)
class _Pass:
    """One forward pass per batch: a network on one rendering, and the feature sets that its taps fill."""

    rendering: Rendering
    forward: Forward
    specs: tuple[FeatureSpec, ...]


def run_unit(job: ExtractJob) -> UnitReport:
    """Extract one unit and publish it; the shards are on disk when this returns. Doing it twice changes nothing.

    Raises SpecMismatch when the weights here are not those the feature sets are made of, and PublishFailed.
    """
    torch.set_num_threads(job.threads)
    if job.device == "cpu":
        keep_memory()
    passes = [each for backbone, specs in job.networks for each in _passes(backbone, specs, job.device)]
    collected: list[list[npt.NDArray[Any]]] = [[] for each in passes for _ in each.specs]
    rows: list[int] = []
    failed: list[Failure] = []
    unread: list[tuple[str, str]] = []
    decode_s = forward_s = 0.0
    with warnings.catch_warnings():
        # Pillow warns of large images and damaged metadata from inside the decoding threads; what matters is recorded.
        warnings.simplefilter("ignore")
        batches = decoded_batches(
            job.samples,
            [each.rendering for each in passes],
            batch_size=job.batch_size or CPU_BATCH,
            threads=job.threads,
        )
        waited = time.perf_counter()
        for batch in batches:
            started = time.perf_counter()
            decode_s += started - waited
            rows += batch.rows
            failed += [_failure(job.samples[row], reason) for row, reason in batch.undecodable]
            unread += [(job.samples[row].id, reason) for row, reason in batch.unread]
            if batch.rows:
                outputs = [
                    out for each, pixels in zip(passes, batch.pixels, strict=True) for out in each.forward(pixels)
                ]
                for parts, output in zip(collected, outputs, strict=True):
                    parts.append(_to_numpy(output))
            waited = time.perf_counter()
            forward_s += waited - started
    started = time.perf_counter()
    specs = [spec for each in passes for spec in each.specs]
    for spec, parts in zip(specs, collected, strict=True):
        features = np.concatenate(parts) if parts else np.empty((0, *spec.shape), np.float32)
        _publish(job, spec, features, [job.samples[row] for row in rows], failed)
    publish_s = time.perf_counter() - started
    return UnitReport(job.unit, len(rows), tuple(failed), tuple(unread), decode_s, forward_s, publish_s)


def _passes(spec: BackboneSpec, features: Sequence[FeatureSpec], device: str) -> list[_Pass]:
    backbone = load_backbone(spec)
    by_view: dict[tuple[str, str], list[FeatureSpec]] = {}
    for feature in features:
        _check_identity(backbone, feature)
        by_view.setdefault((feature.view, feature.compute_dtype), []).append(feature)
    passes = []
    for (view, compute_dtype), group in by_view.items():
        taps = tuple(Tap(feature.tap, feature.reduction) for feature in group)
        rendering = Rendering(backbone.preprocessing, *parse_view(view))
        passes.append(_Pass(rendering, _forward(backbone, taps, device, compute_dtype), tuple(group)))
    return passes


@functools.lru_cache(maxsize=8)
def _forward(backbone: Backbone, taps: tuple[Tap, ...], device: str, compute_dtype: str) -> Forward:
    """Kept between the units of a process: copying a network costs as much as dozens of images."""
    return make_forward(backbone, taps, device=device, compute_dtype=compute_dtype)


def _check_identity(backbone: Backbone, feature: FeatureSpec) -> None:
    for field, here, wanted in (
        ("weights", backbone.weights, feature.weights),
        ("preprocessing", backbone.preprocessing.to_json(), feature.preprocessing),
    ):
        if here != wanted:
            raise SpecMismatch(
                f"{feature.backbone}: the {field} on this machine are {here}, but the feature set {feature.name} "
                f"is made of {wanted}. Plan again (the same command), or bring the file that was planned with."
            )


def _publish(
    job: ExtractJob, spec: FeatureSpec, features: npt.NDArray[Any], samples: Sequence[Sample], failed: Sequence[Failure]
) -> None:
    """Publish the rows that can be stored; the others are failures of this feature set alone."""
    peaks = np.abs(features.reshape(len(features), -1)).max(axis=1, initial=0)
    bad = ~(peaks < _LARGEST[spec.dtype])  # also true for NaN
    failures = list(failed)
    if bad.any():
        failures += [
            _failure(sample, f"{spec.name} reaches {peak:g}, which {spec.dtype} cannot hold; store it as float32")
            for sample, peak, refused in zip(samples, peaks, bad, strict=True)
            if refused
        ]
        features, samples = (
            features[~bad],
            [sample for sample, refused in zip(samples, bad, strict=True) if not refused],
        )
    publish_shard(
        create_feature_set(Path(job.cache_root), spec),
        job.unit,
        features=features,
        ids=[sample.id for sample in samples],
        content=[sample.content for sample in samples],
        failures=failures,
    )


def _failure(sample: Sample, reason: str) -> Failure:
    return Failure(sample.id, sample.content, reason)


def _to_numpy(output: torch.Tensor) -> npt.NDArray[Any]:
    return (output.float() if output.dtype is torch.bfloat16 else output).cpu().numpy()
