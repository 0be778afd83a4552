"""Commands for migrations, and for their parameters and capabilities."""

from __future__ import annotations

import msgspec

from godwit.errors import ConfigError
from godwit.qmp.controller import MigrationController
from godwit.qmp.protocol import short
from godwit.spec import parameters
from godwit.spec.parameters import CAPABILITIES
from godwit.spec.runstate import RunState

from .registry import Arguments, Command, states

_S = RunState


class MigrateArguments(Arguments, frozen=True):
    """Arguments of migrate and migrate-incoming, of which ``insecure`` is Godwit's own."""

    uri: str
    insecure: bool = False


class CapabilityStatus(Arguments, frozen=True):
    """One capability, on or off."""

    capability: str
    state: bool


class CapabilityArguments(Arguments, frozen=True):
    """Arguments of migrate-set-capabilities: a capability that is left out stays as it is."""

    capabilities: list[CapabilityStatus]


#: Arguments of migrate-set-parameters: a parameter that is left out stays as it is.
ParameterArguments = msgspec.defstruct(
    "ParameterArguments",
    [
        (name.replace("-", "_"), kind | None, None)
        for name, kind in parameters.types().items()
        if name not in CAPABILITIES
    ],
    bases=(Arguments,),
    frozen=True,
)


def _migrate(controller: MigrationController, arguments: MigrateArguments) -> None:
    controller.migrate(arguments.uri, arguments.insecure)


def _migrate_incoming(controller: MigrationController, arguments: MigrateArguments) -> None:
    controller.migrate_incoming(arguments.uri, arguments.insecure)


def _query_migrate(controller: MigrationController, _: Arguments) -> object:
    return controller.migration_info()


def _migrate_cancel(controller: MigrationController, _: Arguments) -> None:
    controller.migrate_cancel()


def _set_parameters(controller: MigrationController, given: msgspec.Struct) -> None:
    values = zip(given.__struct_encode_fields__, msgspec.structs.astuple(given), strict=True)
    new = {name: value for name, value in values if value is not None}
    controller.parameters = controller.parameters.changed(new)


def _query_parameters(controller: MigrationController, _: Arguments) -> object:
    shown = controller.parameters.shown()
    return {name: value for name, value in shown.items() if name not in CAPABILITIES}


def _set_capabilities(controller: MigrationController, given: CapabilityArguments) -> None:
    # QEMU refuses this while a migration is under way; here it counts from the next round on.
    for status in given.capabilities:
        if status.capability not in CAPABILITIES:
            known = ", ".join(f"'{name}'" for name in CAPABILITIES)
            raise ConfigError(
                f"Capability '{short(status.capability)}' is not available; there is {known}"
            )
    new = {status.capability: status.state for status in given.capabilities}
    controller.parameters = controller.parameters.changed(new)


def _query_capabilities(controller: MigrationController, _: Arguments) -> object:
    shown = controller.parameters.shown()
    return [{"capability": name, "state": shown[name]} for name in CAPABILITIES]


COMMANDS = {
    "migrate": Command(_migrate, MigrateArguments, states(_S.RUNNING, _S.PAUSED)),
    "migrate-incoming": Command(_migrate_incoming, MigrateArguments, states(_S.INMIGRATE)),
    "query-migrate": Command(_query_migrate),
    "migrate_cancel": Command(_migrate_cancel),
    "migrate-set-parameters": Command(_set_parameters, ParameterArguments),
    "query-migrate-parameters": Command(_query_parameters),
    "migrate-set-capabilities": Command(_set_capabilities, CapabilityArguments),
    "query-migrate-capabilities": Command(_query_capabilities),
}
