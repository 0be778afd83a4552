"""The e1000's registers: configuration space, EEPROM, PHY, interrupts, reset, counters."""

from collections.abc import Iterator

import pytest

from e1000_bench import BAR, GSI, INTX_OFF, IO, MAC, MASTER, MEMORY, PORT, Bench, make_frame
from godwit.errors import ConfigError
from godwit.hw.capabilities import LogsDirtyPages, Negotiates
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.nic import make
from godwit.hw.registry import KINDS
from godwit.spec.config import NicConfig, parse_nic
from tests.fakes.e1000 import ICR_LSC

SK, CS, DI, DO, REQ, GNT = 1, 2, 4, 8, 1 << 6, 1 << 7


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


# --- PCI ------------------------------------------------------------------------------------------
def test_the_guest_finds_an_82540em(bench: Bench) -> None:
    assert bench.read_config(0) == 0x100E_8086
    assert bench.read_config(8) >> 8 == 0x020000
    assert bench.read_config(0x3D, 1) == 1  # INTA
    assert bench.read_config(0x34, 1) == 0  # no capabilities: no MSI
    bench.write_config(0x10, 4, 0xFFFF_FFFF)
    assert bench.read_config(0x10) == 0xFFFE_0000  # 128 KiB of memory
    bench.write_config(0x18, 4, 0xFFFF_FFFF)
    assert bench.read_config(0x18) == 0xFFFF_FFC1  # 64 ports


def test_registers_are_behind_the_ports_too(bench: Bench) -> None:
    bench.ports.write(PORT, 4, regs.VET)
    assert bench.ports.read(PORT, 4) == regs.VET
    bench.ports.write(PORT + 4, 4, 0x1234)
    assert bench.read(regs.VET) == bench.ports.read(PORT + 4, 4) == 0x1234
    bench.ports.write(PORT, 4, 0xFFFF_FFFC)  # beyond the registers
    bench.ports.write(PORT + 4, 4, 1)
    assert bench.ports.read(PORT + 4, 4) == 0
    bench.write_config(4, 2, MEMORY | MASTER)
    assert bench.ports.read(PORT, 4) == 0xFFFF_FFFF
    bench.write_config(4, 2, IO | MEMORY | MASTER)
    bench.write_config(0x18, 4, 0xD001)
    assert bench.ports.read(0xD000, 4) == 0xFFFF_FFFC
    assert bench.ports.read(PORT, 4) == 0xFFFF_FFFF


def test_ports_of_the_platform_stay_its_own(bench: Bench) -> None:
    bench.write_config(0x18, 4, 0xCC1)  # 0xCC0 to 0xCFF: the configuration ports are in there
    assert bench.read_config(0) == 0x100E_8086
    bench.write_config(0x18, 4, PORT | 1)
    bench.ports.write(PORT, 4, 8)
    assert bench.ports.read(PORT, 4) == 8


@pytest.mark.parametrize("size", [1, 2, 8])
def test_only_whole_registers_are_accessed(bench: Bench, size: int) -> None:
    bench.write(regs.VET, 0x8100)
    bench.mmio.write(BAR + regs.VET, size, 0xAA)
    assert bench.read(regs.VET) == 0x8100
    assert bench.mmio.read(BAR + regs.VET, size) == 0
    assert bench.mmio.read(BAR + regs.VET + 2, 4) == 0


def test_every_register_may_be_read_and_written(bench: Bench) -> None:
    for offset in range(0, regs.BAR_SIZE, 4):
        bench.write(offset, 0xFFFF_FFFF if offset not in (regs.CTRL, regs.CTRL_DUP) else 1)
        assert 0 <= bench.read(offset) < 1 << 32
    assert not bench.driver.received()


# --- EEPROM ---------------------------------------------------------------------------------------
def _by_eerd(bench: Bench, address: int) -> int:
    bench.write(regs.EERD, address << 8 | 1)
    value = bench.read(regs.EERD)
    assert value & 1 << 4
    return value >> 16


def _out(bench: Bench, bits: str) -> None:
    for bit in bits:
        level = REQ | CS | (DI if bit == "1" else 0)
        for clock in (0, SK, 0):
            bench.write(regs.EECD, level | clock)


def _by_bits(bench: Bench, address: int, zeros: int = 0) -> int:
    """As e1000_do_read_eeprom does with a Microwire chip of 64 words."""
    bench.write(regs.EECD, REQ)
    assert bench.read(regs.EECD) & GNT
    bench.write(regs.EECD, REQ | CS)
    _out(bench, "0" * zeros + f"110{address:06b}")
    word = 0
    for _ in range(16):
        bench.write(regs.EECD, REQ | CS | SK)
        word = word << 1 | bool(bench.read(regs.EECD) & DO)
        bench.write(regs.EECD, REQ | CS)
    # Standby: the chip is selected again while the clock is high, which is no edge.
    for value in (REQ, REQ | SK, REQ | SK | CS, REQ | CS, REQ | SK, REQ, 0):
        bench.write(regs.EECD, value)
    assert not bench.read(regs.EECD) & GNT
    return word


