"""The table of events: nothing else is sent, all of it is, and the documents agree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from announce_bench import Bench, Port, Questions, S, hung, wanted
from godwit.spec import events
from godwit.spec.events import Event, Reason
from godwit.spec.runstate import TRANSITIONS

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "src/godwit/spec/events.py"
#: The rooms that send events; cli and client wait for some, by the names that a client knows.
PRODUCERS = ("announce", "hw", "machine", "migration", "qmp", "spec", "vm")


def _sources(rooms: tuple[str, ...] = PRODUCERS) -> Iterator[tuple[Path, ast.Module]]:
    for room in rooms:
        for path in sorted((ROOT / "src/godwit" / room).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def _built() -> Iterator[tuple[str, ast.Call]]:
    """Each ``Event.NAME.of(...)`` in the producers: the name and the call."""
    for _, tree in _sources():
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Attribute(value=ast.Name(id="Event"), attr=name), attr="of"
                    )
                ):
                    yield name, node


def test_a_name_is_its_own_and_has_a_meaning() -> None:
    for event in Event:
        assert event == event.name == event.value
        assert event.meaning
        assert len(set(event.members)) == len(event.members)


def test_no_producer_spells_a_name_out() -> None:
    names = {str(event) for event in Event}
    for path, tree in _sources():
        if path == TABLE:
            continue
        spelled = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not spelled & names, path


def test_every_producer_gives_the_members_of_the_table() -> None:
    found = dict.fromkeys(Event, 0)
    for name, call in _built():
        event = Event[name]
        found[event] += 1
        assert not call.args, name
        given = [keyword.arg for keyword in call.keywords]
        named = [one for one in given if one is not None]
        assert set(named) <= set(event.members), name
        if None not in given:  # no **members, which the tests below see at work
            assert set(named) == set(event.members), name
    assert [event for event, times in found.items() if not times] == [], "sent by nobody"


def test_no_producer_sends_what_it_did_not_build() -> None:
    senders, sent = {"_report", "_emit", "emit"}, 0
    for path, tree in _sources(("announce", "qmp", "vm")):
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=attr), args=args) if attr in senders:
                    # Built here, or passed on by what has these parameters itself.
                    text = [ast.unparse(one) for one in args]
                    built = len(text) == 1 and re.match(r"\*(Event|events)\.", text[0])
                    assert built or text == ["event", "data"], (path, node.lineno)
                    sent += 1
    assert sent > 15


def test_other_members_are_refused() -> None:
    assert Event.MIGRATION.of(status="setup") == ("MIGRATION", {"status": "setup"})
    with pytest.raises(TypeError, match="MIGRATION has status; not state"):
        Event.MIGRATION.of(state="setup")
    with pytest.raises(TypeError, match="STOP"):
        Event.STOP.of(why="so")
    with pytest.raises(TypeError, match="GUEST_ERROR has device, message, suppressed; not device"):
        Event.GUEST_ERROR.of(device="nic0")


def test_each_transition_and_reason() -> None:
    for old, following in TRANSITIONS.items():
        for new in following:
            for event, data in events.of_transition(old, new):
                assert set(data) == set(event.members)
    for reason in Reason:
        event, data = events.shutdown(reason)
        assert set(data) == set(event.members)


def test_what_announcements_report_is_in_the_table() -> None:
    seen: set[str] = set()
    answered, silent, failing = Bench(nic0=True, nic1=False), hung(), Bench(nic0=False)
    answered.watched()
    answered.parameters = wanted(patience=5000)
    answered.verifiers["nic0"] = Questions(answered.clock, [])
    answered.verifiers["nic1"] = Questions(answered.clock, *[["VLAN 7"]] * 9)
    failing.nics[0].error = OSError(5, "Input/output error")
    failing.uplinks[0].port = Port("no carrier")
    for bench in (answered, failing):
        bench.go(S.RUNNING)
    failing.uplinks[0].port = Port()
    failing.announcer.port_ready("nic0")
    answered.watched()
    for bench in (answered, silent, failing):
        bench.clock.advance(60)
        for name, data in bench.events:
            assert set(data) == set(Event(name).members)
            for member, value in data.items():
                msgspec.convert(value, events.type_of(Event(name), member))
            seen.add(name)
    assert seen == {str(event) for event in Event if event.startswith("ANNOUNCE_")}


# --- documents ------------------------------------------------------------------------------------
def _rows() -> dict[str, str]:
    """Event -> data of the table in docs/announcement.md."""
    text = (ROOT / "docs/announcement.md").read_text()
    table = text.partition("| event | data | when |")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines() if "|" in line]
    return {row[1].strip(): row[2].strip() for row in rows if row[1].strip("- ")}


def test_the_documented_table_is_the_one_in_force() -> None:
    rows = _rows()
    assert set(rows) <= set(Event)
    assert set(rows) >= {event for event in Event if event.startswith("ANNOUNCE_")}
    for name, data in rows.items():
        # 'ms since it was asked': a member, and what it means.
        assert [one.split()[0] for one in data.split(",")] == list(Event(name).members), name


@pytest.mark.parametrize("name", ["README.md", "docs/announcement.md"])
def test_documents_name_no_other_event(name: str) -> None:
    prefixes = {event.partition("_")[0] for event in Event if "_" in event}
    words = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", (ROOT / name).read_text()))
    named = {word for word in words if word.partition("_")[0] in prefixes}
    # A feature bit of virtio-net.
    assert named - {"GUEST_ANNOUNCE"} <= set(Event)
    assert named & set(Event), "the documents name some"
