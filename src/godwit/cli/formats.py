"""The formats of disk images: which are served by the VM itself, and which by another program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from struct import Struct

from godwit.errors import ConfigError
from godwit.spec.back_ends import ImageFile, VhostUserConfig
from godwit.spec.config import DeviceConfig, DiskConfig, OnError

#: The first fields of a qcow2 image (QEMU's docs/interop/qcow2.txt): magic, version, where the
#: name of a backing file is, and the disk's bytes. From version 3 on, features from byte 72.
_QCOW2, _MAGIC = Struct(">4sIQ8xQ"), b"QFI\xfb"
_FEATURES, _EXTERNAL_DATA = Struct(">72xQ"), 1 << 2
#: The first fields of a LUKS1 image (its on-disk format, 2.1): magic, version, and the sector, of
#: 512 bytes, where the disk begins.
_LUKS1, _LUKS_MAGIC = Struct(">6sH96xI"), b"LUKS\xba\xbe"
_LARGEST = 1 << 60
_NBD_PORT = 10809


def with_formats(devices: Iterable[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """Return the devices, with disks other than raw ones as devices of another program.

    Raises:
        ConfigError: a disk's format is not to be guessed, or has no use for a key.
    """
    return tuple(_format(one) if isinstance(one, DiskConfig) else one for one in devices)


def _format(disk: DiskConfig) -> DeviceConfig:
    server = _server(disk.path)
    head = b"" if server else _head(disk.path)
    found = disk.format or ("raw" if server else _found(disk.path, head))
    _check_key(disk, found)
    if server and found not in ("raw", "luks"):
        # What the server says is in the image could name any file or server.
        raise ConfigError(
            f"--disk path={disk.path}: format={found} is for files; have the server open the image "
            f"(qemu-nbd -f {found}), and leave format= out"
        )
    if found == "raw" and not server:
        return disk
    for key, given in (
        ("serial", disk.serial != ""),
        ("on-error", disk.on_error is not OnError.ENOSPC),
        ("queue-size", disk.queue_size is not None),
    ):
        if given:
            raise ConfigError(f"--disk path={disk.path}: {key}= is for raw images; leave it out")
    size = None
    if found in ("qcow2", "luks") and not server:
        size = _size(disk.path, head) if found == "qcow2" else _luks_size(disk.path, head)
    image = ImageFile(
        disk.path,
        found,
        disk.readonly,
        disk.cache == "none",
        disk.discard,
        size,
        alone=bool(server) or found == "luks" or (size is not None and not _names_files(head)),
        key=disk.key,
        server=server,
    )
    return VhostUserConfig(disk.id, "vhost-user-blk", queues=disk.queues, serves=image)


def _check_key(disk: DiskConfig, found: str) -> None:
    """Check that there is a passphrase where one is needed, and a use for one that is given.

    Raises:
        ConfigError: there is not.
    """
    if disk.key and found not in ("luks", "qcow2"):
        raise ConfigError(
            f"--disk path={disk.path}: key= is for encrypted images; leave it out, or give "
            "format=luks"
        )
    if found == "luks" and not disk.key:
        raise ConfigError(
            f"--disk path={disk.path}: give key=FILE, a file with the passphrase and nothing else"
        )
    if disk.key and not (os.path.isfile(disk.key) and os.access(disk.key, os.R_OK)):
        raise ConfigError(
            f"--disk key={disk.key}: there is no such file to be read; make one with: "
            "printf %s PASSPHRASE"
        )


def _server(path: str) -> tuple[tuple[str, str], ...]:
    """Return where an NBD server is, as options of QEMU's, or nothing for the name of a file.

    ``nbd://HOST[:PORT][/EXPORT]`` and ``nbd+unix:///[EXPORT]?socket=PATH``, as QEMU and libnbd
    have them (the NBD project's doc/uri.md).

    Raises:
        ConfigError: the address is neither.
    """
    if not path.startswith(("nbd:", "nbd+")) or os.path.exists(path):
        return ()
    from urllib.parse import unquote, urlsplit  # only for these

    try:
        parts = urlsplit(path)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    key, _, socket = parts.query.partition("=")
    export, socket = unquote(parts.path).removeprefix("/"), unquote(socket)
    # Nothing is left out in silence: no user, no wish for TLS, nor what urlsplit strips.
    whole = "".join((path, export, socket)).isprintable()
    if not whole or "#" in path or "@" in parts.netloc or "&" in parts.query:
        pass
    elif parts.scheme == "nbd" and host and port != 0 and "?" not in path:
        port = _NBD_PORT if port is None else port
        where = ("server.type", "inet"), ("server.host", host), ("server.port", str(port))
        return (*where, ("export", export))
    elif parts.scheme == "nbd+unix" and not parts.netloc and (key, socket[:1]) == ("socket", "/"):
        return ("server.type", "unix"), ("server.path", socket), ("export", export)
    raise ConfigError(
        f"--disk path={path}: write nbd://HOST:PORT/EXPORT, or nbd+unix:///EXPORT?socket=/PATH"
    )


def _head(path: str) -> bytes:
    """Return the first bytes of an image, or none where there is none to be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return b""  # whoever opens the image explains that
    try:
        return os.read(fd, max(_FEATURES.size, _LUKS1.size))
    except OSError:
        return b""
    finally:
        os.close(fd)


def _found(path: str, head: bytes) -> str:
    """Return the format by an image's first bytes.

    A guest can write these into a raw disk. So what names further files is not believed.

    Raises:
        ConfigError: the image names a further file.
    """
    if not head.startswith(_MAGIC) or len(head) < _FEATURES.size:
        return "raw"
    if _names_files(head):
        raise ConfigError(
            f"--disk path={path}: it looks like qcow2 that names a further file, which a guest may "
            "have written there; give format=qcow2 if it is yours, or format=raw"
        )
    return "qcow2"


def _names_files(head: bytes) -> bool:
    """Return whether a qcow2 image has a backing file, or keeps data elsewhere."""
    _, version, backing, _ = _QCOW2.unpack_from(head)
    if version > 2 and len(head) >= _FEATURES.size:
        return bool(backing or _FEATURES.unpack_from(head)[0] & _EXTERNAL_DATA)
    return bool(backing)


def _size(path: str, head: bytes) -> int:
    """Return the bytes of the disk in a qcow2 image.

    Raises:
        ConfigError: the file is no such image.
    """
    size = 0
    if head.startswith(_MAGIC) and len(head) >= _QCOW2.size:
        size = _QCOW2.unpack_from(head)[3]
    if not 0 < size <= _LARGEST:
        raise ConfigError(
            f"--disk path={path}: there is no qcow2 image to be read; make one with: "
            "qemu-img create -f qcow2 FILE 10G"
        )
    return size


def _luks_size(path: str, head: bytes) -> int:
    """Return the bytes of the disk in a LUKS image.

    Raises:
        ConfigError: the file is no such image.
    """
    size = 0
    if len(head) >= _LUKS1.size:
        magic, version, first = _LUKS1.unpack_from(head)
        if (magic, version) == (_LUKS_MAGIC, 1):
            size = _bytes(path) - 512 * first
    if not 0 < size <= _LARGEST or size % 512:
        raise ConfigError(
            f"--disk path={path}: there is no LUKS image to be read, of version 1; make one with: "
            "qemu-img create -f luks --object secret,id=key,file=KEY -o key-secret=key FILE 10G"
        )
    return size


def _bytes(path: str) -> int:
    """Return the bytes of a file or block device, or 0 for one without an end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return 0
    finally:
        os.close(fd)
