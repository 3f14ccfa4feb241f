"""What the stage that extracts shows beside its progress."""

import pytest

from headrace.cache.format.shard import FailedSample
from headrace.extract.run.plan import WorkUnitReport
from headrace.pipelines.stages.extract import progress_details


def test_shares_of_time_add_up_to_one_and_failures_are_counted():
    """Over all units so far; nothing is divided by zero before any time was spent."""
    failed = (FailedSample("a.png", "0" * 32, "no image"),)
    unread = (("b.png", "gone"),)
    reports = [
        WorkUnitReport("u0", 4, failed, (), decode_s=1.0, forward_s=5.0, publish_s=0.5),
        WorkUnitReport("u1", 4, (), unread, decode_s=1.0, forward_s=2.0, publish_s=0.5),
    ]
    shares = {"decode_share": 0.2, "network_share": 0.7, "disk_share": 0.1}
    assert progress_details(reports) == pytest.approx({**shares, "failed": 2})
    assert set(progress_details([]).values()) == {0}
