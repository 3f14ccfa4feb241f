"""The server process that the workers of this machine are forked from, so that imports happen once.

It is multiprocessing's fork server. It has one thread and opens no file, so that processes forked
from it start as clean as spawned ones, without the seconds of CPU time that importing PyTorch
takes. It lives until the program ends, for later clusters. On systems other than Linux, where some
system libraries do not survive a fork, workers are spawned.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import dask
from distributed.utils import get_mp_context

from headrace.pipelines.cluster.ends_with_driver import ENDS, die_with_parent, preload_name

Result = TypeVar("Result")

START_METHOD = "distributed.worker.multiprocessing-method"  # a setting of Dask
# The modules that every worker needs for its first task.
_IMPORTS = (
    "headrace.pipelines.cluster.worker",
    "headrace.heads.bank",
    "headrace.pipelines.stages.train",
    "headrace.pipelines.stages.extract",
)
_COMMAND = "headrace.pipelines.cli.main"  # the main module of workers that the command starts
_FIRST_IMPORT = "headrace.pipelines.cluster.ends_with_driver"


def start_server(module_names: Sequence[str]) -> str:
    """Start the server, if there is none, and return Dask's name of the way to start workers:
    "forkserver" or "spawn".

    module_names: modules that the server imports too. Those that are missing or fail are skipped; a
    server that runs already does not import them, and workers do it themselves.
    """
    if sys.platform != "linux":
        return "spawn"
    # Dask's nanny sets these before it starts a worker, but NumPy reads the number of threads when
    # it is imported, which is in the server. PyArrow's allocator would start a thread when it is
    # loaded, and only a process with one thread is safe to fork.
    variables = {
        **dask.config.get("distributed.nanny.pre-spawn-environ"),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    end_names = [ENDS] if threading.current_thread() is threading.main_thread() else []
    command_modules = [_COMMAND] if _COMMAND in sys.modules else []
    # Dask sets modules to preload when the context is first used; ours replace them, also for a new
    # server after a killed one.
    with dask.config.set({START_METHOD: "forkserver"}):
        context = get_mp_context()
    # The server imports these in order. The second is not a module: its name tells the first which
    # modules to import, and whether to end with this process (`preload_name`).
    context.set_forkserver_preload(
        [_FIRST_IMPORT, preload_name([*end_names, *_IMPORTS, *command_modules, *module_names])]
    )
    try:
        with sigint_held_back():
            forkserver.ensure_running()
    except OSError:  # for example, the temporary folder's path is too long for a socket
        return "spawn"
    return "forkserver"


@contextlib.contextmanager
def sigint_held_back() -> Iterator[None]:
    """Block SIGINT (Ctrl-C) in processes that are started in the block, and here until it ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started before the mask is set, because starting it clears the thread's mask.
    resource_tracker.ensure_running()
    # A terminal sends the signal to every process, and each worker would print a traceback.
    # Processes and threads inherit the signal mask of the thread that starts them.
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


def is_importing_main() -> bool:
    """Return whether this is a spawned process that is importing its parent's script; it must not
    start processes.
    """
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def lacks_main_line() -> bool:
    """Return whether this program is a script that nowhere asks for its `__name__`, so that all of
    it runs when a spawned process imports it.
    """
    script = sys.modules["__main__"]
    script_path = getattr(script, "__file__", None) or ""
    # What `python -m` runs has a spec, and what pip installs as a command has no suffix.
    if getattr(script, "__spec__", None) is not None or not script_path.endswith(".py"):
        return False
    try:
        return b"__name__" not in Path(script_path).read_bytes()
    except OSError:
        return False


def imports_of(backbone_names: Iterable[str]) -> list[str]:
    """Return the modules, slow to import, that networks need. Names are such as "timm:resnet18"."""
    slow_libraries = {"timm", "torchvision", "transformers", "open_clip"}
    libraries = slow_libraries.intersection(name.partition(":")[0] for name in backbone_names)
    return ["headrace.extract.run.work_unit", *sorted(libraries)]


def call_forked(
    module_names: Sequence[str], function: Callable[..., Result], *arguments: Any
) -> Result:
    """Return `function(*arguments)`, called in a process forked from the server, so that this
    process need not import the function's modules.

    Result and arguments must be picklable. Raises what the function raises. If there can be no such
    process, or it dies, the function is called here.
    """
    is_daemonic = multiprocessing.current_process().daemon  # a daemon must not start processes
    if not is_importing_main() and not is_daemonic and start_server(module_names) == "forkserver":
        context = multiprocessing.get_context("forkserver")
        receiving_end, sending_end = context.Pipe(duplex=False)
        process = context.Process(
            target=_answer, args=(sending_end, function, arguments), daemon=True
        )
        try:
            process.start()
        except (OSError, EOFError):  # the server was ended
            return function(*arguments)
        finally:
            sending_end.close()  # otherwise recv would wait for ever when the process dies
        try:
            result, error = receiving_end.recv()
        # The process died, perhaps of a crash in a library: answered below, in this process.
        except EOFError:
            pass
        else:
            if error is not None:
                raise error
            return result  # type: ignore[no-any-return]
        finally:
            process.kill()  # also if this call was interrupted while it worked
            process.join()
    return function(*arguments)


def _answer(
    sending_end: Connection, function: Callable[..., object], arguments: Sequence[object]
) -> None:
    die_with_parent()
    answer: tuple[object, Exception | None]
    try:
        answer = function(*arguments), None
    except Exception as error:  # noqa: BLE001 - it is raised again where the answer is waited for
        answer = None, error
    sending_end.send(answer)
