"""A tap is taken out of its bridge, or disappears, while its guest is announced."""

from __future__ import annotations

import subprocess

from vm_bench import ONE_BACKEND, Bench, Guest, Watched, announce, announced

from lab.judge import announcements
from lab.scenario import MAC, wait_for

pytestmark = ONE_BACKEND
#: Rounds for as long as the test lasts.
_SCHEDULE = {
    "announce-initial": 200,
    "announce-max": 200,
    "announce-rounds": 1000,
    "announce-step": 1,
}


def _ip(vm: Watched, *words: str) -> None:
    subprocess.run(["ip", "-n", vm.host.netns, *words], check=True, capture_output=True)


def _in_bridge(bench: Bench, vm: Watched) -> None:
    _ip(vm, "link", "set", "dev", vm.tap, "master", vm.host.bridge)
    for vlan in ("100", "200"):
        argv = ["bridge", "-n", vm.host.netns, "vlan", "add", "dev", vm.tap, "vid", vlan]
        subprocess.run(argv, check=True, capture_output=True)


def test_the_schedule_names_what_is_wrong_and_goes_on(bench: Bench, guest: Guest) -> None:
    target = bench.target(guest)
    target.qmp.execute("migrate-set-parameters", _SCHEDULE)
    bench.move(guest, target)
    announced(target)

    target.mark()
    _ip(target, "link", "set", "dev", target.tap, "nomaster")
    failed = target.event("ANNOUNCE_FAILED")
    assert "in a bridge" in failed["data"]["cause"]
    assert failed["data"]["nic"] == "nic0"
    with bench.capture("wired") as capture:
        _in_bridge(bench, target)
        rounds = announce(target)["rounds"]
        wait_for(lambda: announce(target)["rounds"] > rounds + 5, 60)
        bench.answers()
        capture.stop()
    frames = announcements(capture.path, MAC)
    assert {f.vlan for f in frames} == {0, 100, 200}

    # Its link goes, and comes back: no round is made in between.
    target.mark()
    _ip(target, "link", "set", "dev", target.tap, "down")
    assert "no carrier" in target.event("ANNOUNCE_HELD")["data"]["cause"]
    rounds = announce(target)["rounds"]
    _ip(target, "link", "set", "dev", target.tap, "up")
    wait_for(lambda: announce(target)["rounds"] > rounds + 2, 60)
    bench.answers()

    # The tap is deleted under the VM: the guest has no network any more, and runs.
    target.mark()
    _ip(target, "link", "delete", "dev", target.tap)
    held = target.event("ANNOUNCE_HELD")
    assert f"there is no interface '{target.tap}'" in held["data"]["cause"]
    assert target.status() == "running"
    assert announce(target)["held"] == held["data"]["cause"]
    target.qmp.execute("stop")
    target.qmp.execute("cont")
    assert target.alive
    bench.drop_guest()
    bench.net.add_taps(target.host, [target.tap])
