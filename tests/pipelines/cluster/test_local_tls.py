"""A cluster on this machine lets nobody in but the process that started it: loopback belongs to
every user of a machine.
"""

import os
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from dask.distributed import Client, Security

from headrace.pipelines.cluster.clients import local_client
from headrace.pipelines.cluster.tls import KEY, folder_security, own_security, write_tls

NOBODY = 65534

# Run as another user: the libraries are loaded before, for that user may not be allowed to read
# them.
STRANGER = """
import os, sys
from dask.distributed import Client, Security
from headrace.pipelines.cluster.tls import own_security
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
for address, keys in ((sys.argv[1], own_security()), (sys.argv[1].replace("tls://", "tcp://"), Security())):
    try:
        with Client(address, security=keys, timeout="2s") as client:
            print("ran as", client.submit(os.getuid, pure=False).result(timeout=30))
    except OSError:
        print("refused")
"""


@pytest.fixture(scope="module")
def client():
    """Of a cluster of one worker, as a run starts it."""
    with local_client(1) as client:
        yield client


def processes():
    """This process and those that it has started."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening():
    """Addresses at which this process and its workers listen."""
    sockets = [
        connection for process in processes() for connection in process.net_connections("inet")
    ]
    return {connection.laddr for connection in sockets if connection.status == psutil.CONN_LISTEN}


def answer(address, context=None):
    """What a port says to someone who asks for a page, in plain text or over TLS; nothing where he
    is turned away.
    """
    plain = socket.create_connection(address, timeout=10)
    try:
        with context.wrap_socket(plain) if context else plain as end:
            end.sendall(b"GET /status HTTP/1.0\r\n\r\n")
            return end.recv(1000)
    except OSError:
        return b""


@pytest.mark.slow
def test_every_port_wants_the_certificate(client):
    """Scheduler, nanny and worker listen on loopback, and turn away who has no certificate; nobody
    serves pages.
    """
    assert client.submit(sum, [1, 2]).result(timeout=60) == 3
    assert client.scheduler.address.startswith("tls://127.0.0.1:")
    ports = listening()
    assert len(ports) == 3
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    for address in ports:
        assert address.ip == "127.0.0.1"
        assert answer(address) == b""
        assert answer(address, anyone) == b""
    assert not client.dashboard_link


@pytest.mark.slow
def test_another_certificate_is_refused(client):
    """Whoever makes a certificate of his own is not let in with it, and neither is one without."""
    address = client.scheduler.address
    for other, keys in (
        (address, own_security()),
        (address.replace("tls://", "tcp://"), Security()),
    ):
        with pytest.raises(OSError, match=r"Timed out|Connection reset|certificate"):
            Client(other, security=keys, timeout="2s")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(client):
    """A process of another user cannot connect to a run's scheduler, so none of its code runs."""
    code = STRANGER.format(uid=NOBODY)
    done = subprocess.run(
        [sys.executable, "-c", code, client.scheduler.address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["refused", "refused"], done.stderr


@pytest.mark.slow
def test_the_key_is_in_no_file_and_no_command(client):
    """Workers are handed the key through a pipe: nothing of it is left on the disk, in a command
    line or the environment.
    """
    (key,) = {client.security.tls_client_key}
    line = key.splitlines()[1]
    for process in processes():
        assert line not in " ".join([*process.cmdline(), *process.environ().values()])
    left = [
        path
        for path in Path(tempfile.gettempdir()).glob("tmp*/dask.pem")
        if path.read_text() == key
    ]
    assert left == []


def test_a_key_in_a_folder_is_for_its_owner_alone(tmp_path):
    """`write_tls` makes a folder and a key that only the owner can read, and keeps what
    is there.
    """
    folder = write_tls(tmp_path / "keys")
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / KEY).stat().st_mode & 0o777 == 0o600
    before = (folder / KEY).read_bytes()
    assert (write_tls(folder) / KEY).read_bytes() == before
    assert folder_security(folder).require_encryption


def test_keys_differ():
    """Each cluster has a key of its own."""
    assert own_security().tls_client_key != own_security().tls_client_key
