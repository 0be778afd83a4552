"""The operator's choices for a guest from a file."""

from __future__ import annotations

from typing import NamedTuple


class Restore(NamedTuple):
    """The manner in which a guest is restored."""

    lazy: bool = False
    """RAM is the file, page by page as touched, and checked meanwhile; or else read before."""
    clock_now: bool = False
    """The guest's clocks go on from now; or else from when the guest was saved."""
    clone: bool = False
    """The guest is a copy beside the original, and uses none of the original's addresses."""


FULL = Restore()
