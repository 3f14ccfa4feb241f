"""Units of work: decode each image once, one forward pass per network and view, one shard per
feature set.
"""

import os
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from headrace.cache.errors import SpecMismatch
from headrace.cache.format.shard import FailedSample
from headrace.cache.publish import create_feature_set, publish_shard
from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.backbone import Backbone, load_backbone
from headrace.extract.backbones.fused import keep_memory
from headrace.extract.errors import SourceError
from headrace.extract.images.views import parse_view
from headrace.extract.run.decode_ahead import Batch, Rendering, decoded_batches
from headrace.extract.run.device import Limit, Result, check_device, find_batch_size, launch
from headrace.extract.run.plan import ExtractJob
from headrace.extract.run.throughput import UnitReport
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.forward import Forward, make_forward
from headrace.extract.taps.resolve import Tap

# Beyond these a value becomes infinite in the storage dtype.
_LARGEST = {"float16": 65520.0, "bfloat16": 3.39e38, "float32": float("inf"), "uint8": float("inf")}
_NETWORKS = 4  # networks that a process keeps at least, whatever is asked for next
# shards of a unit published at once: each waits for the disk, and the waits overlap
_PUBLISHERS = 8

Made = TypeVar("Made")


@dataclass(frozen=True)
class Pass:
    """One forward pass per batch: a network on one rendering, and the feature sets that its taps
    fill.
    """

    rendering: Rendering
    forward: Forward
    specs: tuple[FeatureSpec, ...]


@dataclass(frozen=True)
class _Started:
    """A unit whose first batches are being decoded."""

    job: ExtractJob
    passes: list[Pass]
    limits: list[Limit]
    batches: Iterator[Batch]


@dataclass(frozen=True)
class _Extracted:
    """A unit in memory: per feature set, the rows' features."""

    specs: list[FeatureSpec]
    features: list[npt.NDArray[Any]]
    samples: list[Sample]  # of the rows
    report: UnitReport


def run_unit(job: ExtractJob) -> UnitReport:
    """Extract one unit and publish it; the shards are on disk when this returns.

    Doing it twice changes nothing.

    Raises SpecMismatch when the weights here are not those the feature sets are made of,
    SourceError at an image that cannot be decoded where the job is strict, and PublishFailed.
    """
    (report,) = run_units([job])
    return report


def run_units(jobs: Iterable[ExtractJob]) -> Iterator[UnitReport]:
    """Extract units one after the other without a pause between them: while the network runs one,
    the next is decoded and the last is written. A report comes out when its shards are on disk. For
    one process that has a device to itself.
    """
    waiting = iter(jobs)
    with quiet_decoding(), ThreadPoolExecutor(1, "publish") as publisher, _decoders() as pools:
        current = next((_start(job, pools) for job in waiting), None)
        publishing: Future[UnitReport] | None = None
        while current is not None:
            following = next((_start(job, pools) for job in waiting), None)
            extracted = _extract(current)
            if publishing is not None:
                yield publishing.result()
            publishing = publisher.submit(_publish, current.job, extracted)
            current = following
        if publishing is not None:
            yield publishing.result()


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Pillow warns of large images and damaged metadata from inside the decoding threads; what
    matters is recorded.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _decoders() -> Iterator[dict[int, ThreadPoolExecutor]]:
    pools: dict[int, ThreadPoolExecutor] = {}
    try:
        yield pools
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def _start(job: ExtractJob, pools: dict[int, ThreadPoolExecutor]) -> _Started:
    check_device(job.device)
    _make_room(job)
    on_cpu = torch.device(job.device).type == "cpu"
    # Both are of the process; a worker runs one unit at a time.
    torch.set_num_threads(job.threads)
    if on_cpu:
        keep_memory()
    passes = [
        each
        for backbone, specs in job.networks
        for each in feature_passes(backbone, specs, job.device, compiled=job.compile)
    ]
    limits = [
        pass_limit(each.forward, each.rendering.preprocessing.crop, job.device, job.batch_size)
        for each in passes
    ]
    # With the network elsewhere every core decodes.
    threads = job.threads if on_cpu else max(job.threads, len(os.sched_getaffinity(0)))
    pool = pools.get(threads) or pools.setdefault(threads, ThreadPoolExecutor(threads, "decode"))
    largest = max(limit.images for limit in limits)
    batches = decoded_batches(
        pool, job.samples, [each.rendering for each in passes], batch_size=largest, pin=not on_cpu
    )
    return _Started(job, passes, limits, batches)


