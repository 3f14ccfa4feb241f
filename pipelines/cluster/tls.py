"""Encryption between the processes of a cluster, which all have one certificate, made for one run
or by `headrace cluster tls`.
"""

import datetime
import os
from pathlib import Path

from dask.distributed import Security

from headrace.pipelines.errors import InvalidInput, OutputExists

CERTIFICATE, KEY = "certificate.pem", "key.pem"
SETTINGS = "dask.yaml"  # written beside them by `headrace cluster tls`
_VALID = datetime.timedelta(days=365)
_SKEW = datetime.timedelta(days=1)  # clocks of a cluster's nodes may differ


def make_certificate() -> tuple[str, str]:
    """Return a new private key and its self-signed certificate as PEM texts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    # An elliptic curve takes milliseconds; an RSA key of this strength a tenth of a second or more.
    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "headrace")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _VALID)
        .sign(private_key, hashes.SHA256())
    )
    private_pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private_pem.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


def own_security() -> Security:
    """Return Dask's security for a cluster that one process starts and ends, with a certificate of
    its own. Worker processes get the key when they are started.
    """
    # Loopback is not private: every user of the machine can connect, and a client that a scheduler
    # accepts can run code as its user.
    private_pem, certificate = make_certificate()
    return _security(private_pem, certificate)


def write_tls(folder: Path) -> Path:
    """Write a key and a self-signed certificate, valid for a year, into a folder that only its
    owner can read; existing ones are kept.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / KEY).exists() or not (folder / CERTIFICATE).exists():
        for file_name, text in zip((KEY, CERTIFICATE), make_certificate(), strict=True):
            (folder / file_name).unlink(missing_ok=True)
            # Only for the owner: scheduler, workers and clients accept this certificate alone, so
            # whoever has the key can run code on the cluster.
            descriptor = os.open(folder / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
    return folder


def require_own_folder(folder: Path) -> None:
    """Raise OutputExists for a folder with only some of the files of `headrace cluster tls`, which
    may then be another program's.
    """
    file_names = {name for name in (KEY, CERTIFICATE, SETTINGS) if (folder / name).exists()}
    if file_names and not {KEY, CERTIFICATE} <= file_names:
        raise OutputExists(
            f"{folder} holds {' and '.join(sorted(file_names))} without the rest of what this "
            f"command makes ({KEY}, {CERTIFICATE}, {SETTINGS}): they may be of something else, and "
            f"are not replaced. Give a new folder, such as {folder / 'headrace-tls'}"
        )


def folder_security(folder: Path | None) -> Security:
    """Return Dask's security from a folder that `write_tls` made. Raises InvalidInput."""
    if folder is None or not (folder / KEY).exists() or not (folder / CERTIFICATE).exists():
        raise InvalidInput(
            f"cluster.tls: {folder or 'no folder'} holds no {KEY} and {CERTIFICATE}. Off this "
            "machine headrace talks over TLS only. Make them with: headrace cluster tls FOLDER"
        )
    return _security(str(folder / KEY), str(folder / CERTIFICATE))


def _security(key: str, certificate: str) -> Security:
    """Return Dask's security. key, certificate: paths, or PEM text."""
    return Security(
        require_encryption=True,
        tls_ca_file=certificate,
        **{f"tls_{role}_key": key for role in ("client", "worker", "scheduler")},
        **{f"tls_{role}_cert": certificate for role in ("client", "worker", "scheduler")},
    )
