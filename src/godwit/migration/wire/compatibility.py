"""What two machines must have in common before a guest moves between them."""

from __future__ import annotations

from godwit.errors import StreamError
from godwit.machine.machine import Machine
from godwit.spec.config import QUEUE_SIZE

from . import messages as codec


def describe(machine: Machine, token: bytes, mark: bytes = b"") -> codec.Hello:
    """The machine as a HELLO; a destination compares its own with it."""
    return codec.Hello(
        machine=machine.config.machine.name,
        token=token,
        cpus=machine.config.cpus,
        ram=[(region.start, region.size) for region in machine.memory.regions],
        nics=[
            codec.NicHello(
                id=nic.name,
                model=nic.model,
                version=nic.version,
                mac=config.mac,
                mtu=config.mtu,
                queue_size=config.queue_size or QUEUE_SIZE,
                negotiated=nic.negotiated,
                foresight=nic.foresight(),
            )
            for nic, config in zip(machine.nics, machine.config.nics, strict=True)
        ],
        versions={"machine": 1, "serial": 1, "power": 1},
        mark=mark,
    )


def check(hello: codec.Hello, machine: Machine) -> None:
    """Refuse what this machine cannot become, before the guest is stopped.

    Raises:
        StreamError: names each thing that differs.
    """
    own = describe(machine, hello.token)
    differences = [
        f"{name}: {theirs} at the source, {ours} here"
        for name, theirs, ours in (
            ("machine type", hello.machine, own.machine),
            ("vCPUs", hello.cpus, own.cpus),
            ("RAM", _megabytes(hello.ram), _megabytes(own.ram)),
            ("versions", hello.versions, own.versions),
            ("NICs", len(hello.nics), len(own.nics)),
        )
        if theirs != ours
    ]
    for theirs, ours, nic in zip(hello.nics, own.nics, machine.nics, strict=False):
        differences += [
            f"NIC {ours.id}, {field}: {_text(getattr(theirs, field))} at the source, "
            f"{_text(getattr(ours, field))} here"
            for field in ("id", "model", "version", "mac", "mtu", "queue_size")
            if getattr(theirs, field) != getattr(ours, field)
        ]
        missing = theirs.negotiated & ~nic.offered
        if missing:
            differences.append(
                f"NIC {ours.id}: the guest uses features {missing:#x} that are not offered here"
            )
    if differences:
        raise StreamError("the machines differ: " + "; ".join(differences))


def _megabytes(ram: list[tuple[int, int]]) -> str:
    return " + ".join(f"{size >> 20} MiB at {start:#x}" for start, size in ram)


def _text(value: object) -> str:
    return value.hex(":") if isinstance(value, bytes) else str(value)
