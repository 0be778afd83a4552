"""Entering network namespaces, without a process for it."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, get_errno

from .errors import LabError

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = CDLL(None, use_errno=True)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise LabError(f"cannot enter a network namespace: {os.strerror(get_errno())}; be root")


@contextmanager
def inside(netns: str | None) -> Iterator[None]:
    """This thread, and no other, is in the named namespace for the block (None: changes nothing).

    A socket stays in the namespace it was made in. Raises LabError.
    """
    if netns is None:
        yield
        return
    try:
        target = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"no network namespace {netns}: {error.strerror}") from error
    home = os.open(
        f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC
    )
    try:
        _enter(target)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(target)
        os.close(home)


def entering(netns: str) -> Callable[[], None]:
    """A ``preexec_fn`` that puts a child into the namespace. The child's /sys is not remounted."""
    path = f"/run/netns/{netns}"

    def enter() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _enter(fd)
        os.close(fd)

    return enter


def exec_argv(netns: str, argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` in the namespace (/sys is the namespace's too)."""
    return ["ip", "netns", "exec", netns, *argv]
