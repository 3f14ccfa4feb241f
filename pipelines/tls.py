"""Encryption between the processes of a cluster: one certificate, made by `headrace cluster tls`, that all of them show."""

import os
from pathlib import Path

from dask.distributed import Security

from headrace.cache import HeadraceError

CERTIFICATE, KEY = "certificate.pem", "key.pem"


class TLSMissing(HeadraceError, ValueError):
    """Traffic would leave this machine in plain text."""


def write_tls(folder: Path) -> Path:
    """Make a key and a self-signed certificate in a folder that only its owner can read; what is there is kept.

    Whoever holds the key is let in: scheduler, workers and clients show the same certificate, and accept no other.
    Valid for a year. Raises TLSMissing where the library that makes certificates is absent.
    """
    try:
        made = Security.temporary()
    except ImportError:
        raise TLSMissing("making a certificate needs the library cryptography: pip install 'headrace[tls]'") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / KEY).exists() or not (folder / CERTIFICATE).exists():
        for name, text in ((KEY, made.tls_client_key), (CERTIFICATE, made.tls_client_cert)):
            (folder / name).unlink(missing_ok=True)
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
    return folder


def security(folder: Path | None) -> Security:
    """What Dask takes, from a folder that `write_tls` made. Raises TLSMissing."""
    if folder is None or not (folder / KEY).exists() or not (folder / CERTIFICATE).exists():
        raise TLSMissing(
            f"cluster.tls: {folder or 'no folder'} holds no {KEY} and {CERTIFICATE}. Off this machine headrace talks over "
            "TLS only. Make them with: headrace cluster tls FOLDER"
        )
    key, certificate = str(folder / KEY), str(folder / CERTIFICATE)
    return Security(
        require_encryption=True,
        tls_ca_file=certificate,
        **{f"tls_{role}_key": key for role in ("client", "worker", "scheduler")},
        **{f"tls_{role}_cert": certificate for role in ("client", "worker", "scheduler")},
    )