def test_the_eeprom_has_the_mac_and_its_checksum(bench: Bench) -> None:
    words = [_by_eerd(bench, address) for address in range(64)]
    assert b"".join(word.to_bytes(2, "little") for word in words[:3]) == MAC
    assert sum(words) & 0xFFFF == 0xBABA
    assert (words[0x0D], words[0x0E]) == (0x100E, 0x8086)
    assert _by_eerd(bench, 64) == _by_eerd(bench, 255) == 0xFFFF


def test_both_ways_to_the_eeprom_agree(bench: Bench) -> None:
    for address in range(64):
        assert _by_bits(bench, address, zeros=address % 3) == _by_eerd(bench, address)


def test_the_eeprom_is_not_written(bench: Bench) -> None:
    before = [_by_eerd(bench, address) for address in range(64)]
    for command in ("100110000", "101000000" + "0" * 16, "111000000", "100100000"):
        bench.write(regs.EECD, REQ)
        bench.write(regs.EECD, REQ | CS)
        _out(bench, command)
        assert bench.read(regs.EECD) & DO  # ready
    bench.write(regs.EECD, 0)
    assert [_by_eerd(bench, address) for address in range(64)] == before
    assert _by_bits(bench, 0) == before[0]


# --- PHY ------------------------------------------------------------------------------------------
def _phy(bench: Bench, register: int, value: int | None = None, address: int = 1) -> int:
    operation = 2 if value is None else 1
    bench.write(regs.MDIC, operation << 26 | address << 21 | register << 16 | (value or 0))
    mdic = bench.read(regs.MDIC)
    assert mdic & 1 << 28
    return mdic


def test_the_phy_is_an_88e1011_with_a_link(bench: Bench) -> None:
    assert _phy(bench, 2) & 0xFFFF == 0x0141
    assert _phy(bench, 3) & 0xFFF0 == 0x0C20
    status = _phy(bench, 1) & 0xFFFF
    assert status & 1 << 2  # link
    assert status & 1 << 5  # negotiated
    assert bench.read(regs.STATUS) & 0xC3 == 0x83  # 1000 Mb/s, link, full duplex


def test_the_phy_keeps_what_may_be_written(bench: Bench) -> None:
    _phy(bench, 0, 0x9340)  # reset, and negotiate again: both are done at once
    assert _phy(bench, 0) & 0xFFFF == 0x1140
    _phy(bench, 4, 0x0DE1)
    assert _phy(bench, 4) & 0xFFFF == 0x0DE1
    _phy(bench, 2, 0xFFFF)
    assert _phy(bench, 2) & 0xFFFF == 0x0141
    bench.write(regs.CTRL, regs.CTRL_PHY_RST)
    assert _phy(bench, 4) & 0xFFFF == 0x01E1
    assert not bench.read(regs.CTRL) & regs.CTRL_PHY_RST


def test_there_is_one_phy(bench: Bench) -> None:
    assert not _phy(bench, 2) & 1 << 30
    assert _phy(bench, 2, address=2) & 1 << 30
    bench.write(regs.MDIC, 0)
    assert bench.read(regs.MDIC) >> 28 & 7 == 5  # ready, with an error: no operation


def test_mdic_interrupts_when_asked_to(bench: Bench) -> None:
    bench.write(regs.IMS, regs.ICR_MDAC)
    _phy(bench, 2)
    assert not bench.line
    bench.write(regs.MDIC, 1 << 29 | 2 << 26 | 1 << 21 | 2 << 16)
    assert bench.line


# --- interrupts -----------------------------------------------------------------------------------
def test_the_line_is_high_while_a_cause_is_not_masked(bench: Bench) -> None:
    bench.write(regs.ICS, ICR_LSC)
    assert not bench.line
    bench.write(regs.IMS, ICR_LSC | regs.ICR_RXT0)
    assert bench.line
    assert bench.read_config(6, 2) & 1 << 3
    bench.write(regs.IMC, ICR_LSC)
    assert not bench.line
    assert not bench.read_config(6, 2) & 1 << 3
    bench.write(regs.IMS, ICR_LSC)
    assert bench.read(regs.IMS) == ICR_LSC | regs.ICR_RXT0
    assert bench.line
    assert bench.read(regs.ICR) == ICR_LSC
    assert not bench.line
    assert bench.read(regs.ICR) == 0


def test_causes_are_cleared_by_writing_ones(bench: Bench) -> None:
    bench.write(regs.IMS, ICR_LSC)
    bench.write(regs.ICS, ICR_LSC | regs.ICR_TXDW)
    bench.write(regs.ICR, ICR_LSC)
    assert not bench.line
    assert bench.read(regs.ICR) == regs.ICR_TXDW


