"""Calls that are killed at any moment: a fifth of benchmarks/kills.py."""

import zlib

import pytest
from kill_cases import CASES, Bench, shares

KILLS = 40
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The images, and a run that nobody killed."""
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "state"))
        return Bench(folder)


@pytest.mark.parametrize(("name", "kills"), list(shares(KILLS)))
def test_the_call_after_a_kill_ends_as_if_there_had_been_none(bench, name, kills):
    """The result of an uninterrupted run, nothing done twice, one opening of the test split, and nothing left lying about."""
    tally = bench.kill(CASES[name], kills, zlib.crc32(name.encode()))
    assert tally.faults == []
    assert tally.kills == kills
