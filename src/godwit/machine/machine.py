"""The machine: a board with its devices and NICs, which it starts and stops in one order.

Stop: vCPUs, then devices (backends, control queues). Start: devices, then vCPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, cast

from godwit.announce.policy import parse_policy
from godwit.announce.uplink import Station
from godwit.errors import ConfigError, KvmError, StreamError
from godwit.host.ioctl import ioctl
from godwit.host.kvm import abi, clocks, cpustate
from godwit.host.kvm.handles import Vcpu
from godwit.host.loop import Loop
from godwit.hw import layout, power, serial
from godwit.hw.console import Console
from godwit.hw.irq import IntxLines, Routes
from godwit.hw.nic.models import NicState, make
from godwit.hw.nic.nic import Nic, Parts
from godwit.hw.pci import CONFIG_ADDRESS, PciBus
from godwit.hw.setup_hints import Foresight
from godwit.spec.config import NicConfig

from .board import Board
from .state import MachineState, NicSaved
from .vcpu import Ending, VcpuThread

_FIRST_BAR = 0xE000_0000
#: Between the reading of a source's clock and the arrival of its state: more is no real delay.
_PLAUSIBLE_S = 2.0
_BAR_STRIDE = 1 << 20  # room for any model's BAR, aligned to its size
#: I/O BARs: ports above all that a PC has by tradition.
_FIRST_PORT, _PORT_STRIDE = 0xC000, 0x100

#: Is told that a phase has ended.
Mark = Callable[[str], None]


def _unmarked(phase: str) -> None:
    """For those who do not ask."""


class PowerOn(NamedTuple):
    """vCPUs and platform as after power-on."""

    vcpus: list[cpustate.VcpuState]
    platform: cpustate.PlatformState


class Machine:
    """A machine, paused at first; from now on it is the machine that closes ``board``.

    ``on_end(ending, detail)`` comes from a vCPU's thread, ``on_offence(nic, message)`` from any.

    Raises:
        HostError: a tap or vhost-net is missing.
        ConfigError: the configuration asks for what cannot be.
    """

    def __init__(
        self,
        board: Board,
        loop: Loop,
        console: Console,
        on_end: Callable[[Ending, str], None],
        on_offence: Callable[[str, str], None],
    ) -> None:
        self._board = board
        self.config, self.memory, self.vm = board.config, board.memory, board.vm
        self.vcpus = board.vcpus
        self._loop = loop
        self._on_offence = on_offence
        self.lock = threading.RLock()
        self.running = False
        with ExitStack() as undo:
            self._routes = Routes(self.vm)
            self._intx = IntxLines(self.vm)
            self._make_platform(console)
            self.nics: list[Nic] = []
            #: Of each NIC what the announcer deals with.
            self.stations: list[Station] = []
            for index, nic in enumerate(self.config.nics):
                self.nics.append(self._make_nic(index, nic))
                undo.callback(self.nics[-1].close)
                policy = None
                if nic.announce_allow is not None:
                    policy = parse_policy(nic.announce_allow)
                self.stations.append(Station(self.nics[-1], loop, policy))
            self._undo = undo.pop_all()
        board.on_end = on_end
        #: Of each vCPU as KVM made it, on the way to a load.
        self._fresh: list[cpustate.Fresh] = []

    @property
    def _vcpus(self) -> list[Vcpu]:
        return [thread.vcpu for thread in self.vcpus]

    # --- making it --------------------------------------------------------------------------------
    def _make_platform(self, console: Console) -> None:
        self.serial = serial.Serial(console, lambda level: self.vm.irq_line(serial.GSI, level))
        console.on_room = self.serial.room_again
        self.pm1 = power.Pm1(
            lambda level: self.vm.irq_line(layout.SCI_GSI, level),
            lambda: self._guest_asked(Ending.POWER_OFF, "the guest powered off"),
        )
        ports = self._board.ports
        self.pci = PciBus(self._board.mmio, ports)
        ports.map(serial.PORT, 8, self.serial)
        ports.map(layout.PM1_EVENT, 8, self.pm1)
        ports.map(CONFIG_ADDRESS, 8, self.pci)

        def reset() -> None:
            self._guest_asked(Ending.RESET, "the guest reset the machine")

        for port in (layout.RESET_PORT, layout.KEYBOARD_COMMAND):
            ports.map(port, 1, power.ResetPorts(port, reset))

    def _make_nic(self, index: int, config: NicConfig) -> Nic:
        parts = Parts(
            self.memory,
            self.vm,
            self._routes,
            self._loop,
            _FIRST_BAR + index * _BAR_STRIDE,
            _FIRST_PORT + index * _PORT_STRIDE,
            self._intx.of(index + 1),
            self.config.machine.guest_announce,
            self._on_offence,
        )
        nic = make(config, parts)
        self.pci.add(index + 1, nic.function)
        return nic

    # --- boot, start, stop ------------------------------------------------------------------------
    def power_on_state(self) -> PowerOn:
        """What KVM makes of a new VM like this one.

        A new one is made for it: by the time anybody could look, this one's guest had run.

        Raises:
            ConfigError: this guest cannot boot here, as no kernel was given.
            KvmError: the host does not give another VM.
        """
        if self.config.kernel is None:
            raise ConfigError(
                "the guest asked for a reboot, but it was booted on another host, and no kernel "
                "was given here; give --kernel and --initrd beside --incoming"
            )
        try:
            with ExitStack() as undo:
                vm = undo.enter_context(self._board.system.create_vm())
                vcpus = self._board.make_vcpus(vm, undo)
                clock, tscs, _ = clocks.read(vm, vcpus)
                states = [
                    cpustate.save_vcpu(vcpu, self._board.msrs, tsc)
                    for vcpu, tsc in zip(vcpus, tscs, strict=True)
                ]
                return PowerOn(states, cpustate.save_platform(vm, clock))
        except OSError as error:
            raise KvmError(f"KVM does not tell what a new VM is like: {error}") from error

    def reboot(self, initial: PowerOn) -> None:
        """Reset everything to power-on and boot again; the machine is paused.

        Raises:
            ConfigError: the kernel cannot be loaded any more.
            StreamError, KvmError: KVM does not take what it told of a new VM.
        """
        with self.lock:
            self.memory.clear()
            for nic in self.nics:
                nic.reset()
            self.serial.reset()
            self.pm1.reset()
            for thread, state in zip(self.vcpus, initial.vcpus, strict=True):
                cpustate.load_vcpu(thread.vcpu, state)
                thread.revive()
            cpustate.load_platform(self.vm, initial.platform)
            self._load_clocks(initial.vcpus, initial.platform, time.monotonic())
            self._board.boot()

    def resume(self, mark: Mark = _unmarked) -> None:
        """Let the guest run."""
        with self.lock:
            if self.running:
                return
            self.running = True
            for nic in self.nics:
                nic.resume()
            mark("nics-started")
            for thread in self.vcpus:
                if not thread.ahead:  # that one was never paused
                    self._tell_paused(thread)
            # In one go: each that is let go wants the interpreter, and may lose its CPU with it.
            for thread in self.vcpus:
                thread.resume()
            mark("vcpus-started")

    @staticmethod
    def _tell_paused(thread: VcpuThread) -> None:
        """Have the guest's watchdogs forgive the pause (Documentation/virt/kvm/api.rst, 4.59)."""
        try:
            ioctl(thread.vcpu.fd, abi.KVMCLOCK_CTRL)
        except OSError:
            pass  # EINVAL: the guest uses no paravirtual clock

    def pause(self, mark: Mark = _unmarked) -> None:
        """Stop the guest; every vCPU has left it when this returns, and devices serve no more.

        Raises:
            KvmError: a vCPU did not come back in time; all of them go on.
        """
        with self.lock:
            if not self.running:
                return
            for thread in self.vcpus:
                thread.request_pause()
            try:
                for thread in self.vcpus:
                    thread.wait_paused()
            except KvmError:
                # Half a machine must not stand: all of it goes on, and the caller hears why.
                for thread in self.vcpus:
                    thread.resume()
                raise
            self.running = False
            mark("vcpus-stopped")
            for nic in self.nics:
                nic.pause()
            mark("nics-stopped")

    @property
    def ended(self) -> tuple[Ending, str] | None:
        """Why the guest will not go on by itself, if so."""
        return next((t.ending for t in self.vcpus if t.ending is not None), None)

    def close(self) -> None:
        """Stop everything and give everything back."""
        self.pause()
        self._board.stop()
        self._undo.close()
        self._board.close()

    def _guest_asked(self, ending: Ending, detail: str) -> None:
        """Called by a device within an exit: the vCPU at hand must not go on."""
        for thread in self.vcpus:
            if thread.is_current():
                thread.end(ending, detail)

    # --- dirty pages ------------------------------------------------------------------------------
    def set_dirty_log(self, on: bool) -> None:
        """Have KVM log the guest's writes, or not."""
        self._board.set_dirty_log(on)

    # --- state ------------------------------------------------------------------------------------
    def save(self) -> MachineState:
        """The state of the machine, which is paused."""
        clock, tscs, _ = clocks.read(self.vm, self._vcpus)
        return MachineState(
            vcpus=[
                cpustate.save_vcpu(vcpu, self._board.msrs, tsc)
                for vcpu, tsc in zip(self._vcpus, tscs, strict=True)
            ],
            platform=cpustate.save_platform(self.vm, clock),
            serial=self.serial.save(),
            power=self.pm1.save(),
            pci_address=self.pci.save(),
            nics=[self._save_nic(station) for station in self.stations],
        )

    def _save_nic(self, station: Station) -> NicSaved:
        nic = cast(Nic, station.nic)
        book = station.observer.save(self._loop.now())
        return NicSaved(nic.name, nic.version, cast(NicState, nic.save()), book)

    def foresee(self, nics: Sequence[tuple[int, Foresight | None]]) -> None:
        """Have ready what is slow to set up for NICs with these features; paused.

        What it says is a source's guess: :meth:`load` counts.
        """
        self._fresh = [frozenset(vcpu.get_msrs(self._board.msrs)) for vcpu in self._vcpus]
        self._routes.hold()
        try:
            for nic, (negotiated, foresight) in zip(self.nics, nics, strict=True):
                nic.foresee(negotiated, foresight)
        finally:
            with suppress(OSError):  # a guess that the kernel refuses is none
                self._routes.release()

    def load(
        self,
        state: MachineState,
        received: float,
        mark: Mark = _unmarked,
    ) -> None:
        """Take over a saved state; the machine is paused. The clock makes up for what it missed.

        ``received`` is the ``time.monotonic()`` at which the state came; ``mark`` is told when a
        part is done.

        Raises:
            StreamError: the state is not one of this machine; names what differs.
        """
        if len(state.vcpus) != len(self.vcpus):
            raise StreamError(f"vcpus: {len(state.vcpus)} in the stream, {len(self.vcpus)} here")
        if [nic.id for nic in state.nics] != [nic.name for nic in self.nics]:
            raise StreamError("nics: not the ones that this machine has")
        stood_still = clock_read_at(state.platform, received)
        fresh, self._fresh = self._fresh or [cpustate.NOT_FRESH] * len(self.vcpus), []
        for vcpu, saved, was in zip(self._vcpus, state.vcpus, fresh, strict=True):
            cpustate.load_vcpu(vcpu, saved, was)
        mark("vcpus")
        cpustate.load_platform(self.vm, state.platform)
        mark("platform")
        self._load_clocks(state.vcpus, state.platform, stood_still)
        mark("clocks")
        self.serial.load(state.serial)
        self.pm1.load(state.power)
        self.pci.load(state.pci_address)
        self._routes.hold()
        try:
            for nic, station, saved_nic in zip(self.nics, self.stations, state.nics, strict=True):
                nic.load(saved_nic.state)
                station.observer.load(saved_nic.addresses, self._loop.now())
        finally:
            self._routes.release()

    def _load_clocks(
        self,
        vcpus: list[cpustate.VcpuState],
        platform: cpustate.PlatformState,
        since: float,
    ) -> None:
        """Have the guest's clocks be what they are by now, and its timers wait for that; ``since``
        is the time.monotonic at which they were what the states say. Raises StreamError, KvmError.
        """
        tscs = [cpustate.tsc_of(state) for state in vcpus]
        try:
            clocks.restore(self.vm, self._vcpus, platform.clock_ns, since, tscs)
        except OSError as error:
            raise StreamError(f"KVM refused the guest's clocks: {error}") from error
        for vcpu, state in zip(self._vcpus, vcpus, strict=True):
            cpustate.load_deadline(vcpu, state)


def clock_read_at(platform: cpustate.PlatformState, received: float) -> float:
    """When the guest's clock was read at its source, as this host's time.monotonic.

    If both hosts' clocks agree, the source's reading says it exactly. They may not: what is known
    for sure is that the clock was read before the state came, and not long before.
    """
    realtime, monotonic = clocks.host_clocks()
    since = monotonic - received
    if platform.realtime_ns:
        by_clock = (realtime - platform.realtime_ns) / 1e9
        if since <= by_clock <= since + _PLAUSIBLE_S:
            return monotonic - by_clock
    return received
