"""The parts of a machine, checked once, and the parsers of the command line's values."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from godwit.errors import ConfigError

from .back_ends import FORMATS, MAX_QUEUES, VhostUserConfig, parse_device, parse_share
from .machine_types import DEFAULT, MachineType, machine_type
from .values import Values, format_mac, parse_mac, parse_size

MAX_CPUS = 8
MAX_NICS = 8
#: PCI slots for devices: slot 0 is the host bridge.
MAX_DEVICES = 31
#: Buffers in a queue of a virtio NIC, unless the configuration says otherwise.
QUEUE_SIZE = 256


class DeviceConfig(Protocol):
    """The configuration that every device has."""

    @property
    def kind(self) -> str:
        """The kind of device: see :data:`godwit.hw.registry.KINDS`."""

    @property
    def id(self) -> str:
        """The device's own name, unique in its machine."""


class NicConfig(NamedTuple):
    """One NIC as its operator describes it."""

    id: str
    tap: str
    mac: bytes
    kind: str = "virtio-net"
    #: The data path: vhost-net in the kernel, or in this process.
    vhost: bool = True
    #: None: the machine type's default.
    guest_announce: bool | None = None
    mtu: int | None = None
    #: None: the model's own.
    queue_size: int | None = None
    #: The guest's addresses that the host may announce, as typed; None: all that the guest used.
    announce_allow: str | None = None


class RngConfig(NamedTuple):
    """The configuration of one random number generator."""

    id: str
    #: The most bytes that the guest gets in a period; None: no limit.
    max_bytes: int | None = None
    #: Milliseconds.
    period_ms: int = 1000
    kind: str = "virtio-rng"


class OnError(StrEnum):
    """A disk's way with an error: the guest is told, or the VM stops until cont."""

    REPORT = "report"
    STOP = "stop"
    #: Stop for want of space, and report all else.
    ENOSPC = "enospc"


class DiskConfig(NamedTuple):
    """One disk as its operator describes it."""

    id: str
    #: A raw file or block device, or an image in another format.
    path: str
    readonly: bool = False
    #: What the guest reads as the disk's identity, at most 20 bytes.
    serial: str = ""
    #: ``writeback``: through the host's page cache; ``none``: past it.
    cache: str = "writeback"
    #: What the guest discards is given back to the host.
    discard: bool = False
    on_error: OnError = OnError.ENOSPC
    #: None: one for each vCPU, at most :data:`MAX_QUEUES`.
    queues: int | None = None
    queue_size: int | None = None
    #: The image's format; None: the one that its first bytes show.
    format: str | None = None
    #: The file with the passphrase of an encrypted image.
    key: str = ""
    kind: str = "virtio-blk"


class VsockConfig(NamedTuple):
    """The configuration of the guest's vsock."""

    id: str
    #: The guest's address; None: one that is free, or the source's.
    cid: int | None = None
    kind: str = "virtio-vsock"


#: ``--cpu``: all that the host's CPU has and KVM offers.
HOST_CPU = "host"


class CpuConfig(NamedTuple):
    """The guest's CPU as its operator describes it."""

    #: :data:`HOST_CPU`, a named baseline, or the path of a file that has one.
    model: str = HOST_CPU
    #: Features that the guest is not told of, as typed.
    off: tuple[str, ...] = ()


class SystemInfo(NamedTuple):
    """The machine in words, as the guest reads them in the SMBIOS tables."""

    manufacturer: str = "Godwit"
    product: str = "KVM Virtual Machine"
    serial: str = ""
    #: 16 bytes in the order of the text; None: all zeros, not present.
    uuid: bytes | None = None
    #: OEM strings, in order.
    strings: tuple[str, ...] = ()


