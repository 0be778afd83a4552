"""The machine: a board with its devices, started and stopped in one order.

Pause: vCPUs, then devices, in two steps. Resume: devices, then vCPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from godwit.errors import ConfigError, KvmError, StreamError
from godwit.host.kvm import abi, clocks, cpustate
from godwit.host.kvm.handles import Vcpu
from godwit.host.loop import Loop
from godwit.hw import acpi, layout, power, registry, serial
from godwit.hw.capabilities import HasSetupHints, SetupHints
from godwit.hw.console import Console
from godwit.hw.device import Device, OnGuestError, Slot
from godwit.hw.devices import Devices
from godwit.hw.generation import Generation
from godwit.hw.irq import IntxLines, Routes
from godwit.hw.nic.nic import Nic
from godwit.hw.pci import CONFIG_ADDRESS, PciBus
from godwit.hw.pvpanic import Pvpanic

from .board import Board
from .state import MachineState
from .vcpu import StopReason, VcpuThread

#: The longest plausible time between the reading of a source's clock and the arrival of its
#: state, seconds.
_PLAUSIBLE_S = 2.0
#: How long devices may take to finish the work in flight at a pause, seconds.
PAUSE_S = 10.0
#: Between two fillings of the UART's FIFO, seconds: the guest is left time to use what it read.
_SERIAL_GAP_S = 0.0005

#: Receives the name of a phase that has ended.
OnPhase = Callable[[str], None]


def _ignore(phase: str) -> None:
    """Ignore the end of a phase."""


class PowerOn(NamedTuple):
    """The state of vCPUs and platform after power-on."""

    vcpus: list[cpustate.VcpuState]
    platform: cpustate.PlatformState


class Machine:
    """A machine, paused at first, which closes ``board`` at its end.

    ``on_exit(reason, detail)`` is called in a vCPU's thread when the guest will not go on by
    itself, ``on_guest_error(device's id, message)`` from any thread.

    Raises:
        HostError: a tap or vhost-net is missing.
        ConfigError: the configuration asks for what cannot be.
    """

    def __init__(
        self,
        board: Board,
        loop: Loop,
        console: Console,
        on_exit: Callable[[StopReason, str], None],
        on_guest_error: OnGuestError,
    ) -> None:
        self._board = board
        self.config, self.memory, self.vm = board.config, board.memory, board.vm
        self.vcpus = board.vcpus
        self.lock = threading.RLock()
        self.running = False
        self.devices = Devices()
        #: Called in a vCPU's thread when the guest reports a panic, and whether it saves a dump.
        self.on_panic: Callable[[bool], None] = lambda crash_loaded: None
        self._routes = Routes(self.vm)
        self._intx = IntxLines(self.vm)
        with ExitStack() as undo:
            undo.callback(self._close_devices)
            self._make_platform(console, loop)
            for number, config in enumerate(self.config.devices, 1):
                slot = self._slot(number, loop, on_guest_error)
                self.devices.add(registry.make(config, slot))
            self._undo = undo.pop_all()
        board.on_exit = on_exit
        #: For each vCPU the MSRs as KVM made them, kept for the next load.
        self._reset_msrs: list[cpustate.ResetMsrs] = []

    @property
    def board(self) -> Board:
        """The board, which has the guest's CPU."""
        return self._board

    @property
    def nics(self) -> list[Nic]:
        """The NICs, in the order of the configuration."""
        return self.devices.having(Nic)

    @property
    def _vcpus(self) -> list[Vcpu]:
        return [thread.vcpu for thread in self.vcpus]

    # --- making the devices -----------------------------------------------------------------------
    def _make_platform(self, console: Console, loop: Loop) -> None:
        self.serial = serial.Serial(
            console,
            lambda level: self.vm.irq_line(serial.GSI, level),
            later=lambda callback: loop.call_later(_SERIAL_GAP_S, callback),
        )
        console.on_space = self.serial.space_again
        self.pm1 = power.Pm1(
            lambda level: self.vm.irq_line(layout.SCI_GSI, level),
            lambda: self._guest_asked(StopReason.POWER_OFF, "the guest powered off"),
        )
        ports = self._board.ports
        self.pci = PciBus(self._board.mmio, ports)
        for device in (self.serial, self.pm1, self.pci):
            self.devices.add(device)
        if self.config.machine.informs:
            panic = Pvpanic(lambda crash_loaded: self.on_panic(crash_loaded))
            self.devices.add(panic)
            self.devices.add(Generation(self.memory, self.pm1.raise_event))
            ports.map(acpi.PANIC_PORT, 1, panic)
        ports.map(serial.PORT, 8, self.serial)
        ports.map(layout.PM1_EVENT, 12 if self.config.machine.informs else 8, self.pm1)
        ports.map(CONFIG_ADDRESS, 8, self.pci)

        def reset() -> None:
            self._guest_asked(StopReason.RESET, "the guest reset the machine")

        for port in (layout.RESET_PORT, layout.KEYBOARD_COMMAND):
            ports.map(port, 1, power.ResetPorts(port, reset))

    def _slot(self, number: int, loop: Loop, on_guest_error: OnGuestError) -> Slot:
        return Slot(
            memory=self.memory,
            vm=self.vm,
            routes=self._routes,
            intx=self._intx,
            pci=self.pci,
            loop=loop,
            machine=self.config.machine,
            cpus=self.config.cpus,
            number=number,
            on_guest_error=on_guest_error,
        )

    def _close_devices(self) -> None:
        for device in reversed(list(self.devices)):
            device.close()

    # --- boot, resume, pause ----------------------------------------------------------------------
    def power_on_state(self) -> PowerOn:
        """Return the state of a new VM like this one.

        A new VM is made for this: by the time anybody could look, this one's guest had run.

        Raises:
            ConfigError: this guest cannot boot here, as no kernel was given.
            KvmError: the host does not give another VM.
        """
        if self.config.kernel is None:
            raise ConfigError(
                "the guest asked for a reboot, but booted on another host, and no kernel "
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
            raise KvmError(f"KVM does not show what a new VM is like: {error}") from error

    def reboot(self, initial: PowerOn) -> None:
        """Reset everything to power-on and boot again, while paused.

        Raises:
            ConfigError: the kernel cannot be loaded any more.
            StreamError, KvmError: KVM does not take the state of its own new VM.
        """
        with self.lock:
            self.memory.clear()
            self.devices.reset()
            for thread, state in zip(self.vcpus, initial.vcpus, strict=True):
                cpustate.load_vcpu(thread.vcpu, state)
                thread.revive()
            cpustate.load_platform(self.vm, initial.platform)
            self._load_clocks(initial.vcpus, initial.platform, time.monotonic())
            self._board.arch_capabilities = None  # a new vCPU has this host's
            self._board.boot()

    def resume(self, on_phase: OnPhase = _ignore) -> None:
        """Resume the devices and let the guest run.

        Raises:
            HostError: another VM has what one alone may have; the machine stays paused.
        """
        with self.lock:
            if self.running:
                return
            self.devices.acquire()  # whoever runs the guest has it
            self.running = True
            self.devices.resume()
            on_phase("devices-resumed")
            for thread in self.vcpus:
                if not thread.early:  # an early vCPU was never paused
                    self._forgive_pause(thread)
            # In one go: each vCPU that starts wants the interpreter, and may lose its CPU with it.
            for thread in self.vcpus:
                thread.resume()
            on_phase("vcpus-started")

    def drain_taps(self) -> None:
        """Throw away the frames waiting in the taps, while paused, as older than the start."""
        for nic in self.nics:
            nic.rx_backlog.drain()

    @staticmethod
    def _forgive_pause(thread: VcpuThread) -> None:
        """Have the guest's watchdogs forgive the pause (Documentation/virt/kvm/api.rst, 4.59)."""
        try:
            thread.vcpu.ioctl(abi.KVMCLOCK_CTRL)
        except OSError:
            pass  # EINVAL: the guest uses no paravirtual clock

    def pause(self, on_phase: OnPhase = _ignore) -> None:
        """Stop the guest: every vCPU has left the guest when this returns, and devices are paused.

        Raises:
            KvmError: a vCPU or a device did not pause in time; all of the machine goes on.
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
                self._resume_vcpus()
                raise
            on_phase("vcpus-stopped")
            busy = self.devices.pause(PAUSE_S)
            if busy is not None:
                self.devices.resume()
                self._resume_vcpus()
                raise KvmError(
                    f"device '{busy.id}' did not finish its work in {PAUSE_S:g} s; "
                    "the guest goes on"
                )
            self.running = False
            on_phase("devices-paused")

    def _resume_vcpus(self) -> None:
        """Let all vCPUs go on, as half a machine must not stand still."""
        for thread in self.vcpus:
            thread.resume()

    @property
    def exited(self) -> tuple[StopReason, str] | None:
        """The stop reason and its detail, or None while the guest would go on by itself."""
        return next((t.exited for t in self.vcpus if t.exited is not None), None)

    def close(self) -> None:
        """Stop everything and give everything back."""
        self.pause()
        self._board.stop()
        self._undo.close()
        self._board.close()

    def _guest_asked(self, reason: StopReason, detail: str) -> None:
        """Stop the vCPU in whose exit a device calls this."""
        for thread in self.vcpus:
            if thread.is_current():
                thread.exit(reason, detail)

    # --- dirty pages ------------------------------------------------------------------------------
    def set_dirty_log(self, on: bool) -> None:
        """Switch KVM's log of the guest's writes on or off."""
        self._board.set_dirty_log(on)

    # --- state ------------------------------------------------------------------------------------
    def save(self, sections: Mapping[str, Any] | None = None) -> MachineState:
        """Return the state of the machine, with the sections of others, while paused."""
        clock, tscs, _ = clocks.read(self.vm, self._vcpus)
        return MachineState(
            vcpus=[
                cpustate.save_vcpu(vcpu, self._board.msrs, tsc)
                for vcpu, tsc in zip(self._vcpus, tscs, strict=True)
            ],
            platform=cpustate.save_platform(self.vm, clock),
            devices=self.devices.save(),
            sections={} if sections is None else dict(sections),
        )

    def hints(self) -> dict[str, SetupHints]:
        """Return the setup hints of each device that has some, by id, from any thread."""
        found = ((device.id, self._hinted(device)) for device in self.devices)
        return {id: part.hints() for id, part in found if part is not None}

    def prepare(self, hints: Mapping[str, SetupHints]) -> None:
        """Set up what is slow to set up for devices with these hints, while paused.

        Hints are a source's guess: :meth:`load` counts.
        """
        self._reset_msrs = [frozenset(vcpu.get_msrs(self._board.msrs)) for vcpu in self._vcpus]
        self._routes.hold()
        try:
            for device in self.devices:
                part = self._hinted(device)
                if part is not None and device.id in hints:
                    part.prepare(hints[device.id])
        finally:
            with suppress(OSError):  # a guess that the kernel refuses is none
                self._routes.release()

    def _hinted(self, device: Device) -> HasSetupHints | None:
        return self.devices.part(device, HasSetupHints)

    def load(
        self,
        state: MachineState,
        received: float,
        on_phase: OnPhase = _ignore,
        *,
        clock_now: bool = False,
    ) -> None:
        """Take over a saved state, while paused.

        The guest's clock makes up for the time in between: for any with ``clock_now``, else for one
        as long as a migration's. ``received`` is the ``time.monotonic()`` at which the state came;
        ``on_phase`` is called when a part is done.

        Raises:
            StreamError: the state is not one of this machine; the message names what differs.
        """
        if len(state.vcpus) != len(self.vcpus):
            raise StreamError(f"vcpus: {len(state.vcpus)} in the stream, {len(self.vcpus)} here")
        devices = self.devices.decode(state.devices)
        on_phase("devices-decoded")
        clock_at = clock_read_at(state.platform, received)
        if clock_now:
            clock_at = time.monotonic() - away_for(state.platform, received)
        reset, self._reset_msrs = self._reset_msrs or [cpustate.NO_RESET_MSRS] * len(self.vcpus), []
        told = self._board.xsave_components
        components = cpustate.ALL_COMPONENTS if told is None else told
        for vcpu, vcpu_state, msrs in zip(self._vcpus, state.vcpus, reset, strict=True):
            cpustate.load_vcpu(vcpu, vcpu_state, msrs, components)
        on_phase("vcpus")
        cpustate.load_platform(self.vm, state.platform)
        on_phase("platform")
        self._load_clocks(state.vcpus, state.platform, clock_at)
        on_phase("clocks")
        self._routes.hold()
        try:
            self.devices.load(devices)
        finally:
            self._routes.release()

    def _load_clocks(
        self,
        vcpus: Sequence[cpustate.VcpuState],
        platform: cpustate.PlatformState,
        since: float,
    ) -> None:
        """Set the guest's clocks to the present, and its timers to wait for that.

        ``since`` is the time.monotonic at which the clocks were what the states have.

        Raises:
            StreamError, KvmError: KVM refuses a clock.
        """
        tscs = [cpustate.tsc_of(state) for state in vcpus]
        try:
            clocks.restore(self.vm, self._vcpus, platform.clock_ns, since, tscs)
        except OSError as error:
            raise StreamError(f"KVM refused the guest's clocks: {error}") from error
        for vcpu, state in zip(self._vcpus, vcpus, strict=True):
            cpustate.load_deadline(vcpu, state)


def away_for(platform: cpustate.PlatformState, received: float) -> float:
    """Return for how many seconds a state was under way until now, in a file perhaps.

    By the real-time clock, which is nearly all there is; never less than since ``received``.
    """
    realtime, monotonic = clocks.host_clocks()
    since = monotonic - received
    if not platform.realtime_ns:
        return since
    return max(since, (realtime - platform.realtime_ns) / 1e9)


def clock_read_at(platform: cpustate.PlatformState, received: float) -> float:
    """Return when the guest's clock was read at its source, as this host's time.monotonic.

    If both hosts' clocks agree, the source's reading is exact. The clocks may not agree: certain is
    only that the clock was read before the state came, and not long before.
    """
    realtime, monotonic = clocks.host_clocks()
    since = monotonic - received
    if platform.realtime_ns:
        by_clock = (realtime - platform.realtime_ns) / 1e9
        if since <= by_clock <= since + _PLAUSIBLE_S:
            return monotonic - by_clock
    return received
