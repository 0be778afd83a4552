"""``godwit pki``: an authority and certificates for the hosts of a first try, made by openssl.

Whoever has an authority already needs none of this: ``--tls`` takes any three files of these names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from godwit.errors import ConfigError, HostError

#: Days for which an authority, and a host's certificate, are valid.
_CA_DAYS, _HOST_DAYS = 3650, 825
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_EXTENSIONS = """basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectAltName={kind}:{name}
"""


def pki(folder: str, hosts: list[str]) -> int:
    """Make ``folder``/ca unless present, and ``folder``/HOST for each host, and return 0.

    Raises:
        ConfigError: a host's name makes no sense, or a host has files already.
        HostError: openssl is missing or fails.
    """
    kinds = {host: _kind(host) for host in hosts}
    root = Path(folder)
    before = os.umask(0o077)  # private keys are among the files
    try:
        authority = _authority(root / "ca")
        for host, kind in kinds.items():
            _certify(authority, root / host, host, kind)
            print(f"{root / host}: for the VMs on {host}: godwit run --tls {root / host} ...")
    except OSError as error:
        raise ConfigError(f"godwit pki: {error.filename or folder}: {error.strerror}") from error
    finally:
        os.umask(before)
    print(f"{authority}: the authority; keep ca-key.pem where no VM is", file=sys.stderr)
    return 0


def _kind(host: str) -> str:
    import ipaddress

    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return "IP"
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host) or host == "ca":
        raise ConfigError(
            f"host {host!r}: give the name or address that stands in 'migrate tls:HOST:PORT'"
        )
    return "DNS"


def _authority(folder: Path) -> Path:
    """Return the folder of the authority, made if absent."""
    if not (folder / "ca-key.pem").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            *("req", "-x509", *_KEY, "-days", str(_CA_DAYS), "-subj", "/CN=Godwit migrations"),
            *("-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"),
            *("-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", str(folder / "ca-key.pem"), "-out", str(folder / "ca.pem")),
        )
    return folder


def _certify(authority: Path, folder: Path, host: str, kind: str) -> None:
    """Make a host's key and certificate."""
    if (folder / "key.pem").exists():
        raise ConfigError(f"'{folder}' has a key already; delete the folder to make another")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        request, extensions = Path(scratch) / "request.pem", Path(scratch) / "extensions"
        extensions.write_text(_EXTENSIONS.format(kind=kind, name=host))
        _openssl(
            *("req", *_KEY, "-subj", f"/CN={host[:64]}"),
            *("-keyout", str(folder / "key.pem"), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-in", str(request), "-days", str(_HOST_DAYS)),
            *("-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca-key.pem")),
            *("-CAcreateserial", "-extfile", str(extensions), "-out", str(folder / "cert.pem")),
        )
    (folder / "ca.pem").write_bytes((authority / "ca.pem").read_bytes())


def _openssl(*arguments: str) -> None:
    try:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise HostError("openssl is missing; install it (Debian: apt install openssl)") from error
    except subprocess.TimeoutExpired as error:
        raise HostError("openssl took more than a minute") from error
    if done.returncode:
        raise HostError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")
