"""The socket filter, run by an interpreter and by the kernel: both say the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLDone,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    IPv6,
    IPv6ExtHdrHopByHop,
    RouterAlert,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from godwit.host.net import bpf
from godwit.host.net.bpf import (
    Bits,
    Instruction,
    Op,
    assemble,
    attach,
    bits,
    guest_filter,
    network_filter,
)
from godwit.host.net.packet import PACKET_OUTGOING

MAC = "52:54:00:12:34:56"


def run(program: Sequence[Instruction], frame: bytes, pkttype: int = 0) -> int:
    """The machine of Documentation/networking/filter.rst, as far as it is used here."""
    a = x = at = 0
    memory = [0] * 16
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == bpf.RET:
            return k
        if code == bpf.LDX_IMM:
            x = k
        elif code == bpf.JA:
            at += k
        elif code == bpf.JEQ:
            at += yes if a == k else no
        elif code == bpf.JSET:
            at += yes if a & k else no
        elif code == bpf.LD_IMM:
            a = k
        elif code == bpf.LD_MEM:
            a = memory[k]
        elif code == bpf.ST:
            memory[k] = a
        elif code == bpf.TAX:
            x = a
        elif code == bpf.AND:
            a &= k
        elif code == bpf.RSH:
            a >>= k
        elif code == bpf.RSH_X:
            a >>= x
        elif k == bpf.PKTTYPE:
            assert code == bpf.LD_W_ABS
            a = pkttype
        else:
            size = {bpf.LD_H_ABS: 2, bpf.LD_B_ABS: 1, bpf.LD_H_IND: 2, bpf.LD_B_IND: 1}[code]
            where = k + (x if code in (bpf.LD_H_IND, bpf.LD_B_IND) else 0)
            if where + size > len(frame):
                return 0
            a = int.from_bytes(frame[where : where + size], "big")


def ether(ethertype: int | None = None) -> Ether:
    return Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff", **({"type": ethertype} if ethertype else {}))


IPV6 = IPv6(src="fe80::1", dst="ff02::1", hlim=255)
TO_ONE = Ether(src=MAC, dst="52:54:00:00:00:01")
MLD = IPv6(src="fe80::1", dst="ff02::16", hlim=1) / IPv6ExtHdrHopByHop(options=RouterAlert())
# name: (frame, passes from the guest, passes to the guest, passes if no address is known)
FRAMES = {
    "ARP request": (ether() / ARP(op=1), True, True, False),
    "ARP reply to many": (ether() / ARP(op=2), True, True, False),
    "ARP reply": (TO_ONE / ARP(op=2), True, True, True),
    "RARP": (ether(0x8035) / ARP(op=3), True, False, False),
    "NS": (ether() / IPV6 / ICMPv6ND_NS(), True, True, False),
    "NA to many": (ether() / IPV6 / ICMPv6ND_NA(), True, True, False),
    "NA": (TO_ONE / IPV6 / ICMPv6ND_NA(), True, True, True),
    "RA": (ether() / IPV6 / ICMPv6ND_RA(), True, True, True),
    "echo": (ether() / IPV6 / ICMPv6EchoRequest(), False, False, False),
    "IPv4": (ether() / IP() / UDP(), False, False, False),
    "IGMP": (ether() / IP(proto=2) / Raw(bytes(8)), True, False, False),
    "MLD": (ether() / MLD / ICMPv6MLReport(), True, False, False),
    "MLDv2": (ether() / MLD / ICMPv6MLReport2(), True, False, False),
    "MLD done": (ether() / MLD / ICMPv6MLDone(), True, False, False),
    "MLD query": (ether() / MLD / ICMPv6MLQuery(), False, False, False),
    "hop-by-hop": (ether() / MLD / UDP(), False, False, False),
    "UDP over IPv6": (ether() / IPV6 / UDP(dport=136) / Raw(b"\x88" * 9), False, False, False),
    "one tag": (ether() / Dot1Q(vlan=5) / ARP(op=2), True, True, False),
    "one tag, to one": (TO_ONE / Dot1Q(vlan=5) / ARP(op=2), True, True, True),
    "service tag": (
        ether() / Dot1AD(vlan=5, type=0x86DD) / IPV6 / ICMPv6ND_NA(),
        True,
        True,
        False,
    ),
    "two tags": (
        TO_ONE / Dot1AD(vlan=5, type=0x8100) / Dot1Q(vlan=6) / ARP(op=2),
        *(True, True, True),
    ),
    "two tags, NS": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IPV6 / ICMPv6ND_NS(),
        *(True, True, False),
    ),
    "two tags, IGMP": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IP(proto=2) / Raw(bytes(8)),
        *(True, False, False),
    ),
    "two tags, RARP": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6, type=0x8035) / ARP(op=3),
        *(True, False, False),
    ),
    "two tags, IPv4": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IP() / UDP(),
        *(False, False, False),
    ),
    "three tags": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7) / ARP(op=2),
        *(False, False, False),
    ),
    "LLDP": (ether(0x88CC) / Raw(bytes(50)), False, False, False),
    "short": (Raw(bytes(13)), False, False, False),
    "short IPv6": (ether(0x86DD) / Raw(bytes(20)), False, False, False),
    "short tag": (ether(0x8100) / Raw(b"\0"), False, False, False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_passes(name: str) -> None:
    frame, passes, to_guest, answers = FRAMES[name]
    data = bytes(frame)
    for pkttype in range(4):
        assert bool(run(guest_filter(), data, pkttype)) == passes
        assert run(network_filter(), data, pkttype) == 0
    assert run(guest_filter(), data, PACKET_OUTGOING) == 0
    assert bool(run(network_filter(), data, PACKET_OUTGOING)) == to_guest
    assert bool(run(network_filter(Bits()), data, PACKET_OUTGOING)) == answers


_IPS = st.lists(st.binary(min_size=4, max_size=4), max_size=6)
_MACS = st.lists(st.binary(min_size=6, max_size=6), max_size=6)


@given(_IPS, _MACS, st.binary(min_size=4, max_size=4), st.binary(min_size=6, max_size=6))
def test_what_concerns_known_addresses_passes(
    ips: list[bytes], macs: list[bytes], ip: bytes, mac: bytes
) -> None:
    known = network_filter(Bits(ipv4=bits(ips), macs=bits(macs)))
    frame = b"\xff" * 6 + mac + bytes.fromhex("08060001080006040001") + mac + ip + bytes(10)
    wanted = ip[-1] in {one[-1] for one in ips} or mac[-1] in {one[-1] for one in macs}
    assert bool(run(known, frame, PACKET_OUTGOING)) == wanted
    # Tagged as well; and of a protocol that is none of these: only the sender counts.
    tagged = frame[:12] + b"\x81\0\0\5" + frame[12:]
    assert bool(run(known, tagged, PACKET_OUTGOING)) == wanted
    vrrp = frame[:12] + b"\x08\0" + bytes(40)
    assert bool(run(known, vrrp, PACKET_OUTGOING)) == (mac[-1] in {one[-1] for one in macs})
    to_one = b"\2" + vrrp[1:]
    assert run(known, to_one, PACKET_OUTGOING) == 0


@given(st.binary(min_size=16, max_size=16), st.sampled_from([135, 136]))
def test_neighbour_discovery_of_known_addresses_passes(ip: bytes, kind: int) -> None:
    source, target = (ip, bytes(16)) if kind == 135 else (bytes(16), ip)
    packet = bytes.fromhex("60000000001a3aff") + source + bytes(16)
    frame = b"\x33" * 12 + b"\x86\xdd" + packet + bytes([kind, 0, 0, 0, 0, 0, 0, 0]) + target
    assert run(network_filter(Bits(ipv6=bits([ip]))), frame, PACKET_OUTGOING)
    peer = network_filter(Bits(peers=bits([ip])))
    assert bool(run(peer, frame, PACKET_OUTGOING)) == (kind == 136)
    every = (1 << 256) - 1
    other = Bits(every, every & ~bits([ip]), every & ~bits([ip]), 0)
    assert not run(network_filter(other), frame, PACKET_OUTGOING)


@pytest.fixture(scope="module")
def filtered() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends; the kernel runs the filter before the second."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        attach(far, guest_filter())
        yield near, far


def _by_kernel(ends: tuple[socket.socket, socket.socket], frame: bytes) -> int:
    near, far = ends
    near.send(frame)
    try:
        return len(far.recv(1 << 16))
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("name", FRAMES)
def test_the_kernel_runs_it_alike(filtered: tuple[socket.socket, socket.socket], name: str) -> None:
    frame, passes, *_ = FRAMES[name]
    # To the kernel this is a frame that came in: PACKET_HOST is 0.
    assert _by_kernel(filtered, bytes(frame)) == (len(frame) if passes else 0)


@pytest.mark.parametrize("known", [None, Bits(), Bits(*4 * [(1 << 256) - 1])])
def test_the_kernel_takes_the_networks_filter(known: Bits | None) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        attach(far, network_filter(known))
        assert _by_kernel((near, far), bytes(ether() / ARP(op=2))) == 0, "it does not go out"


def _as_if_received(program: list[Instruction]) -> list[Instruction]:
    """Return the program with its question for the direction answered the other way."""
    return [program[0], program[1]._replace(yes=program[1].no, no=program[1].yes), *program[2:]]


@given(
    st.integers(0, (1 << 256) - 1),
    st.integers(0, (1 << 256) - 1),
    st.sampled_from([b"\xff" * 6, b"\2" * 6]),
    st.binary(min_size=6, max_size=6),
    st.sampled_from(["08060001080006040001", "08060001080006040002", "0800", "8100000508060001"]),
    st.binary(min_size=40, max_size=60),
)
def test_the_kernel_and_the_interpreter_know_the_same_addresses(
    ips: int, macs: int, to: bytes, mac: bytes, head: str, body: bytes
) -> None:
    program = _as_if_received(network_filter(Bits(ips, ips, macs, macs)))
    data = to + mac + bytes.fromhex(head) + body
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        attach(far, program)
        assert _by_kernel((near, far), data) == min(len(data), run(program, data))


def test_long_frames_are_cut(filtered: tuple[socket.socket, socket.socket]) -> None:
    frame = bytes(ether() / ARP()) + bytes(5000)
    assert _by_kernel(filtered, frame) == bpf.SNAP == run(guest_filter(), frame)


@given(
    st.lists(st.sampled_from([b"\x81\0\0\5", b"\x88\xa8\0\6"]), max_size=3).map(b"".join),
    st.sampled_from([b"\x08\x06", b"\x80\x35", b"\x86\xdd", b"\x08\0"]) | st.binary(max_size=2),
    st.binary(max_size=60),
    st.sampled_from([58, 17]),
    st.sampled_from([134, 135, 136]),
)
def test_interpreter_and_kernel_agree(
    tags: bytes, kind: bytes, body: bytes, following: int, message: int
) -> None:
    data = bytearray(bytes(12) + tags + kind + body)
    at = 14 + len(tags)
    if len(data) > at + 40:
        data[at + 6], data[at + 40] = following, message
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        program = guest_filter()
        attach(far, program)
        kept = min(run(program, bytes(data)), len(data))
        assert _by_kernel((near, far), bytes(data)) == kept


def test_a_jump_has_to_go_forward_to_what_is_there() -> None:
    ret = Op(bpf.RET)
    with pytest.raises(ValueError, match="cannot jump to 'nowhere'"):
        assemble([Op(bpf.JEQ, 1, "nowhere"), ret])
    with pytest.raises(ValueError, match="instruction 1 cannot jump to 'back'"):
        assemble(["back", ret, Op(bpf.JA, yes="back")])
    with pytest.raises(ValueError, match="cannot jump to 'far'"):
        assemble([Op(bpf.JEQ, 1, "far"), *[ret] * 256, "far", ret])
    assert assemble([Op(bpf.JEQ, 7, None, "end"), ret, "end", ret])[0] == (bpf.JEQ, 0, 1, 7)
