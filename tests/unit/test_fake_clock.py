"""The fake clock on which announcements are tested."""

import pytest

from tests.fakes.clock import FakeClock


def test_the_clock_makes_calls_in_order_and_at_their_time() -> None:
    clock = FakeClock(start=0.0)
    seen: list[tuple[str, float]] = []

    def first() -> None:
        seen.append(("first", clock.now()))
        clock.call_later(0.5, lambda: seen.append(("made by first", clock.now())))

    clock.call_later(2.0, lambda: seen.append(("last", clock.now())))
    clock.call_later(1.0, first)
    clock.call_later(1.0, lambda: seen.append(("same time", clock.now())))
    clock.call_later(1.2, lambda: seen.append(("cancelled", clock.now()))).cancel()
    clock.advance(0.9)
    assert seen == []
    assert clock.pending == pytest.approx([0.1, 0.1, 1.1])
    clock.advance(0.7)
    clock.advance(5)
    assert seen == [("first", 1.0), ("same time", 1.0), ("made by first", 1.5), ("last", 2.0)]
    assert clock.now() == pytest.approx(6.6)


def test_the_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="forward"):
        FakeClock().advance(-1)
