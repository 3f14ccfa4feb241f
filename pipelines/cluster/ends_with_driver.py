"""The first import of the server that workers are forked from. It makes the server end with the
driver, gives it the driver's module path, and imports what workers need.

A preloaded module is the only way to run code in the server; in any other process the import does
nothing. multiprocessing's own preloading is not used for the other modules: until Python 3.12.8 it
imports from the current folder first, so a `timm.py` among the images would be run, and it dies of
any error but ImportError, so a broken library would end runs that do not need it.
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
    """Return a name to preload that holds the names of modules to import."""
    # No module has this name, so multiprocessing skips it, and `_read_start_call` finds it.
    # "/" for ".", because a dotted name would be searched for in packages.
    return _PRELOAD_PREFIX + ",".join(module_names).replace(".", "/")


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends, in whatever way (Linux)."""
    # A worker notices by itself that its driver is gone, but not while it is stopped (SIGSTOP).
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
    # Without "", the current folder, which may be a folder of images with a `timm.py` in it.
    sys.path[:] = module_path or [folder for folder in sys.path if folder]
    for module_name in module_names:
        if module_name == ENDS:
            # To the kernel the parent is the thread that started the server, so only a server that
            # the main thread started is given this name.
            die_with_parent()
        else:
            with contextlib.suppress(Exception):  # the task that needs the module reports the error
                importlib.import_module(module_name)


_IS_SERVER = "multiprocessing.forkserver import main" in "".join(sys.orig_argv[-1:])
# names of the driver's environment variables when it started the server
STARTED_WITH = frozenset(os.environ if _IS_SERVER else ())
if _IS_SERVER:
    _start_server()
