"""Calls that are killed at any moment: a few of the 240 kills of benchmarks/kills.py."""

import faulthandler
import zlib

import pytest
from support.kills import CASES, shares

KILLS = 16
PHOTOS = [name for name, case in CASES.items() if case.recipe == "photos"]
pytestmark = pytest.mark.slow


def parts():
    """The kills of each case, four in a test."""
    return [
        (name, first, min(4, kills - first))
        for name, kills in shares(KILLS, PHOTOS)
        for first in range(0, kills, 4)
    ]


@pytest.fixture(autouse=True)
def no_watch(whole_run):
    """Each call here has its own patience (CALL_S).

    Together they may take longer, on a busy machine, than a test that hangs.
    """
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize(("name", "first", "kills"), parts())
def test_the_call_after_a_kill_ends_as_if_there_had_been_none(whole_run, name, first, kills):
    """The result of an uninterrupted run, nothing done twice, one evaluation of the test split, and
    nothing left lying about.
    """
    tally = whole_run.kill(CASES[name], kills, zlib.crc32(name.encode()) + first, first)
    assert tally.faults == []
    assert tally.kills == kills
