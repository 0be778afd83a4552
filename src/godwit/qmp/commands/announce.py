"""Commands for announcements: start one, and show what became of the last."""

from __future__ import annotations

import msgspec

from godwit.qmp.controller import AnnounceController
from godwit.spec.runstate import RunState

from .registry import Arguments, Command, states


class AnnounceArguments(Arguments, frozen=True):
    """Arguments of announce-self: a number that is left out is as after a migration.

    QEMU insists on all four numbers, and ignores names of interfaces it does not know.
    """

    initial: int | None = None
    max: int | None = None
    rounds: int | None = None
    step: int | None = None
    interfaces: list[str] | None = None
    id: str | None = None


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
    "query-announce": Command(_query_announce),
}
