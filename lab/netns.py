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
    """Put this thread alone into the named namespace for the block (None: change nothing).

    A socket made inside stays in the namespace afterwards.

    Raises:
        LabError: there is no such namespace, or this process is not root.
    """
    if netns is None:
        yield
        return
    try:
        target = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(
            f"no network namespace {netns}: {error.strerror}; ip netns list names all"
        ) from error
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
    """Return a ``preexec_fn`` that puts a child into the namespace.

    The child's /sys is not remounted.
    """
    path = f"/run/netns/{netns}"

    def enter() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _enter(fd)
        os.close(fd)

    return enter


def exec_argv(netns: str, argv: Sequence[str]) -> list[str]:
    """Return the command that runs ``argv`` in the namespace (/sys is the namespace's too)."""
    return ["ip", "netns", "exec", netns, *argv]