class VmConfig:
    """One VM, with ``memory`` in bytes and ``kernel`` and ``initrd`` as paths.

    Raises:
        ConfigError: there are too many of something, or two NICs share what is each one's own.
    """

    def __init__(
        self,
        *,
        memory: int = 256 << 20,
        cpus: int = 1,
        kernel: str | None = None,
        initrd: str | None = None,
        command_line: str = "console=ttyS0",
        devices: tuple[DeviceConfig, ...] = (),
        shared_memory: bool = False,
        machine: MachineType | None = None,
        cpu: CpuConfig | None = None,
        system: SystemInfo | None = None,
    ) -> None:
        self.memory = memory
        self.cpus = cpus
        self.kernel = kernel
        self.initrd = initrd
        self.command_line = command_line
        #: In the order of their PCI slots.
        self.devices = devices
        nics = [device for device in devices if isinstance(device, NicConfig)]
        #: RAM is a memfd that other processes can map.
        self.shared_memory = shared_memory
        self.machine = machine or machine_type(DEFAULT)
        self.cpu = cpu or CpuConfig()
        self.system = system or SystemInfo()
        if not 1 <= cpus <= MAX_CPUS:
            raise ConfigError(f"{cpus} vCPUs; 1 to {MAX_CPUS} are supported")
        if len(nics) > MAX_NICS:
            raise ConfigError(f"{len(nics)} NICs; up to {MAX_NICS} are supported")
        if len(devices) > MAX_DEVICES:
            raise ConfigError(f"{len(devices)} devices; up to {MAX_DEVICES} are supported")
        vsocks = [device for device in devices if isinstance(device, VsockConfig)]
        if len(vsocks) > 1:
            raise ConfigError(f"{len(vsocks)} times --vsock; a guest's kernel has one address")
        for device in devices:
            if isinstance(device, VhostUserConfig) and not shared_memory:
                raise ConfigError(
                    f"device '{device.id}': another process serves it, which needs shared RAM; "
                    "give --memory SIZE,shared=on"
                )
        tags = [d.tag for d in devices if isinstance(d, VhostUserConfig) and d.tag]
        _check_own("shares", "tag", tags)
        _check_own("devices", "id", [device.id for device in devices])
        _check_own("NICs", "tap", [nic.tap for nic in nics])
        _check_own("NICs", "mac", [format_mac(nic.mac) for nic in nics])


