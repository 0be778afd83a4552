"""A guest as migrations see one: the machine, and the uplinks of the NICs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from godwit.announce.saved import AddressBookState
from godwit.announce.uplink import Uplink
from godwit.errors import StreamError
from godwit.hw.nic.nic import Nic
from godwit.machine.machine import Machine, OnPhase, away_for
from godwit.machine.state import MachineState
from godwit.spec import saved

#: The name of the section with the address books.
ADDRESSES = "addresses"
#: The address book of each NIC, by the NIC's id.
_Books = dict[str, AddressBookState]
#: Receives a NIC's id and MAC address.
OnOwn = Callable[[str, bytes], None]


class Guest:
    """The machine, and for each of its NICs, in order, the uplink.

    ``now`` is the clock by which the address books' entries age. With ``on_own`` a guest that is
    loaded is a copy, whose original keeps its addresses: called with a NIC's id and MAC address
    once the copy uses one of its own there, by the thread that carries frames.
    """

    def __init__(
        self,
        machine: Machine,
        uplinks: Sequence[Uplink],
        now: Callable[[], float],
        on_own: OnOwn | None = None,
    ) -> None:
        self.machine = machine
        self.uplinks = uplinks
        self._now = now
        self._on_own = on_own

    @property
    def nics(self) -> list[Nic]:
        """The NICs, in the order of the uplinks."""
        return self.machine.nics

    def prepare(self) -> None:
        """Build the decoders of a state that will be loaded."""
        saved.prepare(_Books)
        saved.prepare(MachineState)
        for device in self.machine.devices:
            saved.prepare(device.State)

    def save(self) -> MachineState:
        """Return the machine's state and the address books, while paused."""
        now = self._now()
        books = {}
        for uplink in self.uplinks:
            with uplink.observer.book(now) as book:
                books[uplink.nic.id] = book.save(now)
        return self.machine.save({ADDRESSES: msgspec.Raw(msgspec.msgpack.encode(books))})

    def load(
        self,
        state: MachineState,
        received: float,
        on_phase: OnPhase,
        *,
        kept: bool = False,
        clock_now: bool = False,
    ) -> None:
        """Take over a saved state, while paused, as :meth:`.Machine.load` does.

        The address books' ages count the time for which the state was ``kept``, and so does the
        guest's clock with ``clock_now``.

        Raises:
            StreamError: the state is not one of this guest; the message names what differs.
        """
        if state.sections.keys() != {ADDRESSES}:
            odd = ", ".join(sorted(state.sections.keys() ^ {ADDRESSES}))
            raise StreamError(f"sections: not the ones that a guest has ({odd})")
        books = saved.decode(state.sections[ADDRESSES], _Books)
        if books.keys() != {uplink.nic.id for uplink in self.uplinks}:
            raise StreamError(f"section {ADDRESSES}: not of the NICs that this machine has")
        self.machine.load(state, received, on_phase, clock_now=clock_now)
        if self._on_own is not None:
            self._hold_back(books, self._on_own)
        now = self._now()
        away = away_for(state.platform, received) if kept else 0.0
        for uplink in self.uplinks:
            if self._on_own is None:
                with uplink.observer.book(now) as book:
                    book.load(books[uplink.nic.id], now - away)
                    book.forget_old(now)
            uplink.observer.guest_here(True)

    def _hold_back(self, books: _Books, on_own: OnOwn) -> None:
        """Have no NIC use an address that any of the original's had."""
        from godwit.announce.gate import Original  # for the few that are copies

        entries = [entry for book in books.values() for entry in book.entries]
        macs = {entry.mac for entry in entries}
        for nic in self.nics:
            macs |= {nic.mac, *nic.rx_filter().unicast_table}
        ips = {entry.ip for entry in entries if entry.ip is not None}
        original = Original(macs, ips.union(*(book.former for book in books.values())))
        for uplink in self.uplinks:
            uplink.hold_back(original, partial(on_own, uplink.nic.id))
