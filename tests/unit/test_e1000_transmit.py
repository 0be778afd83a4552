"""The e1000's transmit ring: frames, offloads for the tap's header, and rings that break rules."""

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e1000_bench import HEADER, IO, MASTER, MEMORY, Bench, make_frame
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.offload import ones_sum
from tests.fakes.e1000 import DEXT, EOP, IC, IFCS, RS, TSE, VLE

RAM = 32 << 20
IXSM, TXSM = 1, 2
TUCMD_TCP, TUCMD_IPV4 = 1, 2
NO_OFFLOAD = bytes(HEADER)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM)
    yield memory
    memory.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    bench.driver.start()
    yield bench
    bench.close()


def header(frame: bytes) -> dict[str, int]:
    """The virtio_net_hdr of what came out of the tap."""
    names = ("flags", "gso", "hdr_len", "gso_size", "start", "offset", "buffers")
    return dict(zip(names, struct.unpack("<BBHHHHH", frame[:HEADER]), strict=True))


# --- frames ---------------------------------------------------------------------------------------
def test_frames_are_sent_and_reported(bench: Bench) -> None:
    for number in range(3):
        bench.driver.send(make_frame(number))
    assert bench.sent() == [NO_OFFLOAD + make_frame(number) for number in range(3)]
    assert [bench.driver.tx_done(i) for i in range(4)] == [True, True, True, False]
    assert bench.read(regs.TDBAL + regs.HEAD) == bench.read(regs.TDT) == 3
    assert bench.line
    assert bench.read(regs.ICR) == regs.ICR_TXDW | regs.ICR_TXQE


def test_a_frame_in_pieces_is_one_frame(bench: Bench) -> None:
    frame = make_frame(1, 3000)
    bench.driver.send(frame[:10], frame[10:14], b"", frame[14:])
    assert bench.sent() == [NO_OFFLOAD + frame]
    assert [bench.driver.tx_done(i) for i in range(4)] == [False, False, False, True]


def test_without_a_report_there_is_none(bench: Bench) -> None:
    bench.driver.legacy(make_frame(), EOP | IFCS)
    bench.driver.kick()
    assert len(bench.sent()) == 1
    assert not bench.driver.tx_done(0)
    assert bench.read(regs.ICR) == regs.ICR_TXQE


def test_the_ring_wraps(bench: Bench) -> None:
    sent = []
    for number in range(100):
        frame = make_frame(number, 100)
        bench.driver.send(*(frame[at : at + 20] for at in range(0, 100, 20)))
        sent += bench.sent()
    assert sent == [NO_OFFLOAD + make_frame(number, 100) for number in range(100)]
    assert bench.read(regs.TDBAL + regs.HEAD) == 500 % 16


def test_half_a_frame_waits_for_its_other_half(bench: Bench) -> None:
    frame = make_frame(1, 200)
    bench.driver.legacy(frame[:100], IFCS)
    bench.driver.kick()
    assert bench.sent() == []
    bench.driver.send(frame[100:])
    assert bench.sent() == [NO_OFFLOAD + frame]


def test_short_frames_are_padded(bench: Bench) -> None:
    bench.driver.send(make_frame(1, 20))
    assert bench.sent() == [NO_OFFLOAD + make_frame(1, 20).ljust(60, b"\0")]
    bench.write(regs.TCTL, regs.TCTL_EN)
    bench.driver.send(make_frame(1, 20))
    assert bench.sent() == [NO_OFFLOAD + make_frame(1, 20)]
    bench.driver.send(bytes(13))  # no Ethernet frame
    assert bench.sent() == []
    assert bench.driver.tx_done(2)


def test_many_frames_are_sent_in_turns(memory: GuestMemory) -> None:
    bench = Bench(memory, size=1024)
    try:
        bench.driver.start()
        for number in range(1000):
            bench.driver.legacy(make_frame(number), EOP | IFCS)
        bench.driver.kick()
        first = bench.sent()
        assert 0 < len(first) < 1000
        sent = first
        for _ in range(20):
            bench.loop.run_once(0)  # one turn: a real tap has more space than the fake one
            sent += bench.sent()
        assert sent == [NO_OFFLOAD + make_frame(number) for number in range(1000)]
    finally:
        bench.close()


@pytest.mark.parametrize("off", ["unit", "master", "paused"])
def test_nothing_is_sent_until_it_may_be(bench: Bench, off: str) -> None:
    if off == "unit":
        bench.write(regs.TCTL, 0)
    elif off == "master":
        bench.write_config(4, 2, IO | MEMORY)
    else:
        bench.nic.pause()
    bench.driver.send(make_frame(1))
    bench.serve()
    assert bench.sent() == []
    if off == "unit":
        bench.write(regs.TCTL, regs.TCTL_EN)
    elif off == "master":
        bench.write_config(4, 2, IO | MEMORY | MASTER)
    else:
        bench.nic.resume()
    bench.serve()
    assert bench.sent() == [NO_OFFLOAD + make_frame(1)]


