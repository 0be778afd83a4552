"""The e1000's receive ring and its filter."""

import threading
from collections.abc import Callable, Iterator

import pytest

from e1000_bench import (
    BROADCAST,
    IO,
    MAC,
    MASTER,
    MEMORY,
    Bench,
    make_frame,
    set_vlan,
    tagged,
    with_fcs,
)
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.rxfilter import hash_of

RAM = 32 << 20
DD, EOP, IXSM, VP = 1, 2, 4, 8
GROUP = bytes.fromhex("01005e000001")
OTHER = bytes.fromhex("525400999999")


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(RAM)
    yield memory
    memory.close()


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    bench.driver.start()
    bench.driver.offer(15)
    yield bench
    bench.close()


# --- frames ---------------------------------------------------------------------------------------
def test_frames_arrive_in_order_with_their_fcs(bench: Bench) -> None:
    for number in range(5):
        bench.tap.put(make_frame(number, 100))
    bench.serve()
    received = bench.driver.received()
    assert [frame.data for frame in received] == [with_fcs(make_frame(n, 100)) for n in range(5)]
    assert {frame.status for frame in received} == {DD | EOP | IXSM}
    assert bench.line
    assert bench.read(regs.ICR) & regs.ICR_RXT0
    assert bench.read(regs.RDBAL + regs.HEAD) == 5


def test_secrc_leaves_the_fcs_out(bench: Bench) -> None:
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_SECRC)
    assert bench.receive(make_frame(1)) == [make_frame(1)]


def test_short_frames_are_as_long_as_on_a_wire(bench: Bench) -> None:
    assert bench.receive(make_frame(1, 42)) == [with_fcs(make_frame(1, 42).ljust(60, b"\0"))]


def test_the_ring_wraps(bench: Bench) -> None:
    for number in range(100):
        assert bench.receive(make_frame(number)) == [with_fcs(make_frame(number))]
        bench.driver.offer(1)


def test_a_long_frame_takes_as_many_buffers_as_it_needs(bench: Bench) -> None:
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_LPE)
    bench.tap.put(make_frame(1, 9000))
    bench.serve()
    (received,) = bench.driver.received()
    assert received.data == with_fcs(make_frame(1, 9000))
    assert received.descriptors == 5


@pytest.mark.parametrize(
    ("bits", "size"),
    [(3 << 16, 256), (2 << 16, 512), (1 << 16, 1024), (0, 2048), (1 << 25 | 3 << 16, 4096)],
)
def test_buffers_have_the_size_that_rctl_says(bench: Bench, bits: int, size: int) -> None:
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_SECRC | bits)
    bench.tap.put(make_frame(1, 1500))
    bench.serve()
    (received,) = bench.driver.received()
    assert received.descriptors == -(-1500 // size)


def test_long_frames_need_lpe(bench: Bench) -> None:
    assert bench.receive(make_frame(1, 1519), make_frame(2, 1518)) == [
        with_fcs(make_frame(2, 1518))
    ]
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_LPE)
    assert len(bench.receive(make_frame(1, 16380))[0]) == 16384
    assert bench.receive(make_frame(1, 16381)) == []


def test_a_full_ring_holds_frames_back_until_there_is_space(memory: GuestMemory) -> None:
    bench = Bench(memory)
    try:
        bench.driver.start()
        bench.driver.offer(2)
        got = bench.receive(*(make_frame(number) for number in range(6)))
        assert len(got) == 2
        for _ in range(2):
            bench.driver.offer(2)
            bench.serve()
            got += [received.data for received in bench.driver.received()]
        assert got == [with_fcs(make_frame(number)) for number in range(6)]
    finally:
        bench.close()


def test_a_frame_longer_than_the_whole_ring_does_not_block_it(memory: GuestMemory) -> None:
    bench = Bench(memory)
    try:
        bench.driver.start(regs.RCTL_LPE | 3 << 16)
        bench.driver.offer(15)
        assert bench.receive(make_frame(1, 9000), make_frame(2)) == [with_fcs(make_frame(2))]
    finally:
        bench.close()


def test_few_buffers_left_are_told(bench: Bench) -> None:
    bench.receive(*[make_frame(1)] * 6)
    assert not bench.read(regs.ICR) & regs.ICR_RXDMT0
    bench.receive(make_frame(1))
    assert bench.read(regs.ICR) & regs.ICR_RXDMT0


