"""Machines that differ: the move is refused before the guest stops, and the reason is named."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched

from godwit.client.qmp import CommandRefused
from godwit.errors import PeerRefused
from godwit.migration.wire import messages
from godwit.migration.wire.sockets import SocketConnection
from godwit.spec.machine_types import DEFAULT
from lab.scenario import MAC

pytestmark = ONE_BACKEND

#: What is different at the destination -> the keys of ``Bench.run``, what the refusal names.
_DIFFERENT: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "RAM": ({"memory": "160M"}, ("RAM", "128 MiB", "160 MiB")),
    "vCPUs": ({"cpus": 1}, ("vCPUs: 2 at the source, 1 here",)),
    "MAC": ({"mac": "52:54:00:67:77:02"}, ("nic0, mac", MAC, "52:54:00:67:77:02")),
    "features": ({"nic": "guest-announce=off"}, ("nic0", "features", f"{1 << 21:#x}")),
    "machine type": ({"machine": "godwit-0.1"}, ("machine type", DEFAULT, "godwit-0.1")),
}


@pytest.fixture(scope="module")
def others(bench: Bench) -> Iterator[dict[str, Watched]]:
    """A destination for each difference; they start side by side."""
    guest = bench.traveller()
    host = bench.other(guest.vm)
    vms = {}
    for what, (keys, _) in _DIFFERENT.items():
        more = dict(keys)
        kind = more.pop("machine", None)
        argv = ["--incoming", "defer", *(["--machine", str(kind)] if kind else [])]
        vms[what] = bench.run(host, *argv, **more)  # type: ignore[arg-type]
    yield vms
    for vm in vms.values():
        vm.close()


@pytest.mark.parametrize("what", _DIFFERENT)
def test_another_machine_refuses_the_guest(
    bench: Bench, guest: Guest, others: dict[str, Watched], what: str
) -> None:
    source, target = guest.vm, others[what]
    source.start_migration(bench.listen(target))
    info = source.wait_migration()
    assert info["status"] == "failed"
    for word in _DIFFERENT[what][1]:
        assert word in info["error-desc"]
    assert not source.news("STOP", "RUN_STATE"), "the guest was stopped for a move that cannot be"
    assert source.status() == "running"
    assert target.status() == "inmigrate"
    guest.agent.ping()


def test_who_refused_one_guest_takes_the_right_one(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest)
    uri = bench.listen(target)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(uri.removeprefix("unix:"))
        stranger.settimeout(30)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1000)[0] == messages.Kind.REFUSED
    sock = socket.socket(socket.AF_UNIX)  # root's: a source would not give its guest to a user
    sock.connect(uri.removeprefix("unix:"))
    line = SocketConnection(sock)
    hello = messages.Hello(DEFAULT, bytes(16), 2, [(0, 64 << 20)], [], 1)
    line.send(messages.Kind.HELLO, hello)
    with pytest.raises(PeerRefused, match=r"RAM.*device nic0 .*missing at the source"):
        line.expect_struct(messages.Kind.WELCOME, messages.Welcome)
    line.close()
    assert target.status() == "inmigrate"

    bench.move(guest, target, uri)
    guest.agent.ping()


def test_commands_out_of_season_say_so(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    refusals = (
        ("migrate", {"uri": "tcp:192.0.2.9:4444"}, "--insecure"),
        ("migrate", {"uri": "ftp:x"}, "tls:HOST:PORT, tcp:HOST:PORT or file:PATH"),
        ("migrate-incoming", {"uri": "unix:/run/x"}, "not allowed in state 'running'"),
    )
    for command, arguments, words in refusals:
        with pytest.raises(CommandRefused, match=words):
            vm.qmp.execute(command, arguments)
    target = bench.target(guest)
    for command in ("cont", "stop", "migrate"):
        with pytest.raises(CommandRefused, match="not allowed in state 'inmigrate'"):
            target.qmp.execute(command, {"uri": "unix:/run/x"} if command == "migrate" else {})
    bench.move(guest, target)
    with pytest.raises(CommandRefused, match="not allowed in state 'running'"):
        target.qmp.execute("migrate-incoming", {"uri": "unix:/run/x"})
