"""The process that the workers of this machine are forked from: imports happen once, here.

It is multiprocessing's fork server. It has one thread and opens nothing, so that what is forked
from it starts as clean as what is spawned, without the seconds of CPU that PyTorch takes to import.
It stays until the program ends, for its next cluster. Elsewhere than on Linux, where some libraries
of the system do not bear a fork, workers are spawned.
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
from typing import Any, TypeVar

import dask
from distributed.utils import get_mp_context

from headrace.pipelines.cluster.ends_with_driver import ENDS, die_with_parent, preload_name

Result = TypeVar("Result")

METHOD = "distributed.worker.multiprocessing-method"  # Dask's setting: how workers are started
# What every worker needs before its first task. The command line is what a worker of the command
# imports as its main module.
_IMPORTS = (
    "headrace.pipelines.cluster.worker",
    "headrace.heads.bank",
    "headrace.pipelines.stages.train",
    "headrace.pipelines.stages.extract",
)
_COMMAND = "headrace.pipelines.cli.main"
_FIRST_IMPORT = "headrace.pipelines.cluster.ends_with_driver"


def start_server(module_names: Sequence[str] = ()) -> str:
    """Start the server, unless there is one; returns Dask's word for how to start workers.

    module_names: more of what the server imports. One that is missing or fails is passed over, and
    one that a server which is there already lacks is imported by the workers.
    """
    if sys.platform != "linux":
        return "spawn"
    # As a nanny does before it starts a worker, for the number of threads is read when NumPy is
    # imported. PyArrow's allocator would start a thread as it is loaded, and a process is to be
    # forked only while it has one.
    variables = {
        **dask.config.get("distributed.nanny.pre-spawn-environ"),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    end_names = [ENDS] if threading.current_thread() is threading.main_thread() else []
    command_modules = [_COMMAND] if _COMMAND in sys.modules else []
    # The first time Dask chooses modules; ours are for the server after a killed one too.
    with dask.config.set({METHOD: "forkserver"}):
        context = get_mp_context()
    # The server imports these in order. The first is ours; the second is no module: in its name it
    # tells ours what to import, and whether to end with this process (`preload_name`).
    context.set_forkserver_preload(
        [_FIRST_IMPORT, preload_name([*end_names, *_IMPORTS, *command_modules, *module_names])]
    )
    try:
        with sigint_held_back():
            forkserver.ensure_running()
    except OSError:  # as where the path of the folder for temporary files is too long for a socket
        return "spawn"
    return "forkserver"


@contextlib.contextmanager
def sigint_held_back() -> Iterator[None]:
    """Hold back Ctrl-C from what is started in the block, and here until the block ends.

    A terminal sends it to every process of ours, and each worker would print a traceback. Processes
    and threads inherit the mask of the thread that starts them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started now, for starting it clears the mask of the thread that does so.
    resource_tracker.ensure_running()
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


def is_importing_main() -> bool:
    """Tell whether this is a new process that imports the script of the one that started it: it may
    start none of its own.
    """
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def imports_of(backbone_names: Iterable[str]) -> list[str]:
    """Return the slow imports of networks, by names such as "timm:resnet18"."""
    libraries = {name.partition(":")[0] for name in backbone_names} & {
        "timm",
        "torchvision",
        "transformers",
        "open_clip",
    }
    return ["headrace.extract.run.work_unit", *sorted(libraries)]


def call_forked(
    module_names: Sequence[str], function: Callable[..., Result], *arguments: Any
) -> Result:
    """Return `function(*arguments)`, called in a process forked from the server, so that this one
    need not import what it needs.

    Result and arguments are plain values. Raises what the function raises. Where there can be no
    such process, or it dies, the function is called here.
    """
    is_daemonic = multiprocessing.current_process().daemon  # which may have no processes of its own
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
            sending_end.close()  # or its end would not be seen
        try:
            result, error = receiving_end.recv()
        except EOFError:
            pass
        else:
            if error is not None:
                raise error
            return result  # type: ignore[no-any-return]
        finally:
            process.kill()  # it has answered, or this call was interrupted
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
