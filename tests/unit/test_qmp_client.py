"""The client: a VM that answers, refuses, is not there yet or goes; and hostile servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.client import qmp
from godwit.client.errors import ClientError
from godwit.client.messages import MAX_MESSAGE, Messages
from godwit.client.qmp import Client, CommandRefused, VmGone
from godwit.errors import ConfigError, HostError
from godwit.qmp import server as module
from qmp_bench import DEADLINE, Vm


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def vm(path: Path) -> Iterator[Vm]:
    with Vm(path) as vm:
        yield vm
    assert vm.errors == []


def test_nobody_there(path: Path) -> None:
    with pytest.raises(VmGone, match=r"no VM answers on .*No such file"):
        Client.connect(path, DEADLINE)
    with pytest.raises(VmGone, match="no VM answers on"):
        Client.connect(path, 0.05, retry=True)


def test_it_waits_for_a_vm_that_is_about_to_come(path: Path) -> None:
    found: list[object] = []

    def connect() -> None:
        with Client.connect(path, DEADLINE, retry=True) as client:
            found.append(client.execute("hello", deadline=DEADLINE))

    thread = threading.Thread(target=connect)
    thread.start()
    with Vm(path):
        thread.join(DEADLINE)
    assert found == [{"did": "hello"}]


def test_somebody_there_who_says_nothing(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(VmGone, match=r"within 0\.05 s"):
            Client.connect(path, 0.05)


def test_a_vm_that_ends(path: Path) -> None:
    with Vm(path) as vm:
        client = Client.connect(path, DEADLINE)
        vm.call(vm.server.close)
        with pytest.raises(VmGone, match="closed the connection"):
            client.wait_event("NEVER", DEADLINE)
        with pytest.raises(VmGone):
            client.execute("anything", deadline=DEADLINE)
        client.close()
        client.close()


def test_an_event_that_does_not_come(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        with pytest.raises(VmGone, match=r"event NEVER.*within 0\.05 s"):
            client.wait_event("NEVER", 0.05)
        vm.server.emit("LATER")
        assert client.wait_event("LATER", DEADLINE)["event"] == "LATER"


def test_imports_stay_light() -> None:
    script = (
        "import sys, godwit.qmp.server, godwit.qmp.commands, godwit.client.qmp\n"
        "import godwit.announce.announcer\n"
        "print([name for name in ('asyncio', 'rich', 'qemu', 'ssl') if name in sys.modules])"
    )
    source = str(Path(module.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_it_executes_and_reports_refusals(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        assert client.execute("anything", {"a": 1}, DEADLINE) == {"did": "anything"}
        with pytest.raises(CommandRefused, match="it is wrong") as caught:
            client.execute("fail", deadline=DEADLINE)
        assert caught.value.error_class == "GenericError"
        assert len(client.execute("big", {"size": 600_000}, DEADLINE)) == 600_000


def test_wait_event_passes_over_what_it_does_not_look_for(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        for status in ("setup", "active", "completed"):
            vm.server.emit("MIGRATION", {"status": status})
            vm.server.emit("OTHER")
        event = client.wait_event("MIGRATION", DEADLINE, lambda data: data["status"] == "active")
        assert event["data"] == {"status": "active"}
        client.execute("nothing", deadline=DEADLINE)
        names = [(event["event"], event.get("data")) for event in client.events()]
        assert names == [("OTHER", None), ("MIGRATION", {"status": "completed"}), ("OTHER", None)]
        assert client.events() == []


# --- framing --------------------------------------------------------------------------------------
_NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40)
@given(
    st.lists(st.dictionaries(st.text(), _NESTED), max_size=4),
    st.sampled_from(["", "\r\n", "\n", " "]),
    st.sampled_from([None, 2]),
    st.integers(1, 7),
)
def test_messages_come_out_however_they_are_cut(
    values: list[dict[str, Any]], between: str, indent: int | None, size: int
) -> None:
    text = between.join(json.dumps(value, indent=indent) for value in values).encode()
    messages, found = Messages(), []
    for at in range(0, len(text), size):
        found += [message for message, _ in messages.feed(text[at : at + size])]
    assert found == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1]", "no object"),
        (b"}", "Expecting value"),
        (b'{"a": nothing}', "Expecting value"),
        (b"{]", "Expecting property name|Expecting"),
        (b'{"\xff": 1}', "utf-8"),
        (b"garbage {}", "Expecting value"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", "digits"),
    ],
)
def test_what_is_no_stream_of_objects(text: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(Messages().feed(text))


@pytest.mark.parametrize("start", [b'{"a":"', b"[", b" "])
def test_a_message_without_an_end_is_not_kept(start: bytes) -> None:
    messages, piece = Messages(), b"x" * 65536
    list(messages.feed(start))
    for _ in range((MAX_MESSAGE - len(start)) // len(piece)):
        assert list(messages.feed(piece)) == []
    with pytest.raises(ValueError, match="more than"):
        list(messages.feed(piece))


# --- servers of another kind ----------------------------------------------------------------------
_GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def _server(path: Path, talk: Talk, negotiates: bool = True) -> Iterator[None]:
    """A server whose one connection is ``talk``'s, up to where the client hangs up."""
    errors: list[BaseException] = []

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.settimeout(DEADLINE)
        with sock:
            try:
                if negotiates:
                    sock.sendall(_GREETING)
                    sock.sendall(b'{"return": {}, "id": %d}\r\n' % _ask(sock)["id"])
                talk(sock)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had enough
            except BaseException as error:
                errors.append(error)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield
        thread.join(DEADLINE)
    assert errors == []


