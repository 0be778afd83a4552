"""A whole migration between two machines on fake KVMs, over real sockets, to be broken anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError, StreamError
from godwit.hw.memory import PAGE
from godwit.migration.incoming import Incoming
from godwit.migration.outgoing import Outgoing
from godwit.migration.source import Source
from godwit.migration.times import Times
from godwit.spec.runstate import RunState, RunStates
from godwit.vm.migrations import Migrations
from tests.fakes.host import NIC, Host, config
from tests.fakes.kvm import FakeCpu

S = RunState
#: What is waited for in vain is given up soon; what comes, comes sooner.
IMPATIENT = Times(silence=0.5, patience=5.0, query_again=0.01, marker=0.0, late=0.0)


class Side:
    """A machine with its migrations, as a VM has them.

    Attributes:
        statuses: of the migration out.
        logged: whether the dirty log was on as each of them was reported.
        on_status: called with each of them.
        failures: why no guest came.
    """

    def __init__(
        self,
        state: RunState,
        times: Times,
        cpu: FakeCpu | None = None,
        devices: Sequence[tuple[str, str]] = (NIC,),
    ) -> None:
        self.host = Host(config(*devices), cpu=cpu)
        self.machine = self.host.machine
        self.states = RunStates(state)
        self.uplinks = [Uplink(nic, self.host.loop) for nic in self.machine.nics]
        self.statuses: list[str] = []
        self.logged: list[bool] = []
        self.on_status: Callable[[str], None] = lambda status: None
        self.failures: list[GodwitError] = []
        self._failed = threading.Event()
        self.migrations = Migrations(
            self.machine,
            self.uplinks,
            self.states,
            self.host.loop.now,
            self._status,
            self._fail,
            times=times,
        )

    @property
    def logging(self) -> bool:
        """Whether KVM's dirty log is on."""
        return any(log for *_, log in self.host.vm.memory.values())

    def _status(self, outgoing: Outgoing, status: str) -> None:
        self.statuses.append(status)
        self.logged.append(self.logging)
        self.on_status(status)

    def _fail(self, error: GodwitError) -> None:
        self.failures.append(error)
        self._failed.set()

    def wait_failed(self) -> None:
        """Wait until it is known that no guest will come."""
        assert self._failed.wait(30)

    def refuse_states(self) -> None:
        """Have the machine refuse whatever state comes."""

        def load(*_: object, **__: object) -> None:
            raise StreamError("vcpus: not as they should be")

        self.machine.load = load  # type: ignore[method-assign]

    def close(self) -> None:
        self.migrations.close()
        self.host.close()


class Migration:
    """A guest that runs at its source, and a destination that waits for it."""

    def __init__(
        self,
        folder: Path,
        through: Path | None = None,
        times: Times = IMPATIENT,
        cpus: tuple[FakeCpu | None, FakeCpu | None] = (None, None),
        here: Sequence[tuple[str, str]] = (NIC,),
        there: Sequence[tuple[str, str]] = (NIC,),
    ) -> None:
        self.far = folder / "far"
        self._through = through or self.far
        self.here = Side(S.RUNNING, times, cpus[0], here)
        self.there = Side(S.INMIGRATE, times, cpus[1], there)
        self.here.machine.memory.view(0, 64 * PAGE)[:] = bytes(range(1, 251)) * 1048 + bytes(144)
        self.here.machine.resume()
        #: The destination's process was ended from outside: what it does counts no more.
        self.dead = False

    @property
    def source(self) -> Source:
        """The migration out, once it has begun."""
        return cast(Source, self.here.migrations._outgoing)

    def await_packets_while(self, holding: Callable[[], bool]) -> None:
        """Have packets of the guest's last migration be awaited here for as long as so."""

        class Packets:
            @property
            def holding(self) -> bool:
                return holding()

        previous = SimpleNamespace(packets=Packets(), close=lambda: None, checked=lambda: True)
        self.here.migrations._incoming = cast(Incoming, previous)

    def begin(self) -> None:
        """Start both ends."""
        self.there.migrations.await_guest(f"unix:{self.far}", False)
        self.here.migrations.migrate(f"unix:{self._through}", False)

    def run(self) -> None:
        """Run to the end."""
        self.begin()
        self.finish()

    def finish(self) -> None:
        """Wait for the end."""
        self.source.join(30)
        assert not self.source.active

    def kill(self) -> None:
        """The destination's process dies, by SIGKILL."""
        self.dead = True

    def close(self) -> None:
        self.here.close()
        self.there.close()

    @property
    def running(self) -> tuple[bool, bool]:
        """Whether the guest runs at its source, and at its destination."""
        return self.here.machine.running, self.there.machine.running and not self.dead
