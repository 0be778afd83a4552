"""The limit: the rate at which a plain socket loop in Python copies between two processes.

Both run on this machine, with a Unix socket, 8 MB a call, from populated memory into populated
memory, both with huge pages as a guest's RAM has. A migration does this and more.
"""

from __future__ import annotations

import mmap
import os
import socket
import time

_CALL = 8 << 20
_PIECE = 1 << 20  # of a vector
_READY = b"r"
_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32  # beyond wmem_max, for root (asm-generic/socket.h)


def bytes_a_second(megabytes: int) -> float:
    """Copy ``megabytes`` once, and return the rate in bytes a second."""
    size = megabytes << 20
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    child = os.fork()
    if not child:
        ours.close()
        try:
            _receive(theirs, _memory(size))
        finally:
            os._exit(0)
    theirs.close()
    with ours, _memory(size) as memory:
        if ours.recv(1) != _READY:
            raise OSError("the receiving half of the socket loop died")
        start = time.monotonic()
        with memoryview(memory) as view:
            _send(ours, view)
        if ours.recv(1) != _READY:
            raise OSError("the receiving half of the socket loop died")
        took = time.monotonic() - start
    os.waitpid(child, 0)
    return size / took


def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def _send(sock: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += sock.sendmsg(_vector(view, done))


def _receive(sock: socket.socket, memory: mmap.mmap) -> None:
    sock.sendall(_READY)
    with memoryview(memory) as view:
        done = 0
        while done < len(view):
            got = sock.recvmsg_into(_vector(view, done), 0, socket.MSG_WAITALL)[0]
            if not got:
                return
            done += got
    sock.sendall(_READY)


def _vector(view: memoryview, start: int) -> list[memoryview]:
    end = min(start + _CALL, len(view))
    return [view[at : min(at + _PIECE, end)] for at in range(start, end, _PIECE)]