@pytest.mark.parametrize("off", ["unit", "master", "paused"])
def test_frames_wait_in_the_tap_until_they_may_come(bench: Bench, off: str) -> None:
    if off == "unit":
        bench.write(regs.RCTL, 0)
    elif off == "master":
        bench.write_config(4, 2, IO | MEMORY)
    else:
        bench.nic.pause()
    assert bench.receive(make_frame(1)) == []
    if off == "unit":
        bench.write(regs.RCTL, regs.RCTL_EN)
    elif off == "master":
        bench.write_config(4, 2, IO | MEMORY | MASTER)
    else:
        bench.nic.resume()
    assert bench.receive() == [with_fcs(make_frame(1))]


def test_the_drain_takes_what_waits(bench: Bench) -> None:
    bench.nic.pause()
    for number in range(4):
        bench.tap.put(make_frame(number))
    assert bench.nic.rx_backlog.drain() == 4
    bench.nic.resume()
    assert bench.receive() == []


def test_what_was_written_is_marked_for_a_migration(bench: Bench) -> None:
    bench.memory.start_log()
    bench.tap.put(make_frame(1))
    bench.memory.take_log()
    bench.serve()
    assert bench.memory.take_log() == {bench.driver.rx // 4096, bench.driver.rx_buffers // 4096}
    bench.memory.stop_log()


def test_a_vcpu_may_refill_while_the_loop_delivers(bench: Bench) -> None:
    got: list[bytes] = []
    total = 400
    done = threading.Event()

    def refill() -> None:
        while len(got) < total and not done.wait(0):
            new = bench.driver.received()
            got.extend(frame.data for frame in new)
            if new:
                bench.driver.offer(len(new))

    vcpu = threading.Thread(target=refill)
    vcpu.start()
    for number in range(total):
        while True:
            try:
                bench.tap.put(make_frame(number))
                break
            except BlockingIOError:
                bench.loop.run_once(0.01)
        bench.loop.run_once(0)
    for _ in range(1000):
        if len(got) >= total:
            break
        bench.loop.run_once(0.01)
    done.set()
    vcpu.join()
    assert got == [with_fcs(make_frame(number)) for number in range(total)]


# --- VLANs ----------------------------------------------------------------------------------------
def test_a_tag_is_stripped_where_the_driver_asks(bench: Bench) -> None:
    frame = tagged(0x6064)
    assert bench.receive(frame) == [with_fcs(frame)]
    bench.write(regs.CTRL, regs.CTRL_VME)
    bench.tap.put(frame)
    bench.tap.put(make_frame(1))
    bench.serve()
    stripped, plain = bench.driver.received()
    assert stripped.data[:-4] == frame[:12] + frame[16:]
    assert (stripped.status, stripped.special) == (DD | EOP | IXSM | VP, 0x6064)
    assert (plain.status, plain.special) == (DD | EOP | IXSM, 0)


def test_the_vlan_filter(bench: Bench) -> None:
    set_vlan(bench, 100)
    assert len(bench.receive(tagged(100), tagged(200), make_frame(1))) == 3
    bench.write(regs.RCTL, bench.read(regs.RCTL) | regs.RCTL_VFE)
    assert bench.receive(tagged(100), tagged(200), tagged(0xF064), make_frame(1)) == [
        with_fcs(tagged(100)),
        with_fcs(tagged(0xF064)),
        with_fcs(make_frame(1)),
    ]
    bench.write(regs.RCTL, bench.read(regs.RCTL) | regs.RCTL_UPE)
    assert bench.receive(tagged(200)) == []


# --- addresses ------------------------------------------------------------------------------------
def _set_address(bench: Bench, index: int, address: bytes, valid: int = 1 << 31) -> None:
    bench.write(regs.RA + 8 * index, int.from_bytes(address[:4], "little"))
    bench.write(regs.RA + 8 * index + 4, int.from_bytes(address[4:], "little") | valid)


def _takes(bench: Bench, to: bytes) -> bool:
    return bool(bench.receive(make_frame(1, to=to)))


def test_own_address_and_broadcast(bench: Bench) -> None:
    assert _takes(bench, MAC)
    assert _takes(bench, BROADCAST)
    assert not _takes(bench, OTHER)
    assert not _takes(bench, GROUP)
    bench.write(regs.RCTL, regs.RCTL_EN)
    assert not _takes(bench, BROADCAST)


@pytest.mark.parametrize("index", [1, 15])
def test_more_addresses(bench: Bench, index: int) -> None:
    _set_address(bench, index, OTHER)
    assert _takes(bench, OTHER)
    _set_address(bench, index, GROUP)
    assert _takes(bench, GROUP)
    assert not _takes(bench, OTHER)
    _set_address(bench, index, OTHER, valid=0)
    assert not _takes(bench, OTHER)
    _set_address(bench, index, OTHER, valid=1 << 31 | 1 << 16)  # a source address
    assert not _takes(bench, OTHER)


def test_promiscuous(bench: Bench) -> None:
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_UPE)
    assert _takes(bench, OTHER)
    assert not _takes(bench, GROUP)
    bench.write(regs.RCTL, regs.RCTL_EN | regs.RCTL_MPE)
    assert not _takes(bench, OTHER)
    assert _takes(bench, GROUP)
    assert _takes(bench, BROADCAST)


