"""A synchronous QMP client, for the CLI and for tests: a thin cover over stock ``qemu.qmp``.

qemu.qmp brings asyncio with it, so it is imported when a client is made, not with this module.
Errors::

    ConfigError
    └── CommandRefused     the VM answered with an error
    HostError
    └── VmGone             nobody answers, or no longer, or not in time
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from godwit.errors import ConfigError, HostError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from qemu.qmp import QMPClient

T = TypeVar("T")
Event = Mapping[str, Any]

#: Between two attempts to connect to a VM that is not up yet, seconds.
_RETRY = 0.02


class CommandRefused(ConfigError):
    """The VM answered with an error: its text, and its class in ``error_class``."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class VmGone(HostError):
    """Nobody answers on the socket, or no longer, or not in time."""


class Client:
    """A connection to one VM. Use it as a context manager, from one thread.

    Events that arrive between calls are kept, in order, until they are asked for.
    """

    def __init__(self, path: str, loop: AbstractEventLoop, qmp: QMPClient) -> None:
        self.path = path
        self._loop = loop
        self._qmp = qmp

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], deadline: float = 5.0, retry: bool = False
    ) -> Client:
        """Connect and negotiate within ``deadline`` seconds.

        With ``retry``, a socket that is not there yet is waited for.

        Raises:
            VmGone: nobody answered.
        """
        import asyncio

        from qemu.qmp import QMPClient, QMPError

        name = os.fspath(path)
        end = time.monotonic() + deadline
        loop = asyncio.new_event_loop()
        try:
            while True:
                qmp = QMPClient("godwit")
                # Its own log lines say on stderr what the exceptions say as well.
                qmp.logger.disabled = True
                left = max(0.0, end - time.monotonic())
                try:
                    loop.run_until_complete(asyncio.wait_for(qmp.connect(name), left))
                    return cls(name, loop, qmp)
                except TimeoutError as error:
                    raise VmGone(f"no VM answers on {name} within {deadline:g} s") from error
                except (QMPError, OSError) as error:
                    if not retry or time.monotonic() + _RETRY > end:
                        raise VmGone(f"no VM answers on {name}: {_cause(error)}") from error
                    loop.run_until_complete(asyncio.sleep(_RETRY))
        except BaseException:
            loop.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; harmless when that has been done."""
        from qemu.qmp import QMPError

        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(self._qmp.disconnect())
        except (QMPError, OSError, EOFError):
            pass  # the VM hung up first
        finally:
            self._loop.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, deadline: float = 30.0
    ) -> Any:
        """Execute ``command`` and return its result, within ``deadline`` seconds.

        Raises:
            CommandRefused: the VM answered with an error.
            VmGone: it did not answer.
        """
        from qemu.qmp import ExecuteError

        try:
            return self._wait(self._qmp.execute(command, arguments), deadline, f"'{command}'")
        except ExecuteError as error:
            raise CommandRefused(error.error.error.desc, error.error_class) from error

    def events(self) -> list[Event]:
        """The events that have arrived and were not asked for yet, in order; does not wait."""

        async def turn() -> None:
            # The reader is a task: a few turns of the loop let it take what the socket holds.
            import asyncio

            for _ in range(10):
                await asyncio.sleep(0)

        self._loop.run_until_complete(turn())
        return [dict(message) for message in self._qmp.events.clear()]

    def wait_event(
        self,
        name: str,
        deadline: float = 30.0,
        predicate: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Event:
        """The next event called ``name`` whose data ``predicate`` accepts; others are passed over.

        Raises:
            VmGone: none came within ``deadline`` seconds, or the VM hung up.
        """

        async def search() -> Event:
            while True:
                event = await self._next_event()
                data = event.get("data", {})
                if event["event"] == name and (predicate is None or predicate(data)):
                    return event

        return self._wait(search(), deadline, f"event {name}")

    def wait_any(self, name: str, deadline: float) -> Event | None:
        """The next event called ``name`` within ``deadline`` seconds, or None.

        Raises:
            VmGone: the VM hung up.
        """
        try:
            return self.wait_event(name, deadline)
        except VmGone as error:
            if isinstance(error.__cause__, TimeoutError):
                return None
            raise

    async def _next_event(self) -> Event:
        """The next event, or EOFError once the VM has hung up: the listener hears nothing then."""
        import asyncio

        from qemu.qmp import Runstate

        if not self._qmp.events.empty():
            return dict(await self._qmp.events.get())
        if self._qmp.runstate is not Runstate.RUNNING:
            raise EOFError("the connection is closed")
        arrived = asyncio.ensure_future(self._qmp.events.get())
        changed = asyncio.ensure_future(self._qmp.runstate_changed())
        try:
            # A change is told only to those who wait for it already: let both begin, look again.
            await asyncio.sleep(0)
            if self._qmp.runstate is Runstate.RUNNING:
                await asyncio.wait({arrived, changed}, return_when=asyncio.FIRST_COMPLETED)
            if arrived.done():
                return dict(arrived.result())
            raise EOFError("the connection is closed")
        finally:
            arrived.cancel()
            changed.cancel()

    def _wait(self, work: Coroutine[Any, Any, T], deadline: float, what: str) -> T:
        import asyncio

        from qemu.qmp import ExecuteError, QMPError

        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, deadline))
        except ExecuteError:
            raise  # an answer, though not the one that was hoped for
        except TimeoutError as error:
            raise VmGone(f"{what}: no answer from {self.path} within {deadline:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise VmGone(f"{what}: {self.path} hung up: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What stands at the bottom of qemu.qmp's wrapped exceptions."""
    inner = getattr(error, "exc", None) or error.__cause__
    if isinstance(inner, OSError) and inner.errno is not None:
        return os.strerror(inner.errno)
    return str(error) or type(error).__name__
