"""What a NIC model is to the rest of the VMM, its way to announce included."""

from __future__ import annotations

from typing import Protocol


class NicModel(Protocol):
    """A NIC as the announcer and the machine see it."""

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

    def send_from_host(self, frame: bytes) -> None:
        """Put ``frame`` (Ethernet, no FCS) on the network as if the guest had sent it.

        Raises:
            OSError: the backend did not take it.
        """
