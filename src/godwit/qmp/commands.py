"""The commands: arguments and the run states in which each is allowed. One table at the end.

Names, arguments and results are QEMU's (qapi/*.json of 7.2) unless a docstring says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from godwit.announce.schedule import AnnounceOptions, AnnounceParameters, Verify
from godwit.errors import ConfigError, StateError
from godwit.spec.parameters import ConvergenceParameters, OnNoConvergence
from godwit.spec.runstate import LIVE, RunState

from .controller import Controller
from .protocol import CommandNotFound, short, version

_S = RunState
_Struct = TypeVar("_Struct", AnnounceParameters, AnnounceOptions, ConvergenceParameters)

#: Why a state refuses most commands, in the words of the person who reads it.
_WHY = {
    _S.INMIGRATE: "the guest has not arrived yet",
    _S.RESTORE_VM: "the guest is being restored",
    _S.SAVE_VM: "the guest is being saved",
    _S.FINISH_MIGRATE: "the guest is stopped for the end of its move",
    _S.POSTMIGRATE: "the guest has moved or was saved, and does not run here",
    _S.SHUTDOWN: "the guest has shut down",
    _S.GUEST_PANICKED: "the guest is dead",
    _S.INTERNAL_ERROR: "the guest cannot go on",
}

#: QEMU: migration/options.c, MAX_MIGRATE_DOWNTIME_SECONDS, in ms.
MAX_DOWNTIME_LIMIT = 2_000_000
MAX_BANDWIDTH = 2**63 - 1
#: The only MigrationCapability of QEMU's that Godwit has.
AUTO_CONVERGE = "auto-converge"


class Arguments(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True):
    """No arguments; the base of those that are."""


class MigrateArguments(Arguments, frozen=True):
    """Of migrate and migrate-incoming; ``insecure`` is Godwit's own (default: false)."""

    uri: str
    insecure: bool = False


class AnnounceArguments(Arguments, frozen=True):
    """Of announce-self. What is left out of the schedule is as after a move.

    QEMU insists on all four numbers, and ignores names of interfaces that it does not know.
    """

    initial: int | None = None
    max: int | None = None
    rounds: int | None = None
    step: int | None = None
    interfaces: list[str] | None = None
    id: str | None = None


class ParameterArguments(Arguments, frozen=True):
    """Of migrate-set-parameters: what is left out stays as it is."""

    announce_initial: int | None = None
    announce_max: int | None = None
    announce_rounds: int | None = None
    announce_step: int | None = None
    announce_deadline: int | None = None
    announce_verify: Verify | None = None
    announce_refresh: bool | None = None
    announce_rate: int | None = None
    max_bandwidth: int | None = None
    downtime_limit: int | None = None
    handover: bool | None = None
    cpu_throttle_initial: int | None = None
    cpu_throttle_increment: int | None = None
    max_cpu_throttle: int | None = None
    on_no_convergence: OnNoConvergence | None = None


class CapabilityStatus(Arguments, frozen=True):
    """One capability, on or off."""

    capability: str
    state: bool


class CapabilityArguments(Arguments, frozen=True):
    """Of migrate-set-capabilities: what is left out stays as it is."""

    capabilities: list[CapabilityStatus]


class FilterArguments(Arguments, frozen=True):
    """Of query-rx-filter: all NICs, or one."""

    name: str | None = None


class Command(msgspec.Struct, frozen=True):
    """One command; ``states`` is where it is allowed, None for everywhere."""

    run: Callable[[Controller, Any], object]
    arguments: type[Arguments] = Arguments
    states: frozenset[RunState] | None = None


def execute(controller: Controller, name: str, arguments: Mapping[str, object]) -> object:
    """Execute a command and return its result.

    Raises:
        CommandNotFound: there is none of this name.
        ConfigError: the arguments are wrong; the message names the one.
        StateError: not allowed in the present run state; the message names it and those it is
            allowed in.
        GodwitError: what the controller raised.
    """
    command = COMMANDS.get(name)
    if command is None:
        raise CommandNotFound(f"The command {short(name)} has not been found")
    # Arguments first: a client's mistake is the same mistake in each state.
    typed = _typed(command.arguments, arguments)
    _check_state(name, command, controller.states.current)
    return command.run(controller, typed)


