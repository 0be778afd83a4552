"""The server, asked by the stock client over a real socket; and by clients that misbehave."""

import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.client.qmp import Client
from godwit.errors import ConfigError, HostError
from godwit.host.loop import Loop
from godwit.qmp import server as module
from godwit.qmp.outbox import MAX_EVENTS
from godwit.qmp.server import Server
from qmp_bench import DEADLINE, Raw, Vm


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def vm(path: Path) -> Iterator[Vm]:
    with Vm(path) as vm:
        yield vm
    assert vm.errors == []


def test_events_reach_every_client_that_has_negotiated(vm: Vm) -> None:
    with (
        Client.connect(vm.path, DEADLINE) as first,
        Client.connect(vm.path, DEADLINE) as second,
        Raw(vm.path, negotiate=False) as silent,
    ):
        threading.Thread(target=vm.server.emit, args=("MIGRATION", {"status": "setup"})).start()
        for client in (first, second):
            event = client.wait_event("MIGRATION", DEADLINE)
            assert event["data"] == {"status": "setup"}
            assert set(event["timestamp"]) == {"seconds", "microseconds"}
        silent.send({"execute": "qmp_capabilities"})
        assert silent.read() == {"return": {}}
        vm.server.emit("NEXT")
        assert silent.read()["event"] == "NEXT"


def test_an_event_comes_before_the_reply_of_the_command_that_caused_it(vm: Vm) -> None:
    with Raw(vm.path) as client:
        client.send({"execute": "stop", "id": 1})
        heard = [client.read() for _ in range(3)]
    assert heard[0]["event"] == "RUN_STATE"
    assert heard[0]["data"] == {"from": "running", "to": "paused"}
    assert heard[1]["event"] == "STOP"
    assert heard[2] == {"return": {"did": "stop"}, "id": 1}


