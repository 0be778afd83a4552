"""The socket filter, run by an interpreter and by the kernel: both say the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, IPv6
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from godwit.host.net import bpf
from godwit.host.net.bpf import Instruction, Op, addresses_filter, assemble, attach
from godwit.host.net.packet import PACKET_OUTGOING

MAC = "52:54:00:12:34:56"


def run(program: Sequence[Instruction], frame: bytes, pkttype: int = 0) -> int:
    """The machine of Documentation/networking/filter.rst, as far as it is used here."""
    a = x = at = 0
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
        elif k == bpf.PKTTYPE:
            assert code == bpf.LD_W_ABS
            a = pkttype
        else:
            size = {bpf.LD_H_ABS: 2, bpf.LD_H_IND: 2, bpf.LD_B_IND: 1}[code]
            where = k + (x if code in (bpf.LD_H_IND, bpf.LD_B_IND) else 0)
            if where + size > len(frame):
                return 0
            a = int.from_bytes(frame[where : where + size], "big")


def ether(ethertype: int | None = None) -> Ether:
    return Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff", **({"type": ethertype} if ethertype else {}))


IPV6 = IPv6(src="fe80::1", dst="ff02::1", hlim=255)
# name: (frame, passes, passes as an answer)
FRAMES = {
    "ARP request": (ether() / ARP(op=1), True, False),
    "ARP reply": (ether() / ARP(op=2), True, True),
    "RARP": (ether(0x8035) / ARP(op=3), True, False),
    "NS": (ether() / IPV6 / ICMPv6ND_NS(), True, False),
    "NA": (ether() / IPV6 / ICMPv6ND_NA(), True, True),
    "RA": (ether() / IPV6 / ICMPv6ND_RA(), False, False),
    "echo": (ether() / IPV6 / ICMPv6EchoRequest(), False, False),
    "IPv4": (ether() / IP() / UDP(), False, False),
    "UDP over IPv6": (ether() / IPV6 / UDP(dport=136) / Raw(b"\x88" * 9), False, False),
    "one tag": (ether() / Dot1Q(vlan=5) / ARP(op=2), True, True),
    "service tag": (ether() / Dot1AD(vlan=5, type=0x86DD) / IPV6 / ICMPv6ND_NA(), True, True),
    "two tags": (ether() / Dot1AD(vlan=5, type=0x8100) / Dot1Q(vlan=6) / ARP(op=2), True, True),
    "two tags, NS": (ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IPV6 / ICMPv6ND_NS(), True, False),
    "two tags, RARP": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6, type=0x8035) / ARP(op=3),
        True,
        False,
    ),
    "two tags, IPv4": (ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IP() / UDP(), False, False),
    "three tags": (
        ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7) / ARP(op=2),
        False,
        False,
    ),
    "LLDP": (ether(0x88CC) / Raw(bytes(50)), False, False),
    "short": (Raw(bytes(13)), False, False),
    "short IPv6": (ether(0x86DD) / Raw(bytes(20)), False, False),
    "short tag": (ether(0x8100) / Raw(b"\0"), False, False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_passes(name: str) -> None:
    frame, passes, answers = FRAMES[name]
    data = bytes(frame)
    for pkttype in range(4):
        assert bool(run(addresses_filter(), data, pkttype)) == passes
        assert run(addresses_filter(answers=True), data, pkttype) == 0
    assert run(addresses_filter(), data, PACKET_OUTGOING) == 0
    assert bool(run(addresses_filter(answers=True), data, PACKET_OUTGOING)) == answers


@pytest.fixture(scope="module")
def filtered() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends; the kernel runs the filter before the second."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        attach(far, addresses_filter())
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
    frame, passes, _ = FRAMES[name]
    # To the kernel this is a frame that came in: PACKET_HOST is 0.
    assert _by_kernel(filtered, bytes(frame)) == (len(frame) if passes else 0)


def test_the_kernel_takes_the_one_for_answers() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with near, far:
        attach(far, addresses_filter(answers=True))
        assert _by_kernel((near, far), bytes(ether() / ARP(op=2))) == 0, "it does not go out"


def test_long_frames_are_cut(filtered: tuple[socket.socket, socket.socket]) -> None:
    frame = bytes(ether() / ARP()) + bytes(5000)
    assert _by_kernel(filtered, frame) == bpf.SNAP == run(addresses_filter(), frame)


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
        program = addresses_filter()
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
