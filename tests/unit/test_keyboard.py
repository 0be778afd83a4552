"""The console's input: pipes, files, the escape, and a guest that takes its time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.cli.keyboard import ESCAPE, Keyboard
from godwit.host.loop import Loop


class Guest:
    """Has room for ``room`` bytes, until it makes more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.data = b""
        self.on_room: Callable[[], None] | None = None

    def receive(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)

    def make_room(self, room: int) -> None:
        self.room = room
        if self.on_room is not None:
            self.on_room()


def turn(loop: Loop, times: int = 1) -> None:
    for _ in range(times):
        loop.run_once(0)


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def test_a_slow_guest_gets_all_of_a_pipe(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    loop, guest = Loop(), Guest(10)
    keyboard = Keyboard(loop, guest, reader, None)
    keyboard.start()
    text = os.urandom(60_000)
    os.write(writer, text)
    os.close(writer)
    turn(loop, 40)
    assert guest.data == text[:10]
    while len(guest.data) < len(text):
        before = len(guest.data)
        guest.make_room(25_000)
        turn(loop)
        assert len(guest.data) > before
    assert guest.data == text
    keyboard.close()
    assert guest.on_room is None


def test_reading_stops_far_ahead_of_the_guest(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    loop, guest = Loop(), Guest(0)
    Keyboard(loop, guest, reader, None).start()
    written = 0
    for _ in range(1000):
        try:
            written += os.write(writer, bytes(4096))
        except BlockingIOError:
            break
        turn(loop)
    else:
        pytest.fail("the input is read without end")
    assert written >= 1 << 20
    guest.make_room(1 << 21)
    turn(loop, 40)
    assert len(guest.data) == written


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "commands"
    path.write_bytes(b"uname -a\n" * 1000)
    loop, guest = Loop(), Guest(100)
    with path.open("rb") as file:
        Keyboard(loop, guest, file.fileno(), None).start()
        turn(loop, 10)
        guest.make_room(1 << 20)
        turn(loop, 10)
    assert guest.data == path.read_bytes()


def test_the_escape_is_found_behind_what_waits(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    loop, guest = Loop(), Guest(0)
    escapes: list[int] = []
    Keyboard(loop, guest, reader, lambda: escapes.append(1)).start()
    os.write(writer, b"a" * 5000)
    turn(loop, 3)
    assert not escapes
    os.write(writer, bytes((ord("b"), ESCAPE)) + b"lost")
    turn(loop, 3)
    assert escapes == [1]
    guest.make_room(10_000)
    turn(loop)
    assert guest.data == b"a" * 5000 + b"b"


def test_nothing_is_read_after_the_close(tmp_path: Path) -> None:
    path = tmp_path / "commands"
    path.write_bytes(b"x" * 100_000)
    loop, guest = Loop(), Guest(1 << 20)
    with path.open("rb") as file:
        keyboard = Keyboard(loop, guest, file.fileno(), None)
        keyboard.start()
        turn(loop, 3)
        keyboard.close()
        before = len(guest.data)
        turn(loop, 5)
    assert len(guest.data) == before < 100_000
