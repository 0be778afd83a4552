"""query-qmp-schema, walked as a stock reader does it: all that there is, and nothing else."""

from __future__ import annotations

import enum
import types
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
import pytest

from godwit.qmp import commands
from godwit.qmp.commands import COMMANDS, registry
from godwit.qmp.commands.announce import AnnounceInfo
from godwit.qmp.commands.migration import MigrationInfo
from godwit.spec import events
from godwit.spec.events import Event, MigrationStatus, Reason
from godwit.spec.parameters import CAPABILITIES, Verify
from godwit.spec.runstate import RunState
from qmp_schema_reader import Reader
from test_qmp_commands import Vm, run

#: The members that each meta-type has: SchemaInfo of qapi/introspect.json.
MEMBERS = {
    "builtin": {"json-type"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "object": {"members"},
    "alternate": {"members"},
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
}
JSON_TYPES = {"string", "number", "int", "boolean", "null", "object", "array", "value"}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(run(Vm(), "query-qmp-schema"))


def test_each_entry_has_its_form_and_each_type_is_there_and_used(reader: Reader) -> None:
    used = set()
    for entry in reader.entries:
        assert set(entry) == {"name", "meta-type"} | MEMBERS[entry["meta-type"]], entry
        assert entry.get("json-type", "int") in JSON_TYPES
        used |= set(reader.uses(entry))
    types_ = set(reader.by_name) - reader.named("command") - reader.named("event")
    assert used == types_


def test_each_command_is_there_with_each_argument(reader: Reader) -> None:
    listed = {entry["name"] for entry in run(Vm(), "query-commands")}
    assert reader.named("command") == listed
    assert listed == {*COMMANDS, "qmp_capabilities"} - {"human-monitor-command"}
    for name in listed - {"qmp_capabilities"}:
        fields = msgspec.structs.fields(COMMANDS[name].arguments)
        found = reader.arguments(name)
        assert set(found) == {field.encode_name for field in fields}
        for field in fields:
            assert ("default" in found[field.encode_name]) == (not field.required)
    assert set(reader.arguments("qmp_capabilities")) == {"enable"}


def test_each_event_is_there_with_each_member(reader: Reader) -> None:
    assert reader.named("event") == set(Event)
    for event in Event:
        assert list(reader.arguments(event)) == list(event.members)


@pytest.mark.parametrize(
    ("command", "argument", "shape"),
    [
        ("migrate", "uri", "string"),
        ("migrate", "insecure", "boolean"),
        ("announce-self", "rounds", "int"),
        ("announce-self", "interfaces", "[string]"),
        ("migrate-set-parameters", "announce-verify", "string"),
        ("migrate-set-parameters", "handover", "boolean"),
        ("migrate-set-capabilities", "capabilities", "[object]"),
        ("ANNOUNCE_ACKED", "ms", "number"),
        ("ANNOUNCE_SEEN", "ip", "alternate"),
        ("SHUTDOWN", "guest", "boolean"),
    ],
)
def test_arguments_have_their_types(
    reader: Reader, command: str, argument: str, shape: str
) -> None:
    assert reader.shape(reader.arguments(command)[argument]["type"]) == shape


@pytest.mark.parametrize(
    ("command", "argument", "kind"),
    [
        ("migrate-set-parameters", "announce-verify", Verify),
        ("MIGRATION", "status", MigrationStatus),
        ("RUN_STATE", "from", RunState),
        ("SHUTDOWN", "reason", Reason),
    ],
)
def test_enumerations_have_their_values(
    reader: Reader, command: str, argument: str, kind: type[enum.Enum]
) -> None:
    entry = reader.by_name[reader.arguments(command)[argument]["type"]]
    assert entry["values"] == [one.value for one in kind]
    assert [one["name"] for one in entry["members"]] == entry["values"]


def test_data_of_events_has_the_types_of_the_schema() -> None:
    samples = [events.shutdown(reason) for reason in Reason]
    samples += [events.migration(status) for status in MigrationStatus]
    samples += events.of_transition(RunState.RUNNING, RunState.PAUSED)
    samples += [events.guest_reset(), events.rx_filter_changed("nic0")]
    error = {"device": "disk0", "operation": "write", "action": "stop", "nospace": True}
    samples.append(Event.BLOCK_IO_ERROR.of(**error, reason="No space left on device"))
    for event, data in samples:
        for name, value in data.items():
            msgspec.convert(value, events.type_of(event, name))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert("no such", events.type_of(Event.MIGRATION, "status"))


# --- results --------------------------------------------------------------------------------------
_OF_THE_VM = ("query-migrate", "query-announce")  # what a VM shows: their own tests
_WITHOUT_ARGUMENTS = [
    name
    for name, command in COMMANDS.items()
    if name.startswith("query-") and name not in _OF_THE_VM
]


def _fits(value: Any, kind: str, reader: Reader) -> bool:
    """Whether a value is one of a type of the schema: all mandatory members, and no other."""
    entry = reader.by_name[kind]
    match entry["meta-type"]:
        case "builtin":
            wanted = {"string": str, "boolean": bool, "int": int, "null": type(None)}
            json_type = entry["json-type"]
            if json_type == "number":
                return isinstance(value, int | float)
            return json_type == "value" or type(value) is wanted[json_type]
        case "enum":
            return value in entry["values"]
        case "array":
            return all(_fits(one, entry["element-type"], reader) for one in value)
        case "alternate":
            return any(_fits(value, one["type"], reader) for one in entry["members"])
    members = reader.members(kind)
    mandatory = {name for name, member in members.items() if "default" not in member}
    return mandatory <= set(value) <= set(members) and all(
        _fits(one, members[name]["type"], reader) for name, one in value.items()
    )


@pytest.mark.parametrize("name", _WITHOUT_ARGUMENTS)
def test_results_have_the_types_of_the_schema(reader: Reader, name: str) -> None:
    assert _fits(run(Vm(), name), reader.by_name[name]["ret-type"], reader)


def test_the_check_of_results_sees_what_is_wrong(reader: Reader) -> None:
    kind = reader.by_name["query-status"]["ret-type"]
    right = run(Vm(), "query-status")
    assert _fits(right, kind, reader)
    for wrong in ({**right, "status": "well"}, {**right, "more": 1}, {"running": True}):
        assert not _fits(wrong, kind, reader)


def test_the_announcements_records_have_the_types_of_the_schema(reader: Reader) -> None:
    from announce_bench import Bench

    bench = Bench(nic0=True, nic1=False)
    before = bench.announcer.info()
    bench.go(RunState.RUNNING)
    bench.clock.advance(5)
    for info in (before, bench.announcer.info()):
        built = msgspec.to_builtins(info)
        assert _fits(built, reader.by_name["query-announce"]["ret-type"], reader)
        assert msgspec.convert(built, list[AnnounceInfo])


# --- bounds ---------------------------------------------------------------------------------------
def _unbounded(kind: Any, path: str) -> list[str]:
    """The texts and lists in a type of arguments that have no greatest length."""
    if get_origin(kind) is Annotated:
        inner, *metas = get_args(kind)
        if any(getattr(one, "max_length", None) for one in metas):
            return [] if inner is str else _unbounded(get_args(inner)[0], path + "[]")
        kind = inner
    if get_origin(kind) in (Union, types.UnionType):
        return [found for one in get_args(kind) for found in _unbounded(one, path)]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
        return [one for f in fields for one in _unbounded(f.type, f"{path}.{f.encode_name}")]
    return [path] if kind is str or get_origin(kind) in (list, dict) else []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_text_of_a_client_has_a_greatest_length(name: str) -> None:
    assert _unbounded(COMMANDS[name].arguments, name) == []


def test_the_check_of_bounds_sees_what_has_none() -> None:
    class Loose(registry.Arguments, frozen=True):
        a: str
        b: list[registry.Name] | None = None
        c: Annotated[list[str], registry.MOST] | None = None
        d: int = 0

    assert _unbounded(Loose, "x") == ["x.a", "x.b", "x.c[]"]


def test_a_text_that_is_too_long_is_not_quoted() -> None:
    for name, arguments in (
        ("migrate", {"uri": "unix:/" + "x" * 10**6}),
        ("announce-self", {"id": "x" * 10**6}),
        ("migrate-set-parameters", {"announce-verify": "x" * 10**6}),
        ("migrate-set-capabilities", {"capabilities": [{"x" * 10**6: 1}]}),
        ("query-rx-filter", {"name": "x" * 10**6}),
        ("query-status", {"x" * 10**6: 1}),
    ):
        vm = Vm()
        with pytest.raises(registry.ConfigError) as caught:
            commands.execute(vm, name, arguments)
        assert len(str(caught.value)) < 400
        assert vm.calls == []


def test_capabilities_and_parameters_are_apart(reader: Reader) -> None:
    assert not set(CAPABILITIES) & set(reader.arguments("migrate-set-parameters"))
    shown = {name for name, _, _ in reader.results("query-migrate-parameters")}
    assert shown == {f".{name}" for name in reader.arguments("migrate-set-parameters")}


def test_query_migrate_is_described(reader: Reader) -> None:
    paths = {path for path, _, _ in reader.results("query-migrate")}
    assert {".status", ".ram.mbps", ".total-time", ".godwit.rounds", ".godwit.announce"} <= paths
    assert MigrationInfo().status is None
