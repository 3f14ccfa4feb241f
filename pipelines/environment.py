"""The record, for the report, of the versions and machines that computed a run."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from headrace.extract.cores import available_cores
from headrace.pipelines.records import append_records, read_records

_LIBRARIES = (
    *("headrace", "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"),
    *("h5py", "pillow", "dask", "distributed"),
)


def environment(workers: int | None, device: str) -> dict[str, Any]:
    """Return versions, processor, cores and memory, with the run's `workers` and `device`."""
    return {
        "python": platform.python_version(),
        "versions": {
            name: version for name in _LIBRARIES if (version := _version(name)) is not None
        },
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "workers": workers,
        "device": device,
    }


def note_environment(path: Path, current: dict[str, Any]) -> None:
    """Append the environment to `path`, unless it is the same as in the last line."""
    records, _ = read_records(path)
    previous = records[-1] if records else {}
    previous.pop("since", None)
    if previous != json.loads(json.dumps(current)):  # through JSON, as `previous` went: no tuples
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        append_records(path, [{"since": since, **current}])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Not on every system: Windows has no sysconf.
    except (ValueError, OSError, AttributeError):
        return None
