"""What the server that workers are forked from does first: it ends with the driver, has its module
path, and imports.

It is the server's first import, for there is no other way to tell it; elsewhere the import does
nothing. multiprocessing imports whatever it is told from the current folder first, until Python
3.12.8, and ends where an import raises anything but ImportError: a `timm.py` among the images would
be run, and a library that is broken would be the end of runs that do without it.
"""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Iterable

ENDS = "ends with the driver"
_WANTED = "headrace wants: "


def wanted(names: Iterable[str]) -> str:
    """A name that tells the server what else to import.

    It is no module's, and multiprocessing passes it over.
    """
    return _WANTED + ",".join(names).replace(
        ".", "/"
    )  # with dots it would be looked for in as many packages


def _told() -> tuple[list[str], list[str]]:
    """The driver's module path, and what is wanted: from the call that this process was started
    with.
    """
    path: list[str] = []
    names: list[str] = []
    for node in ast.walk(ast.parse(sys.orig_argv[-1])):
        if isinstance(node, ast.Dict):
            given = ast.literal_eval(node)
            path = given.get("sys_path", path)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(_WANTED)
        ):
            names = node.value.removeprefix(_WANTED).replace("/", ".").split(",")
    return path, names


def _begin() -> None:
    path, names = _told()
    sys.path[:] = path or [folder for folder in sys.path if folder]
    for name in names:
        if name == ENDS:
            # The kernel takes the thread that started a process for its parent, so this is asked
            # for by the main thread alone.
            from headrace.pipelines.cluster.worker import die_with_parent

            die_with_parent()
        else:
            with contextlib.suppress(Exception):  # who needs it meets the error, and says so
                importlib.import_module(name)


_IS_SERVER = "multiprocessing.forkserver import main" in "".join(sys.orig_argv[-1:])
STARTED_WITH = frozenset(
    os.environ if _IS_SERVER else ()
)  # variables of the driver when it started the server
if _IS_SERVER:
    _begin()
