"""The command line without what importing it costs: each call is a fork of one process that has
imported everything.

It is a process of its own all the same, with its own folder, environment, arguments, threads,
signals and children, which can be killed. What is a fact of a fresh interpreter (what it imports,
the encoding of its output, `ulimit`) is no fact of a fork: `run_cases.fresh_headrace` starts one.

As a script: the process that is forked. It reads requests from a socket until its other end is
closed.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

# Sums are then the same from call to call, whatever else the machine does; and OpenMP, which cannot
# be forked, has no threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PROGRAM = "headrace.pipelines"  # as in python -m
# What its functions import themselves.
IMPORTED = (
    "torch",
    "torchvision",
    "timm",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "sklearn.linear_model",
    "safetensors.torch",
)


class Call:
    """A call that has been started, as `subprocess.Popen` has one."""

    def __init__(self, pid: int, answer: Any) -> None:
        self.pid, self.returncode, self._answer = pid, None, answer

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        found = self._look(timeout)
        if found is None:
            raise subprocess.TimeoutExpired(PROGRAM, timeout or 0)
        return found

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._answer], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._answer.readline()))
            self._answer.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Any,
    *,
    cwd: Any,
    stdout: Any,
    stderr: Any,
    env: Any = None,
    first: str = "",
    script: Any = "",
) -> Call:
    """Start `headrace` with these arguments, as the first process of a session of its own.

    stdout, stderr: open files. first: Python that is run in it before, as `sitecustomize` would be;
    for its workers too. script: a Python file that is run instead.
    """
    reader, writer = os.pipe()
    words = [str(word) for word in arguments]
    request = {
        "arguments": words,
        "cwd": str(cwd),
        "env": dict(env or os.environ),
        "first": first,
        "script": str(script),
    }
    with _lock:
        socket.send_fds(
            _server(),
            [json.dumps(request).encode() + b"\n"],
            [stdout.fileno(), stderr.fileno(), writer],
        )
        os.close(writer)
    answer = os.fdopen(reader, buffering=1)
    if not (pid := answer.readline()):
        answer.close()
        raise RuntimeError("the process that is forked has ended; what it said stands above")
    return Call(int(pid), answer)


@contextlib.contextmanager
def on_path(folder: Path) -> Iterator[str]:
    """Give a value of PATH whose `headrace` is such a call: for shells that run a page's commands.

    folder: where to write that program, which hands its arguments, folder, environment and output
    over and waits.
    """
    address = connection.arbitrary_address("AF_UNIX")
    program = folder / "headrace"
    program.write_text(f"#!{sys.executable} -IS\n{HAND_OVER.format(address=address)}")
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        thread = threading.Thread(target=_answer, args=(listener,))
        thread.start()
        try:
            yield os.pathsep.join(
                (str(folder), str(Path(sys.executable).parent), os.environ["PATH"])
            )
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


HAND_OVER = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [call], [1, 2])
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16)))
"""


def _answer(listener: socket.socket) -> None:
    """Start what programs of `on_path` hand over, one after the other, until the listener is
    shut down.
    """
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        with caller:
            text, files, _, _ = socket.recv_fds(caller, 1 << 20, 2)
            while more := caller.recv(1 << 16):
                text += more
            arguments, cwd, env = json.loads(text)
            with os.fdopen(files[0], "wb") as stdout, os.fdopen(files[1], "wb") as stderr:
                call = start(arguments, cwd=cwd, stdout=stdout, stderr=stderr, env=env)
            caller.send(str(call.wait()).encode())


_lock = threading.Lock()


@functools.cache
def _server() -> socket.socket:
    """The process that is forked, started by the first call; it ends with this one."""
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())],
            stdin=subprocess.DEVNULL,
            env=os.environ
            | ONE_THREAD
            | {"JE_ARROW_MALLOC_CONF": "background_thread:false"},  # nor has PyArrow any
            pass_fds=[its.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; returns the request in the fork, nothing when there will be no more of
    them.
    """
    signal.signal(signal.SIGCHLD, _reap)
    text, files = b"", []
    while True:
        more, received, _, _ = socket.recv_fds(requests, 1 << 16, 3)
        text, files = text + more, files + received
        if not more:
            return None
        if not text.endswith(b"\n"):
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if _fork_once_more(*files):
                requests.close()
                return dict(json.loads(text))
        for file in files:
            os.close(file)
        text, files = b"", []


def _fork_once_more(stdout: int, stderr: int, answer: int) -> bool:
    """True in the call's process; this one waits for it and tells how it ended."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.write(answer, f"{os.getpid()}\n".encode())
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for file in (stdout, stderr, answer):
            os.close(file)
        # as an interpreter opens them: those of the server may be a file, which has a position
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", buffering, stream.encoding, stream.errors, closefd=False)
            for number, buffering, stream in ((1, -1, sys.stdout), (2, 1, sys.stderr))
        )
        return True
    os.write(answer, f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def _reap(*_: Any) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def modules() -> list[str]:
    """Whatever a command may import."""
    found = list(IMPORTED)
    for folder in ("extract", "cache", "heads", "pipelines"):
        package = importlib.import_module(f"headrace.{folder}")
        names = [
            module.name
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        ]
        found += [
            name
            for name in names
            if not name.rpartition(".")[2].startswith(("_", "ends_with_driver"))
        ]
    return found


def main() -> None:
    """Serve; in a fork, be `python -m headrace.pipelines`."""
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        for name in modules():
            importlib.import_module(name)
        # It compiles for 8 s in every process that draws a map; test_map.py has what it does.
        sys.modules["umap"] = None  # type: ignore[assignment]
        assert threading.active_count() == 1
        gc.freeze()  # or every fork would look through all of this for garbage
        request = serve(requests)
    if request is None:
        os._exit(0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    searched = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.getcwd(), *searched, *[path for path in sys.path[1:] if path not in searched]]
    sys.argv = ["headrace", *request["arguments"]]
    exec(request["first"], {})
    fork_workers()
    program = functools.partial(runpy.run_module, PROGRAM, alter_sys=True)
    if request["script"]:
        program = functools.partial(runpy.run_path, request["script"])
    _end(_status_of(functools.partial(program, run_name="__main__")))


def fork_workers() -> None:
    """Start the server that workers are forked from (pipelines/cluster/fork_server.py) by a fork
    too, instead of an interpreter.
    """
    from headrace.pipelines.cluster.ends_with_driver import die_with_parent

    listener = socket.socket(socket.AF_UNIX)
    address = connection.arbitrary_address("AF_UNIX")
    listener.bind(address)
    listener.listen()
    alive, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        die_with_parent()
        try:
            forkserver.main(listener.fileno(), alive, [])
        finally:
            os._exit(0)
    os.close(alive)
    listener.close()
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = (
        address,
        held,
        pid,
    )


def _status_of(program: Callable[[], Any]) -> int:
    """What an interpreter would end with."""
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> None:
    """End as an interpreter does, but for destroying every object, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
