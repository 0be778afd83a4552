"""A vCPU's thread: in KVM_RUN nearly always, out of the guest for port I/O, MMIO and kicks.

Kick: ``immediate_exit`` in the shared page and a signal whose handler does nothing. KVM_RUN then
first completes what was pending (the second half of an IN or an MMIO read) and returns EINTR, so a
vCPU parks only with its architectural state complete (Documentation/virt/kvm/api.rst, KVM_RUN).

A throttled vCPU parks after each slice of time in the guest, and goes on by itself after a rest. A
resting vCPU is parked as any other, so that a pause need not wait for the rest.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from enum import Enum

from godwit.errors import GuestError, KvmError
from godwit.host.kvm import abi
from godwit.host.kvm.handles import KICK_SIGNAL, Vcpu
from godwit.hw.bus import MmioBus, PortBus

#: How long a throttled vCPU stays in the guest between two rests, seconds. QEMU:
#: softmmu/cpu-throttle.c, CPU_THROTTLE_TIMESLICE_NS.
SLICE_S = 0.010
#: Time in the guest for which a rest makes up at the most, seconds: a kick may come late on a busy
#: host, and a rest is 99 times as long at the highest throttle. A guest's watchdog for soft lockups
#: waits 20 s (kernel/watchdog.c, get_softlockup_thresh).
_MOST_COUNTED_S = 0.050


class StopReason(Enum):
    """The reason for which a vCPU will not go on by itself."""

    POWER_OFF = "power-off"
    RESET = "reset"
    TRIPLE_FAULT = "triple-fault"
    INTERNAL_ERROR = "internal-error"


def install_kick_handler() -> None:
    """Install the handler once, from the main thread, before the first vCPU runs."""
    signal.signal(KICK_SIGNAL, lambda number, frame: None)


def rest_after(ran: float, percent: int) -> float:
    """Return how many seconds to keep out of the guest after ``ran`` seconds inside."""
    return min(ran, _MOST_COUNTED_S) * percent / (100 - percent)


class VcpuThread:
    """A thread that runs ``vcpu``, parked at first, and calls ``on_exit(reason, detail)``."""

    def __init__(
        self,
        vcpu: Vcpu,
        ports: PortBus,
        mmio: MmioBus,
        on_exit: Callable[[StopReason, str], None],
    ) -> None:
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._on_exit = on_exit
        self._page = vcpu.run_page
        self._changed = threading.Condition()
        self._run_wanted = False
        self._parked = True
        self._quit = False
        #: The first exit waits for :meth:`resume`: the devices are still being made.
        self._early = False
        #: Percent of the time to be kept out of the guest.
        self._throttle = 0
        #: Since when the vCPU may be in the guest, and until when it rests; time.monotonic().
        self._entered = self._rests_until = 0.0
        #: The stop reason: set by :meth:`exit`, by a device too during an exit.
        self.exited: tuple[StopReason, str] | None = None
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.index}", daemon=True)

    def start(self) -> None:
        """Start the thread, which waits for :meth:`resume`."""
        self._thread.start()

    def resume(self) -> None:
        """Let the guest run, unless the vCPU exited and waits for :meth:`revive`."""
        self._early = False
        self._go()

    @property
    def thread_id(self) -> int:
        """The kernel's id of the thread, or 0 before the thread was started."""
        return self._thread.native_id or 0

    @property
    def early(self) -> bool:
        """True from :meth:`start_early` to :meth:`resume`.

        The vCPU may be in the guest then, and KVM's calls for the vCPU would wait until the next
        exit.
        """
        return self._early

    def _go(self) -> None:
        with self._changed:
            if self.exited is None:
                self._page[abi.RUN_IMMEDIATE_EXIT] = 0
                self._run_wanted = True
                self._changed.notify_all()

    def start_early(self) -> None:
        """Let the guest run up to its first exit, which waits for :meth:`resume`."""
        self._early = True
        self._go()

    def revive(self) -> None:
        """Forget the stop reason, as the VM was reset."""
        self.exited = None

    def request_pause(self) -> None:
        """Ask the vCPU to leave the guest, without waiting."""
        with self._changed:
            self._run_wanted = False
            self._kick()

    def _kick(self) -> None:
        """Have the vCPU leave the guest. The caller has the lock."""
        self.vcpu.kick(None if self._parked else self._thread.ident)

    def wait_paused(self, timeout: float = 10.0) -> None:
        """Wait until the vCPU is parked.

        Raises:
            KvmError: the vCPU did not leave the guest in ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._parked, timeout):
                raise KvmError(f"vCPU {self.vcpu.index} did not leave the guest in {timeout} s")

    def throttle(self, percent: int) -> None:
        """Keep the vCPU out of the guest for ``percent`` of the time, 0 to 99.

        The caller has :meth:`end_slice` called from then on. 0 lets a vCPU that rests go on at
        once.
        """
        with self._changed:
            if not self._throttle:
                self._entered = time.monotonic()  # the time before does not count
            self._throttle = percent
            self._changed.notify_all()

    def end_slice(self) -> float:
        """Have a throttled vCPU rest if its slice is over, without waiting.

        Returns:
            Seconds after which to ask again.
        """
        with self._changed:
            now = time.monotonic()
            if self._parked or not self._throttle:
                return max(0.0, self._rests_until - now) + SLICE_S
            left = self._entered + SLICE_S - now
            if left > 0:
                return left
            self._kick()
            return SLICE_S

    def is_current(self) -> bool:
        """Return whether the caller is in this vCPU's thread."""
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """End the thread of this vCPU."""
        with self._changed:
            self._quit = True
            self._changed.notify_all()
        self.request_pause()
        if self._thread.ident is not None and not self.is_current():
            self._thread.join(10)

    def _main(self) -> None:
        while True:
            with self._changed:
                self._parked = True
                self._changed.notify_all()
                self._rest()
                self._changed.wait_for(lambda: self._run_wanted or self._quit)
                if self._quit:
                    return
                self._parked = False
                # That kick is answered; a pause would have cleared _run_wanted.
                self._page[abi.RUN_IMMEDIATE_EXIT] = 0
                self._entered = time.monotonic()
            try:
                self._run()
            except OSError as error:
                self.exit(StopReason.INTERNAL_ERROR, f"KVM_RUN: {error}")
            except Exception as error:  # a device's bug must not end in silence
                self.exit(StopReason.INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    def _rest(self) -> None:
        """Rest for as long as the throttle asks after a slice.

        A pause does not even wake a resting vCPU, which is parked, and only goes on if wanted by
        then.
        """
        if self._throttle and self._run_wanted:
            now = time.monotonic()
            self._rests_until = now + rest_after(now - self._entered, self._throttle)
            self._changed.wait_for(
                lambda: not self._throttle or not self._run_wanted or self._quit,
                self._rests_until - now,
            )
            self._rests_until = 0.0

    def _run(self) -> None:
        """Run the guest until a kick, or until the vCPU exits for good."""
        run = self.vcpu.run
        page = memoryview(self._page)
        reason_at = page[abi.RUN_EXIT_REASON : abi.RUN_EXIT_REASON + 4].cast("I")
        try:
            while True:
                try:
                    run()
                except InterruptedError:
                    if page[abi.RUN_IMMEDIATE_EXIT]:
                        return
                    continue
                except BlockingIOError:  # an AP that got its INIT
                    continue
                except OSError:
                    if self._early and not self._await_resume():
                        return
                    raise  # now somebody receives the reason
                if self._early and not self._await_resume():
                    return
                reason = reason_at[0]
                if reason == abi.EXIT_IO:
                    self._port_io(page)
                elif reason == abi.EXIT_MMIO:
                    self._mmio_access(page)
                elif reason != abi.EXIT_INTR:
                    self.exit(*_explain(reason, page))
                if self.exited is not None:
                    return
        finally:
            reason_at.release()
            page.release()

    def _await_resume(self) -> bool:
        """Wait until the devices are there, or return False if the thread ends first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._early or self._quit)
            return not self._quit

    def _port_io(self, page: memoryview) -> None:
        out, size, port, count, at = abi.RUN_IO.unpack_from(page, abi.RUN_UNION)
        for offset in range(at, at + size * count, size):
            if out:
                value = int.from_bytes(page[offset : offset + size], "little")
                self._ports.write(port, size, value)
            else:
                value = self._ports.read(port, size)
                page[offset : offset + size] = value.to_bytes(size, "little")

    def _mmio_access(self, page: memoryview) -> None:
        address, data, size, write = abi.RUN_MMIO.unpack_from(page, abi.RUN_UNION)
        if not 1 <= size <= 8:
            raise GuestError(f"MMIO access of {size} bytes")
        if write:
            self._mmio.write(address, size, int.from_bytes(data[:size], "little"))
        else:
            value = self._mmio.read(address, size) & (1 << 8 * size) - 1
            at = abi.RUN_MMIO_DATA
            page[at : at + size] = value.to_bytes(size, "little")

    def exit(self, reason: StopReason, detail: str) -> None:
        """Park the vCPU for good, and report the first reason."""
        with self._changed:
            self._run_wanted = False
            first = self.exited is None
            self.exited = (reason, detail)
        if first:
            self._on_exit(reason, detail)


def _explain(reason: int, page: memoryview) -> tuple[StopReason, str]:
    if reason == abi.EXIT_SHUTDOWN:
        return StopReason.TRIPLE_FAULT, "the guest triple-faulted"
    union = abi.RUN_UNION
    if reason == abi.EXIT_FAIL_ENTRY:
        code = int.from_bytes(page[union : union + 8], "little")
        return StopReason.INTERNAL_ERROR, f"the CPU refused to enter the guest ({code:#x})"
    if reason == abi.EXIT_INTERNAL_ERROR:
        code = int.from_bytes(page[union : union + 4], "little")
        return StopReason.INTERNAL_ERROR, f"KVM could not emulate an instruction (suberror {code})"
    return StopReason.INTERNAL_ERROR, f"KVM exit {reason}, which has no handler here"
