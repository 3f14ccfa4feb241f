"""What tests of pages share."""

import pytest
from support import forks


@pytest.fixture(scope="session")
def command_path(tmp_path_factory):
    """PATH for shells that run a page's commands: `headrace` costs no imports (support/forks.py)."""
    with forks.on_path(tmp_path_factory.mktemp("bin")) as path:
        yield path
