"""Migrations by TLS: who is let in, who learns nothing, and a whole migration."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from godwit.cli.pki import pki
from godwit.errors import ConfigError, GodwitError, LinkLost
from godwit.migration.times import Times
from godwit.migration.wire import secret
from godwit.migration.wire.acceptor import Acceptor
from godwit.migration.wire.address import Address, Credentials
from godwit.migration.wire.messages import Kind
from godwit.migration.wire.tls import Tls
from migration_bench import IMPATIENT, Migration

TIMES = Times(silence=5.0, introduction=5.0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts of one authority, and one of another."""
    folder = tmp_path_factory.mktemp("pki")
    pki(str(folder), ["127.0.0.1", "beta"])
    pki(str(folder / "other"), ["127.0.0.1"])
    return folder


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    return number


def _migrate(
    tmp_path: Path, port: int, here: Credentials, there: Credentials, times: Times = IMPATIENT
) -> Migration:
    migration = Migration(tmp_path, times=times)
    migration.here.migrations._credentials = here
    migration.there.migrations._credentials = there
    uri = f"tls:127.0.0.1:{port}"
    migration.there.migrations.await_guest(uri, False)
    migration.here.migrations.migrate(uri, False)
    migration.finish()
    return migration


def test_a_guest_migrates_by_tls(tmp_path: Path, port: int, certificates: Path) -> None:
    here, there = (Credentials(Tls(str(certificates / name))) for name in ("beta", "127.0.0.1"))
    migration = _migrate(tmp_path, port, here, there)
    assert migration.running == (False, True)
    assert migration.here.statuses[-1] == "completed"
    memories = [side.machine.memory.view(0, 1 << 20) for side in (migration.here, migration.there)]
    assert bytes(memories[0]) == bytes(memories[1])
    migration.close()


def test_tls_and_a_secret_together(tmp_path: Path, port: int, certificates: Path) -> None:
    shared = b"0123456789abcdef"
    here, there = (
        Credentials(Tls(str(certificates / name)), shared) for name in ("beta", "127.0.0.1")
    )
    migration = _migrate(tmp_path, port, here, there)
    assert migration.running == (False, True)
    migration.close()


@pytest.mark.parametrize(
    ("here", "there", "here_peers", "there_peers", "says"),
    [
        ("other/127.0.0.1", "127.0.0.1", (), (), "accepted|unknown ca|closed|broke"),
        ("beta", "other/127.0.0.1", (), (), "not accepted"),
        ("127.0.0.1", "beta", (), (), "certificate is for beta, .*and not for 127.0.0.1"),
        ("beta", "127.0.0.1", ("gamma",), (), "not for gamma"),
        ("beta", "127.0.0.1", ("sha256:" + "0" * 64,), (), "not for sha256:0"),
        ("beta", "127.0.0.1", (), ("gamma",), "closed|broke"),
    ],
)
def test_a_wrong_certificate_is_turned_away_and_both_go_on(
    tmp_path: Path,
    port: int,
    certificates: Path,
    here: str,
    there: str,
    here_peers: tuple[str, ...],
    there_peers: tuple[str, ...],
    says: str,
) -> None:
    migration = _migrate(
        tmp_path,
        port,
        Credentials(Tls(str(certificates / here), here_peers)),
        Credentials(Tls(str(certificates / there), there_peers)),
    )
    assert migration.running == (True, False)
    assert migration.here.statuses[-1] == "failed"
    assert re.search(says, str(migration.source.report.error)), migration.source.report.error
    assert not migration.there.failures  # it waits on, and takes the right one
    right = Credentials(Tls(str(certificates / "127.0.0.1"), ["127.0.0.1", "beta"]))
    if "other" not in there and not there_peers:
        migration.here.migrations._credentials = right
        migration.here.migrations.migrate(f"tls:127.0.0.1:{port}", False)
        migration.finish()
        assert migration.running == (False, True)
    migration.close()