def test_events_of_one_thread_keep_their_order(vm: Vm) -> None:
    with Raw(vm.path) as client:

        def emit(thread: int) -> None:
            for number in range(100):
                vm.server.emit("COUNT", {"thread": thread, "number": number})

        threads = [threading.Thread(target=emit, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        heard = [client.read()["data"] for _ in range(400)]
        for thread in threads:
            thread.join(DEADLINE)
    for thread_number in range(4):
        mine = [data["number"] for data in heard if data["thread"] == thread_number]
        assert mine == list(range(100))


def test_the_reply_to_quit_and_the_last_event_still_leave(path: Path) -> None:
    with Vm(path) as vm, Raw(path) as client:
        client.send({"execute": "quit"})
        vm.thread.join(DEADLINE)
        vm.server.emit("SHUTDOWN", {"guest": False})
        vm.server.close()
        assert client.read() == {"return": {"did": "quit"}}
        assert client.read()["event"] == "SHUTDOWN"
        assert client.read() is None
        vm.server.emit("TOO_LATE")
        vm.server.close()
    assert not path.exists()


def test_a_client_that_does_not_read_loses_events_and_the_others_none(vm: Vm) -> None:
    with Raw(vm.path) as deaf, Client.connect(vm.path, DEADLINE) as client:
        data = {"text": "x" * 60_000}
        sent = 0
        outbox = vm.server._clients[min(vm.server._clients)].out
        while not outbox._lost:
            vm.server.emit("NOISE", data)
            client.wait_event("NOISE", DEADLINE)
            sent += 1
            assert sent < 1000
        vm.server.emit("RARE")
        assert sent * 60_000 > MAX_EVENTS
        assert client.execute("still here", deadline=DEADLINE) == {"did": "still here"}
        deaf.send({"execute": "and I"})
        heard = [deaf.read() for _ in range(sent + 2)]
    names = [message.get("event", "reply") for message in heard]
    assert names.count("NOISE") == sent - 1
    assert {name: names.count(name) for name in ("RARE", "EVENTS_LOST", "reply")} == dict.fromkeys(
        ("RARE", "EVENTS_LOST", "reply"), 1
    )
    (lost,) = (message["data"] for message in heard if message.get("event") == "EVENTS_LOST")
    assert lost == {"event": "NOISE", "count": 1}


def test_a_client_that_asks_without_reading_is_not_listened_to(vm: Vm) -> None:
    with Raw(vm.path) as greedy, Client.connect(vm.path, DEADLINE) as client:
        request = json.dumps({"execute": "big", "arguments": {"size": 10_000}}).encode()
        greedy.sock.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while asked < 100_000:
                asked += greedy.sock.send(request) == len(request)
        assert client.execute("still here", deadline=DEADLINE) == {"did": "still here"}
        # It is served on, once it reads.
        greedy.sock.settimeout(DEADLINE)
        assert asked * 10_000 > 2 * module.PAUSE_AT
        for _ in range(asked):
            assert len(greedy.read()["return"]) == 10_000


@pytest.mark.parametrize("garbage", [b"garbage\n", b"\xff", b'{"execute": "x",}', b"{]"])
def test_malformed_json_is_answered_and_ends_the_connection_only(vm: Vm, garbage: bytes) -> None:
    with Raw(vm.path) as client, Client.connect(vm.path, DEADLINE) as other:
        client.send({"execute": "before"})
        assert client.read() == {"return": {"did": "before"}}
        client.sock.sendall(garbage)
        assert client.read()["error"]["class"] == "GenericError"
        assert client.read() is None
        assert other.execute("still here", deadline=DEADLINE) == {"did": "still here"}
    with Client.connect(vm.path, DEADLINE) as again:
        assert again.execute("hello", deadline=DEADLINE) == {"did": "hello"}


def test_a_request_without_an_end_ends_the_connection_only(vm: Vm) -> None:
    with Raw(vm.path) as client, Client.connect(vm.path, DEADLINE) as other:
        # The server may hang up while some of it is still on its way.
        with contextlib.suppress(OSError):
            client.sock.sendall(b'"' + b"x" * (1 << 21))
        with contextlib.suppress(ConnectionError):
            assert "longer than" in client.read()["error"]["desc"]
            assert client.read() is None
        assert other.execute("still here", deadline=DEADLINE) == {"did": "still here"}


def test_who_hangs_up_after_asking_still_gets_the_reply(vm: Vm) -> None:
    with Raw(vm.path) as client:
        client.send({"execute": "last"})
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read() == {"return": {"did": "last"}}
        assert client.read() is None


def test_clients_that_come_and_go_leave_nothing_behind(vm: Vm) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Raw(vm.path) as client:
            client.sock.sendall(b'{"execute"')
    with Raw(vm.path):  # accepted after all of them
        pass
    for _ in range(1000):
        vm.call(lambda: None)
        if not vm.server._clients:
            break
    assert vm.server._clients == {}
    assert len(os.listdir("/proc/self/fd")) == before


def test_there_is_a_limit_to_clients(vm: Vm) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(module.MAX_CLIENTS):
            stack.enter_context(Raw(vm.path))
        one_more = stack.enter_context(Raw(vm.path, negotiate=False))
        assert one_more.greeting is None


def test_the_socket_is_for_its_owner_only(vm: Vm) -> None:
    assert stat.S_IMODE(vm.path.stat().st_mode) == 0o600


def test_no_descriptors_left_for_a_client(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Loop()) as loop, Server(loop, path, lambda *_: None) as server:
        real, tried = server._sock, []

        class Listener:
            def fileno(self) -> int:
                return real.fileno()

            def accept(self) -> None:
                tried.append("accept")
                raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(server, "_sock", Listener())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            for _ in range(5):
                loop.run_once(0)
            assert tried == ["accept"]
            monkeypatch.setattr(server, "_sock", real)
            later = loop.now() + 2
            monkeypatch.setattr(loop, "now", lambda: later)
            loop.run_once(0)
            loop.run_once(0)
            client.settimeout(DEADLINE)
            assert b"QMP" in client.recv(1000)


class TestThePath:
    def make(self, path: Path) -> None:
        with contextlib.closing(Loop()) as loop:
            Server(loop, path, lambda *_: None).close()

    def test_a_socket_that_was_left_behind_is_replaced(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        self.make(path)
        assert not path.exists()

    def test_a_socket_that_is_in_use_is_not(self, vm: Vm) -> None:
        with pytest.raises(ConfigError, match=r"a VM listens on .* choose another"):
            self.make(vm.path)
        with Client.connect(vm.path, DEADLINE) as client:
            assert client.execute("still here", deadline=DEADLINE) == {"did": "still here"}

    def test_a_file_is_not_removed(self, path: Path) -> None:
        path.write_text("precious")
        with pytest.raises(ConfigError, match="not a socket"):
            self.make(path)
        assert path.read_text() == "precious"

    def test_a_path_that_is_too_long(self, path: Path) -> None:
        with pytest.raises(ConfigError, match="too long"):
            self.make(path / ("x" * 120))

    def test_a_directory_that_is_not_there(self, path: Path) -> None:
        with pytest.raises(HostError, match="No such file or directory"):
            self.make(path / "qmp")

    def test_another_vms_socket_is_left_alone_at_the_end(self, path: Path) -> None:
        with contextlib.closing(Loop()) as loop:
            server = Server(loop, path, lambda *_: None)
            path.unlink()
            path.write_text("another's")
            server.close()
        assert path.read_text() == "another's"
