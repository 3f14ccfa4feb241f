"""Work units: the plan of those that are missing, and the report of one that has been run.

It imports no torch, which processes that plan and distribute the work do not need.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypedDict, Unpack

import pandas as pd

from headrace.cache.format.shard import FailedSample
from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import BackboneSpec, Sample

MAX_SHARD_BYTES = 256 * 2**20  # of the largest tap
# About 5 s of a small network on one core: a kill loses little, and at the end of a run no worker
# waits long for the last one.
CPU_IMAGES_PER_SHARD = 128
# A GPU takes a second or less for them. No fewer, because no batch is larger than a shard, and
# each shard is flushed to the disk.
GPU_IMAGES_PER_SHARD = 1024


@dataclass(frozen=True)
class BackboneFeatures:
    """One backbone's feature sets, with the content hashes that need no extraction."""

    backbone: BackboneSpec
    specs: Sequence[FeatureSpec]
    cached: Sequence[Collection[str]]  # of each spec: hashes with a row or a recorded failure


@dataclass(frozen=True)
class ExtractJob:
    """A work unit: decode these samples once, publish a shard for each of these feature sets."""

    cache_root: str
    work_unit: str  # name of its shard in every feature set, see `work_unit_name`
    networks: tuple[tuple[BackboneSpec, tuple[FeatureSpec, ...]], ...]
    samples: tuple[Sample, ...]
    # For decoding, and on a CPU for the forward pass; with an accelerator 1 means all cores.
    threads: int = 1
    device: str = "cpu"
    batch_size: int | None = None  # None: see `find_batch_size`
    # Use PyTorch's compiler, on CUDA: it takes minutes per network and process, so for long runs.
    compile: bool = False
    cuda_graphs: bool = False  # on CUDA; not yet tried on a GPU
    runtime: str = "torch"  # or "openvino": of the pass on a CPU in float32
    compression: str | None = None  # of the shards: None or "bitshuffle-lz4"
    strict: bool = False  # stop at the first image that cannot be decoded

    @property
    def contents(self) -> tuple[str, ...]:
        return tuple(sample.content for sample in self.samples)


@dataclass(frozen=True)
class WorkUnitReport:
    """The outcome of a work unit.

    The three times are wall time. They add up to the work unit's where it is run by itself; in
    `run_work_units` a unit is published while the network runs the next one.
    """

    work_unit: str
    rows: int  # images with features
    failed: tuple[FailedSample, ...]  # images that cannot be decoded; recorded in every shard
    # (id, reason) of images that are gone or have changed since they were hashed; not recorded.
    unread: tuple[tuple[str, str], ...]
    decode_s: float  # waiting for pixels
    forward_s: float  # running the network
    publish_s: float  # waiting for the disk
    clipped: int = 0  # boxes that reached beyond their image, and were clipped


class JobOptions(TypedDict, total=False):
    """Options of a work unit, fields of ExtractJob; they change no feature beyond rounding."""

    threads: int
    device: str
    batch_size: int | None
    compile: bool
    cuda_graphs: bool
    runtime: str
    compression: str | None
    strict: bool


def plan_work_units(
    samples: pd.DataFrame,
    networks: Sequence[BackboneFeatures],
    *,
    cache_root: str | Path,
    images_per_shard: int | None = None,
    **options: Unpack[JobOptions],
) -> list[ExtractJob]:
    """Return the missing work units, in which each image is decoded once for all backbones.

    samples: columns `id`, `path`, `content`; rows without content are left out, and of equal
    contents the first is taken.

    Images that lack the same feature sets go together, `images_per_shard` at a time, in the order
    of the samples. So an interrupted run plans the same work units again, and for a new tap only
    that tap is computed.
    """
    n_images = images_per_shard or default_images_per_shard(
        [spec for network in networks for spec in network.specs], options.get("device", "cpu")
    )
    cached_hashes = [set(cached) for network in networks for cached in network.cached]
    # {which specs of all networks are missing: {content hash: sample}}
    samples_by_lacking: dict[tuple[bool, ...], dict[str, Sample]] = {}
    for name, path, content in zip(samples["id"], samples["path"], samples["content"], strict=True):
        if not isinstance(content, str):
            continue
        is_lacking = tuple(content not in cached for cached in cached_hashes)
        if any(is_lacking):
            sample = Sample(str(name), str(path), content)
            samples_by_lacking.setdefault(is_lacking, {}).setdefault(content, sample)
    jobs = []
    for is_lacking, unique_samples in samples_by_lacking.items():
        lacks = iter(is_lacking)
        work = [
            (network.backbone, tuple(spec for spec in network.specs if next(lacks)))
            for network in networks
        ]
        missing_work = tuple((backbone, specs) for backbone, specs in work if specs)
        group_samples = list(unique_samples.values())
        for start in range(0, len(group_samples), n_images):
            unit_samples = tuple(group_samples[start : start + n_images])
            work_unit = work_unit_name([sample.content for sample in unit_samples])
            job = ExtractJob(str(cache_root), work_unit, missing_work, unit_samples, **options)
            jobs.append(job)
    return jobs


def default_images_per_shard(specs: Sequence[FeatureSpec], device: str) -> int:
    """Return the device's number of images per shard, fewer if the largest tap's shard would
    exceed MAX_SHARD_BYTES.
    """
    value_bytes = {"float32": 4, "uint8": 1}
    row_bytes = [prod(spec.shape) * value_bytes.get(spec.dtype, 2) for spec in specs]
    max_images = CPU_IMAGES_PER_SHARD if device == "cpu" else GPU_IMAGES_PER_SHARD
    return max(1, min(max_images, MAX_SHARD_BYTES // max(row_bytes, default=1)))


def work_unit_name(contents: Sequence[str]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the content hashes, in their order."""
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
