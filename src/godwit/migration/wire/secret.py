"""A shared secret by which the two ends of a connection prove themselves to each other.

The destination sends a nonce (CHALLENGE), the source a nonce of its own and a proof (AUTH), the
destination a proof (AUTH). A proof is HMAC-SHA256 of a role and both nonces, so that none can be
sent back to its maker, or again. The secret proves who began the connection. It protects nothing
that follows: on a network where others can change packets, use TLS, with or without a secret.
"""

from __future__ import annotations

import hmac  # it brings OpenSSL along: this module is for VMs that were given a secret
import os
import stat
from collections.abc import Callable

from godwit.errors import ConfigError, PeerRefused, StreamError
from godwit.spec import saved

from .messages import Auth, Challenge, Kind
from .stream import WaitingConnection

_NONCE = 32
#: Bytes of a secret: fewer could be guessed, more are no secret but a wrong file.
_SHORTEST, _LONGEST = 16, 4096


def read(path: str) -> bytes:
    """Return the secret in a file, without the line's end.

    Raises:
        ConfigError: the file cannot be read, is open to others, or has no secret.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"--migration-secret {path}: it is no regular file")
            if mode & 0o077:
                raise ConfigError(
                    f"--migration-secret {path}: others can read it; do 'chmod 600 {path}' and "
                    "choose another secret"
                )
            secret = file.read(_LONGEST + 1).rstrip(b"\r\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--migration-secret {path!r}: {reason}") from error
    if not _SHORTEST <= len(secret) <= _LONGEST:
        raise ConfigError(
            f"--migration-secret {path}: {len(secret)} bytes; give {_SHORTEST} to {_LONGEST} "
            f"('openssl rand -hex 32 > {path}' makes some)"
        )
    return secret


def challenge(connection: WaitingConnection, secret: bytes) -> Callable[[Kind, bytes], None]:
    """Send a nonce to a source, and return the judge of the answer, which answers in turn.

    The judge raises PeerRefused if the source does not know the secret.
    """
    ours = os.urandom(_NONCE)
    connection.send(Kind.CHALLENGE, Challenge(ours))

    def judge(kind: Kind, payload: bytes) -> None:
        auth = saved.decode(payload, Auth)
        if not _same(auth.proof, _proof(secret, b"source", ours, auth.nonce)):
            raise PeerRefused("the source does not know the --migration-secret")
        proof = _proof(secret, b"destination", ours, auth.nonce)
        connection.send(Kind.AUTH, Auth(proof=proof, nonce=b""))

    return judge


def prove(connection: WaitingConnection, secret: bytes) -> None:
    """Show a destination that the secret is known here, and have the same shown in turn.

    Raises:
        LinkLost: the destination closed the connection, or asks for no secret and stayed silent.
        PeerRefused, StreamError: the destination does not know the secret.
    """
    theirs = connection.expect_struct(Kind.CHALLENGE, Challenge).nonce
    ours = os.urandom(_NONCE)
    connection.send(Kind.AUTH, Auth(_proof(secret, b"source", theirs, ours), ours))
    answer = connection.expect_struct(Kind.AUTH, Auth)
    if not _same(answer.proof, _proof(secret, b"destination", theirs, ours)):
        raise StreamError("the destination does not know the --migration-secret")


def _proof(secret: bytes, role: bytes, destinations: bytes, sources: bytes) -> bytes:
    return hmac.digest(secret, b"godwit " + role + b"\0" + destinations + sources, "sha256")


def _same(one: bytes, other: bytes) -> bool:
    return hmac.compare_digest(one, other)
