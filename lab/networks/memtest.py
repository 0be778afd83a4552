"""memtest86+ as a guest: a judge of memory, and its screen on the serial line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .packages import unpacked

#: One CPU tests; its screen goes to the serial line (memtest86+'s README, "Boot options").
CMDLINE = "console=ttyS0,115200 nosmp"
# The cells are drawn anew every other second, most of them from the column on that changes.
_TEST = re.compile(r"#(\d+) +\[")
_ERRORS = re.compile(r"Pass: +(\d+) +Errors: (\d+)")
_TIME = re.compile(r"Time: +(\d+):(\d\d):(\d\d)")


@dataclass(frozen=True)
class Screen:
    """The newest that memtest86+ showed."""

    test: int
    """The number of the test that runs."""
    passes: int
    errors: int
    time_s: int
    """How long the tests ran by the guest's own clock, seconds."""


def kernel() -> Path:
    """Return the image, which boots as a kernel does.

    Raises:
        LabError: apt cannot provide the package.
    """
    return unpacked("memtest86+") / "boot/memtest86+x64.bin"


def screen(text: str) -> Screen | None:
    """Return the newest of what was printed (None: not yet all of it)."""
    tests, counts, times = (pattern.findall(text) for pattern in (_TEST, _ERRORS, _TIME))
    if not tests or not counts or not times:
        return None
    hours, minutes, seconds = map(int, times[-1])
    passes, errors = map(int, counts[-1])
    return Screen(int(tests[-1]), passes, errors, hours * 3600 + minutes * 60 + seconds)
