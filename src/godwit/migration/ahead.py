"""Work that is done a little before it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import Empty, Queue
from typing import TypeVar

_T = TypeVar("_T")


def ahead(items: Iterable[_T], most: int = 2) -> Generator[_T, None, None]:
    """``items``, taken in a thread of their own, up to ``most`` of them before they are asked for.

    What taking them raises is raised here. A generator that is closed early ends the thread.
    """
    made: Queue[tuple[_T] | BaseException | None] = Queue(most)
    stop = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                if stop.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        try:
            while True:
                made.get_nowait()  # it may wait for room, once
        except Empty:
            pass
        thread.join()