def _check_own(owners: str, what: str, values: Sequence[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"two {owners} have the {what} '{value}'; give each its own")


def default_mac(tap: str, index: int) -> bytes:
    """Return an address for a NIC without one: the same at each start, unlike its neighbours'.

    52:54:00 is what KVM guests use; the rest comes from the tap's name.
    """
    return b"\x52\x54\x00" + zlib.crc32(f"{tap}/{index}".encode()).to_bytes(4, "big")[1:]


def as_copy(devices: Sequence[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """Return the devices of a guest that is a copy of one, which may run beside its copies.

    A NIC without ``mac=`` gets an address at random. Its frames pass this process, which holds
    some of them back.
    """
    nics = [config for config in devices if isinstance(config, NicConfig)]
    given = {nic.id: nic.mac for index, nic in enumerate(nics) if nic.mac != _default(nic, index)}
    return tuple(
        config._replace(vhost=False, mac=given.get(config.id) or b"\x52\x54\x00" + os.urandom(3))
        if isinstance(config, NicConfig)
        else config
        for config in devices
    )


def _default(nic: NicConfig, index: int) -> bytes:
    return default_mac(nic.tap, index)


def parse_memory(text: str) -> tuple[int, bool]:
    """Return bytes and whether RAM is shared, from a value like ``256M`` or ``256M,shared=on``.

    Raises:
        ConfigError: the value is not understood.
    """
    size, comma, rest = text.partition(",")
    if not comma:
        return parse_size(size), False
    values = Values("--memory", rest, ("shared",))
    return parse_size(size), values.switch("shared", False) is True


def parse_cpu(text: str) -> CpuConfig:
    """Return the CPU that ``--cpu`` describes, like ``host`` or ``x86-64-v2,rdrand=off``.

    Raises:
        ConfigError: the value is not understood.
    """
    model, *parts = text.split(",")
    off = []
    for part in parts:
        name, equals, value = part.partition("=")
        if not name or not equals or value != "off":
            raise ConfigError(f"--cpu: '{part}' in '{text}'; write FEATURE=off, or leave it out")
        off.append(name)
    if not model:
        raise ConfigError(f"--cpu '{text}': begin with host, x86-64-v2, x86-64-v3 or a file")
    return CpuConfig(model, tuple(off))


_UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_LONGEST_TEXT = 32768


def parse_smbios(text: str | None, strings: Sequence[str]) -> SystemInfo:
    """Return the machine in words, from ``serial=...,uuid=...`` and OEM strings.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    known = ("manufacturer", "product", "serial", "uuid")
    values = Values("--smbios", text, known) if text else None
    given = {key: values.get(key) for key in known} if values else {}
    uuid = given.pop("uuid", None)
    words = {key: value for key, value in given.items() if value is not None}
    for option, value in (
        *((f"--smbios: {key}=", value) for key, value in words.items()),
        *(("--oem-string ", string) for string in strings),
    ):
        if not value.isprintable() or not 0 < len(value.encode(errors="replace")) <= _LONGEST_TEXT:
            raise ConfigError(
                f"{option}{value[:40]!r}; give 1 to {_LONGEST_TEXT} bytes of printable text"
            )
    if len(strings) > 255:
        raise ConfigError(f"{len(strings)} times --oem-string; up to 255 are possible")
    if uuid is not None and not re.fullmatch(_UUID, uuid):
        raise ConfigError(
            f"--smbios: uuid={uuid[:40]}; write it like 550e8400-e29b-41d4-a716-446655440000"
        )
    raw = None if uuid is None else bytes.fromhex(uuid.replace("-", ""))
    return SystemInfo(**words, uuid=raw, strings=tuple(strings))


def parse_nic(text: str, index: int) -> NicConfig:
    """Return the NIC that ``--nic`` describes, the VM's ``index``-th.

    Like ``tap=tap0,mac=...,vhost=on|off,guest-announce=on|off,announce-allow=...,mtu=...``; also
    ``queue-size=``, ``id=``, ``model=``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    known = (
        *("tap", "mac", "model", "vhost", "guest-announce", "announce-allow"),
        *("mtu", "queue-size", "id"),
    )
    values = Values("--nic", text, known)
    tap = values.get("tap") or ""
    # dev_valid_name (net/core/dev.c). The kernel would make another name of one with a '%'.
    known_name = re.fullmatch(r"[^\s/:%\ud800-\udfff]{1,15}", tap) and tap not in (".", "..")
    if not known_name or len(tap.encode()) > 15:
        raise ConfigError(
            f"--nic {text!r}: tap= needs an interface name of 1 to 15 bytes, in UTF-8 and without "
            "'/', ':', '%' and blanks"
        )
    size = values.number("queue-size", 16, 1024)
    if size is not None and size & size - 1:
        raise ConfigError(f"--nic: queue-size={size}; choose a power of two")
    mac = values.get("mac")
    return NicConfig(
        id=values.id(f"nic{index}"),
        tap=tap,
        mac=parse_mac(mac) if mac is not None else default_mac(tap, index),
        kind=values.get("model") or "virtio-net",
        vhost=values.switch("vhost", True) is not False,
        guest_announce=values.switch("guest-announce", None),
        mtu=values.number("mtu", 68, 65535),
        queue_size=size,
        announce_allow=values.get("announce-allow"),
    )


def parse_rng(text: str, index: int) -> RngConfig:
    """Return the random number generator that ``--rng`` describes, the VM's ``index``-th.

    Like ``id=rng0,max-bytes=4096,period=1000``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    values = Values("--rng", text, ("id", "max-bytes", "period"))
    most, period = values.number("max-bytes", 1, 1 << 30), values.number("period", 1, 60_000)
    if period is not None and most is None:
        raise ConfigError(f"--rng: period={period} has no effect without max-bytes=; give both")
    return RngConfig(values.id(f"rng{index}"), most, period or 1000)


def parse_disk(text: str, index: int) -> DiskConfig:
    """Return the disk that ``--disk`` describes, the VM's ``index``-th.

    Like ``path=disk.raw,readonly,serial=...,cache=none,discard=on,on-error=stop``; also ``id=``,
    ``queues=``, ``queue-size=``, ``format=``, ``key=``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    known = (
        *("path", "readonly", "serial", "cache", "discard", "on-error"),
        *("queues", "queue-size", "id", "format", "key"),
    )
    values = Values("--disk", text, known, ("readonly", "discard"))
    path, serial = values.get("path") or "", values.get("serial") or ""
    if not path or "\0" in path:
        raise ConfigError(f"--disk {text!r}: path= needs the name of an image or block device")
    if len(serial.encode(errors="replace")) > 20 or not (serial.isascii() and serial.isprintable()):
        raise ConfigError(f"--disk: serial={serial[:40]!r}; give at most 20 ASCII characters")
    size = values.number("queue-size", 16, 1024)
    if size is not None and size & size - 1:
        raise ConfigError(f"--disk: queue-size={size}; choose a power of two")
    return DiskConfig(
        id=values.id(f"disk{index}"),
        path=path,
        readonly=values.switch("readonly", False) is True,
        serial=serial,
        cache=values.choice("cache", ("writeback", "none")),
        discard=values.switch("discard", False) is True,
        on_error=OnError(values.choice("on-error", (OnError.ENOSPC, *OnError))),
        queues=values.number("queues", 1, MAX_QUEUES),
        queue_size=size,
        format=values.choice("format", FORMATS) if values.get("format") is not None else None,
        key=values.get("key") or "",
    )


def parse_vsock(text: str, index: int) -> VsockConfig:
    """Return the vsock that ``--vsock`` describes, like ``cid=auto`` or ``cid=7,id=vsock0``.

    Raises:
        ConfigError: a key or value is wrong; the message names it, and what may stand there.
    """
    values = Values("--vsock", text, ("cid", "id"))
    # 0 to 2 are the hypervisor's, the loopback's and the host's, the last one is any.
    cid = None if values.get("cid") == "auto" else values.number("cid", 3, 0xFFFF_FFFE)
    if cid is None and values.get("cid") != "auto":
        raise ConfigError(f"--vsock {text!r}: cid= needs the guest's number, or auto")
    return VsockConfig(values.id(f"vsock{index}"), cid)


class DeviceOption(NamedTuple):
    """An option of ``godwit run`` that adds a device."""

    #: Returns the device that an option's value describes, the ``index``-th of this option.
    parse: Callable[[str, int], DeviceConfig]
    metavar: str
    help: str


#: The options that add devices; a further kind of device adds a row.
DEVICE_OPTIONS = {
    "--nic": DeviceOption(
        parse_nic,
        "tap=NAME[,KEY=VALUE...]",
        "a NIC on a tap; keys: mac, id, model=virtio-net|e1000, mtu, queue-size, "
        "vhost=on|off, guest-announce=on|off, announce-allow=NET;MAC;...",
    ),
    "--disk": DeviceOption(
        parse_disk,
        "path=FILE[,KEY=VALUE...]",
        "a disk, from an image, a block device or nbd://HOST/NAME; keys: readonly, serial, "
        "cache=writeback|none, discard=on|off, on-error=report|stop|enospc, queues, queue-size, "
        "id, format=raw|qcow2|luks|..., key=FILE with the passphrase",
    ),
    "--share": DeviceOption(
        parse_share,
        "path=DIR,tag=TAG[,readonly]",
        "a folder of the host (virtiofsd serves it); the guest: mount -t virtiofs TAG /mnt",
    ),
    "--device": DeviceOption(
        parse_device,
        "vhost-user,socket=PATH,type=blk|fs[,...]",
        "a device that another process serves by vhost-user; keys: queues, id, tag (of type=fs)",
    ),
    "--rng": DeviceOption(
        parse_rng,
        "id=NAME[,KEY=VALUE...]",
        "a random number generator; keys: max-bytes (within a period), period (ms, default 1000)",
    ),
    "--vsock": DeviceOption(
        parse_vsock,
        "cid=N|auto[,id=NAME]",
        "sockets between guest and host, whose address the guest's CID is; auto: a free one",
    ),
}


def parse_devices(given: Iterable[tuple[str, str]]) -> tuple[DeviceConfig, ...]:
    """Return the devices of ``(option, value)`` pairs, in their order, which is that of the slots.

    Raises:
        ConfigError: a value is wrong; the message names it, and what may stand there.
    """
    counts = dict.fromkeys(DEVICE_OPTIONS, 0)
    devices = []
    for option, text in given:
        devices.append(DEVICE_OPTIONS[option].parse(text, counts[option]))
        counts[option] += 1
    return tuple(devices)
