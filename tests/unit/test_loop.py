"""The event loop: order of timers, calls from threads, descriptors that come and go."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from godwit.host.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def _run(loop: Loop, deadline: float = 10.0) -> None:
    """Run until something stops the loop; a test that hangs ends by a timer."""
    loop.call_later(deadline, loop.stop)
    loop.run()


def test_timers_are_called_in_the_order_of_their_time(loop: Loop) -> None:
    called: list[str] = []
    loop.call_later(0.02, lambda: called.append("late"))
    loop.call_later(0.0, lambda: called.append("soon"))
    loop.call_later(0.01, lambda: called.append("between"))
    loop.call_later(0.03, loop.stop)
    _run(loop)
    assert called == ["soon", "between", "late"]


def test_timers_of_the_same_time_are_called_in_the_order_they_were_set(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    now = 5.0
    monkeypatch.setattr(loop, "now", lambda: now)
    for number in range(20):
        loop.call_later(1.0, lambda number=number: called.append(number))
    loop.run_once(0)
    assert called == []
    now = 6.0
    loop.run_once(0)
    assert called == list(range(20))


def test_a_timer_waits_for_its_time(loop: Loop) -> None:
    before = loop.now()
    loop.call_later(0.02, loop.stop)
    _run(loop)
    assert loop.now() - before >= 0.02


def test_a_cancelled_timer_does_nothing_and_may_be_cancelled_again(loop: Loop) -> None:
    called: list[str] = []
    timer = loop.call_later(0.0, lambda: called.append("cancelled"))
    kept = loop.call_later(0.0, lambda: called.append("kept"))
    timer.cancel()
    timer.cancel()
    loop.run_once(0)
    kept.cancel()
    assert called == ["kept"]


def test_a_timer_may_cancel_another_that_is_due_as_well(loop: Loop) -> None:
    called: list[str] = []
    second = None

    def first() -> None:
        assert second is not None
        second.cancel()
        called.append("first")

    loop.call_later(0.0, first)
    second = loop.call_later(0.0, lambda: called.append("second"))
    loop.run_once(0)
    assert called == ["first"]


def test_call_soon_from_threads_keeps_each_threads_order(loop: Loop) -> None:
    called: list[tuple[int, int]] = []
    idents: set[int] = set()
    done = threading.Barrier(4, action=lambda: loop.call_soon(loop.stop))

    def calls(thread: int) -> None:
        for number in range(500):

            def record(number: int = number) -> None:
                called.append((thread, number))
                idents.add(threading.get_ident())

            loop.call_soon(record)
        done.wait(10)

    threads = [threading.Thread(target=calls, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    _run(loop)
    for thread in threads:
        thread.join(10)
    for thread in range(4):
        assert [n for t, n in called if t == thread] == list(range(500))
    assert idents == {threading.get_ident()}


def test_call_soon_wakes_a_loop_that_waits(loop: Loop) -> None:
    waiting = threading.Event()
    loop.call_soon(waiting.set)

    def wake() -> None:
        assert waiting.wait(10)
        loop.call_soon(loop.stop)

    thread = threading.Thread(target=wake)
    thread.start()
    before = loop.now()
    _run(loop)
    thread.join(10)
    assert loop.now() - before < 9


def test_call_later_from_a_thread_wakes_a_loop_that_waits(loop: Loop) -> None:
    waiting = threading.Event()
    loop.call_soon(waiting.set)

    def wake() -> None:
        assert waiting.wait(10)
        loop.call_later(0.0, loop.stop)

    thread = threading.Thread(target=wake)
    thread.start()
    before = loop.now()
    _run(loop)
    thread.join(10)
    assert loop.now() - before < 9


def test_a_call_that_makes_another_does_not_starve_the_rest(loop: Loop) -> None:
    rounds: list[int] = []

    def again() -> None:
        rounds.append(len(rounds))
        loop.call_soon(again)

    loop.call_soon(again)
    loop.run_once(0)
    loop.run_once(0)
    assert rounds == [0, 1]


def test_readable_and_writable(loop: Loop) -> None:
    left, right = socket.socketpair()
    with left, right:
        seen: list[str] = []

        def readable() -> None:
            seen.append(left.recv(10).decode())

        loop.watch(left.fileno(), readable, lambda: seen.append("writable"))
        loop.run_once(0)
        right.send(b"hello")
        loop.watch(left.fileno(), readable)
        loop.run_once(1)
        loop.unwatch(left.fileno())
        right.send(b"nobody listens")
        loop.run_once(0)
    assert seen == ["writable", "hello"]


def test_unwatch_inside_a_callback_of_the_same_descriptor(loop: Loop) -> None:
    left, right = socket.socketpair()
    with left, right:
        seen: list[str] = []

        def readable() -> None:
            seen.append("readable")
            loop.unwatch(left.fileno())

        loop.watch(left.fileno(), readable, lambda: seen.append("writable"))
        right.send(b"x")
        loop.run_once(1)
        loop.run_once(0)
        loop.unwatch(left.fileno())
    assert seen == ["readable"]


def test_unwatch_inside_the_callback_of_another_that_is_ready_too(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    seen: list[int] = []

    def readable(number: int) -> None:
        seen.append(number)
        for own, _ in pairs:
            loop.unwatch(own.fileno())

    for number, (own, _) in enumerate(pairs):
        loop.watch(own.fileno(), lambda number=number: readable(number))
    for _, peer in pairs:
        peer.send(b"x")
    # Both are ready in one wait, and whichever comes first ends both.
    loop.run_once(1)
    loop.run_once(0)
    for own, peer in pairs:
        own.close()
        peer.close()
    assert len(seen) == 1


def test_a_hang_up_is_readable(loop: Loop) -> None:
    left, right = socket.socketpair()
    with left:
        seen: list[bytes] = []
        loop.watch(left.fileno(), lambda: seen.append(left.recv(1)))
        right.close()
        loop.run_once(1)
        loop.unwatch(left.fileno())
    assert seen == [b""]


def test_an_error_goes_to_its_handler_and_the_loop_goes_on() -> None:
    errors: list[BaseException] = []
    loop = Loop(errors.append)
    called: list[str] = []
    read, write = os.pipe()
    try:
        loop.watch(read, lambda: 1 // 0)
        os.write(write, b"x")
        loop.call_soon(lambda: [][0])
        loop.call_later(0.0, lambda: {}["missing"])
        loop.call_later(0.0, lambda: called.append("after"))
        loop.run_once(0)
    finally:
        loop.unwatch(read)
        os.close(read)
        os.close(write)
        loop.close()
    assert [type(error) for error in errors] == [ZeroDivisionError, IndexError, KeyError]
    assert called == ["after"]


def test_without_a_handler_an_error_leaves_the_loop(loop: Loop) -> None:
    loop.call_soon(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loop.run_once(0)


def test_stop_before_run_returns_at_once(loop: Loop) -> None:
    called: list[str] = []
    loop.call_soon(lambda: called.append("never"))
    loop.stop()
    loop.run()
    assert called == []
