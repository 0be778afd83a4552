"""The half common to all ways in: a thread that loads a guest for the VM."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from godwit.errors import GodwitError, as_godwit_error

from .guest import Guest
from .packets.destination import PacketDestination
from .receiver import Receiver
from .times import TIMES, Times

#: Takes the guest over: ``(incoming, running)``; ``running``: the guest ran when it was stopped.
TakeOver = Callable[["Incoming", bool], None]


class Incoming(ABC):
    """A migration in, which loads a guest in a thread of its own and calls back there.

    ``take_over(incoming, running)`` starts the guest, or leaves the guest stopped, and has to call
    :meth:`started`; ``on_failed(error)`` reports that this machine's RAM is spoilt, and that no
    guest will come.

    Attributes:
        packets: the guest's packet handover, if there is one.
        owned: the guest is this VM's own: the guest has run here, and the source knows, or queries
            until answered.
    """

    def __init__(
        self,
        guest: Guest,
        take_over: TakeOver,
        on_failed: Callable[[GodwitError], None],
        times: Times = TIMES,
        *,
        kept: bool = False,
        clock_now: bool = False,
    ) -> None:
        self._guest = guest
        #: The guest comes from a file, and may come from there more than once.
        self.kept = kept
        self._take_over = take_over
        self._on_failed = on_failed
        self._times = times
        self.packets: PacketDestination | None = None
        self._receiver = Receiver(guest, times, kept=kept, clock_now=clock_now)
        self._closing = threading.Event()
        self.owned = False
        self._thread = threading.Thread(target=self._main, name="incoming", daemon=True)

    @property
    def phases(self) -> dict[str, float]:
        """Name of a phase -> ms since the state came, at the phase's end."""
        return self._receiver.phases

    def phase(self, name: str) -> None:
        """Note the end of a phase."""
        self._receiver.phase(name)

    def start(self) -> None:
        """Begin to wait for the guest."""
        self._receiver.start()
        self._thread.start()

    def close(self) -> None:
        """Wait for the guest no more."""
        self._closing.set()
        self._interrupt()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(self._times.silence)
        self._receiver.close()

    def checked(self) -> bool:
        """Return whether all of the guest was checked, which is hurried from now on.

        Raises:
            StreamError: the guest came damaged.
        """
        return True

    def started(self, states: list[str]) -> None:
        """Notify the source that its guest is here, with the run states until then."""
        self.owned = True

    @abstractmethod
    def _run(self) -> None:
        """Load the guest and have the VM take over.

        Raises:
            GodwitError: no guest will come.
        """

    @abstractmethod
    def _interrupt(self) -> None:
        """Make the thread give up."""

    @abstractmethod
    def _finish(self) -> None:
        """Give the thread's resources back, as its last act."""

    def _main(self) -> None:
        try:
            self._run()
        except Exception as error:
            if isinstance(error, GodwitError) and self._closing.is_set():
                return
            if self.owned:
                raise  # reported by threading.excepthook: the guest runs on
            self._on_failed(as_godwit_error(error))
        finally:
            self._receiver.realtime.end()  # if the guest does not start at once
            self._finish()
