"""Ports, MMIO and PCI configuration space."""

import pytest

from godwit.hw.bus import MmioBus, PortBus
from godwit.hw.pci import PciBus, PciFunction, PciState

ENABLE = 1 << 31


class Function(PciFunction):
    """A function with a BAR that answers with what was stored."""

    def __init__(self, address: int = 0xE000_0000) -> None:
        super().__init__(0x1234, 0x5678, 0x010203, (0x9ABC, 0xDEF0), 7)
        self.add_bar(0x1000, address)
        self.changes = 0
        self.stored: list[tuple[int, int, int]] = []

    def bar_moved(self) -> None:
        self.changes += 1

    def read(self, offset: int, size: int) -> int:
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.stored.append((offset, size, value))


class Pc:
    """A bus with one function in slot 3."""

    def __init__(self) -> None:
        self.ports, self.mmio = PortBus(), MmioBus()
        self.bus = PciBus(self.mmio)
        self.ports.map(0xCF8, 8, self.bus)
        self.function = Function()
        self.bus.add(3, self.function)

    def select(self, register: int, slot: int = 3, function: int = 0, bus: int = 0) -> None:
        self.ports.write(0xCF8, 4, ENABLE | bus << 16 | slot << 11 | function << 8 | register)

    def read(self, register: int, size: int = 4, **where: int) -> int:
        self.select(register & 0xFC, **where)
        return self.ports.read(0xCFC + (register & 3), size)

    def write(self, register: int, size: int, value: int) -> None:
        self.select(register & 0xFC)
        self.ports.write(0xCFC + (register & 3), size, value)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_the_address_register(pc: Pc) -> None:
    assert pc.ports.read(0xCF8, 4) == 0
    pc.ports.write(0xCF8, 4, 0x8000_1804)
    assert pc.ports.read(0xCF8, 4) == 0x8000_1804
    assert [pc.ports.read(0xCF8 + i, 1) for i in range(4)] == [4, 0x18, 0, 0x80]
    # Only a dword sets it: Linux probes with a byte to 0xCFB.
    pc.ports.write(0xCFB, 1, 1)
    pc.ports.write(0xCF8, 2, 0)
    assert pc.ports.read(0xCF8, 4) == 0x8000_1804
    other = Pc()
    other.bus.load(pc.bus.save())
    assert other.ports.read(0xCFC, 4) == pc.ports.read(0xCFC, 4)


def test_reads_of_every_width(pc: Pc) -> None:
    assert pc.read(0) == 0x5678_1234
    assert [pc.read(0, 2), pc.read(2, 2)] == [0x1234, 0x5678]
    assert [pc.read(i, 1) for i in range(4)] == [0x34, 0x12, 0x78, 0x56]
    assert pc.read(8) == 0x0102_0307
    assert pc.read(0x2C) == 0xDEF0_9ABC
    assert pc.read(0, slot=0) == 0x1237_8086


@pytest.mark.parametrize(
    "where", [{"slot": 4}, {"function": 1}, {"bus": 1}, {"slot": 31, "function": 7, "bus": 255}]
)
def test_nobody_reads_as_ones(pc: Pc, where: dict[str, int]) -> None:
    assert pc.read(0, **where) == 0xFFFF_FFFF
    assert pc.read(0, 2, **where) == 0xFFFF
    assert pc.read(0, 1, **where) == 0xFF


def test_a_disabled_address_reads_as_ones_and_takes_no_writes(pc: Pc) -> None:
    pc.ports.write(0xCF8, 4, 3 << 11 | 4)
    assert pc.ports.read(0xCFC, 4) == 0xFFFF_FFFF
    pc.ports.write(0xCFC, 4, 0xFFFF)
    assert pc.read(4, 2) == 0


def test_accesses_over_the_end_are_nobodys(pc: Pc) -> None:
    pc.select(0xFC)
    assert pc.ports.read(0xCFF, 4) == 0xFFFF_FFFF
    assert pc.ports.read(0xCFF, 2) == 0xFFFF
    pc.ports.write(0xCFF, 4, 0)


