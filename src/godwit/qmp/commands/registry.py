"""The way from a command's name and arguments to its result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

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


class Arguments(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """No arguments at all, and the base of all others."""


class Command(msgspec.Struct, frozen=True):
    """One command: its function, its arguments, and the run states it needs (None: any)."""

    run: Callable[[Controller, Any], object]
    arguments: type[msgspec.Struct] = Arguments
    states: frozenset[RunState] | None = None


#: Name -> command, of all features. qmp_capabilities belongs to the protocol.
COMMANDS: dict[str, Command] = {}


def states(*needed: RunState) -> frozenset[RunState]:
    """Return the run states a command needs, for its entry in a table."""
    return frozenset(needed)


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
    typed = _typed(command.arguments, arguments)
    _check_state(name, command, controller.states.current)
    return command.run(controller, typed)


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
        path = re.sub(r"[`$]\.?", "", where)
        raise ConfigError(f"Invalid parameter type for '{path}': {what}") from error


def _check_state(name: str, command: Command, state: RunState) -> None:
    if command.states is None or state in command.states:
        return
    why = f" ({_WHY[state]})" if state in _WHY else ""
    # In the order of the enumeration, which is that of a VM's life.
    allowed = ", ".join(f"'{s}'" for s in RunState if s in command.states)
    raise StateError(
        f"The command '{name}' is not allowed in state '{state}'{why}; it is allowed in {allowed}"
    )
