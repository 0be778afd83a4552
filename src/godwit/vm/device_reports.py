"""Events and log lines of devices that the host lets down: disks' errors, and lost back ends."""

from __future__ import annotations

from collections.abc import Callable

from godwit.host.loop import Loop
from godwit.hw.capabilities import HasBackEnd, IoError, ReportsIoErrors
from godwit.hw.devices import Devices
from godwit.spec.events import Event

from .limited_reports import LimitedReports

#: Receives an event's name and data.
Emit = Callable[[Event, dict[str, object]], None]


class DeviceReports:
    """The reports of a VM's devices, made in the loop, where ``on_stop()`` is to stop the VM."""

    def __init__(
        self,
        devices: Devices,
        loop: Loop,
        emit: Emit,
        log: Callable[[str], None],
        on_stop: Callable[[], None],
    ) -> None:
        self._loop, self._emit, self._log, self._on_stop = loop, emit, log, on_stop
        self._io_errors = LimitedReports(loop.now, self._io_error)
        self._last_io_error: dict[str, IoError] = {}
        for part in devices.having(ReportsIoErrors):
            part.on_io_error = self.io_failed
        for device in devices:
            served = devices.part(device, HasBackEnd)
            if served is not None:
                served.on_back_end = self._back_end_changed(device.id)
                served.on_requests_lost = self.requests_lost(device.id)

    def _back_end_changed(self, device: str) -> Callable[[str | None], None]:
        def report(why: str | None) -> None:
            if why is None:
                self._emit(*Event.BACK_END_BACK.of(device=device))
                self._log(f"{device}: its back end is back")
            else:
                self._emit(*Event.BACK_END_LOST.of(device=device, why=why))
                self._log(f"{device}: its back end is lost ({why}); the device waits")

        return lambda why: self._loop.call_soon(lambda: report(why))

    def requests_lost(self, device: str) -> Callable[[], None]:
        """Return a callback that reports requests of ``device`` that nobody knows of any more."""

        def report() -> None:
            self._emit(*Event.BACK_END_REQUESTS_LOST.of(device=device))
            self._log(
                f"{device}: its back end was lost with requests in flight, of which it kept no "
                "record; the device has stopped, and goes on once the guest resets it or reboots"
            )

        return lambda: self._loop.call_soon(report)

    def io_failed(self, error: IoError) -> None:
        """Report an error of a disk, at a rate, and stop the VM if that is wanted."""
        self._last_io_error[error.device] = error
        self._io_errors.add(error.device, error.reason)
        if error.action == "stop":
            self._loop.call_soon(self._on_stop)  # this is a worker of the device

    def _io_error(self, device: str, reason: str, suppressed: int) -> None:
        error = self._last_io_error[device]
        self._emit(*Event.BLOCK_IO_ERROR.of(**error._asdict()))
        more = f"; {suppressed} more since the last report" if suppressed else ""
        done = "the VM stops, and cont tries again" if error.action == "stop" else "the guest knows"
        self._log(f"{device}: a {error.operation} failed ({reason}){more}: {done}")