def test_reports_are_marked_for_a_migration(bench: Bench) -> None:
    bench.memory.start_log()
    bench.driver.legacy(make_frame(1), EOP | RS)
    bench.memory.take_log()
    bench.driver.kick()
    assert bench.memory.take_log() == {bench.driver.tx // 4096}
    bench.memory.stop_log()


# --- VLAN tags ------------------------------------------------------------------------------------
def test_a_tag_is_inserted(bench: Bench) -> None:
    bench.write(regs.VET, 0x8100)
    bench.write(regs.CTRL, regs.CTRL_VME)
    frame = make_frame(5, 100)
    bench.driver.send(frame, command=VLE, special=0x6064)
    expected = frame[:12] + b"\x81\x00\x60\x64" + frame[12:]
    assert bench.sent() == [NO_OFFLOAD + expected]


def test_a_tag_needs_ctrl_vme(bench: Bench) -> None:
    bench.driver.send(make_frame(5), command=VLE, special=100)
    assert bench.sent() == [NO_OFFLOAD + make_frame(5)]


# --- checksums ------------------------------------------------------------------------------------
def ipv4(payload: bytes, protocol: int, *, total: int | None = None) -> bytes:
    """An IPv4 packet, its checksum left out."""
    size = 20 + len(payload) if total is None else total
    return (
        struct.pack(">BBHHHBBH", 0x45, 0, size, 1, 0x4000, 64, protocol, 0)
        + bytes((10, 0, 0, 2, 10, 0, 0, 1))
        + payload
    )


def test_a_checksum_is_left_to_the_kernel(bench: Bench) -> None:
    frame = make_frame(kind=0x0800)[:14] + ipv4(bytes(range(100)), 17)
    bench.driver.context((14, 24, 33), (34, 40, 0), RS)
    bench.driver.data(frame[:50], IFCS, popts=TXSM)
    bench.driver.data(frame[50:], EOP | IFCS | RS)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert sent[HEADER:] == frame
    sent_header = header(sent)
    assert (
        sent_header["flags"],
        sent_header["gso"],
        sent_header["start"],
        sent_header["offset"],
    ) == (1, 0, 34, 6)
    assert bench.driver.tx_done(0)


def test_a_tag_moves_the_checksum(bench: Bench) -> None:
    bench.write(regs.CTRL, regs.CTRL_VME)
    frame = make_frame(kind=0x0800)[:14] + ipv4(bytes(100), 17)
    bench.driver.context((14, 24, 33), (34, 40, 0))
    bench.driver.data(frame, EOP | VLE, popts=TXSM, special=200)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert (header(sent)["start"], header(sent)["offset"]) == (38, 6)
    assert sent[HEADER + 12 : HEADER + 18] == b"\x81\x00\x00\xc8\x08\x00"


def test_a_legacy_descriptor_asks_for_a_checksum(bench: Bench) -> None:
    bench.driver.legacy(make_frame(1, 100), EOP | IC, rest=40 << 16 | 34 << 40)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert (header(sent)["flags"], header(sent)["start"], header(sent)["offset"]) == (1, 34, 6)


def test_an_ip_checksum_is_stored_here(bench: Bench) -> None:
    frame = make_frame(kind=0x0800)[:14] + ipv4(bytes(100), 17)
    bench.driver.context((14, 24, 33), (34, 40, 0))
    bench.driver.data(frame, EOP, popts=IXSM)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert header(sent)["flags"] == 0
    assert ones_sum(sent[HEADER + 14 : HEADER + 34]) == 0xFFFF


def test_a_checksum_of_a_part_is_stored_here(bench: Bench) -> None:
    frame = make_frame(3, 100)
    bench.driver.context((0, 0, 0), (20, 60, 39))
    bench.driver.data(frame, EOP, popts=TXSM)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert header(sent)["flags"] == 0
    stored = int.from_bytes(sent[HEADER + 60 : HEADER + 62], "big")
    assert stored == ~ones_sum(frame[20:40]) & 0xFFFF


@given(st.binary(max_size=200))
def test_the_sum_is_that_of_rfc_1071(data: bytes) -> None:
    total = 0
    padded = data + bytes(len(data) & 1)
    for (word,) in struct.iter_unpack(">H", padded):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    assert ones_sum(data) == total


# --- segmentation ---------------------------------------------------------------------------------
MSS = 1000


def _tcp(bench: Bench, size: int, *, version: int = 4, tag: int | None = None) -> bytes:
    """Send ``size`` bytes of TCP as Linux hands them over (e1000_tso); what came out."""
    tcp = struct.pack(">HHIIBBHHH", 80, 81, 1, 2, 0x50, 0x18, 512, 0x1234, 0) + bytes(size)
    if version == 4:
        frame = make_frame(kind=0x0800)[:14] + ipv4(tcp, 6, total=0)
        ip, tu, command = (14, 24, 33), (34, 50, 0), TUCMD_TCP | TUCMD_IPV4
        length, popts = 54, IXSM | TXSM
    else:
        packet = struct.pack(">IHBB", 6 << 28, 0, 6, 64) + bytes(32) + tcp
        frame = make_frame(kind=0x86DD)[:14] + packet
        ip, tu, command = (14, 0, 0), (54, 70, 0), TUCMD_TCP
        length, popts = 74, TXSM
    bench.driver.context(ip, tu, command | TSE, header_length=length, mss=MSS)
    last = EOP | RS | TSE | (VLE if tag is not None else 0)
    for at in range(0, len(frame), 4096):
        end = at + 4096 >= len(frame)
        bench.driver.data(
            frame[at : at + 4096], last if end else TSE, popts=popts, special=tag or 0
        )
    bench.driver.kick()
    (sent,) = bench.sent()
    return sent


@pytest.mark.parametrize(("version", "gso", "length"), [(4, 1, 54), (6, 4, 74)])
def test_tcp_is_cut_by_the_kernel(bench: Bench, version: int, gso: int, length: int) -> None:
    sent = _tcp(bench, 20_000, version=version)
    sent_header = header(sent)
    assert (sent_header["flags"], sent_header["gso"], sent_header["gso_size"]) == (1, gso, MSS)
    assert (sent_header["hdr_len"], sent_header["start"], sent_header["offset"]) == (
        length,
        length - 20,
        16,
    )
    frame = sent[HEADER:]
    assert len(frame) == length + 20_000
    # The lengths that the driver left out are those of the whole.
    if version == 4:
        assert int.from_bytes(frame[16:18], "big") == len(frame) - 14
        assert ones_sum(frame[14:34]) == 0xFFFF
    else:
        assert int.from_bytes(frame[18:20], "big") == len(frame) - 54
    pseudo = int.from_bytes(frame[length - 4 : length - 2], "big")
    assert pseudo == (0x1234 + 20_020) % 0xFFFF
    assert bench.read(0x4080) == 20  # GPTC: what the wire saw


def test_one_segment_is_no_gso(bench: Bench) -> None:
    sent_header = header(_tcp(bench, 900))
    assert (
        sent_header["flags"],
        sent_header["gso"],
        sent_header["gso_size"],
        sent_header["hdr_len"],
    ) == (1, 0, 0, 0)


def test_a_tag_moves_the_headers(bench: Bench) -> None:
    bench.write(regs.CTRL, regs.CTRL_VME)
    sent = _tcp(bench, 5000, tag=100)
    sent_header = header(sent)
    assert (sent_header["hdr_len"], sent_header["start"]) == (58, 38)
    assert sent[HEADER + 12 : HEADER + 16] == b"\x81\x00\x00\x64"


def test_there_are_two_contexts(bench: Bench) -> None:
    bench.driver.context((14, 24, 33), (34, 40, 0))
    _tcp(bench, 3000)
    bench.driver.data(make_frame(1, 100), EOP, popts=TXSM)
    bench.driver.kick()
    (sent,) = bench.sent()
    assert (header(sent)["start"], header(sent)["offset"]) == (34, 6)


@pytest.mark.parametrize(
    ("tu", "command", "length", "mss"),
    [
        ((34, 50, 0), TUCMD_IPV4, 54, 1000),  # UDP
        ((34, 50, 0), TUCMD_IPV4 | TUCMD_TCP, 54, 0),
        ((34, 50, 0), TUCMD_IPV4 | TUCMD_TCP, 255, 1000),  # headers longer than the frame
        ((34, 50, 0), TUCMD_IPV4 | TUCMD_TCP, 20, 1000),
        ((255, 50, 0), TUCMD_IPV4 | TUCMD_TCP, 54, 1000),
        ((34, 255, 0), TUCMD_IPV4 | TUCMD_TCP, 54, 1000),
        ((34, 0, 0), TUCMD_IPV4 | TUCMD_TCP, 54, 1000),
    ],
)
def test_segmentation_that_makes_no_sense_drops_the_frame(
    bench: Bench, tu: tuple[int, int, int], command: int, length: int, mss: int
) -> None:
    bench.driver.context((14, 24, 33), tu, command | TSE, header_length=length, mss=mss)
    bench.driver.data(bytes(200), EOP | RS | TSE, popts=TXSM)
    bench.driver.kick()
    assert bench.sent() == []
    assert bench.driver.tx_done(1)
    assert not bench.errors


# --- what breaks the rules ------------------------------------------------------------------------
def _head_beyond(bench: Bench) -> None:
    bench.write(regs.TDBAL + regs.HEAD, 16)


def _tail_beyond(bench: Bench) -> None:
    bench.write(regs.TDT, 16)


def _no_ring(bench: Bench) -> None:
    bench.write(regs.TDBAL + regs.LEN, 0)
    bench.write(regs.TDT, 1)


def _ring_beyond_ram(bench: Bench) -> None:
    bench.write(regs.TDBAL, RAM - 16)
    bench.write(regs.TDT, 1)


def _ring_far_away(bench: Bench) -> None:
    bench.write(regs.TDBAL + regs.BAH, 0xFFFF_FFFF)
    bench.write(regs.TDT, 1)


def _buffer_beyond_ram(bench: Bench) -> None:
    bench.driver.put(RAM - 10, 60 | (EOP | RS) << 24)
    bench.driver.kick()


def _buffer_wraps(bench: Bench) -> None:
    bench.driver.put((1 << 64) - 10, 60 | (EOP | RS) << 24)
    bench.driver.kick()


def _odd_type(bench: Bench) -> None:
    bench.driver.put(0x1000, 60 | 5 << 20 | (EOP | DEXT) << 24)
    bench.driver.kick()


def _context_within(bench: Bench) -> None:
    bench.driver.data(make_frame(), IFCS)
    bench.driver.context((0, 0, 0), (0, 0, 0))
    bench.driver.kick()


def _too_long(bench: Bench) -> None:
    for _ in range(3):
        bench.driver.put(0x1000, 0x7FFF | 1 << 20 | DEXT << 24)
    bench.driver.kick()


WRONG = [
    _head_beyond,
    _tail_beyond,
    _no_ring,
    _ring_beyond_ram,
    _ring_far_away,
    _buffer_beyond_ram,
    _buffer_wraps,
    _odd_type,
    _context_within,
    _too_long,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__[1:])
def test_an_offence_stops_the_controller_until_its_reset(
    bench: Bench, wrong: Callable[[Bench], None]
) -> None:
    wrong(bench)
    if wrong is _head_beyond:
        bench.write(regs.TDT, 1)
    assert [nic for nic, _ in bench.errors] == ["nic0"]
    bench.driver.kick()
    bench.write(regs.TDT, 2)
    bench.serve()
    assert bench.sent() == []
    assert len(bench.errors) == 1
    bench.write(regs.CTRL, regs.CTRL_RST)
    bench.driver.start()
    bench.driver.send(make_frame(9))
    assert bench.sent() == [NO_OFFLOAD + make_frame(9)]


def test_a_frame_without_an_end_is_an_offence(memory: GuestMemory) -> None:
    bench = Bench(memory, size=512)
    try:
        bench.driver.start()
        for _ in range(255):
            bench.driver.legacy(b"", 0)
        bench.driver.kick()
        assert not bench.errors
        for _ in range(255):
            bench.driver.legacy(b"", 0)
        bench.driver.kick()
        assert len(bench.errors) == 1
    finally:
        bench.close()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    descriptors=st.lists(
        st.tuples(
            st.integers(0, RAM + 100) | st.integers(0, (1 << 64) - 1),
            st.integers(0, 2000),
            st.integers(0, (1 << 44) - 1),
        ),
        min_size=1,
        max_size=15,
    ),
    registers=st.lists(
        st.tuples(
            st.sampled_from([regs.TDBAL + offset for offset in (0, 4, 8, 0x10, 0x18)]),
            st.integers(0, 2000) | st.integers(0, (1 << 32) - 1),
        ),
        max_size=3,
    ),
)
def test_whatever_is_in_the_ring_the_vm_lives(
    memory: GuestMemory,
    descriptors: list[tuple[int, int, int]],
    registers: list[tuple[int, int]],
) -> None:
    bench = Bench(memory)
    try:
        bench.driver.start()
        for lower, size, upper in descriptors:
            bench.driver.put(lower, size | upper << 20)
        for offset, value in registers:
            bench.write(offset, value)
        bench.driver.kick()
        bench.serve()
        assert len(bench.errors) <= 1
        for frame in bench.sent():
            assert len(frame) >= HEADER + 14
    finally:
        bench.close()


def test_a_frame_that_is_held_back_is_reported_and_not_sent(bench: Bench) -> None:
    seen: list[bytes] = []

    def gate(frame: bytes, checksum_at: int | None) -> bool:
        seen.append(frame)
        return len(seen) > 1

    bench.nic.gate = gate
    frame = bytes(range(200)) * 5
    bench.driver.send(frame)
    bench.driver.send(frame)
    assert seen == [frame] * 2
    assert bench.tap.get() is not None
    assert bench.tap.get() is None
