"""The first import of the server that workers are forked from: it has the server end with the
driver, gives it the driver's module path, and imports what workers need.

There is no other way to tell the server; elsewhere the import does nothing. multiprocessing imports
whatever it is told from the current folder first, until Python 3.12.8, and ends where an import
raises anything but ImportError: a `timm.py` among the images would be run, and a library that is
broken would be the end of runs that do without it.
"""

import ast
import contextlib
import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Iterable

ENDS = "ends with the driver"
_PRELOAD_PREFIX = "headrace preloads: "
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def preload_name(module_names: Iterable[str]) -> str:
    """Return a name that tells the server which modules to import.

    It is no module's own name, and multiprocessing passes it over.
    """
    # With dots it would be looked for in as many packages.
    return _PRELOAD_PREFIX + ",".join(module_names).replace(".", "/")


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however either of them ends (Linux).

    A worker notices by itself that its driver is gone, but not while it is stopped.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _read_start_call() -> tuple[list[str], list[str]]:
    """Return the driver's module path and the imports, from the call that began this process."""
    module_path: list[str] = []
    module_names: list[str] = []
    for node in ast.walk(ast.parse(sys.orig_argv[-1])):
        if isinstance(node, ast.Dict):
            preparation = ast.literal_eval(node)
            module_path = preparation.get("sys_path", module_path)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(_PRELOAD_PREFIX)
        ):
            module_names = node.value.removeprefix(_PRELOAD_PREFIX).replace("/", ".").split(",")
    return module_path, module_names


def _start_server() -> None:
    module_path, module_names = _read_start_call()
    sys.path[:] = module_path or [folder for folder in sys.path if folder]
    for module_name in module_names:
        if module_name == ENDS:
            # The kernel takes the thread that started a process for its parent, so this is asked
            # for by the main thread alone.
            die_with_parent()
        else:
            with contextlib.suppress(Exception):  # who needs it meets the error, and says so
                importlib.import_module(module_name)


_IS_SERVER = "multiprocessing.forkserver import main" in "".join(sys.orig_argv[-1:])
# variables of the driver when it started the server
STARTED_WITH = frozenset(os.environ if _IS_SERVER else ())
if _IS_SERVER:
    _start_server()