def _typed(kind: type[Arguments], arguments: Mapping[str, object]) -> Arguments:
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


def _query_status(controller: Controller, _: Arguments) -> object:
    # 7.2 has 'singlestep' as a mandatory member (qapi/run-state.json, StatusInfo).
    state = controller.states.current
    return {"running": state in LIVE, "singlestep": False, "status": state.value}


def _stop(controller: Controller, _: Arguments) -> None:
    # QEMU as well takes a stop of what does not run for done (softmmu/cpus.c, vm_stop).
    if controller.states.current in LIVE:
        controller.stop()


def _cont(controller: Controller, _: Arguments) -> None:
    if controller.states.current not in LIVE:
        controller.cont()


def _migrate(controller: Controller, arguments: MigrateArguments) -> None:
    controller.migrate(arguments.uri, arguments.insecure)


def _migrate_incoming(controller: Controller, arguments: MigrateArguments) -> None:
    controller.migrate_incoming(arguments.uri, arguments.insecure)


def _announce_self(controller: Controller, arguments: AnnounceArguments) -> None:
    schedule = _changed(
        controller.announce_parameters,
        initial=arguments.initial,
        max=arguments.max,
        rounds=arguments.rounds,
        step=arguments.step,
    )
    controller.announce_self(schedule, arguments.interfaces, arguments.id)


def _changed(old: _Struct, **new: object) -> _Struct:
    return msgspec.structs.replace(
        old, **{name: value for name, value in new.items() if value is not None}
    )


def _set_parameters(controller: Controller, new: ParameterArguments) -> None:
    # Everything is checked before anything is changed.
    schedule = _changed(
        controller.announce_parameters,
        initial=new.announce_initial,
        max=new.announce_max,
        rounds=new.announce_rounds,
        step=new.announce_step,
    )
    options = _changed(
        controller.announce_options,
        deadline=new.announce_deadline,
        verify=new.announce_verify,
        refresh=new.announce_refresh,
        rate=new.announce_rate,
    )
    convergence = _changed(
        controller.convergence,
        cpu_throttle_initial=new.cpu_throttle_initial,
        cpu_throttle_increment=new.cpu_throttle_increment,
        max_cpu_throttle=new.max_cpu_throttle,
        on_no_convergence=new.on_no_convergence,
    )
    _check_range("max-bandwidth", new.max_bandwidth, MAX_BANDWIDTH, "bytes per second")
    _check_range("downtime-limit", new.downtime_limit, MAX_DOWNTIME_LIMIT, "ms")
    controller.announce_parameters = schedule
    controller.announce_options = options
    controller.convergence = convergence
    if new.max_bandwidth is not None:
        controller.max_bandwidth = new.max_bandwidth
    if new.downtime_limit is not None:
        controller.downtime_limit = new.downtime_limit
    if new.handover is not None:
        controller.handover = new.handover


def _check_range(name: str, value: int | None, most: int, unit: str) -> None:
    if value is not None and not 0 <= value <= most:
        raise ConfigError(f"Parameter '{name}' is {value}: choose a value from 0 to {most} {unit}")


def _set_capabilities(controller: Controller, new: CapabilityArguments) -> None:
    # QEMU refuses this while a move is under way; here it counts from the next round on.
    convergence = controller.convergence
    for status in new.capabilities:
        if status.capability != AUTO_CONVERGE:
            raise ConfigError(
                f"Capability '{short(status.capability)}' is not available; "
                f"there is '{AUTO_CONVERGE}'"
            )
        convergence = _changed(convergence, auto_converge=status.state)
    controller.convergence = convergence


