"""The way from a command's name and arguments to its result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from godwit.errors import ConfigError, StateError
from godwit.qmp.controller import Controller
from godwit.qmp.protocol import CommandNotFound, short
from godwit.spec.runstate import RunState

_S = RunState

#: Why a state refuses most commands, for the person who reads the answer.
_WHY = {
    _S.INMIGRATE: "the guest has not arrived yet",
    _S.RESTORE_VM: "the guest is being restored",
    _S.SAVE_VM: "the guest is being saved",
    _S.FINISH_MIGRATE: "the guest is stopped for the end of its migration",
    _S.POSTMIGRATE: "the guest has migrated or was saved, and does not run here",
    _S.SHUTDOWN: "the guest has shut down",
    _S.GUEST_PANICKED: "the guest is dead",
    _S.INTERNAL_ERROR: "the guest cannot go on",
}


#: A name that a client gives: longer than any there is, and short enough to be quoted everywhere.
Name = Annotated[str, msgspec.Meta(max_length=255)]
#: A migration's URI, which may hold a path of Linux's PATH_MAX (include/uapi/linux/limits.h).
Uri = Annotated[str, msgspec.Meta(max_length=4096 + len("file:"))]
#: The most entries of a list that a client gives: more than there are NICs or capabilities.
MOST = msgspec.Meta(max_length=64)


class Arguments(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """No arguments at all, and the base of all others."""


class Absent(msgspec.Struct, frozen=True):
    """An argument of QEMU's without a counterpart here, and the values which mean off.

    Clients send what they know at QEMU's own default, too.
    """

    values: tuple[object, ...]
    why: str


class Command(msgspec.Struct, frozen=True):
    """One command: its function, its arguments, and the run states it needs (None: any).

    Attributes:
        returns: the type of the result, for query-qmp-schema; None: an empty object.
        absent: further arguments of QEMU's, which may be off alone.
        listed: False for a command which is always refused, and in no list.
    """

    run: Callable[[Controller, Any], object]
    arguments: type[msgspec.Struct] = Arguments
    states: frozenset[RunState] | None = None
    returns: Any = None
    absent: Mapping[str, Absent] = {}
    listed: bool = True


#: Name -> command, of all features. qmp_capabilities belongs to the protocol.
COMMANDS: dict[str, Command] = {}


def states(*needed: RunState) -> frozenset[RunState]:
    """Return the run states a command needs, for its entry in a table."""
    return frozenset(needed)


def listed() -> dict[str, Command]:
    """Return the commands that query-commands lists, but for qmp_capabilities."""
    return {name: command for name, command in COMMANDS.items() if command.listed}


def execute(controller: Controller, name: str, arguments: Mapping[str, object]) -> object:
    """Execute a command and return its result.

    Raises:
        CommandNotFound: there is no command of this name.
        ConfigError: an argument is wrong; the message names it.
        StateError: not allowed in the present run state; the message names that state and those
            in which the command is allowed.
        GodwitError: what the controller raised.
    """
    command = COMMANDS.get(name)
    if command is None:
        raise CommandNotFound(f"The command {short(name)} has not been found")
    # Arguments first: a client's mistake is the same mistake in each state.
    typed = _typed(command.arguments, _without_absent(command.absent, arguments))
    _check_state(name, command, controller.states.current)
    return command.run(controller, typed)


def _without_absent(
    absent: Mapping[str, Absent], arguments: Mapping[str, object]
) -> Mapping[str, object]:
    """Leave out what QEMU has and this command has not, if the client does not want it on."""
    for name in absent.keys() & arguments.keys():
        value = arguments[name]
        # By type as well: 0 is not False.
        if not any(type(value) is type(off) and value == off for off in absent[name].values):
            raise ConfigError(f"Parameter '{name}' is QEMU's, not Godwit's: {absent[name].why}")
    return {name: value for name, value in arguments.items() if name not in absent}


def _typed(kind: type[msgspec.Struct], arguments: Mapping[str, object]) -> msgspec.Struct:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name in arguments:
        if name not in fields:
            raise ConfigError(f"Parameter '{short(name)}' is unexpected")
    for name, field in fields.items():
        if field.required and name not in arguments:
            raise ConfigError(f"Parameter '{name}' is missing")
    try:
        return msgspec.convert(arguments, kind)
    except msgspec.ValidationError as error:
        # msgspec: "Expected `str`, got `int` - at `$.uri`"
        what, _, where = str(error).partition(" - at ")
        path = short(re.sub(r"[`$]\.?", "", where))
        # It quotes what it found: an enumeration's value, a name in an object.
        raise ConfigError(f"Invalid parameter type for '{path}': {short(what, 200)}") from error


def _check_state(name: str, command: Command, state: RunState) -> None:
    if command.states is None or state in command.states:
        return
    why = f" ({_WHY[state]})" if state in _WHY else ""
    # In the order of the enumeration, which is that of a VM's life.
    allowed = ", ".join(f"'{s}'" for s in RunState if s in command.states)
    raise StateError(
        f"The command '{name}' is not allowed in state '{state}'{why}; it is allowed in {allowed}"
    )
