"""The process that the workers of this machine are forked from: what they import is imported once, by this process.

It is multiprocessing's fork server. It has one thread and opens nothing, so that what is forked from it starts as clean as
what is spawned, without the seconds of CPU that PyTorch takes to import. It stays until the program ends, for its next
cluster. Elsewhere than on Linux, where some libraries of the system do not bear a fork, workers are spawned.
"""

import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver

import dask
from distributed.utils import get_mp_context

METHOD = "distributed.worker.multiprocessing-method"  # Dask's setting: how workers are started
# What every worker needs before its first task. The command line is what a worker of the command imports as its main module.
_IMPORTS = (
    "headrace.pipelines.worker",
    "headrace.heads",
    "headrace.pipelines.training",
    "headrace.pipelines.extraction",
)
_COMMAND = "headrace.pipelines.cli"
_ENDS = "headrace.pipelines.ends_with_driver"


def start_server(imports: Sequence[str] = ()) -> str:
    """Start the server, unless there is one; returns Dask's word for how to start workers. imports: more modules.

    A module that is missing is passed over, and one that a server which is there already lacks is imported by the workers.
    """
    if sys.platform != "linux":
        return "spawn"
    # As a nanny does before it starts a worker, for the number of threads is read when NumPy is imported. PyArrow's allocator
    # would start a thread as it is loaded, and a process is to be forked only while it has one.
    settings = {
        **dask.config.get("distributed.nanny.pre-spawn-environ"),
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, str(value))
    first = [_ENDS] if threading.current_thread() is threading.main_thread() else []
    command = [_COMMAND] if _COMMAND in sys.modules else []
    with dask.config.set({METHOD: "forkserver"}):
        context = (
            get_mp_context()
        )  # the first time Dask chooses modules; ours are for the server after a killed one too
    context.set_forkserver_preload([*first, *_IMPORTS, *command, *imports])
    try:
        forkserver.ensure_running()
    except OSError:  # as where the path of the folder for temporary files is too long for a socket
        return "spawn"
    return "forkserver"
