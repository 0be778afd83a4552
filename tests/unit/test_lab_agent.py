"""The agent's client against a server that loses, repeats and refuses."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from lab import agent
from lab.agent import Agent, Flow
from lab.errors import AgentError

Answer = Callable[[int, str], str | None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Agent]]:
    """Starts a server on loopback; its function gets the request's number and text."""
    sockets: list[socket.socket] = []
    agents: list[Agent] = []

    def start(answer: Answer) -> Agent:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 0))
        sockets.append(server)

        def loop() -> None:
            number = 0
            while True:
                data, peer = server.recvfrom(65536)
                if data == b"end":
                    return
                tag, _, command = data.decode().partition(" ")
                said = answer(number, command)
                number += 1
                if said is not None:
                    server.sendto(b"#0 stale", peer)
                    server.sendto(f"{tag} {said}".encode(), peer)

        thread = threading.Thread(target=loop)
        thread.start()
        threads.append(thread)
        agents.append(Agent("127.0.0.1", port=server.getsockname()[1]))
        return agents[-1]

    threads: list[threading.Thread] = []
    yield start
    for one in agents:
        one.close()
    for server, thread in zip(sockets, threads, strict=True):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"end", server.getsockname())
        thread.join()
        server.close()


def test_a_lost_request_is_repeated(
    serve: Callable[[Answer], Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_REPEAT_S", 0.01)
    assert serve(lambda number, _: "2" if number >= 2 else None).cpus() == 2


def test_silence_ends_at_the_deadline(serve: Callable[[Answer], Agent]) -> None:
    with pytest.raises(AgentError, match=r"no answer from 127\.0\.0\.1 to 'ping'"):
        serve(lambda *_: None).ping(timeout_s=0.05)


def test_answers_become_values(serve: Callable[[Answer], Agent]) -> None:
    answers = {
        "flows": "7 6 1 2 5 900\n8 1 0 0 0 0\n",
        "clock": "5000000001 17",
        "mem start 3": "ok 00ab",
        "hot check": "ok 12",
        "sh true": "out exit 3\nexit 0",
    }
    one = serve(lambda _, command: answers[command])
    flows = one.flows()
    assert flows[7] == Flow(7, 6, 1, 2, 5, 900)
    assert flows[7].lost(sent=6) == 1
    assert one.clock() == (5_000_000_001, 17)
    assert one.mem_start(3) == "00ab"
    assert one.hot_check() == 12
    assert one.sh("true") == "out exit 3\n"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("bad 00ff", "corrupt: bad 00ff"),
        ("error: no memory", "no memory"),
    ],
)
def test_bad_memory_and_refusals_raise(
    serve: Callable[[Answer], Agent], said: str, message: str
) -> None:
    with pytest.raises(AgentError, match=message):
        serve(lambda *_: said).mem_check()


def test_a_failed_command_raises_with_its_output(serve: Callable[[Answer], Agent]) -> None:
    with pytest.raises(AgentError, match="ended with 2: oh"):
        serve(lambda *_: "oh\nexit 2").sh("x")


def test_a_guest_hangs_once_it_is_silent(
    serve: Callable[[Answer], Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_SILENT_S", 0.05)
    asked: list[str] = []

    def answer(number: int, command: str) -> str | None:
        asked.append(command)
        return "ok" if number < 4 else None

    serve(answer).hang(18)
    assert asked[:5] == ["hang 18", "ping", "ping", "ping", "ping"]


def test_a_guest_that_does_not_hang_is_told(
    serve: Callable[[Answer], Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_HANGS_S", 0.05)
    with pytest.raises(AgentError, match="still answers"):
        serve(lambda *_: "ok").hang(18)
