"""Work done ahead: its order, its errors, and its end when nobody wants the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from godwit.migration.ahead import ahead


def test_all_items_come_in_their_order() -> None:
    assert list(ahead(range(1000))) == list(range(1000))
    assert list(ahead([])) == []


def test_the_next_is_made_while_one_is_in_hand() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    with closing(ahead(items())) as made:
        assert next(made) == 1
        assert second.wait(30)


def test_no_more_are_made_than_asked_for() -> None:
    count = 0

    def items() -> Iterator[int]:
        nonlocal count
        while True:
            count += 1
            yield count

    before = threading.active_count()
    with closing(ahead(items(), 2)) as made:
        assert [next(made), next(made)] == [1, 2]
    assert threading.active_count() == before, "the thread goes on"
    assert count <= 2 + 2 + 2  # asked for, ahead, and one on either side of the queue


def test_an_error_comes_where_the_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    made = ahead(items())
    assert next(made) == 1
    with pytest.raises(ValueError, match="the second"):
        next(made)