def _ask(sock: socket.socket) -> dict[str, Any]:
    """The next request."""
    text = b""
    while not text.endswith(b"\n"):
        text += sock.recv(4096)
    request: dict[str, Any] = json.loads(text)
    return request


def _rest(sock: socket.socket) -> None:
    """Keep the connection until the client hangs up."""
    while sock.recv(4096):
        pass


def test_qemus_way_of_writing(path: Path) -> None:
    def talk(sock: socket.socket) -> None:
        request = _ask(sock)
        assert request["arguments"] == {"a": [1]}
        event = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}
        sock.sendall(json.dumps(event, indent=4).encode() + b"\r\n")
        reply = {"return": {"brace": '}"\\', "deep": [[{}]]}, "id": request["id"]}
        sock.sendall(json.dumps(reply, indent=4).encode())  # and no end of the line
        _rest(sock)

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        assert client.execute("any", {"a": [1]}, DEADLINE) == {"brace": '}"\\', "deep": [[{}]]}
        assert [event["event"] for event in client.events()] == ["STOP"]


def test_the_reply_to_a_command_that_was_given_up_is_nobody_elses(path: Path) -> None:
    late = threading.Event()

    def talk(sock: socket.socket) -> None:
        first = _ask(sock)
        assert late.wait(DEADLINE)
        second = _ask(sock)
        for request, value in ((first, "first"), (second, "second"), (second, "twice")):
            sock.sendall(json.dumps({"return": value, "id": request["id"]}).encode())
        third = _ask(sock)
        sock.sendall(b'{"return": "no id"}{"error": "no object", "id": %d}' % third["id"])
        _rest(sock)

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        with pytest.raises(VmGone, match=r"'slow': no answer .* within 0\.05 s"):
            client.execute("slow", deadline=0.05)
        late.set()
        assert client.execute("quick", deadline=DEADLINE) == "second"
        with pytest.raises(CommandRefused, match="no reason given"):
            client.execute("again", deadline=DEADLINE)


def _drip(sock: socket.socket) -> None:
    for byte in itertools.cycle(b' {"event": "DRIP"} '):
        sock.sendall(bytes([byte]))
        time.sleep(0.002)  # the pace is what is tested: each byte comes before any deadline


def _flood(sock: socket.socket) -> None:
    while True:
        sock.sendall(b'{"return": 1, "id": "another"}' * 1000)


@pytest.mark.parametrize("talk", [_drip, _flood])
def test_a_deadline_is_of_the_whole_call(path: Path, talk: Talk) -> None:
    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        for call in (
            lambda: client.execute("any", deadline=0.3),
            lambda: client.wait_event("NEVER", 0.3),
        ):
            began = time.monotonic()
            with pytest.raises(VmGone, match=r"within 0\.3 s"):
                call()
            assert time.monotonic() - began < 3
        assert client.wait_any("NEVER", 0.1) is None
        client.events()  # comes back, too


@pytest.mark.parametrize("talk", [_drip, _flood])
def test_a_greeting_that_does_not_come(path: Path, talk: Talk) -> None:
    with (
        _server(path, talk, negotiates=False),
        pytest.raises(VmGone, match="no VM answers on"),
    ):
        Client.connect(path, 0.3)


@pytest.mark.parametrize("greeting", [b'{"hello": 1}', b"SSH-2.0-OpenSSH {}", b"[]", b""])
def test_somebody_else_on_the_socket(path: Path, greeting: bytes) -> None:
    with (
        _server(path, lambda sock: sock.sendall(greeting), negotiates=False),
        pytest.raises(VmGone, match="no VM answers on"),
    ):
        Client.connect(path, DEADLINE)


