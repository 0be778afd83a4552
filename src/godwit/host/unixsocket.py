"""Listening Unix sockets: for their owner only, made over the file of a process that exited."""

from __future__ import annotations

import errno
import os
import socket
import stat

from godwit.errors import ConfigError, HostError

from . import sandbox

_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32  # beyond wmem_max, for root (asm-generic/socket.h)
_reserved: list[socket.socket] = []


def reserve(count: int) -> None:
    """Make sockets with large buffers while the process may: a default one holds fifty pages."""
    while len(_reserved) < count:
        sock = socket.socket(socket.AF_UNIX)
        enlarge(sock)
        _reserved.append(sock)


def make() -> socket.socket:
    """Return a socket to connect with, of those that are reserved if there is one.

    An ordinary one takes its place, so that a process holds as many descriptors as before.
    """
    made = socket.socket(socket.AF_UNIX)
    if not _reserved:
        return made
    _reserved.append(made)
    return _reserved.pop(0)


def enlarge(sock: socket.socket) -> None:
    """Give a Unix socket a send buffer of 1 MiB, or what the kernel allows."""
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * _BUFFER:
        return  # the kernel reports twice what was asked for
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)


def listen(path: str, what: str) -> socket.socket:
    """Make a listening socket at ``path``, mode 0600.

    ``what`` (QMP, migration) names the socket in errors.

    Raises:
        ConfigError: the path is too long, is not a socket, or another process listens there.
        HostError: the socket cannot be made.
    """
    remove_stale(path, what)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        # Between bind and listen nobody can connect, so the mode is never wider than it should
        # be for anyone; the process's umask, which all threads share, stays as it is.
        os.chmod(path, 0o600)
        sock.listen(8)
        return sock
    except OSError as error:
        sock.close()
        if error.errno is None:  # Python's own 'AF_UNIX path too long' (sun_path: 108 bytes)
            raise ConfigError(f"{path} is too long for a Unix socket: at most 107 bytes") from error
        reason = os.strerror(error.errno)
        raise HostError(
            f"cannot make the {what} socket {path}: {reason}{sandbox.hint(error)}"
        ) from error
    except BaseException:
        sock.close()
        raise


def remove(path: str, inode: int) -> None:
    """Remove the file of our socket, unless another process has taken the path meanwhile."""
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except OSError:
        pass  # gone already


def remove_stale(path: str, what: str) -> None:
    """Remove the socket file an exited process left behind.

    Raises:
        ConfigError: the file is no socket, or another process listens there.
        HostError: the file cannot be removed.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing there; or bind will report what is wrong
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is not a socket: choose another path for {what}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        failure = probe.connect_ex(path)
    if failure == errno.ECONNREFUSED:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise HostError(
                f"cannot remove {path}, which an exited process left: {error.strerror}"
            ) from error
    elif failure in (errno.EACCES, errno.EPERM):
        raise ConfigError(f"{path} is another user's socket: choose another path for {what}")
    elif failure != errno.ENOENT:
        # 0 or EAGAIN: another process listens.
        raise ConfigError(f"a VM listens on {path} already: choose another path for {what}")
