"""Guest errors: one way to report a rule the guest broke, for every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from godwit.errors import GuestError


@contextmanager
def guarded(report: Callable[[str], None], where: str = "") -> Iterator[None]:
    """Report a guest error that is raised inside, and go on behind the block."""
    try:
        yield
    except GuestError as error:
        report(f"{where}: {error}" if where else str(error))
