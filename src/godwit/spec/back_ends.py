"""The devices that other processes serve by vhost-user, and the parsers of their options."""

from __future__ import annotations

from typing import NamedTuple

from godwit.errors import ConfigError

from .values import Values

#: Of a disk, for requests.
MAX_QUEUES = 16

#: Formats of disk images: raw ones are served by the VM itself, others by qemu-storage-daemon.
FORMATS = ("raw", "qcow2", "luks", "vmdk", "vdi", "vhdx", "vpc")

#: The name of a passphrase in qemu-storage-daemon.
KEY = "key"


class Share(NamedTuple):
    """A folder of the host for virtiofsd to serve."""

    path: str
    readonly: bool = False


class ImageFile(NamedTuple):
    """A disk image, in any of QEMU's formats, for qemu-storage-daemon to serve."""

    #: A file, or the address of an NBD server.
    path: str
    format: str
    readonly: bool = False
    #: Past the host's page cache.
    direct: bool = False
    discard: bool = False
    #: Bytes of the disk; None: not known before the image is open, which then is from the start.
    size: int | None = None
    #: It names no further file, as far as is known.
    alone: bool = False
    #: The file with the passphrase of an encrypted image.
    key: str = ""
    #: Of the NBD server that has the image: options of the daemon's. Empty for a file.
    server: tuple[tuple[str, str], ...] = ()

    def secret(self) -> dict[str, str | dict[str, str]]:
        """Return the options by which the daemon finds the passphrase, as in its QMP."""
        if not self.key:
            return {}
        if self.format == "luks":
            return {"key-secret": KEY}
        return {"encrypt": {"format": "luks", "key-secret": KEY}}


class VhostUserConfig(NamedTuple):
    """A device behind vhost-user, in another process."""

    id: str
    kind: str
    #: Where that process listens.
    socket: str = ""
    #: Queues for requests. None, for a disk: one for each vCPU, if the back end has so many.
    queues: int | None = None
    #: Of a share: what the guest mounts.
    tag: str = ""
    #: Served by a process that is started with the VM.
    serves: Share | ImageFile | None = None
    #: The descriptor of the connection to that process; -1 before its start.
    connection: int = -1
    #: The descriptor of QMP's, by which its image is opened and closed; -1 without.
    control: int = -1


def parse_device(text: str, index: int) -> VhostUserConfig:
    """Return the device that ``--device`` describes, the VM's ``index``-th.

    Like ``vhost-user,socket=/run/disk.sock,type=blk``; also ``queues=``, ``id=``, and ``tag=`` for
    ``type=fs``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    model, _, rest = text.partition(",")
    if model != "vhost-user":
        raise ConfigError(f"--device {text!r}: begin with vhost-user,socket=PATH,type=blk|fs")
    values = Values("--device", rest, ("socket", "type", "tag", "queues", "id"))
    path = values.get("socket") or ""
    if not 0 < len(path.encode(errors="replace")) <= 107 or "\0" in path:
        raise ConfigError(
            f"--device {text!r}: socket= needs the path where the back end listens, of at most "
            "107 bytes"
        )
    kind = "vhost-user-" + values.choice("type", ("blk", "fs"))
    if (values.get("tag") is None) != (kind == "vhost-user-blk"):
        raise ConfigError(f"--device {text!r}: tag= belongs to type=fs, and is needed there")
    return VhostUserConfig(
        id=values.id(f"vhost-user{index}"),
        kind=kind,
        socket=path,
        queues=values.number("queues", 1, MAX_QUEUES) or (None if kind == "vhost-user-blk" else 1),
        tag=_tag("--device", values) if kind == "vhost-user-fs" else "",
    )


def _tag(option: str, values: Values) -> str:
    tag = values.get("tag") or ""
    if not 0 < len(tag.encode(errors="replace")) <= 36 or not tag.isprintable():
        raise ConfigError(
            f"{option}: tag={tag[:40]!r}; give 1 to 36 bytes of printable text, which the guest "
            "mounts: mount -t virtiofs TAG /mnt"
        )
    return tag


def parse_share(text: str, index: int) -> VhostUserConfig:
    """Return the shared folder that ``--share`` describes, the VM's ``index``-th.

    Like ``path=/srv/data,tag=data,readonly``; also ``id=``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    values = Values("--share", text, ("path", "tag", "readonly", "id"), ("readonly",))
    path = values.get("path") or ""
    if not path or "\0" in path:
        raise ConfigError(f"--share {text!r}: path= needs the folder to share")
    share = Share(path, values.switch("readonly", False) is True)
    name = values.id(f"share{index}")
    tag = _tag("--share", values)
    return VhostUserConfig(name, "vhost-user-fs", queues=1, tag=tag, serves=share)
