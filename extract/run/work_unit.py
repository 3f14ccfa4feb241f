"""Work units: decode each image once, one pass per network and view, one shard per feature set."""

import functools
import os
import threading
import time
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
from headrace.extract.backbones.fused import keep_freed_memory
from headrace.extract.errors import SourceError
from headrace.extract.images.crops import EMPTY_TILE
from headrace.extract.images.views import parse_view
from headrace.extract.run.decode_ahead import PixelBatch, decoded_batches
from headrace.extract.run.decode_processes import DecodeProcesses
from headrace.extract.run.device import (
    BatchLimit,
    PendingOutputs,
    check_device,
    current_device,
    find_batch_size,
    is_cpu,
    launch_forward,
)
from headrace.extract.run.plan import ExtractJob
from headrace.extract.run.rendering import Rendering, quiet_decoding
from headrace.extract.run.throughput import WorkUnitReport
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.forward import Forward, make_forward
from headrace.extract.taps.resolve import Tap

# From these on a value becomes infinite in the storage dtype.
_LARGEST = {"float16": 65520.0, "bfloat16": 3.39e38, "float32": float("inf"), "uint8": float("inf")}
_NETWORKS = 4  # networks that a process keeps at least, whatever is asked for next
# shards of a unit published at once: each waits for the disk, and the waits overlap
_PUBLISHERS = 8
# Cores from which an accelerator is fed by processes: with fewer, threads do not yet wait for each
# other (Python's lock is held for a fifth of the 3.7 ms that an image of 500 x 375 pixels takes),
# and are there at once.
_PROCESSES_FROM = 4
# A worker with a GPU runs two units at a time, so that one is decoded and published while the other
# has the network; networks and their hooks are of one thread at a time.
_NETWORK_LOCK = threading.RLock()

Made = TypeVar("Made")


@dataclass(frozen=True)
class ForwardPass:
    """A pass per batch: a network on one rendering, and the feature sets that its taps fill."""

    rendering: Rendering
    forward: Forward
    specs: tuple[FeatureSpec, ...]


@dataclass(frozen=True)
class _Started:
    """A unit whose first batches are being decoded."""

    job: ExtractJob
    passes: list[ForwardPass]
    limits: list[BatchLimit]
    batches: Iterator[PixelBatch]


@dataclass(frozen=True)
class _Extracted:
    """A unit in memory: per feature set, the rows' features."""

    specs: list[FeatureSpec]
    features: list[npt.NDArray[Any]]
    samples: list[Sample]  # of the rows
    report: WorkUnitReport


def run_work_unit(job: ExtractJob) -> WorkUnitReport:
    """Extract one unit and publish it; the shards are on disk when this returns.

    Doing it twice changes nothing.

    Raises SpecMismatch when the weights here are not those the feature sets are made of,
    SourceError at an image that cannot be decoded where the job is strict, and PublishFailed.
    """
    (report,) = run_work_units([job])
    return report


def run_work_units(jobs: Iterable[ExtractJob]) -> Iterator[WorkUnitReport]:
    """Extract units one after the other without a pause between them: while the network runs one,
    the next is decoded and the last is written. A report comes out when its shards are on disk. For
    one process that has a device to itself.
    """
    waiting_jobs = iter(jobs)
    with (
        quiet_decoding(),
        ThreadPoolExecutor(1, "publish") as publisher,
        _decoders() as decoder_pools,
    ):
        current_unit = next((_start(job, decoder_pools) for job in waiting_jobs), None)
        pending_report: Future[WorkUnitReport] | None = None
        while current_unit is not None:
            next_unit = next((_start(job, decoder_pools) for job in waiting_jobs), None)
            extracted = _extract(current_unit)
            if pending_report is not None:
                yield pending_report.result()
            pending_report = publisher.submit(_publish, current_unit.job, extracted)
            current_unit = next_unit
        if pending_report is not None:
            yield pending_report.result()


@contextmanager
def _decoders() -> Iterator[dict[int, ThreadPoolExecutor]]:
    decoder_pools: dict[int, ThreadPoolExecutor] = {}
    try:
        yield decoder_pools
    finally:
        for pool in decoder_pools.values():
            pool.shutdown(cancel_futures=True)


@functools.cache
def _decode_processes(count: int) -> DecodeProcesses:
    """Kept between units: starting them takes about a second."""
    return DecodeProcesses(count)