def test_intx_disable_takes_the_line_but_not_the_status(bench: Bench) -> None:
    bench.write(regs.IMS, ICR_LSC)
    bench.write(regs.ICS, ICR_LSC)
    bench.write_config(4, 2, IO | MEMORY | MASTER | INTX_OFF)
    assert not bench.line
    assert bench.read_config(6, 2) & 1 << 3
    bench.write_config(4, 2, IO | MEMORY | MASTER)
    assert bench.line


def test_the_line_is_set_only_when_its_level_changes(bench: Bench) -> None:
    before = bench.vm.count("irq_line")
    for _ in range(3):
        bench.write(regs.ICS, regs.ICR_TXDW)
    bench.write(regs.IMS, regs.ICR_TXDW)
    bench.write(regs.ICS, ICR_LSC)
    assert bench.vm.count("irq_line") == before + 1
    assert bench.vm.lines == {GSI: True}


# --- reset ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["memory", "ports"])
def test_a_reset_forgets_all_but_the_pci_configuration(bench: Bench, way: str) -> None:
    bench.driver.start()
    bench.write(regs.ICS, ICR_LSC)
    bench.write(regs.RA, 0x1111_1111)
    bench.write(regs.MTA, 1)
    assert bench.line
    if way == "memory":
        bench.write(regs.CTRL, regs.CTRL_RST)
    else:
        bench.ports.write(PORT, 4, regs.CTRL)
        bench.ports.write(PORT + 4, 4, regs.CTRL_RST)
    assert not bench.line
    for offset in (regs.ICR, regs.IMS, regs.RCTL, regs.TCTL, regs.TDBAL, regs.RDT, regs.MTA):
        assert bench.read(offset) == 0
    assert bench.read(regs.RA) == int.from_bytes(MAC[:4], "little")
    assert bench.read(regs.RA + 4) == int.from_bytes(MAC[4:], "little") | 1 << 31
    assert not bench.read(regs.CTRL) & regs.CTRL_RST
    assert bench.read_config(4, 2) == IO | MEMORY | MASTER


def test_power_on_forgets_that_too(bench: Bench) -> None:
    bench.write(regs.IMS, ICR_LSC)
    bench.write(regs.ICS, ICR_LSC)
    bench.write_config(0x18, 4, 0xD001)
    bench.nic.pause()
    bench.nic.reset()
    assert not bench.line
    assert bench.read_config(4, 2) == 0
    assert bench.read_config(0x18) == PORT | 1
    assert bench.mmio.read(BAR, 4) == 0xFFFF_FFFF


# --- counters -------------------------------------------------------------------------------------
def test_counters_are_cleared_by_reading(bench: Bench) -> None:
    bench.driver.start()
    bench.driver.offer(8)
    bench.receive(make_frame(size=100), make_frame(to=b"\xff" * 6), make_frame(size=1000))
    bench.driver.send(make_frame(size=300))
    bench.driver.send(b"\x01" + make_frame()[1:])
    gprc, bprc, mprc, gptc, mptc = 0x4074, 0x4078, 0x407C, 0x4080, 0x40F0
    assert [bench.read(at) for at in (gprc, bprc, mprc, gptc, mptc)] == [3, 1, 0, 2, 1]
    assert [bench.read(at) for at in (gprc, bprc, mprc, gptc, mptc)] == [0] * 5
    by_size = [bench.read(0x405C + 4 * i) for i in range(6)]
    assert by_size == [1, 1, 0, 0, 1, 0]
    gorcl, gotcl = 0x4088, 0x4090
    assert bench.read(gorcl) == 104 + 64 + 1004
    assert bench.read(gorcl) == 104 + 64 + 1004  # the upper half clears both
    assert bench.read(gorcl + 4) == 0
    assert bench.read(gorcl) == 0
    assert bench.read(gotcl) == 304 + 64


# --- configuration --------------------------------------------------------------------------------
def test_the_model_is_known() -> None:
    assert "e1000" in KINDS
    assert parse_nic("tap=tap0,model=e1000,vhost=on", 0).kind == "e1000"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("guest-announce=on", "RARP"),
        ("mtu=1400", "set the MTU in the guest"),
        ("queue-size=256", "sizes its rings"),
    ],
)
def test_what_only_virtio_has_is_refused(bench: Bench, key: str, says: str) -> None:
    config = parse_nic(f"tap=tap0,model=e1000,{key}", 0)
    with pytest.raises(ConfigError, match=f"model=virtio-net.*{says}"):
        make(config, bench.board.slot())


def test_it_declines_to_announce(bench: Bench) -> None:
    assert bench.nic.announce() is False
    assert not isinstance(bench.nic, Negotiates)
    bench.nic.send_from_host(make_frame(7))
    assert bench.sent() == [bytes(12) + make_frame(7)]
    assert not isinstance(bench.nic, LogsDirtyPages), "guest memory has the log"
    assert NicConfig("a", "b", MAC).queue_size is None
