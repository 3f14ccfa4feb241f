"""Checks of cores and memory, of the machine or the container, and of the compiled heads."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.cache.count_text import count_text
from headrace.pipelines.doctor.finding import Finding

_WORKER_BYTES = 1.5e9  # memory of a worker with a small network: torch itself, and a batch


def check_threads(
    n_cores: int | None = None,
    cpu_quota: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Finding:
    """Check that the container allows as many CPUs as there are cores, one for each worker."""
    n_cores = n_cores or _cores()
    cpu_quota = cpu_quota if cpu_quota is not None else _cpu_quota()
    observation = count_text(n_cores, "core")
    if cpu_quota is not None and cpu_quota < n_cores:
        # A quota may be less than one core.
        n_fitting = max(1, int(cpu_quota))
        return Finding(
            "threads",
            "note",
            f"{observation}, of which this container may use {cpu_quota:g}",
            "one worker per core would fight over them: headrace run recipe.yaml --workers "
            f"{n_fitting}",
        )
    # Each worker would start as many threads, which then wait for each other.
    omp_threads = environment.get("OMP_NUM_THREADS", "")
    if omp_threads.isdecimal() and int(omp_threads) > n_cores:
        return Finding(
            "threads",
            "note",
            f"{observation}, OMP_NUM_THREADS={omp_threads}",
            "unset OMP_NUM_THREADS, or set it to 1",
        )
    return Finding("threads", "ok", observation)


def check_heads(find_vector_length: Callable[[], int | None] | None = None) -> Finding:
    """Check for the compiled pass of logistic heads. find_vector_length: returns how many floats
    an instruction processes; None if the pass was not built or cannot run.
    """
    vector_length = (find_vector_length or _vector_length)()
    if vector_length is None:
        return Finding(
            "heads",
            "note",
            "logistic heads run in NumPy: no compiled pass for this processor was built",
            "they train up to twice as fast with it: install a C compiler (apt-get install gcc), "
            "then install headrace again",
        )
    return Finding(
        "heads", "ok", f"logistic heads have a compiled pass, vectors of {vector_length} floats"
    )


def _vector_length() -> int | None:
    from headrace.heads.linear.solver.compiled_blocks import load_compiled_kernels

    library = load_compiled_kernels()
    return None if library is None else library.vector_length


def check_memory(available_bytes: float | None = None, n_cores: int | None = None) -> Finding:
    """Check that there is memory for a worker per core. available_bytes: free memory."""
    available_bytes = available_bytes if available_bytes is not None else _available_bytes()
    n_cores = n_cores or _cores()
    observation = f"{available_bytes / 1e9:.1f} GB free"
    if available_bytes < _WORKER_BYTES:
        return Finding(
            "memory",
            "fail",
            observation,
            f"a worker takes about {_WORKER_BYTES / 1e9:g} GB: close something, or use another "
            "machine",
        )
    # By default there is one worker for each core.
    if available_bytes < n_cores * _WORKER_BYTES:
        n_fitting = int(available_bytes / _WORKER_BYTES)
        return Finding(
            "memory",
            "note",
            f"{observation} for {count_text(n_cores, 'core')}",
            f"start fewer workers: --workers {n_fitting}",
        )
    return Finding("memory", "ok", observation)


def _cores() -> int:
    from headrace.extract.cores import available_cores

    return available_cores()


def _cpu_quota() -> float | None:
    """Return the cores that the container's control group allows; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        # Microseconds of processor time in each period: twice the period is two cores.
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _available_bytes() -> float:
    """Return the free memory of the machine or of the container, whichever is less."""
    available_bytes = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                # MemFree would be less: it lacks the file cache, which Linux gives back.
                available_bytes = float(line.split()[1]) * 1024
    except OSError:
        available_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit_bytes = float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used_bytes = float(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        available_bytes = min(available_bytes, limit_bytes - used_bytes)
    except (OSError, ValueError):
        pass  # no limit
    return available_bytes
