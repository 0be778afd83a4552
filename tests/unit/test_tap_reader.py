"""The reader of a tap, whose owner may stop it while the loop comes to its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

from godwit.host.loop import Loop
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.nic.tap_reader import TapReader
from tests.fakes.tap import FakeTap


class _Stopped(TapReader):
    """A reader that another thread stops right after it was found to run."""

    looks: list[Callable[[], None] | None]

    @property
    def _readable(self) -> Callable[[], None] | None:
        return self.looks.pop(0) if self.looks else None

    @_readable.setter
    def _readable(self, readable: Callable[[], None] | None) -> None:
        self.looks = [readable]


def test_a_reader_that_is_stopped_in_the_middle_of_its_turn_calls_nobody_who_is_gone() -> None:
    """A vCPU reset the device between two lines of the loop's: None was called."""
    loop, tap = Loop(), FakeTap()
    backlog = RxBacklog(tap, threading.RLock())
    reader = _Stopped(tap, backlog, loop, lambda frame: True, lambda frame: True)
    calls: list[int] = []
    reader.looks = [lambda: calls.append(1)]
    reader._turn_again()
    reader._turn_again()
    assert calls == [1]
    tap.close()
    loop.close()
