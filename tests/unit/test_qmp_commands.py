"""The commands against a fake VM: arguments, run states, results."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from godwit.errors import ConfigError, GodwitError, MigrationError, StateError
from godwit.hw.nic.nic import RxFilterInfo
from godwit.qmp import commands
from godwit.qmp.commands import COMMANDS, announce, devices, migration, network, snapshots, vm
from godwit.qmp.controller import Controller, DeviceView
from godwit.qmp.protocol import CommandNotFound
from godwit.spec import events, machine_types
from godwit.spec.parameters import (
    AnnounceOptions,
    AnnounceParameters,
    ConvergenceParameters,
    MigrationParameters,
    OnNoConvergence,
    Rarp,
    Verify,
)
from godwit.spec.runstate import RunState, RunStates

S = RunState


class Vm:
    """A Controller that notes its calls."""

    def __init__(self, state: RunState = S.RUNNING) -> None:
        self.states = RunStates(state)
        self.parameters = MigrationParameters()
        self.announced: list[dict[str, object]] = []
        self.filters: dict[str, RxFilterInfo] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.info: dict[str, object] = {}
        self.error: GodwitError | None = None

    def _note(self, *what: object) -> None:
        self.calls.append(what)
        if self.error:
            raise self.error

    def stop(self) -> None:
        self._note("stop")

    def cont(self) -> None:
        self._note("cont")

    def powerdown(self) -> None:
        self._note("powerdown")

    def quit(self) -> None:
        self._note("quit")

    def vcpu_threads(self) -> list[int]:
        return [71, 72]

    def ram_size(self) -> int:
        return 256 << 20

    def migrate(self, uri: str, insecure: bool) -> None:
        self._note("migrate", uri, insecure)

    def save(self, path: str, keep_running: bool, compress: str) -> None:
        self._note("save", path, keep_running, compress)

    def migrate_incoming(self, uri: str, insecure: bool) -> None:
        self._note("migrate_incoming", uri, insecure)

    def migration_info(self) -> dict[str, object]:
        return self.info

    def migrate_cancel(self) -> None:
        self._note("migrate_cancel")

    def announce_self(
        self, parameters: AnnounceParameters, interfaces: Sequence[str] | None, id: str | None
    ) -> None:
        self._note("announce_self", parameters, interfaces, id)

    def announce_info(self) -> list[dict[str, object]]:
        return self.announced

    def devices(self) -> list[DeviceView]:
        return [
            ("vsock0", "virtio-vsock", {"resets": 1}, {"cid": 7}),
            ("power0", "power", {}, {}),
        ]

    def rx_filters(self, name: str | None) -> list[tuple[str, RxFilterInfo]]:
        if name is not None and name not in self.filters:
            raise ConfigError(f"there is no NIC '{name}'")
        return [(nic, view) for nic, view in self.filters.items() if name in (None, nic)]


def run(vm: Vm, name: str, /, **arguments: object) -> Any:
    controller: Controller = vm
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return msgspec.to_builtins(commands.execute(controller, name, given))


PAUSABLE = "prelaunch prelaunch-migrate running paused"
#: Command -> the states it is allowed in, once more by hand; the others: everywhere.
ALLOWED = {
    "stop": PAUSABLE,
    "cont": f"{PAUSABLE} io-error",
    "system_powerdown": "running paused",
    "migrate": "running paused",
    "godwit-save": "running paused",
    "migrate-incoming": "inmigrate",
    "announce-self": "running",
}
NEEDED: dict[str, dict[str, object]] = {
    "migrate": {"uri": "unix:x"},
    "godwit-save": {"path": "/x"},
    "migrate-incoming": {"uri": "unix:x"},
    "migrate-set-capabilities": {"capabilities": []},
}
#: What is refused in all states, not for the state.
REFUSED = ("human-monitor-command",)


@pytest.mark.parametrize("state", RunState)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in REFUSED])
def test_every_command_in_every_state(name: str, state: RunState) -> None:
    vm = Vm(state)
    allowed = ALLOWED[name].split() if name in ALLOWED else [s.value for s in RunState]
    if state.value in allowed:
        run(vm, name, **NEEDED.get(name, {}))
    else:
        with pytest.raises(StateError) as caught:
            run(vm, name, **NEEDED.get(name, {}))
        text = str(caught.value)
        assert f"'{name}' is not allowed in state '{state}'" in text
        named = text.partition("it is allowed in ")[2].replace("'", "").split(", ")
        assert sorted(named) == sorted(allowed)
        assert vm.calls == []


def test_a_refusal_says_why() -> None:
    with pytest.raises(StateError, match="does not run here"):
        run(Vm(S.POSTMIGRATE), "cont")
    with pytest.raises(StateError, match="has not arrived yet"):
        run(Vm(S.INMIGRATE), "cont")


def test_query_status_as_qemu_7_2() -> None:
    for state in RunState:
        assert run(Vm(state), "query-status") == {
            "running": state is S.RUNNING,
            "singlestep": False,
            "status": state.value,
        }


@pytest.mark.parametrize("state", PAUSABLE.split())
def test_stop_and_cont_where_there_is_nothing_to_do(state: str) -> None:
    running = state == "running"
    vm = Vm(RunState(state))
    run(vm, "stop")
    assert vm.calls == ([("stop",)] if running else [])
    vm = Vm(RunState(state))
    run(vm, "cont")
    assert vm.calls == ([] if running else [("cont",)])


def test_simple_commands_reach_the_vm() -> None:
    vm = Vm()
    for name in ("system_powerdown", "quit", "migrate_cancel"):
        assert run(vm, name) is None
    assert vm.calls == [("powerdown",), ("quit",), ("migrate_cancel",)]


def test_migrate_and_its_arguments() -> None:
    vm = Vm()
    run(vm, "migrate", uri="unix:/run/b")
    run(vm, "migrate", uri="tcp:b:4444", insecure=True)
    assert vm.calls == [("migrate", "unix:/run/b", False), ("migrate", "tcp:b:4444", True)]
    vm = Vm(S.INMIGRATE)
    run(vm, "migrate-incoming", uri="tcp:0:4444", insecure=True)
    assert vm.calls == [("migrate_incoming", "tcp:0:4444", True)]


def test_migrate_takes_qemus_arguments_as_far_as_they_ask_for_nothing() -> None:
    vm = Vm()
    off = {"blk": False, "inc": False, "resume": False}
    run(vm, "migrate", uri="unix:x", detach=True, **off)
    run(vm, "migrate", uri="unix:x", detach=False)
    assert vm.calls == [("migrate", "unix:x", False)] * 2
    for name, why in (("blk", "not copied"), ("inc", "not copied"), ("resume", "no postcopy")):
        with pytest.raises(ConfigError, match=f"'{name}' is true, but .*{why}.*: leave it out"):
            run(vm, "migrate", uri="unix:x", **{name: True})
    assert len(vm.calls) == 2


def test_parameters_of_qemus_may_be_off() -> None:
    vm = Vm()
    off: dict[str, object] = {"tls-creds": "", "tls-hostname": None, "block-incremental": False}
    off |= {"multifd-compression": "none", "max-postcopy-bandwidth": 0, "block-bitmap-mapping": []}
    run(vm, "migrate-set-parameters", **off, **{"max-bandwidth": 7})
    assert run(vm, "query-migrate-parameters")["max-bandwidth"] == 7
    for name, value in (("tls-creds", "tls0"), ("block-incremental", 0), ("compress-level", 1)):
        with pytest.raises(ConfigError, match=f"Parameter '{name}' is QEMU's, not Godwit's: "):
            run(vm, "migrate-set-parameters", **{name: value, "max-bandwidth": 8})
    assert run(vm, "query-migrate-parameters")["max-bandwidth"] == 7, "all or none"


def test_the_human_monitor_is_refused_with_the_way_to_go() -> None:
    with pytest.raises(ConfigError, match="'query-commands' lists") as caught:
        run(Vm(), "human-monitor-command", command_line="info status")
    assert not isinstance(caught.value, CommandNotFound)
    assert "human-monitor-command" not in str(run(Vm(), "query-commands"))


def test_facts_about_the_vm_as_qemu_has_them() -> None:
    vm = Vm()
    assert run(vm, "query-name") == {}
    assert run(vm, "query-uuid") == {"UUID": "00000000-0000-0000-0000-000000000000"}
    assert run(vm, "query-target") == {"arch": "x86_64"}
    assert run(vm, "query-block") == []
    assert run(vm, "query-memory-size-summary") == {"base-memory": 256 << 20}
    cpus = run(vm, "query-cpus-fast")
    assert [(cpu["cpu-index"], cpu["thread-id"]) for cpu in cpus] == [(0, 71), (1, 72)]
    machines = run(vm, "query-machines")
    assert [one["name"] for one in machines if one.get("is-default")] == [machine_types.DEFAULT]
    assert len(machines) >= 2


def test_what_the_vm_refuses_is_the_error() -> None:
    vm = Vm()
    vm.error = MigrationError("nobody listens on unix:/run/b")
    with pytest.raises(MigrationError, match="nobody listens"):
        run(vm, "migrate", uri="unix:/run/b")


def test_query_migrate_shows_what_the_vm_says() -> None:
    vm = Vm()
    assert run(vm, "query-migrate") == {}
    vm.info = {"status": "completed", "downtime": 31}
    assert run(vm, "query-migrate") == {"status": "completed", "downtime": 31}


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("migrate", {}, "Parameter 'uri' is missing"),
        ("migrate", {"uri": 5}, "Invalid parameter type for 'uri': Expected `str`, got `int`"),
        ("migrate", {"uri": None}, "Invalid parameter type for 'uri'"),
        ("migrate", {"uri": "unix:x", "insecure": 1}, "'insecure': Expected `bool`"),
        ("migrate", {"uri": "unix:x", "detached": True}, "Parameter 'detached' is unexpected"),
        ("stop", {"now": True}, "Parameter 'now' is unexpected"),
        ("query-status", {"x" * 500: 1}, "is unexpected"),
        ("announce-self", {"rounds": "5"}, "'rounds': Expected `int"),
        ("announce-self", {"rounds": True}, "'rounds': Expected `int"),
        ("announce-self", {"interfaces": ["nic0", 1]}, "'interfaces[1]': Expected `str`"),
        ("announce-self", {"rounds": 1001}, "'rounds' is 1001"),
        ("announce-self", {"step": 0}, "'step' is 0 ms"),
        ("announce-self", {"max": -1}, "'max' is -1 ms"),
        ("migrate-set-parameters", {"announce-initial": 100_001}, "'initial' is 100001 ms"),
        ("migrate-set-parameters", {"announce_initial": 1}, "'announce_initial' is unexpected"),
        ("migrate-set-parameters", {"max-bandwidth": -1}, "'max-bandwidth' is -1"),
        ("migrate-set-parameters", {"max-bandwidth": 2**63}, "'max-bandwidth'"),
        ("migrate-set-parameters", {"downtime-limit": 2_000_001}, "from 0 to 2000000 ms"),
        ("migrate-set-parameters", {"announce-deadline": 9}, "'deadline' is 9 ms"),
        ("migrate-set-parameters", {"announce-deadline": 60_001}, "from 10 to 60000 ms"),
        ("migrate-set-parameters", {"announce-verify": "both"}, "'announce-verify': Invalid enum"),
        ("migrate-set-parameters", {"announce-verify": True}, "'announce-verify': Expected `str"),
        ("migrate-set-parameters", {"announce-refresh": 1}, "'announce-refresh': Expected `bool"),
        ("migrate-set-parameters", {"cpu-throttle-initial": 0}, "'cpu-throttle-initial' is 0"),
        ("migrate-set-parameters", {"cpu-throttle-increment": 100}, "from 1 to 99 percent"),
        ("migrate-set-parameters", {"max-cpu-throttle": 19}, "'cpu-throttle-initial', which is 20"),
        ("migrate-set-parameters", {"max-cpu-throttle": "50"}, "'max-cpu-throttle': Expected `int"),
        ("migrate-set-parameters", {"on-no-convergence": "wait"}, "'on-no-convergence': Invalid"),
        ("migrate-set-parameters", {"auto-converge": True}, "'auto-converge' is unexpected"),
        ("migrate-set-parameters", {"convergence": {}}, "'convergence' is unexpected"),
        ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "xbzrle", "state": True}]},
            "Capability 'xbzrle' is not available; there is 'auto-converge'",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "auto-converge", "state": 1}]},
            "'capabilities[0].state': Expected `bool`",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "auto-converge"}]},
            "'capabilities[0]': Object missing required field `state`",
        ),
        ("query-rx-filter", {"name": 1}, "'name': Expected `str"),
        ("query-rx-filter", {"id": "nic0"}, "Parameter 'id' is unexpected"),
        ("query-rx-filter", {"name": "nic9"}, "there is no NIC 'nic9'"),
        ("query-announce", {"nic": "nic0"}, "Parameter 'nic' is unexpected"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: dict[str, object], text: str) -> None:
    vm = Vm()
    with pytest.raises(ConfigError) as caught:
        commands.execute(vm, name, arguments)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 250
    assert vm.calls == []


def test_an_unknown_command() -> None:
    with pytest.raises(CommandNotFound, match="The command fly has not been found"):
        run(Vm(), "fly")
    with pytest.raises(CommandNotFound):
        run(Vm(), "qmp_capabilities")


def test_announce_self_completes_its_schedule_from_the_parameters() -> None:
    vm = Vm()
    vm.parameters = MigrationParameters(announce=AnnounceParameters(initial=7, rounds=9))
    run(vm, "announce-self")
    run(vm, "announce-self", rounds=2, step=30, max=60, initial=1, interfaces=["nic1"], id="a")
    assert vm.calls == [
        ("announce_self", AnnounceParameters(7, 550, 9, 100), None, None),
        ("announce_self", AnnounceParameters(1, 60, 2, 30), ["nic1"], "a"),
    ]


def test_parameters_are_set_and_shown() -> None:
    vm = Vm()
    shown = run(vm, "query-migrate-parameters")
    assert shown == {
        "announce-initial": 50,
        "announce-max": 550,
        "announce-rounds": 5,
        "announce-step": 100,
        "announce-deadline": 400,
        "announce-verify": "off",
        "announce-refresh": False,
        "announce-rate": 1000,
        "announce-rarp": "always",
        "announce-ask-gateways": True,
        "announce-patience": 60_000,
        "max-bandwidth": 0,
        "downtime-limit": 300,
        "handover": True,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "max-cpu-throttle": 99,
        "on-no-convergence": "abort",
    }
    others = {
        "announce-verify": "probe",
        "announce-refresh": True,
        "announce-rate": 50,
        "announce-rarp": "fallback",
        "announce-ask-gateways": False,
        "handover": False,
        "on-no-convergence": "stop-and-copy",
    }
    for name in shown:
        before = run(vm, "query-migrate-parameters")
        value = others.get(name, 42)
        commands.execute(vm, "migrate-set-parameters", {name: value})
        assert run(vm, "query-migrate-parameters") == {**before, name: value}
    run(vm, "migrate-set-parameters")
    assert run(vm, "query-migrate-parameters") == {**dict.fromkeys(shown, 42), **others}
    assert vm.parameters.announce == AnnounceParameters(42, 42, 42, 42)
    assert vm.parameters.announce_options == AnnounceOptions(
        42, Verify.PROBE, True, 50, Rarp.FALLBACK, False, 42
    )
    assert vm.parameters.convergence == ConvergenceParameters(
        False, 42, 42, 42, OnNoConvergence.STOP_AND_COPY
    )


def test_capabilities_are_set_and_shown() -> None:
    vm = Vm()
    for state in (True, False):
        wanted = [{"capability": "auto-converge", "state": state}]
        assert run(vm, "migrate-set-capabilities", capabilities=wanted) is None
        assert run(vm, "query-migrate-capabilities") == wanted
        assert vm.parameters.convergence == ConvergenceParameters(auto_converge=state)
    run(vm, "migrate-set-capabilities", capabilities=[])
    twice = [{"capability": "auto-converge", "state": state} for state in (False, True)]
    run(vm, "migrate-set-capabilities", capabilities=twice)
    assert run(vm, "query-migrate-capabilities") == twice[1:]
    unknown = [*twice, {"capability": "multifd", "state": True}]
    with pytest.raises(ConfigError):
        run(vm, "migrate-set-capabilities", capabilities=[*reversed(twice), *unknown])
    assert run(vm, "query-migrate-capabilities") == twice[1:], "all or none"


def test_a_capability_that_is_not_there_can_be_turned_off() -> None:
    vm = Vm()
    on = {"capability": "auto-converge", "state": True}
    off = [{"capability": name, "state": False} for name in ("multifd", "xbzrle", "no such")]
    assert run(vm, "migrate-set-capabilities", capabilities=[*off, on]) is None
    assert run(vm, "query-migrate-capabilities") == [on]


@pytest.mark.parametrize("how", Verify)
def test_each_way_to_verify_can_be_chosen(how: Verify) -> None:
    vm = Vm()
    run(vm, "migrate-set-parameters", announce_verify=how.value, announce_refresh=True)
    assert vm.parameters.announce_options == AnnounceOptions(verify=how, refresh=True)
    run(vm, "migrate-set-parameters", announce_verify="off", announce_refresh=False)
    assert vm.parameters.announce_options == AnnounceOptions()


def test_query_announce_shows_what_the_vm_says() -> None:
    vm = Vm()
    assert run(vm, "query-announce") == []
    vm.announced = [{"nic": "nic0", "method": "guest"}]
    assert run(vm, "query-announce") == vm.announced


def test_query_rx_filter_as_qemu() -> None:
    vm = Vm()
    assert run(vm, "query-rx-filter") == []
    view = RxFilterInfo(
        promiscuous=False,
        unicast="normal",
        multicast="all",
        vlan="none",
        broadcast=True,
        unicast_overflow=False,
        multicast_overflow=True,
        main_mac=bytes.fromhex("525400123456"),
        unicast_table=(b"\2\0\0\0\0\1",),
        multicast_table=(b"\1\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"),
        vlan_table=(0, 100),
    )
    vm.filters = {"nic0": view, "nic1": view._replace(promiscuous=True)}
    first, second = run(vm, "query-rx-filter")
    # RxFilterInfo of qapi/net.json.
    assert first == {
        "name": "nic0",
        "promiscuous": False,
        "multicast": "all",
        "unicast": "normal",
        "vlan": "none",
        "broadcast-allowed": True,
        "multicast-overflow": True,
        "unicast-overflow": False,
        "main-mac": "52:54:00:12:34:56",
        "vlan-table": [0, 100],
        "unicast-table": ["02:00:00:00:00:01"],
        "multicast-table": ["01:00:5e:00:00:01", "33:33:00:00:00:01"],
    }
    assert second == {**first, "name": "nic1", "promiscuous": True}
    assert run(vm, "query-rx-filter", name="nic1") == [second]


def test_parameters_change_all_or_none() -> None:
    vm = Vm()
    before = run(vm, "query-migrate-parameters")
    with pytest.raises(ConfigError):
        run(vm, "migrate-set-parameters", announce_rounds=3, max_bandwidth=9, downtime_limit=-1)
    assert run(vm, "query-migrate-parameters") == before
    with pytest.raises(ConfigError):
        run(vm, "migrate-set-parameters", announce_rounds=3, announce_deadline=1)
    with pytest.raises(ConfigError):
        run(vm, "migrate-set-parameters", max_bandwidth=9, max_cpu_throttle=100)
    with pytest.raises(ConfigError):
        run(vm, "migrate-set-parameters", announce_deadline=500, announce_rounds=-1)
    assert run(vm, "query-migrate-parameters") == before


def test_each_command_is_in_one_features_table() -> None:
    tables = [
        feature.COMMANDS for feature in (vm, migration, snapshots, announce, network, devices)
    ]
    names = [name for table in tables for name in table]
    assert len(set(names)) == len(names)
    assert set(COMMANDS) == set(names)
    assert all(COMMANDS[name] is table[name] for table in tables for name in table)


def test_query_commands_and_version() -> None:
    names = [entry["name"] for entry in run(Vm(), "query-commands")]
    assert names == sorted(names)
    assert {"qmp_capabilities", "migrate", "announce-self", "query-commands"} <= set(names)
    assert set(run(Vm(), "query-version")) == {"qemu", "package"}
    assert run(Vm(), "query-kvm") == {"enabled": True, "present": True}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (S.PRELAUNCH, S.RUNNING, ["RUN_STATE", "RESUME"]),
        (S.RUNNING, S.PAUSED, ["RUN_STATE", "STOP"]),
        (S.RUNNING, S.FINISH_MIGRATE, ["RUN_STATE", "STOP"]),
        (S.FINISH_MIGRATE, S.POSTMIGRATE, ["RUN_STATE"]),
        (S.INMIGRATE, S.PRELAUNCH_MIGRATE, ["RUN_STATE"]),
        (S.PRELAUNCH_MIGRATE, S.RUNNING, ["RUN_STATE", "RESUME"]),
        (S.RUNNING, S.PRELAUNCH, ["RUN_STATE", "RESET"]),
    ],
)
def test_events_of_transitions(old: RunState, new: RunState, names: list[str]) -> None:
    found = events.of_transition(old, new)
    assert [name for name, _ in found] == names
    assert found[0][1] == {"from": old.value, "to": new.value}


def test_events_with_reasons() -> None:
    assert events.shutdown(events.Reason.GUEST_SHUTDOWN) == (
        "SHUTDOWN",
        {"guest": True, "reason": "guest-shutdown"},
    )
    assert events.shutdown(events.Reason.HOST_QUIT)[1] == {
        "guest": False,
        "reason": "host-qmp-quit",
    }
    assert events.rx_filter_changed("nic0") == (
        "NIC_RX_FILTER_CHANGED",
        {"name": "nic0", "path": "/machine/nic0"},
    )
    assert events.migration("active") == ("MIGRATION", {"status": "active"})


def test_devices_are_listed_with_counters_and_properties() -> None:
    assert run(Vm(S.FINISH_MIGRATE), "query-devices") == [
        {
            "id": "vsock0",
            "kind": "virtio-vsock",
            "counters": {"resets": 1},
            "properties": {"cid": 7},
        },
        {"id": "power0", "kind": "power", "counters": {}, "properties": {}},
    ]
