"""What waits for one client: replies are never lost, and a flood of one event costs no other."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from godwit.qmp import protocol
from godwit.qmp.outbox import MAX_EVENTS, RESERVED, Outbox

_SIZE = 1000
_TEXT = protocol.event("FLOOD", {"text": "x" * _SIZE}, 0)
_MANY = 2 * MAX_EVENTS // len(_TEXT)


def _sent(box: Outbox, count: int | None = None) -> bytes:
    """Send some bytes, or all that there are."""
    done = b""
    while box.data and (count is None or len(done) < count):
        part = bytes(box.data[: None if count is None else count - len(done)])
        box.sent(len(part))
        done += part
    return done


def _names(data: bytes) -> list[str]:
    return [json.loads(line).get("event", "reply") for line in data.splitlines()]


def _lost(data: bytes) -> list[dict[str, Any]]:
    messages = [json.loads(line) for line in data.splitlines()]
    return [one["data"] for one in messages if one.get("event") == "EVENTS_LOST"]


def test_what_is_too_much_is_left_out_and_counted() -> None:
    box = Outbox()
    for _ in range(_MANY):
        box.event("FLOOD", _TEXT)
    assert len(box) <= MAX_EVENTS
    data = _sent(box)
    came = _names(data).count("FLOOD")
    assert _names(data)[-1] == "EVENTS_LOST"
    assert _lost(data) == [{"event": "FLOOD", "count": _MANY - came}]
    box.event("FLOOD", _TEXT)
    assert _names(_sent(box)) == ["FLOOD"]


def test_a_flood_of_one_kind_costs_no_event_of_another_and_no_reply() -> None:
    box = Outbox()
    rare = protocol.event("MIGRATION", {"status": "completed"}, 0)
    for _ in range(_MANY):
        box.event("FLOOD", _TEXT)
    for _ in range(10):
        box.event("MIGRATION", rare)
        box.reply(b"{}\r\n")
    names = _names(_sent(box))
    assert names.count("MIGRATION") == names.count("reply") == 10
    assert names.count("EVENTS_LOST") == 1


def test_a_client_that_reads_slowly_gets_few_notes_of_loss() -> None:
    box, data = Outbox(), b""
    for _ in range(20):
        for _ in range(_MANY // 4):
            box.event("FLOOD", _TEXT)
        data += _sent(box, MAX_EVENTS // 4)
    data += _sent(box)
    lost = _lost(data)
    assert _names(data).count("FLOOD") + sum(one["count"] for one in lost) == 20 * (_MANY // 4)
    assert 1 <= len(lost) <= 6


def test_one_event_is_taken_however_long_it_is() -> None:
    box = Outbox()
    for _ in range(_MANY):
        box.event("FLOOD", _TEXT)
    box.event("LONG", protocol.event("LONG", {"text": "x" * 2 * RESERVED}, 0))
    box.event("LONG", protocol.event("LONG", {"text": "y"}, 0))
    data = _sent(box)
    assert _names(data).count("LONG") == 1
    assert {"event": "LONG", "count": 1} in _lost(data)


_steps = st.lists(
    st.tuples(st.sampled_from("ABCr"), st.integers(1, 400))
    | st.tuples(st.just("send"), st.integers(1, 200_000)),
    max_size=60,
)


@given(_steps)
def test_all_that_was_added_is_sent_or_counted_and_what_waits_is_bounded(
    steps: list[tuple[str, int]],
) -> None:
    box, data, replies = Outbox(), b"", 0
    added = dict.fromkeys("ABC", 0)
    for kind, number in steps:
        if kind == "send":
            data += _sent(box, number)
        elif kind == "r":
            box.reply(b"{}\r\n" * number)
            replies += number
        else:
            message = protocol.event(kind, {"text": "x" * 900}, 0)
            for _ in range(number):
                box.event(kind, message)
            added[kind] += number
        assert len(box) <= MAX_EVENTS + 3 * RESERVED + 4 * replies + 1000
    data += _sent(box)
    names = _names(data)
    assert names.count("reply") == replies
    for kind, number in added.items():
        lost = sum(one["count"] for one in _lost(data) if one["event"] == kind)
        assert names.count(kind) + lost == number
