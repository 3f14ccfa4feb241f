"""The whole examples: their blocks run as written, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted(
    page
    for page in (Path(__file__).parents[2] / "docs" / "gallery").glob("*.md")
    if page.stem != "index"
)
FENCE = re.compile(r"(<!-- not run by the test -->\n)?^```(\w+)\n(.*?)^```", re.S | re.M)
# What each leaves behind, beside its run.
RESULTS = {
    "species": ["birds.yaml", "new-photos.csv", "headrace-runs/birds/report.html"],
    "patients": ["predictions.csv"],
    "satellite": ["land-cover.csv"],
    "defects": ["inspection-model/MODEL_CARD.md", "inspection-model/model.pt2"],
    "cluster": ["headrace-tls", "headrace-runs/large/leaderboard.csv"],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_example_runs_as_it_stands(page, tmp_path, command_path):
    """Images are made, the recipe is written, and every command ends well."""
    environment = os.environ | {"PATH": command_path, "COLUMNS": "100"}
    for skipped, language, block in FENCE.findall(page.read_text()):
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
        elif language == "yaml":
            (tmp_path / re.match(r"# (\S+)\n", block)[1]).write_text(block)
        elif language == "sh" and not skipped:
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for name in RESULTS[page.stem]:
        assert (tmp_path / name).exists(), name
