"""A cache is what its model says, whatever happens to it: kills, flipped bits, lost shards, repair."""

import pytest
from support.cache_histories import run_histories


@pytest.mark.slow
def test_anything_can_happen(monkeypatch):
    """Ten random histories; benchmarks/cache_faults.py has more and longer ones."""
    monkeypatch.setattr("headrace.cache.atomic_io.LEASE_S", 0.1)
    run_histories(10, 15)
