"""Cores and memory, of the machine or of the container."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.pipelines.doctor.finding import Finding

_WORKER_BYTES = 1.5e9  # of a worker that runs a small network: torch itself, and a batch


def check_threads(
    cores: int | None = None,
    quota: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Finding:
    """As many workers as cores, where the container lets it have them."""
    cores = cores or _cores()
    quota = quota if quota is not None else _cpu_quota()
    said = f"{cores} cores"
    if quota is not None and quota < cores:
        fitting = max(1, int(quota))
        return Finding(
            "threads",
            "note",
            f"{said}, of which this container may use {quota:g}",
            "one worker per core would fight over them: headrace run recipe.yaml --workers "
            f"{fitting}",
        )
    set_to = environment.get("OMP_NUM_THREADS", "")
    if set_to.isdecimal() and int(set_to) > cores:
        return Finding(
            "threads",
            "note",
            f"{said}, OMP_NUM_THREADS={set_to}",
            "unset OMP_NUM_THREADS, or set it to 1",
        )
    return Finding("threads", "ok", said)


def check_heads(lanes: Callable[[], int | None] | None = None) -> Finding:
    """The compiled pass of logistic heads. lanes: floats of a vector, None where it was not built
    or cannot run.
    """
    found = (lanes or _lanes)()
    if found is None:
        return Finding(
            "heads",
            "note",
            "logistic heads run in NumPy: no compiled pass for this processor was built",
            "they train up to twice as fast with it: install a C compiler (apt-get install gcc), "
            "then install headrace again",
        )
    return Finding("heads", "ok", f"logistic heads have a compiled pass, vectors of {found} floats")


def _lanes() -> int | None:
    from headrace.heads.linear.solver.compiled_blocks import load_compiled_kernels

    library = load_compiled_kernels()
    return None if library is None else library.vector_length


def check_memory(available: float | None = None, cores: int | None = None) -> Finding:
    """Room for a worker per core. available: bytes."""
    available = available if available is not None else _available_bytes()
    cores = cores or _cores()
    said = f"{available / 1e9:.1f} GB free"
    if available < _WORKER_BYTES:
        return Finding(
            "memory",
            "fail",
            said,
            f"a worker takes about {_WORKER_BYTES / 1e9:g} GB: close something, or use another "
            "machine",
        )
    if available < cores * _WORKER_BYTES:
        fitting = int(available / _WORKER_BYTES)
        return Finding(
            "memory",
            "note",
            f"{said} for {cores} cores",
            f"start fewer workers: --workers {fitting}",
        )
    return Finding("memory", "ok", said)


def _cores() -> int:
    from headrace.pipelines.environment import available_cores

    return available_cores()


def _cpu_quota() -> float | None:
    """Cores that the container's control group allows; None where it does not say."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _available_bytes() -> float:
    """Memory that can be had, of the machine or of the container, whichever is less."""
    available = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                available = float(line.split()[1]) * 1024
    except OSError:
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = float(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass  # no limit
    return available
