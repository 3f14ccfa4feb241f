"""Throughput statistics of an extraction while it runs.

It does not import torch, which the process that distributes the work does not need.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from headrace.cache.format.shard import FailedSample


@dataclass(frozen=True)
class WorkUnitReport:
    """The outcome of a work unit.

    The three times are wall time of the thread that feeds the network, and add up to the unit's.
    """

    unit: str
    rows: int  # images with features
    failed: tuple[FailedSample, ...]  # images that cannot be decoded; recorded in every shard
    # (id, reason) of images that are gone or have changed since they were hashed; not recorded.
    unread: tuple[tuple[str, str], ...]
    decode_s: float  # waiting for pixels
    forward_s: float  # running the network
    publish_s: float  # waiting for the disk
    clipped: int = 0  # boxes that reached beyond their image, and were clipped


@dataclass(frozen=True)
class ThroughputStatistics:
    """Progress of an extraction.

    The shares are of the time of the threads that feed networks; they add up to 1.
    """

    images: int  # done, failed ones included
    total: int
    failed: int
    images_per_s: float
    eta_s: float  # estimated seconds until the end
    decode_share: float  # waiting for pixels: more decoding threads or smaller files would help
    device_share: float  # running the network: most time should go here
    disk_share: float  # waiting for shards to be on disk

    def to_json(self) -> str:
        """Return one line of JSON for a log that programs read."""
        return json.dumps({name: round(value, 4) for name, value in asdict(self).items()})

    def __str__(self) -> str:
        return (
            f"{self.images:,} of {self.total:,} images, {self.images_per_s:.1f}/s, "
            f"{self.eta_s:.0f} s left, {self.failed:,} failed; decode {self.decode_share:.0%}, "
            f"device {self.device_share:.0%}, disk {self.disk_share:.0%}"
        )


def throughput_statistics(
    reports: Sequence[WorkUnitReport], elapsed_s: float, total: int
) -> ThroughputStatistics:
    """Return the statistics of an extraction of `total` images after `elapsed_s` seconds."""
    failed = sum(len(report.failed) + len(report.unread) for report in reports)
    images = sum(report.rows for report in reports) + failed
    images_per_s = images / elapsed_s if elapsed_s > 0 else 0.0
    spent_seconds = [
        sum(getattr(report, seconds) for report in reports)
        for seconds in ("decode_s", "forward_s", "publish_s")
    ]
    shares = [seconds / (sum(spent_seconds) or 1.0) for seconds in spent_seconds]
    return ThroughputStatistics(
        images,
        total,
        failed,
        images_per_s,
        (total - images) / images_per_s if images_per_s else float("nan"),
        *shares,
    )
