"""The e1000's saved state: it comes back as it was, and what cannot be is refused."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e1000_bench import BAR, IO, MAC, MASTER, MEMORY, PORT, Bench, make_frame, set_vlan, with_fcs
from godwit.errors import StreamError
from godwit.hw.memory import GuestMemory
from godwit.hw.nic.e1000 import regs
from godwit.hw.nic.e1000.state import E1000State
from tests.fakes.e1000 import EOP

DECODER = msgspec.msgpack.Decoder(E1000State)


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    bench = Bench(memory)
    yield bench
    bench.close()


def _save(bench: Bench) -> E1000State:
    """The state, having been on a line."""
    bench.nic.pause()
    state = DECODER.decode(msgspec.msgpack.encode(bench.nic.save()))
    assert isinstance(state, E1000State)
    return state


def _busy(bench: Bench) -> None:
    """A driver at work."""
    bench.write_config(0x18, 4, 0xD001)
    bench.driver.start()
    bench.driver.offer(8)
    bench.receive(make_frame(1))
    bench.driver.send(make_frame(2))
    bench.driver.context((14, 24, 33), (34, 40, 0))
    bench.driver.kick()
    set_vlan(bench, 100)
    bench.write(regs.MDIC, 1 << 26 | 1 << 21 | 4 << 16 | 0xDE1)
    for value in (1 << 6, 1 << 6 | 2, 1 << 6 | 2 | 4, 1 << 6 | 2 | 4 | 1):
        bench.write(regs.EECD, value)
    bench.ports.write(0xD000, 4, regs.VET)


def test_it_comes_back_as_it_was(memory: GuestMemory, bench: Bench) -> None:
    _busy(bench)
    bench.sent()
    state = _save(bench)
    other = Bench(memory, enable=False)
    try:
        other.nic.load(state)
        assert other.nic.save() == state
        other.vm.lines.clear()
        other.nic.resume()
        assert other.line  # a cause waits: KVM has to hear of it in any case
        other.driver.tx_next, other.driver.rx_next = bench.driver.tx_next, bench.driver.rx_next
        assert other.receive(make_frame(3)) == [with_fcs(make_frame(3))]
        other.driver.data(make_frame(4, 100), EOP, popts=2)
        other.driver.kick()
        (sent,) = other.sent()
        assert sent[6:10] == b"\x22\0\x06\0"  # by the context that came along
        assert other.ports.read(0xD000, 4) == regs.VET
        assert not other.errors
    finally:
        other.close()


def test_what_waits_at_the_resume_is_sent(memory: GuestMemory, bench: Bench) -> None:
    bench.driver.start()
    bench.nic.pause()
    bench.driver.send(make_frame(1))
    other = Bench(memory, enable=False)
    try:
        other.nic.load(_save(bench))
        other.nic.resume()
        other.serve()
        assert other.sent() == [bytes(12) + make_frame(1)]
    finally:
        other.close()


def test_a_fresh_one_is_off(bench: Bench) -> None:
    other = Bench(bench.memory, enable=False)
    try:
        other.nic.load(_save(other))
        other.nic.resume()
        assert not other.line
        assert other.mmio.read(BAR, 4) == 0xFFFF_FFFF
    finally:
        other.close()


def test_a_broken_one_stays_broken(memory: GuestMemory, bench: Bench) -> None:
    bench.driver.start()
    bench.write(regs.TDT, 0xFFFF)
    assert len(bench.errors) == 1
    other = Bench(memory, enable=False)
    try:
        other.nic.load(_save(bench))
        other.nic.resume()
        other.serve()
        assert not other.errors
        other.write(regs.CTRL, regs.CTRL_RST)
        other.driver.start()
        other.driver.send(make_frame(1))
        assert len(other.sent()) == 1
    finally:
        other.close()


def _replaced(state: E1000State, **mac: Any) -> E1000State:
    return msgspec.structs.replace(state, mac=msgspec.structs.replace(state.mac, **mac))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("registers", {}, "registers: not the ones"),
        ("registers", {"VET": 1 << 16}, "registers: VET is 0x10000"),
        ("registers", {"ICR": 1 << 31}, "registers: ICR"),
        ("registers", {"CTRL": regs.CTRL_RST}, "registers: CTRL"),
        ("registers", {"TDLEN": 16}, "registers: TDLEN"),
        ("registers", {"ODD": 0}, r"registers: not the ones of this controller \(ODD\)"),
        ("phy", {2: 0xFFFF}, "phy: register 2 is 0xffff"),
        ("ra", {1: 1 << 20}, "filter.ra: RAH0 is 0x100000"),
        ("eecd", 8, "eeprom.eecd: 0x8"),
    ],
)
def test_what_cannot_be_is_refused(bench: Bench, field: str, value: Any, says: str) -> None:
    state = _save(bench)
    mac = state.mac
    if field == "registers":
        wrong = _replaced(state, registers={**mac.registers, **value} if value else {})
    elif field == "phy":
        wrong = _replaced(state, phy=[value.get(i, v) for i, v in enumerate(mac.phy)])
    elif field == "ra":
        ra = [value.get(i, v) for i, v in enumerate(mac.filter.ra)]
        wrong = _replaced(state, filter=msgspec.structs.replace(mac.filter, ra=ra))
    else:
        wrong = _replaced(state, eeprom=msgspec.structs.replace(mac.eeprom, eecd=value))
    with pytest.raises(StreamError, match=f"^{says}"):
        bench.nic.load(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"io_bar": -1},
        {"io_bar": 1 << 32},
        {"more": 1},
        {"mac": {"contexts": [[0, 0]]}},
        {"mac": {"statistics": [0] * 63}},
        {"mac": {"phy": [1 << 16] * 32}},
        {"mac": {"broken": 1}},
        {"mac": {"filter": {"ra": [], "mta": [], "vfta": []}}},
        {"mac": {"eeprom": {"eecd": 0, "command": 0, "output": 0, "presented": 17}}},
        {"mac": {"registers": {"VET": -1}}},
    ],
    ids=str,
)
def test_a_malformed_state_is_no_state(bench: Bench, change: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(_save(bench))
    for key, value in change.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) else value
    with pytest.raises(msgspec.ValidationError):
        DECODER.decode(msgspec.msgpack.encode(plain))


_u32 = st.integers(0, 5000) | st.integers(0, (1 << 32) - 1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    registers=st.dictionaries(st.sampled_from(sorted(regs.REGISTERS)), _u32, max_size=20),
    pci=st.tuples(st.integers(0, 0xFFFF), _u32, _u32),
    context=st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)),
)
def test_any_state_that_loads_is_survived(
    memory: GuestMemory,
    registers: dict[int, int],
    pci: tuple[int, int, int],
    context: tuple[int, int],
) -> None:
    bench = Bench(memory)
    try:
        _busy(bench)
        state = _save(bench)
        named = dict(state.mac.registers)
        for offset, value in registers.items():
            register = regs.REGISTERS[offset]
            named[register.name] = value & register.mask
        wrong = msgspec.structs.replace(
            _replaced(state, registers=named, contexts=[context, context]),
            pci=msgspec.structs.replace(state.pci, command=pci[0], bar0=pci[1]),
            io_bar=pci[2],
        )
        bench.nic.load(wrong)
        bench.nic.resume()
        bench.tap.put(make_frame(1))
        bench.serve()
        bench.nic.reset()
        bench.write_config(4, 2, IO | MEMORY | MASTER)
        assert bench.ports.read(PORT, 4) == 0
        bench.sent()
        bench.driver.start()
        bench.driver.send(make_frame(2))
        assert bench.sent()[-1:] == [bytes(12) + make_frame(2)]
        assert bench.nic.mac == MAC
    finally:
        bench.close()
