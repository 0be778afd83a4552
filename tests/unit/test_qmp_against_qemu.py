"""QEMU itself as the judge: its schema of what we took from it, and its parser of requests.

The QEMU runs no guest and needs no KVM. Skipped where there is none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from godwit.errors import ConfigError
from godwit.qmp.protocol import Session
from godwit.spec.parameters import PLACES
from qmp_schema_reader import Reader
from test_qmp_commands import Vm, run

_QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(_QEMU is None, reason="there is no qemu-system-x86_64")


class Qemu:
    """A QEMU without a machine, and its monitor."""

    def __init__(self) -> None:
        argv = [str(_QEMU), "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self.version = self._read()["QMP"]["version"]["qemu"]
        self.ask('{"execute": "qmp_capabilities"}')

    def ask(self, request: str) -> dict[str, Any]:
        stream = self._process.stdin
        assert stream is not None
        stream.write(request.encode())
        stream.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    qemu = Qemu()
    yield qemu
    qemu.close()


@pytest.fixture(scope="module")
def theirs(qemu: Qemu) -> Reader:
    return Reader(qemu.ask('{"execute": "query-qmp-schema"}')["return"])


@pytest.fixture(scope="module")
def ours() -> Reader:
    return Reader(run(Vm(), "query-qmp-schema"))


#: Commands and events of Godwit's own.
_OWN_COMMANDS = {"query-announce", "query-devices", "godwit-save"}
_OWN_EVENTS = ("ANNOUNCE_", "NIC_", "RUN_STATE", "GUEST_ERROR", "EVENTS_LOST", "BACK_END_")
#: Values of enumerations and members of results that QEMU has not.
_OWN_VALUES = {"prelaunch-migrate"}
_OWN_MEMBERS = {"godwit"}


def test_entries_have_the_form_of_qemus(ours: Reader, theirs: Reader) -> None:
    forms: dict[str, set[str]] = {}
    for entry in theirs.entries:
        forms.setdefault(entry["meta-type"], set()).update(entry)
    for entry in ours.entries:
        assert set(entry) <= forms[entry["meta-type"]]
    assert {e["json-type"] for e in ours.entries if "json-type" in e} <= {
        e["json-type"] for e in theirs.entries if "json-type" in e
    }


def test_what_is_not_our_own_is_qemus(ours: Reader, theirs: Reader) -> None:
    assert ours.named("command") - _OWN_COMMANDS <= theirs.named("command")
    shared = {event for event in ours.named("event") if not event.startswith(_OWN_EVENTS)}
    assert shared <= theirs.named("event")
    for event in shared:
        given = {name: ours.shape(m["type"]) for name, m in ours.arguments(event).items()}
        wanted = theirs.arguments(event)
        mandatory = {name for name, member in wanted.items() if "default" not in member}
        assert mandatory <= set(given) <= set(wanted), event
        assert given == {name: theirs.shape(wanted[name]["type"]) for name in given}


def test_what_qemus_clients_send_is_taken(ours: Reader, theirs: Reader) -> None:
    for name in ours.named("command") & theirs.named("command"):
        mine, wanted = ours.arguments(name), theirs.arguments(name)
        for argument in set(mine) & set(wanted):
            assert ours.shape(mine[argument]["type"]) == theirs.shape(wanted[argument]["type"])
        for argument in set(mine) - set(wanted):
            assert "default" in mine[argument], f"{name}: a client of QEMU's lacks {argument}"
        # The parameters that Godwit lacks are refused by name, if they are not off.
        if name != "migrate-set-parameters":
            assert set(wanted) <= set(mine), name


def test_what_qemus_clients_read_is_there(ours: Reader, theirs: Reader) -> None:
    for name in ours.named("command") & theirs.named("command"):
        _compare(name, ours, theirs)


def _compare(name: str, ours: Reader, theirs: Reader) -> None:
    mine = {path: (owner, member) for path, owner, member in ours.results(name)}
    wanted = {path: (owner, member) for path, owner, member in theirs.results(name)}
    for path, (_, member) in mine.items():
        if path not in wanted:
            own = set(path.replace("[]", "").strip(".").split(".")) & _OWN_MEMBERS
            assert own or name == "query-migrate-parameters", f"{name}{path} is not QEMU's"
            continue
        their = wanted[path][1]
        assert ours.shape(member["type"]) == theirs.shape(their["type"]), f"{name}{path}"
        assert "default" not in member or "default" in their, f"{name}{path} is mandatory"
        _compare_values(
            f"{name}{path}", ours.by_name[member["type"]], theirs.by_name[their["type"]]
        )
    # In each object that is there, all members that QEMU always has are there as well.
    for path, (_, member) in wanted.items():
        above = path.rpartition(".")[0].removesuffix("[]")
        if (above in mine or not above) and "default" not in member and mine:
            assert path in mine, f"{name}{path} is missing"


def _compare_values(where: str, mine: dict[str, Any], their: dict[str, Any]) -> None:
    if mine["meta-type"] == "enum":
        assert set(mine["values"]) - _OWN_VALUES <= set(their["values"]), where


def test_each_parameter_of_qemus_is_set_or_refused_by_name(theirs: Reader) -> None:
    for name, member in theirs.arguments("migrate-set-parameters").items():
        sample = {"int": 50, "boolean": True, "string": "zlib"}
        value: object = sample.get(theirs.shape(member["type"]), [{}])
        if name in PLACES:
            run(Vm(), "migrate-set-parameters", **{name: value})
            continue
        with pytest.raises(ConfigError, match=f"Parameter '{name}' is QEMU's, not Godwit's: "):
            run(Vm(), "migrate-set-parameters", **{name: value})


def test_each_capability_of_qemus_can_be_turned_off(theirs: Reader) -> None:
    kind = theirs.arguments("migrate-set-capabilities")["capabilities"]["type"]
    member = theirs.members(theirs.by_name[kind]["element-type"])["capability"]
    values = theirs.by_name[member["type"]]["values"]
    assert "auto-converge" in values
    off = [{"capability": name, "state": False} for name in values]
    assert run(Vm(), "migrate-set-capabilities", capabilities=off) is None


_TAGS = [
    "'single'",
    "'a \"word\"'",
    r"'it\'s'",
    r'"it\'s"',
    r"'\"\\\/\b\f\n\r\t\u00e9'",
    "'é€😀'",
    r'"\ud83d\ude00"',
    "[{'a': [\"b\", 'c']}, 1, null, true]",
]


@pytest.mark.parametrize("tag", _TAGS)
def test_an_id_in_any_spelling_comes_back_as_from_qemu(qemu: Qemu, tag: str) -> None:
    request = "{'execute': 'no-such', 'id': " + tag + "}"
    session = Session(lambda name, arguments: run(Vm(), name))
    session.negotiated = True
    session.feed(request.encode())
    reply = session.step()
    assert reply is not None
    assert reply.isascii()
    assert json.loads(reply) == qemu.ask(request)


@pytest.mark.parametrize(
    "request_",
    [
        "{'execute': 'x', 'id': '\\x'}",
        "{'execute': 'x' 'y'}",
        "{'execute': 'query-status', 'more': 1}",
        "['execute']",
        "{}",
        "{'execute': 1}",
        "{'execute': 'qmp_capabilities'}",
        "{'execute': 'query-status', 'arguments': {'x': 1}}",
        "{'execute': 'migrate', 'arguments': {}}",
    ],
)
def test_what_qemu_refuses_is_refused_in_the_same_class(qemu: Qemu, request_: str) -> None:
    session = Session(lambda name, arguments: run(Vm(), name, **arguments))
    session.negotiated = True
    session.feed(request_.encode())
    reply = session.step()
    assert reply is not None
    mine, their = json.loads(reply)["error"], qemu.ask(request_)["error"]
    assert mine["class"] == their["class"]
    if not mine["desc"].startswith("JSON parse error"):
        assert mine["desc"] == their["desc"]
