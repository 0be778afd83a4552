"""The comparison of two machines before a guest migrates between them."""

from __future__ import annotations

from collections.abc import Iterator

from godwit.errors import HostError, StreamError
from godwit.host.boot import boot_id
from godwit.hw.capabilities import HasIdentity, Negotiates, ReservesAhead
from godwit.hw.device import Device
from godwit.machine import cpu
from godwit.machine.machine import Machine
from godwit.machine.state import VERSION

from .messages import Hello, HelloDevice


def describe(machine: Machine, token: bytes, cookie: bytes = b"") -> Hello:
    """Return the machine as a HELLO, which a destination compares with its own."""
    hints = machine.hints()
    return Hello(
        machine=machine.config.machine.name,
        token=token,
        cpus=machine.config.cpus,
        ram=[(region.start, region.size) for region in machine.memory.regions],
        devices=[
            HelloDevice(
                id=device.id,
                kind=device.kind,
                version=device.version,
                properties=dict(device.properties()),
                negotiated=_negotiated(machine, device),
                hints=hints.get(device.id),
            )
            for device in machine.devices
        ],
        version=VERSION,
        cookie=cookie,
        cpu=cpu.describe(machine.board) if machine.config.machine.describes_cpu else None,
        boot=boot_id() if machine.devices.having(ReservesAhead) else "",
    )


def check(hello: Hello, machine: Machine, *, kept: bool = False, copied: bool = False) -> None:
    """Refuse what this machine cannot become, before the guest is stopped.

    The guest was ``kept`` in a file, or runs at its source. One that is ``copied`` gets an identity
    of its own.

    Raises:
        StreamError: the machines differ; the message names each difference.
    """
    if copied:
        for part in machine.devices.having(HasIdentity):
            part.be_copy()
    else:
        _follow(hello, machine)
    own = describe(machine, hello.token)
    differences = [
        f"{name}: {theirs} at the source, {ours} here"
        for name, theirs, ours in (
            ("machine type", hello.machine, own.machine),
            ("vCPUs", hello.cpus, own.cpus),
            ("RAM", _regions(hello.ram), _regions(own.ram)),
            ("version of the machine's state", hello.version, own.version),
        )
        if theirs != ours
    ]
    differences += _device_differences(hello, own, machine, copied)
    if differences:
        raise StreamError("the machines differ: " + "; ".join(differences))
    problems = [] if hello.cpu is None else cpu.problems(machine.board, hello.cpu)
    problems += [f"{nic.id}: {problem}" for nic in machine.nics for problem in nic.problems()]
    if not problems:
        problems += _reserve(
            machine, same_host=not kept and bool(own.boot) and hello.boot == own.boot
        )
    if problems:
        raise StreamError("this host cannot take the guest: " + "; ".join(problems))


def _follow(hello: Hello, machine: Machine) -> None:
    theirs = {device.id: device for device in hello.devices}
    for device in machine.devices:
        part = machine.devices.part(device, ReservesAhead)
        if part is not None and device.id in theirs and theirs[device.id].kind == device.kind:
            part.follow(theirs[device.id].properties)


def _reserve(machine: Machine, same_host: bool) -> Iterator[str]:
    """Yield what one VM alone may have, and another has."""
    for device in machine.devices:
        part = machine.devices.part(device, ReservesAhead)
        if part is not None:
            try:
                part.reserve(same_host)
            except HostError as error:
                yield f"{device.id}: {error}"


def adopt(hello: Hello, machine: Machine) -> None:
    """Become what :func:`check` let pass and a new machine is not: one with the guest's CPU.

    Raises:
        StreamError: KVM refuses.
    """
    if hello.cpu is not None:
        cpu.adopt(machine.board, hello.cpu)


def _device_differences(hello: Hello, own: Hello, machine: Machine, copied: bool) -> Iterator[str]:
    theirs = {device.id: device for device in hello.devices}
    if len(theirs) != len(hello.devices):
        yield "two devices at the source have one id"
    ours = {device.id: device for device in own.devices}
    for id in theirs.keys() - ours.keys():
        yield f"device {id} ({theirs[id].kind}): at the source, missing here"
    for id in ours.keys() - theirs.keys():
        yield f"device {id} ({ours[id].kind}): here, missing at the source"
    for device in machine.devices:
        if device.id in theirs:
            part = machine.devices.part(device, HasIdentity) if copied else None
            identity = part.identity if part is not None else frozenset()
            yield from _differences(theirs[device.id], ours[device.id], identity)
            missing = theirs[device.id].negotiated & ~_offered(machine, device)
            if missing:
                yield (
                    f"device {device.id}: the guest uses features {missing:#x} that are not "
                    "offered here"
                )


def _differences(theirs: HelloDevice, ours: HelloDevice, identity: frozenset[str]) -> Iterator[str]:
    pairs = [("kind", theirs.kind, ours.kind), ("version", theirs.version, ours.version)]
    if theirs.kind == ours.kind:
        names = dict.fromkeys([*ours.properties, *theirs.properties])
        pairs += [
            (name, theirs.properties.get(name, "absent"), ours.properties.get(name, "absent"))
            for name in names
        ]
    for name, their, our in pairs:
        if name in identity:
            if their == our:
                yield (
                    f"device {ours.id}, {name}: {their} is the original's, which the copy cannot "
                    "have too; give another, or none for one at random"
                )
        elif their != our:
            given = name in ("queues", "queue-size") and isinstance(their, int)
            hint = f"; give {name}={their} here" if given else ""
            yield f"device {ours.id}, {name}: {their} at the source, {our} here{hint}"


def _negotiated(machine: Machine, device: Device) -> int:
    part = machine.devices.part(device, Negotiates)
    return part.negotiated if part is not None else 0


def _offered(machine: Machine, device: Device) -> int:
    part = machine.devices.part(device, Negotiates)
    return part.offered if part is not None else 0


def _regions(ram: list[tuple[int, int]]) -> str:
    return " + ".join(f"{_size(size)} at {start:#x}" for start, size in ram)


def _size(size: int) -> str:
    return f"{size} bytes" if size % (1 << 20) else f"{size >> 20} MiB"