def _extract(unit: _Started) -> _Extracted:
    job, passes = unit.job, unit.passes
    parts: list[list[npt.NDArray[Any]]] = [[] for each in passes for _ in each.specs]
    rows: list[int] = []
    failed: list[FailedSample] = []
    unread: list[tuple[str, str]] = []
    decode_s = forward_s = 0.0
    running: list[Result] = []

    def collect() -> None:
        outputs = [output for result in running for output in result()]
        for part, output in zip(parts, outputs, strict=False):  # no outputs before the first batch
            part.append(output)
        running.clear()

    waited = time.perf_counter()
    for batch in unit.batches:
        started = time.perf_counter()
        decode_s += started - waited
        rows += batch.rows
        failed += [_failure(job.samples[row], reason) for row, reason in batch.undecodable]
        unread += [(job.samples[row].id, reason) for row, reason in batch.unread]
        if job.strict and (failed or unread):
            name, reason = (failed[0].id, failed[0].reason) if failed else unread[0]
            raise SourceError(
                f"{name}: {reason}. Strict extraction stops here; without it the image is recorded."
            )
        if batch.rows:
            launched = [
                launch(each.forward, pixels, job.device, limit)
                for each, pixels, limit in zip(passes, batch.pixels, unit.limits, strict=True)
            ]
            collect()  # of the batch before, while the device is busy with this one
            running += launched
        waited = time.perf_counter()
        forward_s += waited - started
    collect()
    forward_s += time.perf_counter() - waited
    specs = [spec for each in passes for spec in each.specs]
    features = [
        np.concatenate(part) if part else np.empty((0, *spec.shape), np.float32)
        for spec, part in zip(specs, parts, strict=True)
    ]
    report = UnitReport(job.unit, len(rows), tuple(failed), tuple(unread), decode_s, forward_s, 0.0)
    return _Extracted(specs, features, [job.samples[row] for row in rows], report)


def _publish(job: ExtractJob, unit: _Extracted) -> UnitReport:
    if not unit.samples and not unit.report.failed:
        # Nothing could be read (a disk that is away): a shard without content would be taken for
        # the unit's next time.
        return unit.report
    started = time.perf_counter()
    with ThreadPoolExecutor(min(_PUBLISHERS, len(unit.specs)), "shard") as pool:
        done = [
            pool.submit(_publish_set, job, spec, features, unit.samples, unit.report.failed)
            for spec, features in zip(unit.specs, unit.features, strict=True)
        ]
        for future in done:
            future.result()
    return replace(unit.report, publish_s=time.perf_counter() - started)


def _publish_set(
    job: ExtractJob,
    spec: FeatureSpec,
    features: npt.NDArray[Any],
    samples: Sequence[Sample],
    failed: Sequence[FailedSample],
) -> None:
    """Publish the rows that can be stored; the others are failures of this feature set alone."""
    reasons = unstorable(features, spec)
    failures = [*failed, *(_failure(samples[row], reason) for row, reason in reasons.items())]
    if reasons:
        kept = [row for row in range(len(samples)) if row not in reasons]
        features = features[kept]
        samples = [samples[row] for row in kept]
    publish_shard(
        create_feature_set(Path(job.cache_root), spec),
        job.unit,
        features=features,
        ids=[sample.id for sample in samples],
        content_hashes=[sample.content for sample in samples],
        failures=failures,
        compression=job.compression,
    )


def unstorable(features: npt.NDArray[Any], spec: FeatureSpec) -> dict[int, str]:
    """{row: reason} of the rows of features (n, *spec.shape) that the storage dtype cannot hold."""
    flat = features.reshape(
        len(features), prod(features.shape[1:])
    )  # -1 is no number of columns where no image decodes
    peaks = np.maximum(flat.max(axis=1, initial=0), -flat.min(axis=1, initial=0))
    bad = ~(peaks < _LARGEST[spec.dtype])  # also true for NaN
    return {
        int(row): (
            f"{spec.name} reaches {peaks[row]:g}, which {spec.dtype} cannot hold; store it as "
            "float32"
        )
        for row in np.flatnonzero(bad)
    }


