"""What try_wheel.sh runs in the clean environment: the installed packages, typed markers, and a
small head.
"""

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

import numpy as np

work = Path(sys.argv[1]).resolve()
for package in ("headrace.cache", "headrace.extract", "headrace.heads", "headrace.pipelines"):
    module = importlib.import_module(package)
    origin = Path(module.__file__).resolve()
    assert origin.is_relative_to(work / "venv"), f"{package} came from {origin}, not from the wheel"
assert importlib.resources.files("headrace").joinpath("py.typed").is_file(), "no py.typed"
assert importlib.resources.files("headrace.cache").joinpath("FORMAT.md").is_file(), (
    "the format's page is not in the wheel"
)

for asset in ("page.html.j2", "report.css", "report.js"):
    assert importlib.resources.files("headrace.pipelines.report.page").joinpath(asset).is_file(), (
        f"the wheel lost {asset}"
    )

from headrace.heads.estimators import LogisticHead  # noqa: E402

X = np.random.default_rng(0).normal(size=(60, 4))
assert LogisticHead().fit(X, X[:, 0] > 0).score(X, X[:, 0] > 0) > 0.9

version = importlib.metadata.version("headrace")
command = work / "venv" / "bin" / "headrace"
shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
assert version in shown, shown
refused = subprocess.run([command, "run", "absent.yaml"], capture_output=True, text=True)
assert refused.returncode == 2, refused
assert "headrace init" in refused.stderr, refused