@pytest.mark.parametrize("offset", range(4))
def test_the_multicast_hash(bench: Bench, offset: int) -> None:
    bench.write(regs.RCTL, bench.read(regs.RCTL) | offset << regs.RCTL_MO_SHIFT)
    address = bytes.fromhex("01005e12a5b7")
    # By hand: the 12 bits of 0xB7A5 that begin at bit 4, 3, 2 or 0.
    bit = (0xB7A, 0x6F4, 0xDE9, 0x7A5)[offset]
    assert hash_of(address, offset) == bit
    assert not _takes(bench, address)
    bench.write(regs.MTA + 4 * (bit >> 5), 1 << (bit & 31))
    assert _takes(bench, address)
    assert not _takes(bench, bytes.fromhex("020000") + address[3:])


def test_the_mac_is_the_one_that_the_guest_set(bench: Bench) -> None:
    assert bench.nic.mac == MAC
    _set_address(bench, 0, OTHER)
    assert bench.nic.mac == OTHER
    _set_address(bench, 0, GROUP)  # none that a NIC may have
    assert bench.nic.mac == MAC
    _set_address(bench, 0, bytes(6))
    assert bench.nic.mac == MAC
    _set_address(bench, 0, OTHER, valid=0)
    assert bench.nic.mac == MAC


def test_the_filter_in_words(bench: Bench) -> None:
    _set_address(bench, 1, OTHER)
    _set_address(bench, 2, GROUP)
    view = bench.nic.rx_filter()
    assert view.broadcast
    assert not view.promiscuous
    assert (view.unicast, view.multicast, view.vlan) == ("normal", "normal", "all")
    assert (view.main_mac, view.unicast_table, view.multicast_table) == (MAC, (OTHER,), (GROUP,))
    assert not view.multicast_overflow
    assert view.vlan_table == ()
    set_vlan(bench, 100)
    set_vlan(bench, 4095)
    bench.write(regs.MTA + 4, 1)
    bench.write(regs.RCTL, regs.RCTL_VFE | regs.RCTL_UPE | regs.RCTL_MPE)
    view = bench.nic.rx_filter()
    assert (view.promiscuous, view.unicast, view.multicast) == (True, "all", "all")
    assert view.multicast_overflow
    assert (view.vlan, view.vlan_table) == ("normal", (100, 4095))


# --- what breaks the rules ------------------------------------------------------------------------
def _head_beyond(bench: Bench) -> None:
    bench.write(regs.RDBAL + regs.HEAD, 16)


def _tail_beyond(bench: Bench) -> None:
    bench.write(regs.RDT, 0xFFFF)


def _no_ring(bench: Bench) -> None:
    bench.write(regs.RDBAL + regs.LEN, 0)


def _ring_beyond_ram(bench: Bench) -> None:
    bench.write(regs.RDBAL, RAM - 16)


def _buffer_beyond_ram(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.offer_at([RAM - 10])


def _buffer_far_away(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.offer_at([(1 << 64) - 4])


@pytest.mark.parametrize(
    "wrong",
    [
        _head_beyond,
        _tail_beyond,
        _no_ring,
        _ring_beyond_ram,
        _buffer_beyond_ram,
        _buffer_far_away,
    ],
    ids=lambda wrong: wrong.__name__[1:],
)
def test_an_offence_stops_the_controller_until_its_reset(
    bench: Bench, wrong: Callable[[Bench], None]
) -> None:
    wrong(bench)
    bench.receive(make_frame(1))
    assert [nic for nic, _ in bench.errors] == ["nic0"]
    bench.tap.put(make_frame(2))
    bench.serve()
    assert len(bench.errors) == 1
    bench.write(regs.CTRL, regs.CTRL_RST)
    bench.driver.start()
    bench.driver.offer(3)
    assert bench.receive() == [with_fcs(make_frame(2))]
