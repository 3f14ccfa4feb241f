"""Making processes die and disks fail, at a chosen system call."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Every system call of ours and of filelock's that changes something on disk goes through one of
# these names.
CALLS = (
    "open",
    "write",
    "fsync",
    "close",
    "link",
    "unlink",
    "rename",
    "replace",
    "ftruncate",
    "mkdir",
    "utime",
)


@contextmanager
def intercepted(
    on_call: Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Let `on_call(name, original, args, kwargs)` stand in for each of CALLS."""
    originals = {name: getattr(os, name) for name in CALLS}

    def standing_in(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: on_call(name, originals[name], args, kwargs)

    for name in CALLS:
        setattr(os, name, standing_in(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(target: int, moment: str) -> Any:
    """Interception that kills this process at its target-th call: before or after it; or in the
    middle of its target-th write.
    """
    count = 0

    def on_call(name, original, args, kwargs):
        nonlocal count
        count += moment != "middle" or name == "write"
        if count != target:
            return original(*args, **kwargs)
        if moment == "before":
            die()
        if moment == "middle":
            descriptor, data = args
            original(descriptor, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            die()
        try:
            return original(*args, **kwargs)
        finally:
            die()

    return intercepted(on_call)


def failing_at(target: int, code: int, names: tuple[str, ...]) -> Any:
    """Interception that lets the target-th call of `names` fail; a write first writes half, as full
    disks do.
    """
    count = 0

    def on_call(name, original, args, kwargs):
        nonlocal count
        if name in names:
            count += 1
            if count == target:
                if name == "write":
                    data = memoryview(args[1]).cast("B")
                    original(args[0], data[: len(data) // 2])
                raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    return intercepted(on_call)


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child, its imports done; returns its exit status:

    0, or minus the signal.
    """
    pid = start_child(work)
    return wait_for(pid)


def start_child(work: Callable[[], Any]) -> int:
    """Fork a child that runs `work` and exits, with 1 and a traceback if it raised; returns its
    process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into pytest
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_for(pid: int) -> int:
    """Exit status of a child: 0, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