def test_names_and_fingerprints_of_peers_are_taken(
    tmp_path: Path, port: int, certificates: Path
) -> None:
    cert = certificates / "127.0.0.1" / "cert.pem"
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(cert), "-noout", "-fingerprint", "-sha256"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    fingerprint = "sha256:" + shown.strip().rpartition("=")[2]
    here = Credentials(Tls(str(certificates / "beta"), ["nobody", fingerprint]))
    there = Credentials(Tls(str(certificates / "127.0.0.1"), ["BETA"]))
    migration = _migrate(tmp_path, port, here, there)
    assert migration.running == (False, True)
    migration.close()


@pytest.fixture
def acceptor(port: int, certificates: Path) -> Iterator[Acceptor]:
    there = Credentials(Tls(str(certificates / "127.0.0.1")))
    address = Address(f"tls:127.0.0.1:{port}", False, TIMES, there)
    acceptor = Acceptor(address, TIMES, lambda *_: None)
    yield acceptor
    acceptor.close()


@pytest.mark.parametrize("with_certificate", [False, True])
def test_a_client_without_a_certificate_learns_nothing(
    port: int, acceptor: Acceptor, certificates: Path, with_certificate: bool
) -> None:
    """Neither a fact of the machine nor even a refusal."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "ca" / "ca.pem")
    if with_certificate:
        folder = certificates / "other" / "127.0.0.1"
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    found: list[bytes] = []

    def client() -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(30)
            with context.wrap_socket(sock) as tls:
                tls.sendall(b"x" * 100)
                found.append(tls.recv(100))

    thread = threading.Thread(target=client)
    thread.start()
    while thread.is_alive():
        assert acceptor.next(0.05) is None
    thread.join()
    assert b"".join(found) == b""


def test_tls_below_1_3_is_refused(port: int, acceptor: Acceptor, certificates: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "ca" / "ca.pem")
    folder = certificates / "beta"
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    errors: list[OSError] = []

    def client() -> None:
        try:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                context.wrap_socket(sock)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    while thread.is_alive():
        assert acceptor.next(0.05) is None
    assert errors


def test_a_plain_source_at_a_tls_destination_fails_and_is_told_soon(
    tmp_path: Path, port: int, acceptor: Acceptor
) -> None:
    thread = threading.Thread(target=acceptor.next, args=(1.0,))
    thread.start()
    plain = Address(f"tcp:127.0.0.1:{port}", False, TIMES).connect()
    plain.send(Kind.ROUND)
    with pytest.raises(GodwitError):
        plain.expect(Kind.READY)
    plain.close()
    thread.join()


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_files_that_are_none(
    tmp_path: Path, certificates: Path, name: str, content: bytes | None
) -> None:
    for path in (certificates / "beta").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "key.pem").chmod(0o600)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="--tls"):
        Tls(str(tmp_path))


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, certificates: Path) -> None:
    for path in (certificates / "beta").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Tls(str(tmp_path))


@pytest.mark.parametrize("peer", ["sha256:12", "sha256:" + "g" * 64])
def test_fingerprints_that_are_none(certificates: Path, peer: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        Tls(str(certificates / "beta"), [peer])


def test_tls_without_certificates_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="--tls DIR"):
        Address("tls:127.0.0.1:1", False)


@pytest.mark.parametrize("host", ["", "a b", "../x", "ca", "a/b", "x" * 300, "-x"])
def test_hosts_for_which_no_certificate_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="name or address"):
        pki(str(tmp_path), [host])
    assert not list(tmp_path.iterdir())


def test_a_second_certificate_for_a_host_is_not_made(certificates: Path) -> None:
    before = (certificates / "beta" / "key.pem").read_bytes()
    with pytest.raises(ConfigError, match="has a key already"):
        pki(str(certificates), ["beta"])
    assert (certificates / "beta" / "key.pem").read_bytes() == before


# --- secrets in files -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (b"short\n", 0o600, "5 bytes"),
        (b"", 0o600, "0 bytes"),
        (b"x" * 5000, 0o600, "bytes"),
        (b"x" * 64, 0o644, "chmod 600"),
    ],
)
def test_secrets_that_are_none(tmp_path: Path, content: bytes, mode: int, says: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        secret.read(str(path))


def test_secrets_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent"), str(tmp_path), "/dev/zero", "/tmp/a\0b"):
        with pytest.raises(ConfigError, match="--migration-secret"):
            secret.read(path)


def test_a_secret_is_a_files_line(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef0\n")
    path.chmod(0o600)
    assert secret.read(str(path)) == b"0123456789abcdef0"


def test_a_connection_that_breaks_in_the_handshake_is_lost(port: int, certificates: Path) -> None:
    here = Credentials(Tls(str(certificates / "beta")))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(LinkLost):
            Address(f"tls:127.0.0.1:{port}", False, TIMES, here).connect()
        thread.join()


def test_a_cancel_sends_nothing_in_clear(tmp_path: Path, port: int, certificates: Path) -> None:
    """SSLSocket.shutdown forgets its keys: what was sent behind it went out as it was."""
    here, there = (Credentials(Tls(str(certificates / name))) for name in ("beta", "127.0.0.1"))
    migration = Migration(tmp_path, times=Times())
    migration.here.migrations._credentials = here
    migration.there.migrations._credentials = there
    mark = b"GUEST-SECRET----"
    migration.here.machine.memory.view(8 << 20, 16 << 20)[:] = mark * (1 << 20)
    wire = bytearray()
    enough, go_on = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as front:
        migration.there.migrations.await_guest(f"tls:127.0.0.1:{port}", False)
        uri = f"tls:127.0.0.1:{front.getsockname()[1]}"
        migration.here.migrations.migrate(uri, False)
        near = front.accept()[0]
        far = socket.create_connection(("127.0.0.1", port))

        def onward() -> None:
            with suppress(OSError):
                while data := near.recv(1 << 16):
                    wire.extend(data)
                    if len(wire) > 1 << 20 and not enough.is_set():
                        enough.set()
                        go_on.wait(30)
                    with suppress(OSError):
                        far.sendall(data)

        def back() -> None:
            with suppress(OSError):
                while data := far.recv(1 << 16):
                    near.sendall(data)

        threads = [threading.Thread(target=way) for way in (onward, back)]
        for thread in threads:
            thread.start()
        assert enough.wait(30)
        assert migration.source.cancel()
        go_on.set()
        migration.source.join(30)
        assert not migration.source.active
        far.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(30)
    assert migration.here.statuses[-1] == "cancelled"
    assert mark not in wire
    assert b"cancelled" not in wire
    for sock in (near, far):
        sock.close()
    migration.close()


def test_addresses_are_compared_as_addresses(tmp_path: Path) -> None:
    from godwit.migration.wire.tls import _peer

    assert _peer("::1") == _peer("0:0:0:0:0:0:0:1") == _peer("[::1]")
    assert _peer("2001:DB8:0::1") == _peer("2001:db8::1")
    assert _peer("127.0.0.1") == "127.0.0.1"
    assert _peer("Host.Example") == "host.example"


def test_a_guest_migrates_to_an_ipv6_address(tmp_path: Path) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip("no IPv6 here")
    pki(str(tmp_path / "pki"), ["::1"])
    both = Credentials(Tls(str(tmp_path / "pki" / "::1")))
    migration = Migration(tmp_path)
    for side in (migration.here, migration.there):
        side.migrations._credentials = both
    migration.there.migrations.await_guest(f"tls:[::1]:{port}", False)
    migration.here.migrations.migrate(f"tls:[::1]:{port}", False)
    migration.finish()
    assert migration.running == (False, True), migration.source.report.error
    migration.close()


def test_a_slow_link_is_no_silent_one(certificates: Path) -> None:
    """OpenSSL reports a piece once all of it is on its way: pieces are short."""
    tls = Tls(str(certificates / "127.0.0.1"))
    now = 0.0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    sizes: list[int] = []

    def serve() -> None:
        with suppress(OSError):
            wrapped = tls.server.wrap_socket(far, server_side=True)
            while wrapped.recv(1 << 16):
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    connection = tls.connection(sock, Times(now=lambda: now), "127.0.0.1")
    connection.handshake()
    real = connection._tls.send

    def send(data: memoryview) -> int:
        sizes.append(len(data))
        return real(data)

    connection._tls.send = send  # type: ignore[method-assign,assignment]
    connection.send_parts([b"header", memoryview(bytearray(4 << 20))])
    assert max(sizes) <= 128 << 10
    connection.interrupt()
    thread.join(30)
    connection.close()
    far.close()
