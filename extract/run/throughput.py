"""Reports of work units, and what the display of progress says of them.

It does not import torch, which the process that distributes the work does not need.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def progress_details(reports: Sequence[WorkUnitReport]) -> dict[str, float]:
    """Return what the display of an extraction's progress shows: the count of failed images, and
    how the threads that feed networks spend their time, in shares that add up to 1.
    """
    seconds = {
        # Waiting for pixels: more decoding threads or smaller files would help.
        "decode_share": sum(report.decode_s for report in reports),
        "network_share": sum(report.forward_s for report in reports),
        "disk_share": sum(report.publish_s for report in reports),
    }
    all_seconds = sum(seconds.values()) or 1.0
    shares = {name: spent / all_seconds for name, spent in seconds.items()}
    return {**shares, "failed": sum(len(report.failed) + len(report.unread) for report in reports)}
