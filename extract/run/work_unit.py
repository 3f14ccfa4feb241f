"""Work units: decode each image once, one pass per network and view, one shard per feature set."""

import functools
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
from headrace.extract.backbones.fused import Forward, keep_freed_memory
from headrace.extract.cores import available_cores
from headrace.extract.errors import SourceError
from headrace.extract.images.crops import EMPTY_TILE
from headrace.extract.images.views import parse_view
from headrace.extract.run.cuda_graph import GraphedForward
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
from headrace.extract.run.plan import ExtractJob, WorkUnitReport
from headrace.extract.run.rendering import Rendering, quiet_decoding
from headrace.extract.spec import BackboneSpec, Sample
from headrace.extract.taps.forward import make_forward
from headrace.extract.taps.resolve import Tap

# Values from these on become infinite in the storage dtype.
_OVERFLOW_FROM = {"float16": 65520.0, "bfloat16": 3.39e38, "float32": np.inf, "uint8": np.inf}
_MIN_KEPT_NETWORKS = 4  # least number of networks that a process keeps for later work units
_PUBLISHERS = 8  # shards published at once: each waits for the disk, and the waits overlap
# Number of cores from which processes, not threads, decode for an accelerator. With fewer, threads
# do not yet wait for each other (the interpreter lock is held for a fifth of the 3.7 ms that an
# image of 500 x 375 pixels takes), and they need no start-up time.
_PROCESSES_FROM = 4
# A worker with a GPU runs two work units at a time: one is decoded and published while the other
# uses the network. Networks and their hooks can be used by one thread at a time.
_NETWORK_LOCK = threading.RLock()

Value = TypeVar("Value")


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass per batch: a network on one rendering, and the feature sets of its taps."""

    rendering: Rendering
    forward: Forward
    specs: tuple[FeatureSpec, ...]


@dataclass(frozen=True)
class PassOptions:
    """How a process runs forward passes, see ExtractJob."""

    device: str
    compiled: bool = False
    graphed: bool = False
    runtime: str = "torch"


@dataclass(frozen=True)
class _StartedUnit:
    """A work unit whose first batches are being decoded."""

    job: ExtractJob
    passes: list[ForwardPass]
    limits: list[BatchLimit]
    batches: Iterator[PixelBatch]


@dataclass(frozen=True)
class _ExtractedUnit:
    """The features of a work unit in memory."""

    specs: list[FeatureSpec]
    features: list[npt.NDArray[Any]]  # of each spec: (rows, *spec.shape)
    samples: list[Sample]  # of the rows
    report: WorkUnitReport


def run_work_unit(job: ExtractJob) -> WorkUnitReport:
    """Extract one work unit and publish it; the shards are on disk when this returns.

    A second call changes nothing.

    Raises SpecMismatch when the weights here are not those of the feature sets, SourceError for an
    image that cannot be decoded if the job is strict, and PublishFailed.
    """
    (report,) = run_work_units([job])
    return report


def run_work_units(jobs: Iterable[ExtractJob]) -> Iterator[WorkUnitReport]:
    """Extract work units one after the other without a pause between them, and yield their reports.

    While the network runs one work unit, the next is decoded and the last is written; a report is
    yielded when the work unit's shards are on disk. For a process that has a device of its own.
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
    """Yield {number of threads: pool}, to which `_start` adds; all pools end with the context."""
    decoder_pools: dict[int, ThreadPoolExecutor] = {}
    try:
        yield decoder_pools
    finally:
        for pool in decoder_pools.values():
            pool.shutdown(cancel_futures=True)


@functools.cache
def _decode_processes(count: int) -> DecodeProcesses:
    """Return the decoding processes. They are kept, because starting them takes about a second."""
    return DecodeProcesses(count)


