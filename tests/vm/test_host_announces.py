"""Where the guest cannot announce itself, the host speaks for it: RARP, as others send it."""

from __future__ import annotations

import pytest
from vm_bench import Bench, announce, rarps, recovered

from lab.judge import announcements
from lab.scenario import MAC, rounds, wait_for
from lab.traffic import FLOWS

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
    bench.answers()  # so that it was heard on each network
    with bench.capture("rarp") as capture, bench.ping(0) as ping:
        ping.wait_answer(0.0)
        moved = bench.move(guest, target)
        wait_for(lambda: rounds(target) >= _ROUNDS, 60)
        recovered([ping], moved)
        bench.answers()
        capture.stop()

    frames = rarps(capture.path)
    # One a round and network, and one more with the addresses that were asked for.
    assert len([frame for frame in frames if len(frame) == 60]) == _ROUNDS + 1
    assert len(frames) == 3 * (_ROUNDS + 1)
    for frame in frames:
        _check_rarp(frame)
    told = announcements(capture.path, MAC)
    assert {f.sender for f in told} == {"host"}
    # All that the guest was heard to use on its first host, each in its VLAN.
    assert {(f.kind, f.vlan, f.address) for f in told if f.kind != "RARP"} >= {
        ("GARP" if flow.family == "ipv4" else "NA", flow.vlan, flow.guest) for flow in FLOWS
    }
    assert not target.news("ANNOUNCE_ACKED")
    record = announce(target)
    assert (record["method"], record["ack-ms"]) == ("host", None)
    assert record["host-sent"] == len(told)

    # A guest that was booted elsewhere cannot be booted anew here, and it is said.
    guest.agent.reboot()
    assert target.wait(60) == 3
    assert "give --kernel" in target.console


def _check_rarp(frame: bytes) -> None:
    """A RARP request of the guest's for its own MAC, as QEMU sends it (net/announce.c), perhaps
    with a tag."""
    from scapy.layers.l2 import ARP, Dot1Q, Ether

    ether = Ether(frame)
    assert (ether.dst, ether.src) == ("ff:ff:ff:ff:ff:ff", MAC)
    tag = 4 if Dot1Q in ether else 0
    assert len(frame) == 60 + tag
    assert (ether[Dot1Q].type if tag else ether.type) == 0x8035
    arp = ARP(frame[14 + tag : 42 + tag])
    assert (arp.op, arp.hwsrc, arp.hwdst) == (3, MAC, MAC)