def _start(job: ExtractJob, decoder_pools: dict[int, ThreadPoolExecutor]) -> _Started:
    check_device(job.device)
    on_cpu = is_cpu(job.device)
    # Settings of the whole process, like the memory that it keeps.
    torch.set_num_threads(job.threads)
    if on_cpu:
        keep_freed_memory()
    with _NETWORK_LOCK:
        _make_room(job)
        passes = [
            feature_pass
            for backbone, specs in job.networks
            for feature_pass in make_forward_passes(
                backbone, specs, job.device, compiled=job.compile
            )
        ]
        batch_limits = [
            batch_limit_of(
                feature_pass.forward,
                feature_pass.rendering.preprocessing.pixel_shape,
                job.device,
                job.batch_size,
            )
            for feature_pass in passes
        ]
    # With the network elsewhere every core decodes, or as many as are this process's share.
    n_threads = job.threads if on_cpu or job.threads > 1 else len(os.sched_getaffinity(0))
    decoder_pool = (
        _decode_processes(n_threads)
        if not on_cpu and n_threads >= _PROCESSES_FROM
        else (
            decoder_pools.get(n_threads)
            or decoder_pools.setdefault(n_threads, ThreadPoolExecutor(n_threads, "decode"))
        )
    )
    largest_batch = max(limit.images for limit in batch_limits)
    with current_device(job.device):
        batches = decoded_batches(
            decoder_pool,
            job.samples,
            [feature_pass.rendering for feature_pass in passes],
            batch_size=largest_batch,
            pin_memory=not on_cpu,
        )
    return _Started(job, passes, batch_limits, batches)


def _extract(started_unit: _Started) -> _Extracted:
    job, passes = started_unit.job, started_unit.passes
    feature_parts: list[list[npt.NDArray[Any]]] = [
        [] for feature_pass in passes for _ in feature_pass.specs
    ]
    decoded_rows: list[int] = []
    failed_samples: list[FailedSample] = []
    unread_samples: list[tuple[str, str]] = []
    n_clipped = 0
    decode_s = forward_s = 0.0
    pending_results: list[PendingOutputs] = []

    def collect() -> None:
        outputs = [output for result in pending_results for output in result()]
        # no outputs before the first batch
        for feature_part, output in zip(feature_parts, outputs, strict=False):
            feature_part.append(output)
        pending_results.clear()

    wait_started = time.perf_counter()
    for batch in started_unit.batches:
        batch_ready = time.perf_counter()
        decode_s += batch_ready - wait_started
        decoded_rows += batch.rows
        failed_samples += [_failure(job.samples[row], reason) for row, reason in batch.undecodable]
        unread_samples += [(job.samples[row].id, reason) for row, reason in batch.unread]
        n_clipped += len(batch.clipped)
        refused = [
            (failed.id, failed.reason)
            for failed in failed_samples
            if not failed.reason.startswith(EMPTY_TILE)
        ]
        if job.strict and (refused or unread_samples):
            sample_id, reason = (refused or unread_samples)[0]
            raise SourceError(
                f"{sample_id}: {reason}. Strict extraction stops here; without it the image is "
                "recorded."
            )
        if batch.rows:
            with _NETWORK_LOCK:
                launched_passes = [
                    launch_forward(feature_pass.forward, pixels, job.device, limit)
                    for feature_pass, pixels, limit in zip(
                        passes, batch.pixels, started_unit.limits, strict=True
                    )
                ]
            collect()  # of the batch before, while the device is busy with this one
            pending_results += launched_passes
        wait_started = time.perf_counter()
        forward_s += wait_started - batch_ready
    collect()
    forward_s += time.perf_counter() - wait_started
    specs = [spec for feature_pass in passes for spec in feature_pass.specs]
    features = [
        np.concatenate(feature_part) if feature_part else np.empty((0, *spec.shape), np.float32)
        for spec, feature_part in zip(specs, feature_parts, strict=True)
    ]
    report = WorkUnitReport(
        job.unit,
        len(decoded_rows),
        tuple(failed_samples),
        tuple(unread_samples),
        decode_s,
        forward_s,
        0.0,
        n_clipped,
    )
    return _Extracted(specs, features, [job.samples[row] for row in decoded_rows], report)


def _publish(job: ExtractJob, extracted_unit: _Extracted) -> WorkUnitReport:
    if not extracted_unit.samples and not extracted_unit.report.failed:
        # Nothing could be read (a disk that is away): a shard without content would be taken for
        # the unit's next time.
        return extracted_unit.report
    publish_started = time.perf_counter()
    with ThreadPoolExecutor(min(_PUBLISHERS, len(extracted_unit.specs)), "shard") as publisher_pool:
        publish_futures = [
            publisher_pool.submit(
                _publish_set,
                job,
                spec,
                features,
                extracted_unit.samples,
                extracted_unit.report.failed,
            )
            for spec, features in zip(extracted_unit.specs, extracted_unit.features, strict=True)
        ]
        for future in publish_futures:
            future.result()
    return replace(extracted_unit.report, publish_s=time.perf_counter() - publish_started)


