"""A disk image: a raw file or block device with size, lock, and operations on the bytes.

The lock is QEMU's (block/file-posix.c): a byte of the file for each thing that its holder does, and
one for each that nobody else may do meanwhile, locked as an open file description. So qemu-img and
qemu-storage-daemon refuse an image in use here, and the other way round.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from struct import Struct

from godwit.errors import ConfigError, HostError

from . import iovec
from .ioctl import io, ioctl_out, ior
from .iovec import Vector

SECTOR = 512
#: Bytes of the image that are locked: RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE.
_DOES, _ALONE = 100, 200
#: Bits of BLK_PERM_*: consistent read, write, resize.
_READS, _WRITES, _RESIZES = 0, 1, 3
_FLOCK = Struct("hhqqi4x")  # struct flock
_SIZE = ior(0x12, 114, 8)  # BLKGETSIZE64
_LOGICAL = io(0x12, 104)  # BLKSSZGET
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # linux/falloc.h
#: Bytes of zeros that are written at once, and of data that the disk cannot reach by itself.
_ZEROS = _BOUNCED = 1 << 20
#: Pieces that are written through the page cache at once. Linux 6.12 takes time by their square
#: (seen on tmpfs, and no more in 6.18): most likely it looks at all that is left of the data for
#: each page of the file that it fills (generic_perform_write in mm/filemap.c).
_AT_ONCE = 64
_TMPFS = 0x01021994
#: File systems of this host alone (statfs(2)): ext4, XFS, Btrfs, tmpfs, overlayfs, F2FS, ZFS.
_LOCAL = (0xEF53, 0x58465342, 0x9123683E, _TMPFS, 0x794C7630, 0xF2F52010, 0x2FC12FC1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Image:
    """An open disk image, unlocked at first.

    Attributes:
        size: bytes, a multiple of 512.
        in_memory: the image is in memory (tmpfs), where no read waits for a disk.
        block: bytes of the smallest piece that can be read or written.
        direct: the host's page cache is passed by.

    Raises:
        ConfigError: there is no image that can be used so; the message has the remedy.
    """

    def __init__(self, path: str, *, readonly: bool = False, direct: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.direct = direct
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"disk image '{path}': {_why_not(error, readonly, direct)}"
            ) from error
        try:
            status = os.fstat(self._fd)
            self.is_device = stat.S_ISBLK(status.st_mode)
            if not self.is_device and not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"disk image '{path}': it is no file and no block device")
            self.size = self._present_size()
            self.block = self._block_size()
            self._check_size()
        except BaseException:
            self.close()
            raise
        self.in_memory = not self.is_device and _file_system(self._fd) == _TMPFS
        self._locked = False
        #: Inode, size and time of the last change when the lock was given back.
        self._left: tuple[int, int, int] | None = None
        #: The kernel reports a lost write once: to the first of several flushes, so one is at work.
        self._flushing = threading.Lock()
        #: An error of a write that the kernel had taken: each flush fails from then on.
        self._lost: OSError | None = None
        #: Of a file the kernel lets one write at a time (inode_lock), and who waits there spins.
        self._writing = threading.Lock()
        #: Something may have been written since the last flush began.
        self._written = True

    # --- making sure ------------------------------------------------------------------------------
    def _present_size(self) -> int:
        if not self.is_device:
            return os.fstat(self._fd).st_size
        answer = bytearray(8)
        ioctl_out(self._fd, _SIZE, answer)
        return int.from_bytes(answer, "little")

    def _block_size(self) -> int:
        if not self.direct:
            return SECTOR
        if self.is_device:
            answer = bytearray(4)
            ioctl_out(self._fd, _LOGICAL, answer)
            return int.from_bytes(answer, "little")
        for block in (SECTOR, 4096):
            if self.size < 2 * block:
                continue
            with mmap.mmap(-1, 8192) as page, memoryview(page) as view, view[:block] as part:
                try:
                    os.preadv(self._fd, [part], block)
                except OSError:
                    continue
            return block
        return 4096

    def _check_size(self) -> None:
        if not self.size:
            raise ConfigError(
                f"disk image '{self.path}': it is empty; make one with: truncate -s 10G FILE"
            )
        if self.size % self.block:
            raise ConfigError(
                f"disk image '{self.path}': its {self.size} bytes are no multiple of {self.block}; "
                f"lengthen it with: truncate -s %{self.block} '{self.path}'"
            )

    @property
    def stamp(self) -> tuple[int, int]:
        """The file's inode, and the time of the last change in ns.

        Not the file system's number: that differs on another host, and after a reboot, for NFS and
        Btrfs.
        """
        status = os.fstat(self._fd)
        return status.st_ino, status.st_mtime_ns

    @property
    def identity(self) -> tuple[int, int]:
        """The file system's number on this host, and the file's inode."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    # --- the lock ---------------------------------------------------------------------------------
    def lock(self) -> None:
        """Take the lock, against writers and against readers of data written here.

        Raises:
            HostError: another has it, or has written the image since the lock was given back.
        """
        if self._locked:
            return
        self._take_lock()
        if self._left not in (None, self._present()):
            self._give_lock()
            raise HostError(
                f"disk image '{self.path}' was written by another while the guest had given it up, "
                "and its file systems would not survive that; end this VM, and boot it anew"
            )
        self._locked = self._written = True
        self._forget_cached()

    def _take_lock(self) -> None:
        does = (_READS,) if self.readonly else (_READS, _WRITES)
        alone = (_WRITES, _RESIZES)
        try:
            for at in (*(_DOES + bit for bit in does), *(_ALONE + bit for bit in alone)):
                self._set_lock(fcntl.F_RDLCK, at)
            taken = any(self._held(_ALONE + bit) for bit in does)
            taken = taken or any(self._held(_DOES + bit) for bit in alone)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise HostError(
                    f"disk image '{self.path}': its file system has no locks, and nothing would "
                    "keep another VM from it; keep it elsewhere"
                ) from error
            taken = True
        if taken:
            self._give_lock()
            raise HostError(
                f"disk image '{self.path}': another process uses it; end that VM or tool first"
                + ("" if self.readonly else ", or give readonly=on to all that only read it")
            )

    def unlock(self) -> None:
        """Give back the lock, if the image has one, once all is flushed."""
        if self._locked:
            self._left = self._present()
        self._locked = False
        self._give_lock()

    def _present(self) -> tuple[int, int, int] | None:
        """Return what shows that somebody wrote, or None for an image where nothing does."""
        if self.is_device or self.readonly:
            return None
        status = os.fstat(self._fd)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _give_lock(self) -> None:
        self._set_lock(fcntl.F_UNLCK, _DOES, _ALONE + 100 - _DOES)

    def _set_lock(self, kind: int, at: int, length: int = 1) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, length, 0))

    def _held(self, at: int) -> bool:
        """Return whether another holds a byte."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        kind: int = _FLOCK.unpack(answer)[0]
        return kind != fcntl.F_UNLCK

    def _forget_cached(self) -> None:
        """Drop what this host has cached: another host may have written since.

        A file system of this host alone has one cache for all.
        """
        if self.direct or (not self.is_device and _file_system(self._fd) in _LOCAL):
            return
        try:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # where it means nothing

    # --- bytes ------------------------------------------------------------------------------------
    def read(self, at: int, into: Vector, flags: int = 0) -> None:
        """Read all of ``into``, from byte ``at`` on.

        Raises:
            OSError: the host cannot; EAGAIN if RWF_NOWAIT is in ``flags``, and it would wait.
        """
        try:
            done = iovec.read(self._fd, into, at, flags)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            for place, rest, buffer in _bounced(at, into):
                if iovec.read(self._fd, Vector.of([buffer]), place) != len(buffer):
                    raise _truncated(self.path) from None
                rest.fill(buffer)
            return
        while done < into.size:
            if not done:
                raise _truncated(self.path)
            if flags:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            at, into = at + done, into.after(done)
            done = iovec.read(self._fd, into, at)

    def write(self, at: int, data: Vector) -> None:
        """Write all of ``data``, from byte ``at`` on.

        Raises:
            OSError: the host cannot.
        """
        if not self.is_device and os.fstat(self._fd).st_size < self.size:
            raise _truncated(self.path)
        one_by_one = not self.direct and not self.is_device
        try:
            with self._writing if one_by_one else nullcontext():
                for part in self._cut(at, data):
                    self._write(at, part)
                    at += part.size
        finally:
            self._written = True

    def _cut(self, at: int, data: Vector) -> Sequence[Vector]:
        """Return the parts in which data are written: whole pages of the file, or all at once.

        Of a page that is written in part the kernel reads the rest first.
        """
        if self.direct or data.pieces <= _AT_ONCE or at % mmap.PAGESIZE:
            return (data,)
        parts = list(data.parts(_AT_ONCE))
        return (data,) if any(part.size % mmap.PAGESIZE for part in parts[:-1]) else parts

    @property
    def is_written(self) -> bool:
        """True while a write is at work for which the next one would wait."""
        return self._writing.locked()

    def _write(self, at: int, data: Vector) -> None:
        try:
            done = iovec.write(self._fd, data, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            for place, rest, buffer in _bounced(at, data):
                rest.copy_to(buffer)
                if iovec.write(self._fd, Vector.of([buffer]), place) != len(buffer):
                    raise _truncated(self.path) from None
            return
        while done < data.size:
            if not done:
                raise _truncated(self.path)
            at, data = at + done, data.after(done)
            done = iovec.write(self._fd, data, at)

    def flush(self) -> None:
        """Flush all data written to the image to the disk, after a flush that is under way.

        Raises:
            OSError: the host cannot, or could not before: the kernel reports that once only.
        """
        if self.readonly:
            return
        with self._flushing:
            if self._lost is not None:
                raise OSError(self._lost.errno, self._lost.strerror) from self._lost
            if not self._written:
                return  # the flush that was waited for had all of it
            self._written = False  # first: what is written meanwhile is for the next flush
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._lost = error
                raise

    def discard(self, at: int, size: int) -> None:
        """Give ``size`` bytes at ``at`` back to a host with support for discarding."""
        try:
            self._allocate(_PUNCH_HOLE | _KEEP_SIZE, at, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise

    def write_zeroes(self, at: int, size: int, unmap: bool) -> None:
        """Have ``size`` bytes at ``at`` read as zeros, without space of their own if ``unmap``.

        Raises:
            OSError: the host cannot.
        """
        wanted = _PUNCH_HOLE if unmap else _ZERO_RANGE
        for mode in (wanted, _PUNCH_HOLE):
            try:
                self._allocate(mode | _KEEP_SIZE, at, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                    raise
        zeros = bytearray(min(size, _ZEROS))
        while size > 0:
            count = min(size, len(zeros))
            self.write(at, Vector.of([memoryview(zeros)[:count]]))
            at, size = at + count, size - count

    def _allocate(self, mode: int, at: int, size: int) -> None:
        if not self.is_device and os.fstat(self._fd).st_size < self.size:
            raise _truncated(self.path)
        failed = _libc.fallocate(self._fd, mode, at, size)
        number = ctypes.get_errno()
        self._written = True
        if failed:
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Close the image, and so give its lock back. Closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _bounced(at: int, data: Vector) -> Iterator[tuple[int, Vector, memoryview]]:
    """Yield memory that any disk can reach, whole pages, for a part of the data after the other.

    Each with the part's place on the disk, and the data from there on. The driver says how much
    data there is, which several threads may have at once: so it is copied by parts.
    """
    with mmap.mmap(-1, min(_BOUNCED, data.size)) as pages, memoryview(pages) as whole:
        while data.size:
            with whole[: data.size] as buffer:
                yield at, data, buffer
                at, data = at + len(buffer), data.after(len(buffer))


def _truncated(path: str) -> OSError:
    return OSError(errno.EIO, f"'{path}' has become shorter than it was at the start")


def _why_not(error: OSError | ValueError, readonly: bool, direct: bool) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.ENOENT:
        return "there is no such file; make one with: truncate -s 10G FILE"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not readonly:
        return f"{error.strerror}: it cannot be written; give readonly=on, or the right to write"
    if error.errno == errno.EINVAL and direct:
        return "its file system has no O_DIRECT; leave cache=none out"
    return f"{error.strerror}"


def _file_system(fd: int) -> int:
    """Return the magic number of a file's file system (statfs(2))."""
    answer = ctypes.create_string_buffer(120)  # struct statfs
    if _libc.fstatfs(fd, answer):
        return 0
    return int.from_bytes(answer.raw[:8], "little")
