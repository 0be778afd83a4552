"""What a NIC is to the rest of the VMM, its way to announce included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import msgspec

from godwit.host.kvm.handles import Vm
from godwit.host.loop import Loop
from godwit.hw.irq import Routes
from godwit.hw.memory import GuestMemory
from godwit.hw.pci import PciFunction
from godwit.hw.setup_hints import Foresight

from .rx_filter_info import FilterView


class NicModel(Protocol):
    """A NIC as the announcer sees it."""

    @property
    def name(self) -> str:
        """The NIC's id, as configured: ``nic0``."""

    @property
    def mac(self) -> bytes:
        """The MAC address in force, six bytes: the one the guest set, if it set one."""

    def announce(self) -> bool:
        """Have the guest announce itself; False when the model has no way to, or declines.

        Called with the VM running, from any thread; it never blocks on the guest.
        """

    def rx_filter(self) -> FilterView:
        """What the guest told the NIC to receive; from any thread."""

    def send_from_host(self, frame: bytes) -> None:
        """Put ``frame`` (Ethernet, no FCS) on the network as if the guest had sent it.

        Raises:
            OSError: the backend did not take it.
        """


class Nic(NicModel, Protocol):
    """A NIC as the machine sees it."""

    model: str
    #: Version of the saved state.
    version: int
    #: The tap's descriptor: readable while frames wait in it.
    tap_fd: int
    #: Told of each announcement that the guest acknowledged; never under the NIC's lock.
    on_ack: Callable[[], None]
    #: Told that the guest changed the filter or its MAC address; never under the NIC's lock.
    on_filter: Callable[[], None]

    @property
    def function(self) -> PciFunction:
        """What is plugged into the PCI bus."""

    @property
    def offered(self) -> int:
        """Feature bits that the guest may use; 0 for a model without negotiation."""

    @property
    def negotiated(self) -> int:
        """Feature bits that the guest uses now."""

    def foresight(self) -> Foresight | None:
        """What a destination may have ready before the stop, if anything; running, any thread."""

    def foresee(self, negotiated: int, foresight: Foresight | None) -> None:
        """A NIC that uses these features, and is like that, will be loaded; paused.

        What this sets up is a guess, and :meth:`load` sets it right.
        """

    def pause(self) -> None:
        """The vCPUs are stopped: move no frames, and let interrupts under way reach the APICs."""

    def resume(self) -> None:
        """The vCPUs are about to run."""

    def reset(self) -> None:
        """Power-on; paused."""

    def close(self) -> None:
        """Give everything back; paused."""

    def start_log(self) -> None:
        """Log the pages that the backend writes behind the VMM's back."""

    def take_log(self) -> bytes | None:
        """The bitmap since the last call, if any: a bit per 4 KiB page of guest memory."""

    def stop_log(self) -> None:
        """Log no more."""

    def drain(self) -> int:
        """Throw away the frames that wait in the tap, not what goes ahead; how many. Paused."""

    # A move's handover (docs/decisions/0013-handover.md): frames that reach the old host after the
    # guest has stopped are taken there, and given to it at the new host before the new tap's.
    def take(self, limit: int) -> list[bytes]:
        """Take what waits for the guest, at most so many frames, each with the tap's header;
        paused."""

    def hold(self) -> None:
        """From the next resume on, give the guest nothing from the tap until :meth:`release`."""

    def put_ahead(self, frames: Iterable[bytes]) -> int:
        """Give the guest these before what the tap has, as :meth:`take` took them; any thread.

        How many were refused: too many (:mod:`.ahead`), too short, or too long.
        """

    def release(self) -> int:
        """All that goes ahead was put: the tap's turn. How many of its frames were dropped, because
        a broadcast had come both ways; any thread."""

    def save(self) -> msgspec.Struct:
        """The state, of the type that the model's row in :data:`.models.MODELS` names; paused."""

    def load(self, state: msgspec.Struct) -> None:
        """Take over a saved state; paused.

        Raises:
            StreamError: it is not one that this NIC can be in; names the field.
        """


class Parts(NamedTuple):
    """What a NIC is made from, beside its configuration."""

    memory: GuestMemory
    vm: Vm
    routes: Routes
    loop: Loop
    #: Where firmware would put BAR 0.
    bar: int
    #: Where firmware would put an I/O BAR.
    port: int
    #: Sets the level of the NIC's INTA line.
    intx: Callable[[bool], None]
    #: The machine type's word on VIRTIO_NET_F_GUEST_ANNOUNCE.
    guest_announce: bool
    #: Told when the guest broke the device's rules: (NIC's id, message).
    on_offence: Callable[[str, str], None]
