"""Calls that are killed at any moment: a fifth of benchmarks/kills.py."""

import zlib

import pytest
from kill_cases import CASES, shares

KILLS = 40
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "kills"), list(shares(KILLS)))
def test_the_call_after_a_kill_ends_as_if_there_had_been_none(whole_run, name, kills):
    """The result of an uninterrupted run, nothing done twice, one opening of the test split, and nothing left lying about."""
    tally = whole_run.kill(CASES[name], kills, zlib.crc32(name.encode()))
    assert tally.faults == []
    assert tally.kills == kills