def test_only_writable_bits_change(pc: Pc) -> None:
    before = [pc.read(at) for at in range(0, 256, 4)]
    for at in range(0, 256, 4):
        if at != 0x10:
            pc.write(at, 4, 0xFFFF_FFFF)
    after = [pc.read(at) for at in range(0, 256, 4)]
    changed = {4 * i: a ^ b for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    assert changed == {4: 0x0406, 0x3C: 0xFF}


def test_the_bar(pc: Pc) -> None:
    function = pc.function
    assert function.bar is None
    assert pc.mmio.read(0xE000_0010, 4) == 0xFFFF_FFFF
    pc.write(4, 2, 2)
    assert (function.bar, function.changes) == (0xE000_0000, 1)
    assert pc.mmio.read(0xE000_0FFF, 1) == 0xFFF
    pc.mmio.write(0xE000_0008, 2, 5)
    assert function.stored == [(8, 2, 5)]
    pc.write(0x10, 4, 0xFFFF_FFFF)
    assert pc.read(0x10) == 0xFFFF_F000
    pc.write(0x12, 2, 0xD000)  # half of it
    assert pc.read(0x10) == 0xD000_F000
    assert pc.mmio.read(0xD000_F004, 4) == 4
    assert pc.mmio.read(0xE000_0010, 4) == 0xFFFF_FFFF
    pc.write(4, 2, 0)
    assert function.bar is None
    changes = function.changes
    pc.write(0x10, 4, 0xC000_0000)
    assert function.changes == changes


def test_bars_that_overlap_leave_the_first_where_it_is(pc: Pc) -> None:
    second = Function()
    pc.bus.add(4, second)
    pc.write(4, 2, 2)
    second.write_config(4, 2, 2)
    assert second.bar is None
    assert pc.function.bar == 0xE000_0000
    second.write_config(0x10, 4, 0xE000_1000)
    assert second.bar == 0xE000_1000


def test_configuration_moves(pc: Pc) -> None:
    pc.write(0x10, 4, 0xD000_0000)
    pc.write(4, 2, 0x0406)
    pc.write(0x3C, 1, 9)
    state = pc.function.save_config()
    assert state == PciState(0x0406, 0xD000_0000, 9)
    other = Pc()
    other.function.load_config(state)
    assert other.function.save_config() == state
    assert other.function.bar == 0xD000_0000
    other.function.load_config(PciState(0xFFFF, 0xFFFF_FFFF, 0xFF))
    assert other.function.save_config() == PciState(0x0406, 0xFFFF_F000, 0xFF)
    other.function.reset_config()
    assert other.function.save_config() == PciState(0, 0xE000_0000, 0)
    assert other.function.bar is None


def test_capabilities_are_a_list() -> None:
    function = Function()
    assert not function.read_config(6, 2) & 0x10
    first = function.add_capability(0x11, b"12345")
    second = function.add_capability(0x09, b"67", b"\xff\0")
    assert function.read_config(6, 2) & 0x10
    assert (function.read_config(0x34, 1), first) == (0x40, 0x40)
    assert function.read_config(first, 2) == second << 8 | 0x11
    assert second % 4 == 0
    assert function.read_config(second, 2) == 0x09
    function.write_config(second, 4, 0)
    assert function.read_config(second, 4) == ord("7") << 24 | 9


def test_ports_that_nobody_has() -> None:
    ports = PortBus()
    assert [ports.read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    ports.write(0x80, 1, 0)


def test_ports_are_claimed_where_nobody_is() -> None:
    ports = PortBus()
    first, second = Function(), Function()
    ports.map(0xCF8, 8, first)
    assert not ports.claim(0xCC0, 0x40, second)
    assert not ports.claim(0xFFF0, 0x20, second)
    assert ports.claim(0xFFC0, 0x40, second)
    assert ports.read(0xFFC8, 4) == 8
    ports.unmap(0xFFC0, 0x40)
    assert ports.read(0xFFC8, 4) == 0xFFFF_FFFF
    assert ports.read(0xCFA, 1) == 2


def test_windows() -> None:
    bus = MmioBus()
    one, two = Function(), Function()
    assert bus.map(0x1000, 0x1000, one)
    assert bus.map(0x3000, 0x1000, two)
    assert not bus.map(0x1FFF, 2, two)
    assert not bus.map(0x2000, 0x1001, one)
    assert bus.map(0x2000, 0x1000, one)
    assert [bus.read(at, 4) for at in (0x1000, 0x2004, 0x3008)] == [0, 4, 8]
    for nobody in (0, 0xFFF, 0x4000, 1 << 63):
        assert bus.read(nobody, 8) == (1 << 64) - 1
        bus.write(nobody, 1, 0)
    bus.unmap(one)
    assert bus.read(0x1000, 1) == 0xFF
    assert bus.read(0x3008, 1) == 8
