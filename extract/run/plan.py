"""The plan of missing work units. Pure: cached content hashes go in, jobs come out."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypedDict, Unpack

import pandas as pd

from headrace.cache.spec import FeatureSpec
from headrace.extract.spec import BackboneSpec, Sample

MAX_SHARD_BYTES = 256 * 2**20  # of the largest tap, at most
# about 5 s of a small network on one core: little is lost to a kill, and little waited for at the
# end
CPU_IMAGES_PER_SHARD = 128
# a GPU does them in a second or less; its batches are no larger than a unit, and each shard is
# flushed
GPU_IMAGES_PER_SHARD = 1024


@dataclass(frozen=True)
class BackboneFeatures:
    """One backbone's feature sets, each with the content hashes that it has, or has failed."""

    backbone: BackboneSpec
    specs: Sequence[FeatureSpec]
    cached: Sequence[Collection[str]]  # as `specs`


@dataclass(frozen=True)
class ExtractJob:
    """A work unit: decode these samples once, publish one shard of each of these feature sets."""

    cache_root: str
    unit: str  # a hash of the content hashes: the shard's name in every feature set
    networks: tuple[tuple[BackboneSpec, tuple[FeatureSpec, ...]], ...]
    samples: tuple[Sample, ...]
    # of the forward pass on a CPU, and of decoding; beside an accelerator 1 means all cores
    threads: int = 1
    device: str = "cpu"
    batch_size: int | None = None  # None: what is fast on the device
    # PyTorch's compiler, on CUDA: minutes once per network and process, for long runs
    compile: bool = False
    compression: str | None = None  # of the shards: None or "bitshuffle-lz4"
    strict: bool = False  # stop at the first image that cannot be decoded

    @property
    def contents(self) -> tuple[str, ...]:
        return tuple(sample.content for sample in self.samples)


class JobOptions(TypedDict, total=False):
    """Options of a work unit, which change no byte beyond rounding; fields of ExtractJob."""

    threads: int
    device: str
    batch_size: int | None
    compile: bool
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
    """The units of all backbones that are missing, each image decoded once for all that lack it.

    samples: columns `id`, `path`, `content`; rows whose content is missing are left out, equal
    contents are taken once. Images that lack the same feature sets go together, in the order of the
    samples, `images_per_shard` at a time; so a run that was interrupted plans the same units again,
    and a tap that is new is computed alone.
    """
    requested_specs = [
        (backbone_index, spec)
        for backbone_index, network in enumerate(networks)
        for spec in network.specs
    ]
    cached_hashes = [set(cached) for network in networks for cached in network.cached]
    n_images = images_per_shard or default_images_per_shard(
        [spec for _, spec in requested_specs], options.get("device", "cpu")
    )
    samples_by_lacking: dict[tuple[int, ...], dict[str, Sample]] = {}
    for name, path, content in zip(samples["id"], samples["path"], samples["content"], strict=True):
        if not isinstance(content, str):
            continue
        lacking_specs = tuple(
            index for index, cached in enumerate(cached_hashes) if content not in cached
        )
        if lacking_specs:
            samples_by_lacking.setdefault(lacking_specs, {}).setdefault(
                content, Sample(str(name), str(path), content)
            )
    jobs = []
    for lacking_specs, unique_samples in samples_by_lacking.items():
        group_work = tuple(
            (
                network.backbone,
                tuple(
                    requested_specs[index][1]
                    for index in lacking_specs
                    if requested_specs[index][0] == backbone_index
                ),
            )
            for backbone_index, network in enumerate(networks)
        )
        group_samples = list(unique_samples.values())
        for start in range(0, len(group_samples), n_images):
            unit_samples = tuple(group_samples[start : start + n_images])
            jobs.append(
                ExtractJob(
                    cache_root=str(cache_root),
                    unit=work_unit_name([sample.content for sample in unit_samples]),
                    networks=tuple(
                        backbone_work for backbone_work in group_work if backbone_work[1]
                    ),
                    samples=unit_samples,
                    **options,
                )
            )
    return jobs


def default_images_per_shard(specs: Sequence[FeatureSpec], device: str = "cpu") -> int:
    """Return CPU_IMAGES_PER_SHARD or GPU_IMAGES_PER_SHARD, or fewer where a shard of the largest
    tap would exceed MAX_SHARD_BYTES.
    """
    largest = max(
        (prod(spec.shape) * {"float32": 4, "uint8": 1}.get(spec.dtype, 2) for spec in specs),
        default=1,
    )
    return max(
        1,
        min(
            CPU_IMAGES_PER_SHARD if device == "cpu" else GPU_IMAGES_PER_SHARD,
            MAX_SHARD_BYTES // largest,
        ),
    )


def work_unit_name(contents: Sequence[str]) -> str:
    """First 16 hex digits of the SHA-256 of the content hashes in their order."""
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]
