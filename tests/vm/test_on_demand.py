"""announce-self, what ends its rounds, and the receive filter as a real guest sets it."""

from __future__ import annotations

import time

import pytest
from vm_bench import ONE_BACKEND, Bench, Guest, Watched, announce, announced, stamp

from godwit.client.qmp import CommandRefused
from lab.judge import announcements
from lab.scenario import MAC, wait_for

pytestmark = ONE_BACKEND
_FAST = {"initial": 100, "max": 100, "step": 1}
_ENDLESS = {**_FAST, "rounds": 1000}


def _rounds(vm: Watched, count: int) -> None:
    wait_for(lambda: announce(vm)["rounds"] >= count, 60)


def test_the_same_id_starts_anew_and_another_runs_beside_it(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    vm.mark()
    with pytest.raises(CommandRefused, match=r"no NIC 'eth0'.*nic0"):
        vm.qmp.execute("announce-self", {"interfaces": ["eth0"]})
    with bench.capture("demand") as capture:
        vm.qmp.execute("announce-self", {"id": "one", "interfaces": ["nic0"], **_ENDLESS})
        _rounds(vm, 3)
        vm.qmp.execute("announce-self", {"id": "one", **_FAST, "rounds": 2})
        _rounds(vm, 2)
        guest.agent.ping(60)
        bench.answers()  # takes longer than many rounds of the first would
        capture.stop()
    assert announce(vm)["rounds"] == 2
    assert [event["data"]["id"] for event in vm.news("ANNOUNCE_STARTED")] == ["one", "one"]
    frames = announcements(capture.path, MAC)
    assert {f.sender for f in frames if f.kind != "RARP"} == {"guest"}
    assert {f.vlan for f in frames} == {0, 100, 200}


def test_a_pause_and_a_move_end_the_rounds(bench: Bench, guest: Guest) -> None:
    vm = guest.vm
    vm.qmp.execute("announce-self", {"id": "endless", **_ENDLESS})
    _rounds(vm, 3)
    vm.mark()
    vm.qmp.execute("stop")
    made = announce(vm)["rounds"]
    with bench.capture("ended") as capture, bench.ping(0) as ping:
        vm.qmp.execute("cont")
        resumed = time.time()
        at = ping.wait_answer(resumed)
        for _ in range(20):  # far more than a round's time
            at = ping.wait_answer(at)
        capture.stop()
    assert announce(vm)["rounds"] == made
    # What was asked of the guest before the pause it may answer after it, once.
    late = [f for f in announcements(capture.path, MAC) if f.at > resumed]
    assert len(late) <= len({(f.kind, f.vlan, f.address) for f in late})
    assert not vm.news("ANNOUNCE_STARTED")

    vm.qmp.execute("announce-self", {"id": "endless", **_ENDLESS})
    _rounds(vm, 3)
    target = bench.target(guest)
    moved = bench.move(guest, target)
    announced(target)
    guest.agent.ping(60)
    assert announce(target)["id"] == "migration"
    assert announce(target)["rounds"] == 5
    assert stamp(target.event("ANNOUNCE_STARTED")) >= moved.loaded


def test_the_receive_filter_is_what_the_guest_set(bench: Bench, guest: Guest) -> None:
    vm, sh = guest.vm, guest.agent.sh

    def view() -> dict[str, object]:
        (found,) = vm.qmp.execute("query-rx-filter", {"name": "nic0"})
        return dict(found)

    before = view()
    assert before["main-mac"] == MAC
    assert before["promiscuous"] is False
    assert {100, 200} <= set(before["vlan-table"])  # type: ignore[call-overload]
    vm.mark()
    sh("ip link add link eth0 name filtered type vlan id 333 && ip link set filtered up")
    changed = vm.event("NIC_RX_FILTER_CHANGED")
    assert changed["data"]["name"] == "nic0"
    sh("ip link set eth0 promisc on")
    # Nobody has asked since: one event is enough.
    assert len(vm.news("NIC_RX_FILTER_CHANGED")) == 1
    after = view()
    assert after["promiscuous"] is True
    assert 333 in after["vlan-table"]  # type: ignore[operator]
    sh("ip link set eth0 promisc off && ip link del filtered")
    wait_for(lambda: len(vm.news("NIC_RX_FILTER_CHANGED")) == 2, 30)
    assert view() == before