@pytest.mark.parametrize("data", ["", "x" * 60_000])
def test_events_that_nobody_asks_for_are_not_kept_without_a_bound(path: Path, data: str) -> None:
    event = json.dumps({"event": "NOISE", "data": {"text": data}}).encode()
    many = 2 * min(qmp.MAX_EVENTS, qmp.MAX_EVENT_BYTES // len(event))

    def talk(sock: socket.socket) -> None:
        tag = _ask(sock)["id"]
        for _ in range(many):
            sock.sendall(event)
        sock.sendall(b'{"event": "LAST"}{"return": 7, "id": %d}' % tag)

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        assert client.execute("any", deadline=DEADLINE) == 7
        events = client.events()
        assert events[-1] == {"event": "LAST"}
        assert len(events) <= qmp.MAX_EVENTS
        assert len(events) * len(event) <= qmp.MAX_EVENT_BYTES + len(event)
        assert client.events_lost == many + 1 - len(events) > 0


def test_events_that_are_asked_for_may_be_any_number(vm: Vm) -> None:
    with Client.connect(vm.path, DEADLINE) as client:
        for number in range(3):
            vm.call(lambda: [vm.server.emit("COUNT", {"text": "x" * 100}) for _ in range(4000)])
            client.execute(f"after {number}", deadline=DEADLINE)
            assert len(client.events()) == 4000


def test_garbage_ends_the_connection(path: Path) -> None:
    def talk(sock: socket.socket) -> None:
        _ask(sock)
        sock.sendall(b'{"event": "STOP"}}')
        _rest(sock)

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        with pytest.raises(VmGone, match="what the VM sends is not QMP"):
            client.execute("any", deadline=DEADLINE)
        assert client.wait_event("STOP", DEADLINE)["event"] == "STOP"
        with pytest.raises(VmGone, match="what the VM sends is not QMP"):
            client.wait_any("STOP", DEADLINE)


def test_events_of_a_vm_that_has_gone_can_still_be_had(path: Path) -> None:
    gone = threading.Event()

    def talk(sock: socket.socket) -> None:
        sock.sendall(b'{"event": "STOP"}{"event": "SHUTDOWN", "data": {"guest": true}}')
        sock.close()
        gone.set()

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        assert gone.wait(DEADLINE)
        names = [event["event"] for event in client.events()]
        assert names == ["STOP", "SHUTDOWN"]
        assert client.events() == []
        with pytest.raises(VmGone, match="closed the connection"):
            client.wait_any("SHUTDOWN", DEADLINE)
    with pytest.raises(VmGone, match="closed the connection"):
        client.execute("any", deadline=DEADLINE)
    with Vm(path.with_name("other")) as vm:
        client = Client.connect(vm.path, DEADLINE)
        client.close()
        with pytest.raises(VmGone, match="the connection is closed"):
            client.execute("any", deadline=DEADLINE)


def test_who_hangs_up_in_the_middle_of_a_request(path: Path) -> None:
    def talk(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(b'{"event": "SHUTDOWN"}')

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        with pytest.raises(VmGone, match="closed the connection"):
            client.execute("any", {"text": "x" * 5_000_000}, DEADLINE)
        assert [event["event"] for event in client.events()] == ["SHUTDOWN"]


def test_a_vm_that_reads_nothing(path: Path) -> None:
    ended = threading.Event()

    def talk(sock: socket.socket) -> None:
        assert ended.wait(DEADLINE)

    with _server(path, talk), Client.connect(path, DEADLINE) as client:
        with pytest.raises(VmGone, match=r"within 0\.1 s"):
            client.execute("any", {"text": "x" * 5_000_000}, 0.1)
        ended.set()


def test_a_backlog_that_is_full_is_waited_for(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        began = time.monotonic()
        with pytest.raises(VmGone, match=r"no VM answers on .*temporarily unavailable"):
            Client.connect(path, 0.1)
        assert time.monotonic() - began >= 0.05


def test_a_path_that_is_too_long(path: Path) -> None:
    with pytest.raises(VmGone, match="path too long"):
        Client.connect(path / ("x" * 120), 0.1)


def test_the_errors_are_the_clients_and_godwits() -> None:
    assert issubclass(CommandRefused, ClientError)
    assert issubclass(VmGone, ClientError)
    assert issubclass(CommandRefused, ConfigError)
    assert issubclass(VmGone, HostError)


def test_no_descriptor_is_left(path: Path) -> None:
    with Vm(path) as vm:
        with Client.connect(vm.path, DEADLINE):
            pass
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            Client.connect(vm.path, DEADLINE).close()
        assert vm.errors == []
        with contextlib.suppress(VmGone):
            Client.connect(path.with_name("none"), 0.05, retry=True)
        with Client.connect(vm.path, DEADLINE) as client:
            client.execute("all of them are gone", deadline=DEADLINE)
            while len(vm.server._clients) > 1:
                client.execute("once more", deadline=DEADLINE)
        vm.call(lambda: None)
    assert len(os.listdir("/proc/self/fd")) <= before
