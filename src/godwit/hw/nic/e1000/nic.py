"""The e1000 as a device of the machine: the controller, PCI and a tap together.

Registers are accessed by vCPUs, the tap is read by the event loop, under one lock. The guest's
frames are sent by the vCPU that announces them, up to a budget, and the rest by the loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

from godwit.errors import ConfigError
from godwit.host.loop import SoonCall
from godwit.host.net.tap import Tap
from godwit.hw.capabilities import Counts
from godwit.hw.device import Device, Slot, guarded
from godwit.hw.nic.nic import Nic, RxFilterInfo
from godwit.hw.nic.rx_backlog import RxBacklog
from godwit.hw.nic.tap_reader import TapReader
from godwit.spec.config import DeviceConfig, NicConfig

from .mac import Mac, Wires
from .pci import E1000Pci
from .state import E1000State


def make(config: DeviceConfig, slot: Slot) -> E1000:
    """Return an e1000 on its tap.

    Raises:
        ConfigError: the configuration has what only virtio-net has.
        HostError: the tap is missing.
    """
    assert isinstance(config, NicConfig)
    for key, given, remedy in (
        ("guest-announce=on", config.guest_announce is True, "the host announces it, by RARP"),
        ("mtu=", config.mtu is not None, "set the MTU in the guest"),
        ("queue-size=", config.queue_size is not None, "the guest's driver sizes its rings"),
    ):
        if given:
            raise ConfigError(
                f"NIC {config.id}: {key} needs model=virtio-net; leave it out here ({remedy})"
            )
    tap = Tap(config.tap)
    try:
        return E1000(config.id, config.mac, tap, slot)
    except BaseException:
        tap.close()
        raise


class E1000(Device, Nic, Counts):
    """The controller on a tap, which the device owns and closes."""

    kind = "e1000"
    State = E1000State

    def __init__(self, id: str, mac: bytes, tap: Tap, slot: Slot) -> None:
        self.id = id
        self.configured_mac = mac
        #: Never called: the guest has no way to acknowledge.
        self.on_ack: Callable[[], None] = lambda: None
        #: Called once for all changes of the filter that come before the loop's turn.
        self.on_filter: Callable[[], None] = lambda: None
        self._filter_soon = SoonCall(slot.loop, lambda: self.on_filter())
        self._transmit_soon = SoonCall(slot.loop, self._transmit_more)
        self._lock = threading.RLock()
        self._paused = True
        self._sent = self._received = 0
        self._tap = tap
        self.tap, self.tap_fd = tap.name, tap.fd
        self.rx_backlog = RxBacklog(tap, self._lock)
        wires = Wires(
            send=self._send,
            interrupt=lambda level: self.function.update_line(),
            receive=self._receive_changed,
            transmit=self._transmit,
            guest_error=lambda message: slot.on_guest_error(id, message),
            filter=self._filter_soon.request,
        )
        self._mac = Mac(slot.memory, mac, wires)
        self.function = E1000Pci(
            self._mac, self._lock, slot.bar, slot.port, slot.intx.of(slot.number), self._dma_changed
        )
        self._reader = TapReader(tap, self.rx_backlog, slot.loop, self._mac.accepts, self._deliver)
        slot.pci.add(slot.number, self.function)

    def properties(self) -> Mapping[str, str | int | None]:
        """Return the configured MAC address."""
        return {"mac": self.configured_mac.hex(":")}

    def counters(self) -> Mapping[str, int]:
        """Return how many frames were sent and received."""
        return {"frames-sent": self._sent, "frames-received": self._received}

    # --- Nic --------------------------------------------------------------------------------------
    @property
    def mac(self) -> bytes:
        """The MAC address in force."""
        with self._lock:
            return self._mac.filter.mac

    def announce(self) -> bool:
        """Return False: this controller has no way to ask its driver for an announcement."""
        return False

    def send_from_host(self, frame: bytes) -> None:
        """Send a frame as if the guest had.

        Raises:
            OSError: the tap did not take the frame.
        """
        if self.gate is None or self.gate(frame, None):
            self._tap.send(frame)

    def rx_filter(self) -> RxFilterInfo:
        """Return what the receive filter takes."""
        with self._lock:
            return self._mac.view_filter()

    # --- Device -----------------------------------------------------------------------------------
    def pause(self) -> None:
        """Carry no more frames, while the interrupt line keeps its level, which is saved."""
        with self._lock:
            self._paused = True
            self._reader.stop()

    def resume(self) -> None:
        """Carry frames, and set the line's level anew.

        KVM forgets a line's level on the way to another host.
        """
        with self._lock:
            self._paused = False
            self.function.update_line(always=True)
            self._dma_changed()

    def reset(self) -> None:
        """Return to the state after power-on."""
        with self._lock:
            self._mac.reset()
            self.rx_backlog.clear()
            self.function.reset_config()
            self.function.reset_io()
            self.function.update_line(always=True)

    def close(self) -> None:
        """Give the tap back, and stop."""
        with self._lock:
            self._paused = True
            self._reader.stop()
            self._tap.close()

    def save(self) -> E1000State:
        """Return the state of the device."""
        with self._lock:
            io_bar, io_address = self.function.save_io()
            return E1000State(
                pci=self.function.save_config(),
                io_bar=io_bar,
                io_address=io_address,
                mac=self._mac.save(),
            )

    def load(self, state: E1000State) -> None:
        """Take over a saved state.

        Raises:
            StreamError: the device cannot be in the state; the message names the field.
        """
        with self._lock:
            self._mac.load(state.mac)
            self.function.load_io(state.io_bar, state.io_address)
            self.function.load_config(state.pci)

    # --- frames -----------------------------------------------------------------------------------
    def _works(self) -> bool:
        return not self._paused and self.function.may_dma

    def _dma_changed(self) -> None:
        self._receive_changed()
        self._transmit()

    def _receive_changed(self) -> None:
        """React to a receiver that was turned on or off, or has more space."""
        if not self._works() or not self._mac.receiving:
            self._reader.stop()
            return
        self._reader.start(self._receive)

    def _receive(self) -> None:
        with self._lock:
            if not self._works() or not self._mac.receiving:
                return
            with guarded(self._mac.guest_error):
                if self._reader.turn():
                    self._mac.received()

    def _deliver(self, frame: bytes) -> bool:
        delivered = self._mac.receiver.deliver(frame)
        self._received += delivered
        return delivered

    def _transmit(self) -> None:
        if self._works() and self._mac.transmit():
            self._transmit_soon.request()

    def _transmit_more(self) -> None:
        with self._lock:
            self._transmit()

    def _send(self, frame: bytes) -> None:
        if not self.lets_out(frame):
            return
        try:
            os.write(self._tap.fd, frame)
            self._sent += 1
        except OSError:
            # The tap is down or its queue is full, or the offload makes no sense: a NIC drops the
            # frame, and so do we.
            pass
