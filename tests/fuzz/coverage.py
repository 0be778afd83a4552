"""Which edges between lines of the subject an input reaches, by :func:`sys.settrace`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any
from zlib import crc32


class Coverage:
    """The edges that were reached in modules whose path has one of ``parts``.

    Other threads than the one that runs the target are not looked at.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = tuple(parts)
        self._bases: dict[CodeType, int] = {}  # 0: not of the subject
        self._last = 0
        self._reached: set[int] = set()
        self.edges: set[int] = set()

    def run(self, work: Callable[[], None]) -> int:
        """Do the work, and return how many edges it reached that none had reached before.

        What the work raises is raised.
        """
        self._reached, self._last = set(), 0
        if not self._parts:
            work()
            return 0
        sys.settrace(self._call)
        try:
            work()
        finally:
            sys.settrace(None)
            new = len(self._reached - self.edges)
            self.edges |= self._reached
        return new

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        base = self._bases.get(code)
        if base is None:
            base = self._bases[code] = self._base(code)
        return self._line if base else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            here = self._bases[frame.f_code] + frame.f_lineno
            self._reached.add(self._last * 31 ^ here)
            self._last = here
        return self._line

    def _base(self, code: CodeType) -> int:
        name = code.co_filename
        if "/tests/" in name or not any(part in name for part in self._parts):
            return 0
        return crc32(name.rpartition("/src/")[2].encode()) << 16