def _query_capabilities(controller: Controller, _: Arguments) -> object:
    return [{"capability": AUTO_CONVERGE, "state": controller.convergence.auto_converge}]


def _query_parameters(controller: Controller, _: Arguments) -> object:
    schedule = controller.announce_parameters
    options = controller.announce_options
    convergence = controller.convergence
    return {
        "announce-initial": schedule.initial,
        "announce-max": schedule.max,
        "announce-rounds": schedule.rounds,
        "announce-step": schedule.step,
        "announce-deadline": options.deadline,
        "announce-verify": options.verify.value,
        "announce-refresh": options.refresh,
        "announce-rate": options.rate,
        "max-bandwidth": controller.max_bandwidth,
        "downtime-limit": controller.downtime_limit,
        "handover": controller.handover,
        "cpu-throttle-initial": convergence.cpu_throttle_initial,
        "cpu-throttle-increment": convergence.cpu_throttle_increment,
        "max-cpu-throttle": convergence.max_cpu_throttle,
        "on-no-convergence": convergence.on_no_convergence.value,
    }


def _query_rx_filter(controller: Controller, arguments: FilterArguments) -> object:
    return [
        {
            "name": name,
            "promiscuous": view.promiscuous,
            "multicast": view.multicast,
            "unicast": view.unicast,
            "vlan": view.vlan,
            "broadcast-allowed": view.broadcast,
            "multicast-overflow": view.multicast_overflow,
            "unicast-overflow": view.unicast_overflow,
            "main-mac": view.main_mac.hex(":"),
            "vlan-table": list(view.vlan_table),
            "unicast-table": [mac.hex(":") for mac in view.unicast_table],
            "multicast-table": [mac.hex(":") for mac in view.multicast_table],
        }
        for name, view in controller.rx_filters(arguments.name)
    ]


def _query_commands(_: Controller, __: Arguments) -> object:
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


def _in(*states: RunState) -> frozenset[RunState]:
    return frozenset(states)


#: The guest is here and would be stopped by 'stop' or already is. Not in finish-migrate: a stop
#: that came to nothing would be taken back by a move that fails.
_PAUSABLE = _in(_S.PRELAUNCH, _S.PRELAUNCH_MIGRATE, _S.RUNNING, _S.PAUSED)

#: Name -> command. qmp_capabilities belongs to the protocol.
COMMANDS: dict[str, Command] = {
    "query-status": Command(_query_status),
    "query-version": Command(lambda _, __: version()),
    "query-commands": Command(_query_commands),
    "query-kvm": Command(lambda _, __: {"enabled": True, "present": True}),
    "stop": Command(_stop, states=_PAUSABLE),
    # QEMU lets a guest go on at the source of a move that succeeded: two of it would run.
    # In inmigrate it notes 'start on arrival'; here --autostart says that, and cont is refused.
    "cont": Command(_cont, states=_PAUSABLE),
    "system_powerdown": Command(lambda vm, _: vm.powerdown(), states=_in(_S.RUNNING, _S.PAUSED)),
    "quit": Command(lambda vm, _: vm.quit()),
    "migrate": Command(_migrate, MigrateArguments, _in(_S.RUNNING, _S.PAUSED)),
    "migrate-incoming": Command(_migrate_incoming, MigrateArguments, _in(_S.INMIGRATE)),
    "query-migrate": Command(lambda vm, _: vm.migration_info()),
    "migrate_cancel": Command(lambda vm, _: vm.migrate_cancel()),
    "migrate-set-parameters": Command(_set_parameters, ParameterArguments),
    "query-migrate-parameters": Command(_query_parameters),
    "migrate-set-capabilities": Command(_set_capabilities, CapabilityArguments),
    "query-migrate-capabilities": Command(_query_capabilities),
    "query-announce": Command(lambda vm, _: vm.announce_info()),
    "query-rx-filter": Command(_query_rx_filter, FilterArguments),
    "announce-self": Command(_announce_self, AnnounceArguments, _in(_S.RUNNING)),
}