def feature_passes(
    spec: BackboneSpec, features: Sequence[FeatureSpec], device: str, *, compiled: bool = False
) -> list[Pass]:
    """One pass for each view (and dtype of the network) that these feature sets of one backbone are
    made of.

    Raises SpecMismatch when the weights or the preprocessing here are not those that they were made
    with.
    """
    # The feature sets name the weights that are asked for, so those of a file that has changed
    # since are not mistaken for them.
    backbone = _backbones.get(
        (spec, features[0].weights), lambda: _checked(load_backbone(spec), features[0])
    )
    by_view: dict[tuple[str, str], list[FeatureSpec]] = {}
    for feature in features:
        _checked(backbone, feature)
        by_view.setdefault((feature.view, feature.compute_dtype), []).append(feature)
    passes = []
    for (view, compute_dtype), group in by_view.items():
        taps = tuple(Tap(feature.tap, feature.reduction) for feature in group)
        rendering = Rendering(backbone.preprocessing, *parse_view(view))
        passes.append(
            Pass(rendering, _forward(backbone, taps, device, compute_dtype, compiled), tuple(group))
        )
    return passes


class _Latest(Generic[Made]):
    """What was made last, by what it was made of; with `room` for all that one unit of
    work needs.
    """

    def __init__(self) -> None:
        self.room = _NETWORKS
        self._made: dict[Hashable, Made] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        made = self._made.pop(key) if key in self._made else make()
        self._made[key] = made  # as the last
        for old in list(self._made)[: -self.room]:
            del self._made[old]
        return made


_backbones: _Latest[Backbone] = _Latest()
_forwards: _Latest[Forward] = _Latest()
# Forgotten with their passes, which hold (a GPU's) memory.
_limits: "weakref.WeakKeyDictionary[Forward, dict[Hashable, Limit]]" = weakref.WeakKeyDictionary()


def _make_room(job: ExtractJob) -> None:
    """Have the networks of a job kept for the next one, however many they are, and as many others
    of the same run.
    """
    passes = {
        (network, spec.view, spec.compute_dtype)
        for network, specs in job.networks
        for spec in specs
    }
    _backbones.room = max(_NETWORKS, 2 * len(job.networks))
    _forwards.room = max(_NETWORKS, 2 * len(passes))


def _forward(
    backbone: Backbone, taps: tuple[Tap, ...], device: str, compute_dtype: str, compiled: bool
) -> Forward:
    """Kept between the units of a process: copying a network costs as much as dozens of images."""
    return _forwards.get(
        (backbone, taps, device, compute_dtype, compiled),
        lambda: make_forward(
            backbone, taps, device=device, compute_dtype=compute_dtype, compiled=compiled
        ),
    )


def pass_limit(
    forward: Forward, crop: tuple[int, int], device: str, batch_size: int | None
) -> Limit:
    """The batch size of a pass.

    Kept as long as it, so that a size that was too large is not tried again in the next unit.
    """
    limits = _limits.setdefault(forward, {})
    key = (crop, device, batch_size)
    if key not in limits:
        limits[key] = Limit(batch_size or find_batch_size(forward, crop, device))
    return limits[key]


def _checked(backbone: Backbone, feature: FeatureSpec) -> Backbone:
    check_identity(backbone, feature)
    return backbone


def check_identity(backbone: Backbone, feature: FeatureSpec) -> None:
    """Raises SpecMismatch when the feature set is made by other weights or preprocessing than those
    here.
    """
    for field, here, wanted in (
        ("weights", backbone.weights, feature.weights),
        ("preprocessing", backbone.preprocessing.to_json(), feature.preprocessing),
    ):
        if here != wanted:
            raise SpecMismatch(
                f"{feature.backbone}: the {field} on this machine are {here}, but the feature set "
                f"{feature.name} is made of {wanted}. Plan again (the same command), or bring the "
                "file that was planned with."
            )


def _failure(sample: Sample, reason: str) -> FailedSample:
    # A NUL has no place in fixed-length text, and decoders quote the bytes that they stumbled over.
    return FailedSample(sample.id, sample.content, reason.replace("\0", "\\0"))
