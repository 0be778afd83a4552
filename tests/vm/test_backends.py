"""The in-process backend does what vhost-net does, and guests move between the two."""

from __future__ import annotations

from contextlib import ExitStack

from vm_bench import Bench, announced, rarps

from lab.judge import announcements
from lab.scenario import MAC, wait_for
from lab.traffic import FLOWS, Sender


def test_guests_move_between_the_backends(bench: Bench) -> None:
    """Booted in-process, moved to in-process, to vhost, and back."""
    a, b = bench.net.a, bench.net.b
    wait = ("--incoming", "defer", "--no-reboot")
    targets = [bench.run(b, *wait, nic="vhost=off"), bench.run(a, *wait)]
    targets.append(bench.run(b, *wait, nic="vhost=off"))
    for target in targets:  # a slow CPU is no deaf guest
        target.qmp.execute("migrate-set-parameters", {"announce-deadline": 10_000})
    guest = bench.boot(nic="vhost=off", keep=targets)
    bench.answers()
    checksum = guest.agent.mem_start(16)
    with ExitStack() as stack:
        sender = stack.enter_context(Sender(bench.net.client.netns, bench.folder, 50))
        wait_for(lambda: len(guest.agent.flows()) == len(FLOWS), 60)
        for target in targets:
            with bench.capture(f"to-{target.name}") as capture:
                moved = bench.move(guest, target)
                announced(target)
                capture.stop()
            frames = announcements(capture.path, MAC)
            assert len(rarps(capture.path)) == 5
            assert {f.kind for f in frames if f.sender == "guest"} == {"GARP", "NA"}
            assert {f.kind for f in frames if f.sender == "host"} == {"RARP"}
            assert {f.vlan for f in frames} == {0, 100, 200}
            assert min(f.at for f in frames) > moved.loaded
        sender.stop()
    last = {flow: count - 1 for flow, count in sender.counts().items()}
    wait_for(lambda: {f.id: f.max_seq for f in guest.agent.flows().values()} == last, 30)
    bench.answers()
    assert guest.agent.mem_check() == checksum

    guest.agent.reboot()
    assert guest.vm.wait(60) == 3
    (event,) = guest.vm.news("SHUTDOWN")
    assert event["data"] == {"guest": True, "reason": "guest-reset"}
