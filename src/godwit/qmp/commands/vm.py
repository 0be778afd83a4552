"""Commands for the VM itself: run state, end, and facts about the VM and the server."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from godwit.errors import ConfigError
from godwit.qmp.controller import VmController
from godwit.qmp.protocol import VersionInfo, version
from godwit.spec import machine_types
from godwit.spec.config import MAX_CPUS
from godwit.spec.runstate import LIVE, RunState

from . import registry
from .registry import Arguments, Command, states

_S = RunState


class StatusInfo(msgspec.Struct, frozen=True):
    """The StatusInfo of qapi/run-state.json, where 7.2 has 'singlestep' as mandatory."""

    running: bool
    singlestep: bool
    status: RunState


class CommandInfo(msgspec.Struct, frozen=True):
    """The name of a command."""

    name: str


class KvmInfo(msgspec.Struct, frozen=True):
    """The presence of KVM, and the use."""

    enabled: bool
    present: bool


class NameInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The VM's name, which no VM has: clients know a VM by the socket."""

    name: str = ""


class UuidInfo(msgspec.Struct, frozen=True):
    """The VM's UUID: the null UUID stands for none (qapi/misc.json)."""

    uuid: str = msgspec.field(name="UUID")


class Target(enum.StrEnum):
    """The architectures of guests: QEMU's SysEmuTarget (qapi/machine.json) has more."""

    X86_64 = "x86_64"


class TargetInfo(msgspec.Struct, frozen=True):
    """The architecture of the guest."""

    arch: Target


class CpuInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The CpuInfoFast of qapi/machine.json. The path is a name: there are no objects behind it."""

    cpu_index: int
    qom_path: str
    thread_id: int
    target: Target


class MachineInfo(msgspec.Struct, rename="kebab", frozen=True, omit_defaults=True):
    """The MachineInfo of qapi/machine.json."""

    name: str
    cpu_max: int
    hotpluggable_cpus: bool
    numa_mem_supported: bool
    deprecated: bool
    is_default: bool = False


class MemoryInfo(msgspec.Struct, rename="kebab", frozen=True):
    """The MemoryInfo of qapi/machine.json: RAM in bytes."""

    base_memory: int


class HumanArguments(Arguments, frozen=True):
    """Arguments of human-monitor-command, which is always refused."""

    command_line: Annotated[str, msgspec.Meta(max_length=4096)]
    cpu_index: int = 0


def _query_status(controller: VmController, _: Arguments) -> StatusInfo:
    state = controller.states.current
    return StatusInfo(running=state in LIVE, singlestep=False, status=state)


def _stop(controller: VmController, _: Arguments) -> None:
    # QEMU as well takes a stop of what does not run for done (softmmu/cpus.c, vm_stop).
    if controller.states.current in LIVE:
        controller.stop()


def _cont(controller: VmController, _: Arguments) -> None:
    if controller.states.current not in LIVE:
        controller.cont()


def _powerdown(controller: VmController, _: Arguments) -> None:
    controller.powerdown()


def _quit(controller: VmController, _: Arguments) -> None:
    controller.quit()


def _query_version(_: VmController, __: Arguments) -> VersionInfo:
    return version()


def _query_commands(_: VmController, __: Arguments) -> list[CommandInfo]:
    return [CommandInfo(name) for name in sorted([*registry.listed(), "qmp_capabilities"])]


def _query_kvm(_: VmController, __: Arguments) -> KvmInfo:
    return KvmInfo(enabled=True, present=True)


def _query_name(_: VmController, __: Arguments) -> NameInfo:
    return NameInfo()


def _query_uuid(_: VmController, __: Arguments) -> UuidInfo:
    return UuidInfo("00000000-0000-0000-0000-000000000000")


def _query_target(_: VmController, __: Arguments) -> TargetInfo:
    return TargetInfo(Target.X86_64)


def _query_cpus(controller: VmController, _: Arguments) -> list[CpuInfo]:
    return [
        CpuInfo(index, f"/machine/cpu{index}", thread, Target.X86_64)
        for index, thread in enumerate(controller.vcpu_threads())
    ]


def _query_machines(_: VmController, __: Arguments) -> list[MachineInfo]:
    return [
        MachineInfo(name, MAX_CPUS, False, False, False, is_default=name == machine_types.DEFAULT)
        for name in machine_types.names()
    ]


def _query_memory(controller: VmController, _: Arguments) -> MemoryInfo:
    return MemoryInfo(controller.ram_size())


def _human(_: VmController, __: HumanArguments) -> None:
    raise ConfigError(
        "there is no human monitor: use QMP's own commands, which 'query-commands' lists "
        "('query-status' for 'info status', 'query-migrate' for 'info migrate')"
    )


def _query_schema(_: VmController, __: Arguments) -> list[dict[str, object]]:
    from godwit.qmp import schema  # for the few that ask

    return schema.describe(registry.listed())


#: The guest is here and would be stopped by 'stop' or already is. Not in finish-migrate: a stop
#: that came to nothing would be taken back by a migration that fails.
_PAUSABLE = states(_S.PRELAUNCH, _S.PRELAUNCH_MIGRATE, _S.RUNNING, _S.PAUSED)

COMMANDS = {
    "query-status": Command(_query_status, returns=StatusInfo),
    "query-version": Command(_query_version, returns=VersionInfo),
    "query-commands": Command(_query_commands, returns=list[CommandInfo]),
    "query-qmp-schema": Command(_query_schema, returns=list[dict[str, object]]),
    "query-kvm": Command(_query_kvm, returns=KvmInfo),
    "query-name": Command(_query_name, returns=NameInfo),
    "query-uuid": Command(_query_uuid, returns=UuidInfo),
    "query-target": Command(_query_target, returns=TargetInfo),
    "query-machines": Command(_query_machines, returns=list[MachineInfo]),
    "query-cpus-fast": Command(_query_cpus, returns=list[CpuInfo]),
    "query-memory-size-summary": Command(_query_memory, returns=MemoryInfo),
    "stop": Command(_stop, states=_PAUSABLE),
    # QEMU lets a guest go on at the source of a migration that succeeded: two of it would run.
    # In inmigrate it notes 'start on arrival'; here --autostart has that meaning, and cont is
    # refused.
    "cont": Command(_cont, states=_PAUSABLE | {_S.IO_ERROR}),
    "system_powerdown": Command(_powerdown, states=states(_S.RUNNING, _S.PAUSED)),
    "quit": Command(_quit),
    # Clients ask for it where they know no other way; CommandNotFound would not name one.
    "human-monitor-command": Command(_human, HumanArguments, listed=False),
}
