"""A copy of a saved guest beside its original: its identity, and what its NIC lets out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import virtio_bench
from godwit.announce import frames
from godwit.errors import GodwitError, StateError, StreamError
from godwit.host.net.tap import HEADER
from godwit.hw.capabilities import LogsDirtyPages
from godwit.hw.memory import GuestMemory
from godwit.spec.config import NicConfig, as_copy, default_mac, parse_devices
from godwit.spec.restore import Restore
from godwit.spec.runstate import RunState
from migration_bench import IMPATIENT, Side
from tests.fakes.backend import FakeBackend
from tests.fakes.tap import FakeTap

OLD, NEW = (bytes.fromhex(f"5254000000{n}") for n in ("3a", "77"))
OLD4, NEW4 = bytes((10, 0, 0, 2)), bytes((10, 0, 0, 77))
VLAN = ((0x8100, 100),)


def _nic(mac: bytes, model: str) -> tuple[str, str]:
    return "--nic", f"tap=tap0,mac={mac.hex(':')},model={model},vhost=off"


@pytest.fixture(params=["virtio-net", "e1000"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(tmp_path: Path, model: str) -> Path:
    """A guest that has used an address in a VLAN."""
    side = Side(RunState.RUNNING, IMPATIENT, devices=(_nic(OLD, model),))
    side.machine.resume()
    now = side.host.loop.now()
    assert side.uplinks[0].observer.frame(frames.gratuitous_arp(OLD, OLD4, VLAN), None, now)
    path = tmp_path / "guest"
    side.migrations.save(str(path), True, "")
    outgoing = side.migrations._outgoing
    assert outgoing is not None
    outgoing.join(60)
    assert side.statuses[-1] == "completed"
    side.close()
    return path


class Copy(Side):
    """A VM that takes a copy of the guest."""

    def __init__(self, path: Path, mac: bytes, model: str) -> None:
        super().__init__(RunState.INMIGRATE, IMPATIENT, devices=(_nic(mac, model),))
        self.own: list[tuple[str, bytes]] = []
        self.migrations._restore = Restore(clone=True)
        self.migrations._on_own = lambda nic, mac: self.own.append((nic, mac))
        self.migrations.await_guest(f"file:{path}", False)
        incoming = self.migrations._incoming
        assert incoming is not None
        incoming._thread.join(60)

    @property
    def tap(self) -> FakeTap:
        tap = self.machine.nics[0]._tap  # type: ignore[attr-defined]
        assert isinstance(tap, FakeTap)
        return tap


def test_nothing_of_the_originals_leaves_and_its_own_does(saved: Path, model: str) -> None:
    copy = Copy(saved, NEW, model)
    try:
        assert not copy.failures
        assert copy.machine.running
        uplink, nic = copy.uplinks[0], copy.machine.nics[0]
        assert nic.mac == OLD, "the driver has not seen the new one yet"
        assert uplink.gate is not None
        for frame in (
            frames.rarp(OLD),
            frames.gratuitous_arp(OLD, OLD4, VLAN),
            frames.gratuitous_arp(NEW, OLD4, VLAN),
        ):
            uplink.send(frame)
        assert copy.tap.get() is None
        assert uplink.gate.held == 3
        assert not copy.own
        with pytest.raises(StateError, match="nic0: the guest is a copy"):
            copy.migrations.migrate("unix:/nowhere", False)
        uplink.send(own := frames.gratuitous_arp(NEW, NEW4, VLAN))
        assert (copy.tap.get() or b"")[HEADER:] == own
        assert copy.own == [("nic0", NEW)]
        assert uplink.gate.open
        assert not [entry for entry in uplink.entries() if entry.ip == OLD4]
    finally:
        copy.close()


def test_an_address_of_the_originals_is_refused(saved: Path, model: str) -> None:
    copy = Copy(saved, OLD, model)
    (error,) = copy.failures
    assert OLD.hex(":") in str(error)
    assert "original's" in str(error)
    assert not copy.machine.running
    copy.close()


def test_without_clone_another_mac_is_another_machine(saved: Path, model: str) -> None:
    failed = threading.Event()
    there = Side(RunState.INMIGRATE, IMPATIENT, devices=(_nic(NEW, model),))
    failures: list[GodwitError] = []

    def fail(error: GodwitError) -> None:
        failures.append(error)
        failed.set()

    there.migrations._on_incoming_failed = fail
    there.migrations.await_guest(f"file:{saved}", False)
    assert failed.wait(30)
    assert "mac" in str(failures[0])
    there.close()


def test_a_copys_nics_get_addresses_of_their_own() -> None:
    given = [("--nic", "tap=tap0"), ("--nic", "tap=tap1,mac=52:54:00:00:00:09,vhost=on")]
    one, two = as_copy(parse_devices(given)), as_copy(parse_devices(given))
    nics = [config for config in (*one, *two) if isinstance(config, NicConfig)]
    assert not [nic for nic in nics if nic.vhost], "its frames have to pass this process"
    assert nics[1].mac == nics[3].mac == bytes.fromhex("525400000009")
    assert len({nics[0].mac, nics[2].mac, default_mac("tap0", 0)}) == 3


class Kernels(FakeBackend, LogsDirtyPages):
    """A backend in the kernel, whose frames nobody here sees."""

    def start_log(self) -> None:
        pass

    def take_log(self) -> bytes:
        return b""

    def stop_log(self) -> None:
        pass


def test_a_nic_whose_frames_the_kernel_carries_is_no_copys() -> None:
    memory = GuestMemory(32 << 20)
    bench = virtio_bench.Bench(memory)
    bench.net.be_copy()
    bench.net.backend = Kernels()
    with pytest.raises(StreamError, match="vhost=off"):
        bench.net.be_copy()
    bench.close()
    memory.close()