def _publish_set(
    job: ExtractJob,
    spec: FeatureSpec,
    features: npt.NDArray[Any],
    samples: Sequence[Sample],
    failed_samples: Sequence[FailedSample],
) -> None:
    """Publish the rows that can be stored; the others are failures of this feature set alone."""
    reason_of_row = find_unstorable_rows(features, spec)
    failures = [
        *failed_samples,
        *(_failure(samples[row], reason) for row, reason in reason_of_row.items()),
    ]
    if reason_of_row:
        stored_rows = [row for row in range(len(samples)) if row not in reason_of_row]
        features = features[stored_rows]
        samples = [samples[row] for row in stored_rows]
    publish_shard(
        create_feature_set(Path(job.cache_root), spec),
        job.unit,
        features=features,
        ids=[sample.id for sample in samples],
        content_hashes=[sample.content for sample in samples],
        failures=failures,
        compression=job.compression,
    )


def find_unstorable_rows(features: npt.NDArray[Any], spec: FeatureSpec) -> dict[int, str]:
    """{row: reason} of the rows of features (n, *spec.shape) that the storage dtype cannot hold."""
    # -1 is no number of columns where no image decodes
    flat_features = features.reshape(len(features), prod(features.shape[1:]))
    row_peaks = np.maximum(
        flat_features.max(axis=1, initial=0), -flat_features.min(axis=1, initial=0)
    )
    is_unstorable = ~(row_peaks < _LARGEST[spec.dtype])  # also true for NaN
    return {
        int(row): (
            f"{spec.name} reaches {row_peaks[row]:g}, which {spec.dtype} cannot hold; store it as "
            "float32"
        )
        for row in np.flatnonzero(is_unstorable)
    }


def make_forward_passes(
    spec: BackboneSpec, features: Sequence[FeatureSpec], device: str, *, compiled: bool = False
) -> list[ForwardPass]:
    """One pass for each view (and dtype of the network) that these feature sets of one backbone are
    made of.

    Raises SpecMismatch when the weights or preprocessing here are not those they were made with.
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
    view_passes = []
    for (view_text, compute_dtype), view_features in by_view.items():
        taps = tuple(Tap(feature.tap, feature.pooling) for feature in view_features)
        rendering = Rendering(backbone.preprocessing, *parse_view(view_text))
        view_passes.append(
            ForwardPass(
                rendering,
                _forward(backbone, taps, device, compute_dtype, compiled),
                tuple(view_features),
            )
        )
    return view_passes


class _Latest(Generic[Made]):
    """The most recently built values by key; `room` holds all that one work unit needs."""

    def __init__(self) -> None:
        self.room = _NETWORKS
        self._made: dict[Hashable, Made] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        cached_value = self._made.pop(key) if key in self._made else make()
        self._made[key] = cached_value  # as the last
        for stale_key in list(self._made)[: -self.room]:
            del self._made[stale_key]
        return cached_value


_backbones: _Latest[Backbone] = _Latest()
_forwards: _Latest[Forward] = _Latest()
# Forgotten with their passes, which hold (a GPU's) memory.
_limits: "weakref.WeakKeyDictionary[Forward, dict[Hashable, BatchLimit]]" = (
    weakref.WeakKeyDictionary()
)


def _make_room(job: ExtractJob) -> None:
    """Let this worker keep the networks of a job, and as many others of the same run."""
    pass_keys = {
        (network, spec.view, spec.compute_dtype)
        for network, specs in job.networks
        for spec in specs
    }
    _backbones.room = max(_NETWORKS, 2 * len(job.networks))
    _forwards.room = max(_NETWORKS, 2 * len(pass_keys))


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


def batch_limit_of(
    forward: Forward, image_shape: tuple[int, ...], device: str, batch_size: int | None
) -> BatchLimit:
    """The batch size of a pass.

    Kept as long as it, so that a size that was too large is not tried again in the next unit.
    """
    known_limits = _limits.setdefault(forward, {})
    limit_key = (image_shape, device, batch_size)
    if limit_key not in known_limits:
        known_limits[limit_key] = BatchLimit(
            batch_size or find_batch_size(forward, image_shape, device)
        )
    return known_limits[limit_key]


def _checked(backbone: Backbone, feature: FeatureSpec) -> Backbone:
    check_backbone_identity(backbone, feature)
    return backbone


def check_backbone_identity(backbone: Backbone, feature: FeatureSpec) -> None:
    """Raise SpecMismatch for a feature set of other weights or preprocessing than these."""
    for field_name, local_value, expected_value in (
        ("weights", backbone.weights, feature.weights),
        ("preprocessing", backbone.preprocessing.to_json(), feature.preprocessing),
    ):
        if local_value != expected_value:
            raise SpecMismatch(
                f"{feature.backbone}: the {field_name} on this machine are {local_value}, but the "
                f"feature set {feature.name} is made of {expected_value}. Plan again (the same "
                "command), or bring the file that was planned with."
            )


def _failure(sample: Sample, reason: str) -> FailedSample:
    # A NUL has no place in fixed-length text, and decoders quote the bytes that they stumbled over.
    return FailedSample(sample.id, sample.content, reason.replace("\0", "\\0"))
