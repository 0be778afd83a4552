"""Where the guest cannot announce itself, the host speaks for it: RARP, as others send it."""

from __future__ import annotations

import pytest
from vm_bench import Bench, rarps, records

from godwit.lab.judge import announcements
from godwit.lab.scenario import MAC, rounds, wait_for
from godwit.lab.traffic import FLOWS

_ROUNDS = 5


@pytest.mark.parametrize(
    ("arguments", "nic"),
    [((), "guest-announce=off"), (("--machine", "godwit-0.1"), "")],
    ids=["property off", "older machine type"],
)
def test_without_guest_announce_the_host_sends_rarp(
    bench: Bench, arguments: tuple[str, ...], nic: str
) -> None:
    target = bench.run(bench.net.b, "--incoming", "defer", *arguments, nic=nic)
    guest = bench.boot(*arguments, nic=nic, keep=[target])
    feature = guest.agent.sh("cat /sys/bus/virtio/devices/virtio0/features").strip()
    assert feature[21] == "0"  # VIRTIO_NET_F_GUEST_ANNOUNCE, virtio 1.2, 5.1.3
    with bench.capture("rarp") as capture, bench.ping(0) as ping:
        ping.wait_answer(0.0)
        moved = bench.move(guest, target)
        wait_for(lambda: rounds(target) >= _ROUNDS, 60)
        # RARP is untagged: those peers hear of it.
        ping.wait_answer(moved.resumed, 60)
        # The others, once the guest speaks to them.
        for flow in FLOWS[2:]:
            guest.agent.udp_send(flow.client, 9, flow.id, 10, 20)
        bench.answers()
        capture.stop()

    frames = rarps(capture.path)
    assert len(frames) == _ROUNDS
    for frame in frames:
        _check_rarp(frame)
    assert not [f for f in announcements(capture.path, MAC) if f.sender == "guest"]
    assert not target.news("ANNOUNCE_ACKED")
    (record,) = records(target)
    assert (record["method"], record["ack-ms"], record["host-sent"]) == ("host", None, _ROUNDS)

    # A guest that was booted elsewhere cannot be booted anew here, and it is said.
    guest.agent.reboot()
    assert target.wait(60) == 3
    assert "give --kernel" in target.console


def _check_rarp(frame: bytes) -> None:
    """A RARP request of the guest's for its own MAC, as QEMU sends it (net/announce.c)."""
    from scapy.layers.l2 import ARP, Ether

    assert len(frame) == 60
    ether = Ether(frame)
    assert (ether.dst, ether.src, ether.type) == ("ff:ff:ff:ff:ff:ff", MAC, 0x8035)
    arp = ARP(frame[14:42])
    assert (arp.op, arp.hwsrc, arp.hwdst) == (3, MAC, MAC)