def _start(job: ExtractJob, decoder_pools: dict[int, ThreadPoolExecutor]) -> _StartedUnit:
    """Build the passes of a work unit and begin to decode its samples."""
    check_device(job.device)
    on_cpu = is_cpu(job.device)
    # Both are settings of the whole process.
    torch.set_num_threads(job.threads)
    if on_cpu:
        keep_freed_memory()
    options = PassOptions(job.device, job.compile, job.cuda_graphs, job.runtime)
    with _NETWORK_LOCK:
        _make_room(job)
        passes = [
            feature_pass
            for backbone, specs in job.networks
            for feature_pass in make_forward_passes(backbone, specs, options)
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
    # With the network on an accelerator all cores of this process decode, unless the job says how
    # many.
    n_threads = job.threads if on_cpu or job.threads > 1 else available_cores()
    decoder_pool: ThreadPoolExecutor | DecodeProcesses
    if not on_cpu and n_threads >= _PROCESSES_FROM:
        decoder_pool = _decode_processes(n_threads)
    else:
        if n_threads not in decoder_pools:
            decoder_pools[n_threads] = ThreadPoolExecutor(n_threads, "decode")
        decoder_pool = decoder_pools[n_threads]
    largest_batch = max(limit.images for limit in batch_limits)
    with current_device(job.device):
        batches = decoded_batches(
            decoder_pool,
            job.samples,
            [feature_pass.rendering for feature_pass in passes],
            batch_size=largest_batch,
            pin_memory=not on_cpu,
        )
    return _StartedUnit(job, passes, batch_limits, batches)


def _extract(started_unit: _StartedUnit) -> _ExtractedUnit:
    """Run the passes of a work unit batch by batch, and keep the features in memory."""
    job, passes = started_unit.job, started_unit.passes
    outputs_of_spec: list[list[npt.NDArray[Any]]] = [
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
        # strict=False: before the first batch there are no outputs.
        for spec_outputs, output in zip(outputs_of_spec, outputs, strict=False):
            spec_outputs.append(output)
        pending_results.clear()

    wait_started = time.perf_counter()
    for batch in started_unit.batches:
        batch_ready = time.perf_counter()
        decode_s += batch_ready - wait_started
        decoded_rows += batch.rows
        failed_samples += [_failure(job.samples[row], reason) for row, reason in batch.undecodable]
        unread_samples += [(job.samples[row].id, reason) for row, reason in batch.unread]
        n_clipped += len(batch.clipped)
        if job.strict:
            _refuse_failures(failed_samples, unread_samples)
        if batch.rows:
            with _NETWORK_LOCK:
                launched_passes = [
                    launch_forward(feature_pass.forward, pixels, job.device, limit)
                    for feature_pass, pixels, limit in zip(
                        passes, batch.pixels, started_unit.limits, strict=True
                    )
                ]
            # The outputs of the batch before, while the device works on this one.
            collect()
            pending_results += launched_passes
        wait_started = time.perf_counter()
        forward_s += wait_started - batch_ready
    collect()
    forward_s += time.perf_counter() - wait_started
    specs = [spec for feature_pass in passes for spec in feature_pass.specs]
    features = [
        np.concatenate(spec_outputs) if spec_outputs else np.empty((0, *spec.shape), np.float32)
        for spec, spec_outputs in zip(specs, outputs_of_spec, strict=True)
    ]
    n_rows, failed, unread = len(decoded_rows), tuple(failed_samples), tuple(unread_samples)
    report = WorkUnitReport(
        job.work_unit, n_rows, failed, unread, decode_s, forward_s, publish_s=0.0, clipped=n_clipped
    )
    return _ExtractedUnit(specs, features, [job.samples[row] for row in decoded_rows], report)


def _refuse_failures(
    failed_samples: Sequence[FailedSample], unread_samples: Sequence[tuple[str, str]]
) -> None:
    """Raise SourceError for the first failure; empty tiles are none."""
    failures = [
        (failed.id, failed.reason)
        for failed in failed_samples
        if not failed.reason.startswith(EMPTY_TILE)
    ]
    for sample_id, reason in (*failures, *unread_samples):
        raise SourceError(
            f"{sample_id}: {reason}. Strict extraction stops here; without it the image is "
            "recorded."
        )


def _publish(job: ExtractJob, extracted_unit: _ExtractedUnit) -> WorkUnitReport:
    # Nothing could be read, perhaps because a disk is not mounted. A shard without rows would be
    # taken for the whole work unit's by the next run.
    if not extracted_unit.samples and not extracted_unit.report.failed:
        return extracted_unit.report
    publish_started = time.perf_counter()
    with ThreadPoolExecutor(min(_PUBLISHERS, len(extracted_unit.specs)), "shard") as publisher_pool:
        samples, failed = extracted_unit.samples, extracted_unit.report.failed
        publish_futures = [
            publisher_pool.submit(_publish_set, job, spec, features, samples, failed)
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
    """Publish the rows that can be stored; the others become failures of this feature set only."""
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
        job.work_unit,
        features=features,
        ids=[sample.id for sample in samples],
        content_hashes=[sample.content for sample in samples],
        failures=failures,
        compression=job.compression,
    )


def find_unstorable_rows(features: npt.NDArray[Any], spec: FeatureSpec) -> dict[int, str]:
    """Return {row: reason} of features (n, *spec.shape) that the storage dtype cannot hold."""
    # Not reshape(n, -1), which fails for n = 0.
    flat_features = features.reshape(len(features), prod(features.shape[1:]))
    row_peaks = np.maximum(
        flat_features.max(axis=1, initial=0), -flat_features.min(axis=1, initial=0)
    )
    is_unstorable = ~(row_peaks < _OVERFLOW_FROM[spec.dtype])  # also true for NaN
    return {
        int(row): (
            f"{spec.name} reaches {row_peaks[row]:g}, which {spec.dtype} cannot hold; store it as "
            "float32"
        )
        for row in np.flatnonzero(is_unstorable)
    }


def make_forward_passes(
    spec: BackboneSpec, feature_specs: Sequence[FeatureSpec], options: PassOptions
) -> list[ForwardPass]:
    """Return a pass for each pair of view and compute dtype among one backbone's feature sets.

    Raises SpecMismatch when the weights or preprocessing here are not those of the feature sets.
    """
    # The weights that the feature sets name are part of the key, so that a network loaded from a
    # file that has been replaced since is not used.
    backbone = _backbones.get(
        (spec, feature_specs[0].weights), lambda: _checked(load_backbone(spec), feature_specs[0])
    )
    by_view: dict[tuple[str, str], list[FeatureSpec]] = {}
    for feature_spec in feature_specs:
        _checked(backbone, feature_spec)
        by_view.setdefault((feature_spec.view, feature_spec.compute_dtype), []).append(feature_spec)
    view_passes = []
    for (view_text, compute_dtype), view_features in by_view.items():
        taps = tuple(Tap(feature_spec.tap, feature_spec.pooling) for feature_spec in view_features)
        rendering = Rendering(backbone.preprocessing, *parse_view(view_text))
        forward = _forward(backbone, taps, compute_dtype, options)
        view_passes.append(ForwardPass(rendering, forward, tuple(view_features)))
    return view_passes


class _RecentValues(Generic[Value]):
    """The `max_size` most recently used values, by key."""

    def __init__(self) -> None:
        # Not functools.lru_cache, whose size is fixed: this one grows with what a work unit needs.
        self.max_size = _MIN_KEPT_NETWORKS
        self._values: dict[Hashable, Value] = {}

    def get(self, key: Hashable, build: Callable[[], Value]) -> Value:
        value = self._values.pop(key) if key in self._values else build()
        self._values[key] = value  # as the last one
        for stale_key in list(self._values)[: -self.max_size]:
            del self._values[stale_key]
        return value


_backbones: _RecentValues[Backbone] = _RecentValues()
_forwards: _RecentValues[Forward] = _RecentValues()
# Weak keys: a limit must not keep its pass, and the device's memory, alive.
_limits: "weakref.WeakKeyDictionary[Forward, dict[Hashable, BatchLimit]]" = (
    weakref.WeakKeyDictionary()
)


def _make_room(job: ExtractJob) -> None:
    """Let this worker keep the networks of a job, and as many others."""
    pass_keys = {
        (network, spec.view, spec.compute_dtype)
        for network, specs in job.networks
        for spec in specs
    }
    _backbones.max_size = max(_MIN_KEPT_NETWORKS, 2 * len(job.networks))
    _forwards.max_size = max(_MIN_KEPT_NETWORKS, 2 * len(pass_keys))


def _forward(
    backbone: Backbone, taps: tuple[Tap, ...], compute_dtype: str, options: PassOptions
) -> Forward:
    """Return a pass. It is kept, because copying a network costs as much as dozens of images."""

    def make() -> Forward:
        forward = make_forward(
            backbone,
            taps,
            device=options.device,
            compute_dtype=compute_dtype,
            compiled=options.compiled,
            runtime=options.runtime,
        )
        # "cuda" is also ROCm's name.
        is_graphed = options.graphed and torch.device(options.device).type == "cuda"
        return GraphedForward(forward) if is_graphed else forward

    return _forwards.get((backbone, taps, compute_dtype, options), make)


def batch_limit_of(
    forward: Forward, image_shape: tuple[int, ...], device: str, batch_size: int | None
) -> BatchLimit:
    """Return the batch limit of a pass."""
    # Kept as long as the pass, so that a size that was too large is not tried again.
    known_limits = _limits.setdefault(forward, {})
    limit_key = (image_shape, device, batch_size)
    if limit_key not in known_limits:
        known_limits[limit_key] = BatchLimit(
            batch_size or find_batch_size(forward, image_shape, device)
        )
    return known_limits[limit_key]


def _checked(backbone: Backbone, feature_spec: FeatureSpec) -> Backbone:
    check_backbone_identity(backbone, feature_spec)
    return backbone


def check_backbone_identity(backbone: Backbone, feature_spec: FeatureSpec) -> None:
    """Raise SpecMismatch for a feature set of other weights or preprocessing than these."""
    for field_name, local_value, expected_value in (
        ("weights", backbone.weights, feature_spec.weights),
        ("preprocessing", backbone.preprocessing.to_json(), feature_spec.preprocessing),
    ):
        if local_value != expected_value:
            raise SpecMismatch(
                f"{feature_spec.backbone}: the {field_name} on this machine are {local_value}, but "
                f"the feature set {feature_spec.name} is made of {expected_value}. Plan again "
                "(the same command), or bring the file that was planned with."
            )


def _failure(sample: Sample, reason: str) -> FailedSample:
    # Fixed-length text cannot hold a NUL, and decoders quote the bytes at which they failed.
    return FailedSample(sample.id, sample.content, reason.replace("\0", "\\0"))
