"""``godwit console``: bytes both ways, ends of either side, and what it refuses."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from godwit.cli.console import carry
from godwit.cli.main import main


class Ends(NamedTuple):
    """Both ends of a carrier: the guest's socket, and the user's pipes."""

    guest: socket.socket
    keys: int
    screen: int
    thread: threading.Thread


def _carrier(escape: bool) -> Iterator[Ends]:
    mine, guest = socket.socketpair()
    source, keys = os.pipe()
    screen, sink = os.pipe()
    thread = threading.Thread(
        target=carry, args=(mine, source, sink), kwargs={"escape": escape}, daemon=True
    )
    thread.start()
    guest.settimeout(10)
    yield Ends(guest, keys, screen, thread)
    guest.close()
    thread.join(10)
    assert not thread.is_alive()
    mine.close()
    for fd in (source, keys, screen, sink):
        try:
            os.close(fd)
        except OSError:
            pass


@pytest.fixture
def piped() -> Iterator[Ends]:
    yield from _carrier(escape=False)


@pytest.fixture
def typed() -> Iterator[Ends]:
    yield from _carrier(escape=True)


def test_bytes_go_both_ways(piped: Ends) -> None:
    os.write(piped.keys, b"to the guest \x1d")
    assert piped.guest.recv(100) == b"to the guest \x1d"
    piped.guest.sendall(b"and back")
    assert os.read(piped.screen, 100) == b"and back"


def test_the_end_of_the_input_is_passed_on_and_the_answer_waited_for(piped: Ends) -> None:
    os.close(piped.keys)
    assert piped.guest.recv(100) == b""
    piped.guest.sendall(b"late")
    assert os.read(piped.screen, 100) == b"late"


def test_it_ends_with_the_guest(piped: Ends) -> None:
    piped.guest.close()
    piped.thread.join(10)
    assert not piped.thread.is_alive()


def test_a_guest_that_only_talks_does_not_stop_the_escape(typed: Ends) -> None:
    typed.guest.setblocking(False)
    try:
        while True:  # more than all buffers on the way hold
            typed.guest.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    os.write(typed.keys, b"x" * 4096)
    os.write(typed.keys, b"\x1d")
    typed.thread.join(10)
    assert not typed.thread.is_alive()


def test_a_reader_that_left_ends_it(piped: Ends) -> None:
    os.close(piped.screen)
    piped.guest.sendall(b"for nobody")
    piped.thread.join(10)
    assert not piped.thread.is_alive()


def test_a_reset_ends_it(piped: Ends) -> None:
    piped.guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    os.write(piped.keys, b"unread")
    piped.guest.close()
    piped.thread.join(10)
    assert not piped.thread.is_alive()


def test_the_escape_leaves(typed: Ends) -> None:
    os.write(typed.keys, b"\x1d")
    typed.thread.join(10)
    assert not typed.thread.is_alive()


@pytest.mark.parametrize("port", ["-1", "4294967296", "ssh", ""])
def test_a_port_is_a_number(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["console", "--qmp", "/nowhere", "--port", port])
    assert ended.value.code == 2
    assert "no port" in capsys.readouterr().err or port == "-1"


def test_no_vm_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["console", "--qmp", "/nowhere/a.qmp", "--port", "22"]) == 1
    assert "/nowhere/a.qmp" in capsys.readouterr().err
