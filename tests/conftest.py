"""What every test is given without asking."""

import pytest


@pytest.fixture(autouse=True)
def own_state_directory(tmp_path_factory, monkeypatch):
    """What a test remembers about this machine (verified shards) stays its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("state")))
