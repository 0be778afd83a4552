"""Runs of pages, ``(guest address, count)``, and what is done with lists of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from godwit.hw.memory import PAGE
from godwit.migration.wire.messages import MAX_PAGES, Run

#: Bytes of a bitmap that are looked at as one number: pieces without a bit cost next to nothing.
_BITMAP_PIECE = 4096


def add(runs: list[Run], address: int, pages: int) -> None:
    """Append a run, or make the last one longer."""
    if runs and runs[-1][0] + runs[-1][1] * PAGE == address:
        runs[-1] = runs[-1][0], runs[-1][1] + pages
    else:
        runs.append((address, pages))


def pages_in(runs: Iterable[Run]) -> int:
    """How many pages."""
    return sum(pages for _, pages in runs)


def union(left: list[Run], right: list[Run]) -> list[Run]:
    """Runs of pages in either."""
    merged: list[Run] = []
    for address, pages in sorted(left + right):
        if merged and address <= merged[-1][0] + merged[-1][1] * PAGE:
            start, count = merged[-1]
            merged[-1] = start, max(count, (address - start) // PAGE + pages)
        else:
            merged.append((address, pages))
    return merged


def portions(runs: Iterable[Run], pages: int = MAX_PAGES) -> Iterator[list[Run]]:
    """``runs`` in groups of at most ``pages`` pages."""
    group: list[Run] = []
    room = pages
    for address, count in runs:
        while count:
            taken = min(count, room)
            group.append((address, taken))
            address += taken * PAGE
            count -= taken
            room -= taken
            if not room:
                yield group
                group, room = [], pages
    if group:
        yield group


def bitmap_runs(bitmap: bytes | bytearray, start: int) -> list[Run]:
    """Runs of set bits; bit 0 is the page at guest address ``start``."""
    runs: list[Run] = []
    for at in range(0, len(bitmap), _BITMAP_PIECE):
        bits = int.from_bytes(bitmap[at : at + _BITMAP_PIECE], "little")
        if bits:
            base = start + at * 8 * PAGE
            for first, pages in spans(bin(bits)[:1:-1]):
                add(runs, base + first * PAGE, pages)
    return runs


def spans(text: str) -> Iterator[tuple[int, int]]:
    """(first, count) of the ones in a text of zeros and ones: a search for a character is quick."""
    first = text.find("1")
    while first >= 0:
        end = text.find("0", first)
        if end < 0:
            end = len(text)
        yield first, end - first
        first = text.find("1", end)
