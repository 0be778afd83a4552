"""A VMM's memory beyond its guest's RAM, from ``/proc/PID/smaps``, by one rule for both VMMs.

Guest RAM is the memory for which the VMM advised huge pages: an anonymous mapping with the flag
``hg`` (proc(5)). Both advise so for guest RAM and for nothing else of size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ", re.MULTILINE)
_FIELD = re.compile(r"^(\w+): +(\d+) kB$", re.MULTILINE)
_FLAGS = re.compile(r"^VmFlags: (.*)$", re.MULTILINE)
#: A mapping smaller than a huge page is no guest RAM: QEMU advises huge pages for its ROMs, too.
_LEAST_KB = 2048


@dataclass(frozen=True)
class Memory:
    """A process's memory, in kB."""

    pss: int
    """Resident beyond the guest's RAM, where a page that N processes map counts 1/N."""
    rss: int
    """The same, a shared page counted in full."""
    ram: int
    """Size of the mappings taken for the guest's RAM."""


def beyond_ram(smaps: str) -> Memory:
    """Return the sizes that a text of ``smaps`` shows."""
    starts = [match.start() for match in _HEAD.finditer(smaps)] + [len(smaps)]
    pss = rss = ram = 0
    for begin, end in pairwise(starts):
        text = smaps[begin:end]
        fields = {name: int(size) for name, size in _FIELD.findall(text)}
        flags = _FLAGS.search(text)
        if flags and "hg" in flags[1].split() and fields["Size"] >= _LEAST_KB:
            ram += fields["Size"]
        else:
            pss += fields["Pss"]
            rss += fields["Rss"]
    return Memory(pss, rss, ram)


def measure(pid: int) -> Memory:
    """Return the sizes of a running process."""
    return beyond_ram(Path(f"/proc/{pid}/smaps").read_text())
