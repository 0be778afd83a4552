"""The connection to a back end: watched, and made anew once lost.

The event loop waits for no back end and no lock: what takes an answer runs in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from godwit.errors import HostError
from godwit.host.loop import Loop
from godwit.host.vhost_user import BackEnd

#: How long until another back end is looked for, and until a callback tries the lock again, in
#: seconds.
_AGAIN_S, _BUSY_S = 1.0, 0.02


class Owner(Protocol):
    """The device of a link, called under its lock."""

    def lost(self, why: str) -> None:
        """Go on without a back end."""

    def found(self, back_end: BackEnd) -> None:
        """Go on with another back end.

        Raises:
            HostError: this one will not do.
        """

    def config_changed(self, back_end: BackEnd) -> None:
        """Read the configuration space once more.

        Raises:
            HostError: the back end gives none.
        """


class Link:
    """The connection of a device, to be used under the device's ``lock``.

    ``connect`` makes a connection; None: there is none beside the first.

    Attributes:
        back_end: the back end, or None while there is none.
        losses: how often one was lost.
    """

    def __init__(
        self,
        first: BackEnd,
        connect: Callable[[], BackEnd] | None,
        owner: Owner,
        loop: Loop,
        lock: threading.RLock,
    ) -> None:
        self.back_end: BackEnd | None = first
        self.losses = 0
        self._connect = connect
        self._owner = owner
        self._loop = loop
        self._lock = lock
        self._closed = threading.Event()
        self._refusal = ""
        #: While descriptors are closed: the loop's thread may look at them without the lock.
        self._ending = threading.Lock()
        self._watch(first)

    def lose(self, why: str) -> None:
        """Give the back end up, unless there is none, and look for another."""
        if self.back_end is None:
            return
        self._disconnect()
        self.losses += 1
        self._owner.lost(why)
        if self._connect is not None and not self._closed.is_set():
            self._run(self._look_for_another, self._connect)

    def close(self) -> None:
        """Close the connection for good."""
        self._closed.set()
        self._disconnect()

    def _disconnect(self) -> None:
        with self._ending:
            back_end, self.back_end = self.back_end, None
            if back_end is not None:
                self._unwatch(back_end)
                back_end.close()

    # --- another back end -------------------------------------------------------------------------
    def _look_for_another(self, connect: Callable[[], BackEnd]) -> None:
        while not self._closed.wait(_AGAIN_S):
            try:
                back_end = connect()
            except HostError:
                continue  # nobody listens yet
            with self._lock:
                if self._closed.is_set():
                    back_end.close()
                elif not self._take(back_end):
                    continue
            return

    def _take(self, back_end: BackEnd) -> bool:
        self.back_end = back_end
        self._watch(back_end)
        try:
            back_end.begin()
            self._owner.found(back_end)
        except HostError as error:
            if self.back_end is back_end:
                self._disconnect()
                self._refuse(f"another will not do: {error}")
                return False
        else:
            self._refusal = ""
        return True  # or lost again, by which another thread looks

    def _refuse(self, why: str) -> None:
        """Have it reported, once, why another back end was not taken."""
        if why != self._refusal:
            self._refusal = why
            self._owner.lost(why)

    # --- in the event loop ------------------------------------------------------------------------
    def _watch(self, back_end: BackEnd) -> None:
        self._loop.watch(back_end.fd, hung_up=lambda: self._when_free(back_end, self._hung_up))
        if back_end.requests >= 0:
            self._loop.watch(back_end.requests, lambda: self._when_free(back_end, self._requested))

    def _unwatch(self, back_end: BackEnd) -> None:
        self._loop.unwatch(back_end.fd)
        if back_end.requests >= 0:
            self._loop.unwatch(back_end.requests)

    def _when_free(self, back_end: BackEnd, act: Callable[[BackEnd], None]) -> None:
        """Call back about the back end, if still ours, once the lock is free."""
        if not self._lock.acquire(blocking=False):
            with self._ending:
                if back_end is not self.back_end:
                    return
                self._unwatch(back_end)
            self._loop.call_later(_BUSY_S, lambda: self._when_free(back_end, self._watch))
            return
        try:
            if back_end is self.back_end:
                act(back_end)
        finally:
            self._lock.release()

    def _hung_up(self, back_end: BackEnd) -> None:
        self.lose("it closed the connection")

    def _requested(self, back_end: BackEnd) -> None:
        try:
            changed = back_end.config_changed()
        except HostError as error:
            self.lose(str(error))
            return
        if changed:
            # Not looked at until the answer is here: one thread, however much is sent.
            self._loop.unwatch(back_end.requests)
            self._run(self._read_config, back_end)

    def _read_config(self, back_end: BackEnd) -> None:
        with self._lock:
            if back_end is not self.back_end:
                return
            try:
                back_end.begin()
                self._owner.config_changed(back_end)
            except HostError as error:
                self.lose(str(error))
            else:
                self._watch(back_end)

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, name="back-end", daemon=True).start()
