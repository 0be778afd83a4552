"""Clients that are clumsy, or worse: no client locks another out, or keeps the loop to itself."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from godwit.client.qmp import Client
from godwit.host.loop import Loop
from godwit.qmp import server as module
from godwit.qmp.server import Server
from qmp_bench import DEADLINE, Raw, Vm


class _Busy(Vm):
    """A VM that notes its commands, and whose command 'hold' waits for the test."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.done: list[str] = []
        self.holding, self.go_on = threading.Event(), threading.Event()

    def execute(self, name: str, arguments: Mapping[str, object]) -> object:
        if name == "hold":
            self.holding.set()
            assert self.go_on.wait(DEADLINE)
        self.done.append(name)
        return super().execute(name, arguments)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[_Busy]:
    with _Busy(tmp_path / "qmp") as vm:
        yield vm
    assert vm.errors == []


class _Timed:
    """A server in a loop that this test turns, with a time that it sets."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path, self.time, self._stack = path, 1000.0, stack
        self.loop = stack.enter_context(contextlib.closing(Loop()))
        self.loop.now = lambda: self.time
        self.server = stack.enter_context(Server(self.loop, path, lambda *_: None))

    def connect(self, data: bytes = b"") -> socket.socket:
        client = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(DEADLINE)
        client.connect(str(self.path))
        self.turn()
        if data:
            client.sendall(data)
            self.turn()
        return client

    def turn(self) -> None:
        for _ in range(5):
            self.loop.run_once(0)


@pytest.fixture
def timed(tmp_path: Path) -> Iterator[_Timed]:
    with contextlib.ExitStack() as stack:
        yield _Timed(tmp_path / "qmp", stack)


NEGOTIATE = b'{"execute": "qmp_capabilities"}'


def _read(client: socket.socket) -> bytes:
    """Read all that was sent, which ends if the connection did."""
    client.setblocking(False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while part := client.recv(65536):
            data += part
        data += b"END"
    return data


def test_who_does_not_negotiate_is_dropped_after_a_time(timed: _Timed) -> None:
    silent, negotiated = timed.connect(), timed.connect(NEGOTIATE)
    timed.time += module.NEGOTIATION_S / 2
    later = timed.connect()
    timed.time += module.NEGOTIATION_S / 2 + 0.1
    timed.turn()
    assert _read(silent).endswith(b"END")
    assert not _read(negotiated).endswith(b"END")
    assert not _read(later).endswith(b"END")
    timed.time += module.NEGOTIATION_S
    timed.turn()
    assert _read(later).endswith(b"END")
    assert len(timed.server._clients) == 1
    assert not timed.loop._timers, "nobody is left who has to negotiate"


def test_the_longest_idle_client_without_negotiation_makes_space(timed: _Timed) -> None:
    idle = []
    for _ in range(module.MAX_CLIENTS):
        idle.append(timed.connect())
        timed.time += 0.1
    idle[0].sendall(b" ")
    timed.turn()
    operator = timed.connect(NEGOTIATE)
    assert b'{"return":{}}' in _read(operator)
    assert [_read(one).endswith(b"END") for one in idle[:3]] == [False, True, False]
    assert len(timed.server._clients) == module.MAX_CLIENTS


def test_a_client_with_much_to_do_lets_others_have_their_turn(vm: _Busy) -> None:
    with Raw(vm.path) as greedy, Raw(vm.path) as other:
        greedy.sock.sendall(b'{"execute":"hold"}' + b'{"execute":"work"}' * 150)
        assert vm.holding.wait(DEADLINE)
        other.send({"execute": "other"})
        vm.go_on.set()
        assert other.read() == {"return": {"did": "other"}}
        for _ in range(151):
            assert "return" in greedy.read()
    assert len(vm.done) == 152
    assert vm.done.index("other") <= 2 * module.MAX_REQUESTS


def test_large_answers_to_pipelined_requests_all_arrive(vm: _Busy) -> None:
    request = b'{"execute":"big","arguments":{"size":800000}}'
    with Raw(vm.path) as client, Client.connect(vm.path, DEADLINE) as other:
        client.sock.sendall(request * 40)
        assert other.execute("still here", deadline=DEADLINE) == {"did": "still here"}
        # As long as nothing is read, no more is executed than fits.
        assert len(vm.done) < 10
        for _ in range(40):
            assert len(client.read()["return"]) == 800_000


def test_a_client_that_left_many_events_unread_is_still_served(vm: _Busy) -> None:
    with Raw(vm.path) as client:
        outbox = next(iter(vm.server._clients.values())).out
        while len(outbox) < 4 * module.PAUSE_AT:
            vm.call(lambda: vm.server.emit("NOISE", {"text": "x" * 10_000}))
        client.send({"execute": "stop"})
        while "stop" not in vm.done:
            vm.call(lambda: None)
        while "event" in (message := client.read()):
            pass
        assert message == {"return": {"did": "stop"}}


def test_requests_before_the_end_of_the_connection_are_executed(vm: _Busy) -> None:
    with Raw(vm.path) as client:
        client.sock.sendall(b'{"execute":"work"}' * 100)
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(100):
            assert client.read() == {"return": {"did": "work"}}
        assert client.read() is None


def test_a_flood_of_events_is_sent_in_turns_of_the_loop(tmp_path: Path) -> None:
    turns: list[object] = []
    with (
        contextlib.closing(Loop()) as loop,
        Server(loop, tmp_path / "q", lambda *_: 0) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(tmp_path / "q"))
        loop.run_once(0)
        client.sendall(NEGOTIATE)
        loop.run_once(0)
        call_soon = loop.call_soon
        loop.call_soon = lambda call: (turns.append(call), call_soon(call))
        for _ in range(1000):
            server.emit("NOISE")
        assert len(turns) == 1
