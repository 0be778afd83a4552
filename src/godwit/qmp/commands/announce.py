"""Commands for announcements: start one, and show what became of the last."""

from __future__ import annotations

from typing import Annotated

import msgspec

from godwit.qmp.controller import AnnounceController
from godwit.spec.runstate import RunState

from .registry import MOST, Arguments, Command, Name, states


class AnnounceArguments(Arguments, frozen=True):
    """Arguments of announce-self: a number that is left out is as after a migration.

    QEMU insists on all four numbers, and ignores names of interfaces it does not know.
    """

    initial: int | None = None
    max: int | None = None
    rounds: int | None = None
    step: int | None = None
    interfaces: Annotated[list[Name], MOST] | None = None
    id: Name | None = None


class Vlan(msgspec.Struct, frozen=True):
    """A VLAN tag of the addresses announced in one VLAN."""

    tpid: int
    vid: int


class AnnouncedAddress(msgspec.Struct, rename="kebab", frozen=True):
    """An address of the guest's, and when it was announced, ms since the announcement began."""

    mac: str
    vlans: list[Vlan]
    ip: str | None
    seen_ms: float | None
    host_ms: float | None


class AnnounceInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The progress of one NIC's last announcement: NicRecord in ``announce/record.py``."""

    nic: str
    id: str
    mac: str
    method: str | None
    rounds: int
    asked: int
    acks: int
    ack_ms: float | None
    timeouts: int
    rarp_sent: int
    host_sent: int
    reports_sent: int
    host_ms: float | None
    held: str | None
    ready_ms: float | None
    questions: int
    answers: int
    proof: str | None
    proved_ms: float | None
    unproved: list[str]
    claims: int
    verified_ms: float | None
    unverified: list[str]
    error: str | None
    watched: bool
    malformed: int
    quarantined: bool
    held_back: int
    addresses: list[AnnouncedAddress]


def _announce_self(controller: AnnounceController, given: AnnounceArguments) -> None:
    old = controller.parameters.announce
    numbers = {name: getattr(given, name) for name in old.__struct_fields__}
    new = {name: value for name, value in numbers.items() if value is not None}
    schedule = msgspec.structs.replace(old, **new)
    controller.announce_self(schedule, given.interfaces, given.id)


def _query_announce(controller: AnnounceController, _: Arguments) -> object:
    return controller.announce_info()


COMMANDS = {
    "announce-self": Command(_announce_self, AnnounceArguments, states(RunState.RUNNING)),
    "query-announce": Command(_query_announce, returns=list[AnnounceInfo]),
}
