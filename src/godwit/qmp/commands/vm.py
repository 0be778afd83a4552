"""Commands for the VM itself: run state, end, and facts about the server."""

from __future__ import annotations

from godwit.qmp.controller import VmController
from godwit.qmp.protocol import version
from godwit.spec.runstate import LIVE, RunState

from . import registry
from .registry import Arguments, Command, states

_S = RunState


def _query_status(controller: VmController, _: Arguments) -> object:
    # 7.2 has 'singlestep' as a mandatory member (qapi/run-state.json, StatusInfo).
    state = controller.states.current
    return {"running": state in LIVE, "singlestep": False, "status": state.value}


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


def _query_version(_: VmController, __: Arguments) -> object:
    return version()


def _query_commands(_: VmController, __: Arguments) -> object:
    return [{"name": name} for name in sorted([*registry.COMMANDS, "qmp_capabilities"])]


def _query_kvm(_: VmController, __: Arguments) -> object:
    return {"enabled": True, "present": True}


#: The guest is here and would be stopped by 'stop' or already is. Not in finish-migrate: a stop
#: that came to nothing would be taken back by a migration that fails.
_PAUSABLE = states(_S.PRELAUNCH, _S.PRELAUNCH_MIGRATE, _S.RUNNING, _S.PAUSED)

COMMANDS = {
    "query-status": Command(_query_status),
    "query-version": Command(_query_version),
    "query-commands": Command(_query_commands),
    "query-kvm": Command(_query_kvm),
    "stop": Command(_stop, states=_PAUSABLE),
    # QEMU lets a guest go on at the source of a migration that succeeded: two of it would run.
    # In inmigrate it notes 'start on arrival'; here --autostart has that meaning, and cont is
    # refused.
    "cont": Command(_cont, states=_PAUSABLE),
    "system_powerdown": Command(_powerdown, states=states(_S.RUNNING, _S.PAUSED)),
    "quit": Command(_quit),
}
