"""The console's writer: nothing is lost, and nobody waits for its reader."""

import fcntl
import os
import threading
from collections.abc import Iterator

import pytest

from godwit.hw.console import Console

DEADLINE = 20.0


class Pipe:
    """A pipe that holds a page, and what was read from it."""

    def __init__(self, *, blocking: bool = True) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.writer, blocking)
        self.data = b""

    def read(self, size: int) -> None:
        while len(self.data) < size:
            piece = os.read(self.reader, min(512, size - len(self.data)))
            assert piece
            self.data += piece

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_slow_reader_loses_nothing_and_holds_nobody_up(blocking: bool) -> None:
    pipe = Pipe(blocking=blocking)
    console = Console(pipe.writer)
    text = bytes(i & 0xFF for i in range(50_000))
    for start in range(0, len(text), 100):
        console.write(text[start : start + 100])  # returns, though nobody reads
    assert not console.flush(0)
    pipe.read(len(text))
    assert console.flush(DEADLINE)
    assert console.close(DEADLINE)
    assert pipe.data == text
    pipe.close()


def test_there_is_no_space_while_too_much_waits_and_it_reports_when_there_is(pipe: Pipe) -> None:
    console = Console(pipe.writer, limit=1000)
    again = threading.Event()
    console.on_space = again.set
    assert console.has_space()
    total = 0
    # The pipe and the thread's share take some; then it is full, and stays so.
    while console.has_space() or total < 20_000:
        console.write(b"x" * 500)
        total += 500
    assert not again.is_set()
    pipe.read(total)
    assert again.wait(DEADLINE)
    assert console.flush(DEADLINE)
    assert console.has_space()
    assert console.close(DEADLINE)


def test_a_flush_of_nothing_is_done(pipe: Pipe) -> None:
    console = Console(pipe.writer)
    assert console.flush(0)
    assert console.close(DEADLINE)


def test_close_says_when_not_all_was_written(pipe: Pipe) -> None:
    console = Console(pipe.writer)
    console.write(bytes(10_000))
    assert not console.close(0)


def test_a_reader_that_is_gone_is_no_error(pipe: Pipe) -> None:
    os.close(pipe.reader)
    pipe.reader = -1
    console = Console(pipe.writer)
    console.write(b"to nobody")
    assert console.flush(DEADLINE)
    console.write(b"again")
    assert console.close(DEADLINE)


def test_many_writers(pipe: Pipe) -> None:
    console = Console(pipe.writer)
    threads = [
        threading.Thread(target=lambda i=i: [console.write(bytes((i,))) for _ in range(1000)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    pipe.read(4000)
    for thread in threads:
        thread.join()
    assert [pipe.data.count(bytes((i,))) for i in range(4)] == [1000] * 4
    assert console.close(DEADLINE)
