"""The times of a migration: its clock, and the longest waits of each side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Times(NamedTuple):
    """Everything in a migration that depends on time, handed in as one object.

    All but the rate are seconds.
    """

    #: Monotonic time.
    now: Callable[[], float] = time.monotonic
    #: A peer that sends nothing for so long is gone; a message is whole within so long, and
    #: :attr:`rate`.
    silence: float = 10.0
    #: The least bytes per second at which a long message has to come.
    rate: float = 65536.0
    #: A connection is closed unless its first message is whole within so long.
    introduction: float = 5.0

    # --- the source -------------------------------------------------------------------------------
    #: How long the guest may be stopped for a migration in all before it goes on at the source,
    #: beside ten times what the stop was expected or allowed to take.
    stop: float = 10.0
    #: For the message that is being sent when a migration is given up.
    hurry: float = 0.5
    #: Between two queries for what became of the guest.
    query_again: float = 0.5
    #: For a connection to be made while querying.
    query_connect: float = 2.0
    #: For the last message of a destination that closed the connection: it is here, or was never
    #: sent.
    last_message: float = 0.1
    #: For all of a destination's last messages.
    last_messages: float = 1.0
    #: Between two looks at whether the process ends, or a previous packet handover is over.
    look: float = 0.05

    # --- the destination --------------------------------------------------------------------------
    #: How long a source may take from WELCOME to its next message.
    begin: float = 2.0
    #: How long a guest that was loaded waits for its source's query once the connection is lost.
    patience: float = 30.0

    # --- packet handover, the source (docs/decisions/0013-handover.md) ----------------------------
    #: How long a marker is waited for once the destination has sent it: it need not come (a port
    #: that does not forward, a network that floods no broadcasts). While the guest's packets still
    #: come the marker may just be late, as on a host whose CPUs are overloaded: so long after the
    #: last packet, then.
    marker: float = 0.25
    #: The longest that markers are waited for, whatever comes.
    old_path: float = 2.0
    #: The markers leave together. When one is here and no other follows for so long, none will: the
    #: network does not carry that VLAN.
    quiet: float = 0.05
    #: How long packets are sent after a guest that is not started at once.
    start: float = 30.0
    #: How long a tap is looked at after its last marker, for packets that took a longer way.
    late: float = 0.3

    # --- packet handover, the destination ---------------------------------------------------------
    #: How long a tap waits for the old host's next packets: longer than the source waits for a
    #: marker while none comes.
    hold: float = 1.0
    #: How long a tap waits in all, from the switchover on: longer than the source does.
    hold_longest: float = 3.0
    #: How long the announcement waits, from the switchover on. Where a marker is lost the
    #: announcement is what switches the traffic over, and the tap's packets wait on behind the old
    #: host's.
    settle: float = 0.3
    #: The source looks for late packets for less than this after its last message.
    listen: float = 40.0


TIMES = Times()
