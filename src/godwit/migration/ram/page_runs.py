"""Runs of pages, ``(guest address, count)``, and pure operations on lists of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from godwit.host.pagemap import spans
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
    """Return how many pages runs have."""
    return sum(pages for _, pages in runs)


def union(left: list[Run], right: list[Run]) -> list[Run]:
    """Return the runs of pages that are in either."""
    merged: list[Run] = []
    for address, pages in sorted(left + right):
        if merged and address <= merged[-1][0] + merged[-1][1] * PAGE:
            start, count = merged[-1]
            merged[-1] = start, max(count, (address - start) // PAGE + pages)
        else:
            merged.append((address, pages))
    return merged


def chunks(
    runs: Iterable[Run], pages: int = MAX_PAGES, most_runs: int | None = None
) -> Iterator[list[Run]]:
    """Yield ``runs`` cut into chunks of at most ``pages`` pages and ``most_runs`` runs."""
    chunk: list[Run] = []
    space = pages
    for address, count in runs:
        while count:
            taken = min(count, space)
            chunk.append((address, taken))
            address += taken * PAGE
            count -= taken
            space -= taken
            if not space or len(chunk) == most_runs:
                yield chunk
                chunk, space = [], pages
    if chunk:
        yield chunk


def bitmap_runs(bitmap: bytes | bytearray, start: int) -> list[Run]:
    """Return the runs of set bits. Bit 0 is the page at guest address ``start``."""
    runs: list[Run] = []
    for at in range(0, len(bitmap), _BITMAP_PIECE):
        bits = int.from_bytes(bitmap[at : at + _BITMAP_PIECE], "little")
        if bits:
            base = start + at * 8 * PAGE
            for first, pages in spans(bin(bits)[:1:-1]):
                add(runs, base + first * PAGE, pages)
    return runs
