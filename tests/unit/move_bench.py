"""A whole move between two stand-ins for machines, over real sockets, to be broken anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from godwit.announce.uplink import Uplink
from godwit.errors import GodwitError, StreamError
from godwit.hw.memory import PAGE, GuestMemory
from godwit.machine.machine import Machine, Mark
from godwit.machine.state import MachineState
from godwit.migration.destination import Destination
from godwit.migration.packets.destination import PacketDestination
from godwit.migration.source import Source
from godwit.migration.wire.sockets import Address
from godwit.spec import saved
from godwit.spec.parameters import MigrationParameters
from godwit.spec.runstate import RunState, RunStates
from handover_bench import Nic as HandoverNic
from recorded import STREAMS
from tests.fakes.clock import FakeClock

S = RunState
_STATE = saved.decode(STREAMS[1].read()[1], MachineState)


class Nic(HandoverNic):
    """What a move asks of a NIC beside the handover."""

    model, version, offered, negotiated = "virtio-net", 1, 0, 0

    def foresight(self) -> None:
        pass

    def start_log(self) -> None:
        pass

    def take_log(self) -> None:
        return None

    def stop_log(self) -> None:
        pass


class Standin:
    """A machine that runs or does not."""

    def __init__(self) -> None:
        self.memory = GuestMemory(32 << 20)
        self.vm = SimpleNamespace(dirty_log=lambda slot, address: None)
        self.nics = [Nic("nic0")]
        self.uplinks = [Uplink(nic, FakeClock()) for nic in self.nics]
        nic = SimpleNamespace(mac=self.nics[0].mac, mtu=None, queue_size=None)
        self.config = SimpleNamespace(
            machine=SimpleNamespace(name="godwit-0.2"), cpus=1, nics=(nic,)
        )
        self.lock = threading.RLock()
        self.ended = None
        self.running = False
        self.logging = False
        self.loads = 0
        self.bad_state = False

    def set_dirty_log(self, on: bool) -> None:
        self.logging = on

    def pause(self, mark: Mark) -> None:
        self.running = False

    def resume(self, mark: Mark = lambda phase: None) -> None:
        self.running = True
        mark("vcpus-started")

    def save(self) -> MachineState:
        return _STATE

    def foresee(self, nics: object) -> None:
        pass

    def load(self, state: MachineState, received: float, mark: Mark) -> None:
        assert state == _STATE
        if self.bad_state:
            raise StreamError("vcpus: not as they should be")
        self.loads += 1

    def close(self) -> None:
        self.nics[0].tap.close()
        self.memory.close()


class Move:
    """A guest that runs at its source, and a destination that waits for it."""

    def __init__(self, folder: Path, through: Path | None = None) -> None:
        self.far = folder / "far"
        self.here, self.there = Standin(), Standin()
        self.here.running = True
        self.here.memory.view(0, 64 * PAGE)[:] = bytes(range(1, 251)) * 1048 + bytes(144)
        self.states, self.states_there = RunStates(S.RUNNING), RunStates(S.INMIGRATE)
        self.told: list[str] = []
        #: Whether the dirty log was on as each of them was told.
        self.logged: list[bool] = []
        #: Called with each of them.
        self.on_told: Callable[[str], None] = lambda status: None
        #: Whether frames of the guest's last move are still awaited.
        self.arriving: Callable[[], bool] = lambda: False
        self.failed: list[GodwitError] = []
        self._failed = threading.Event()
        #: The destination's process was ended from outside: what it does counts no more.
        self.dead = False
        self.destination = Destination(
            cast(Machine, self.there),
            Address(f"unix:{self.far}", False),
            self._arrive,
            self._fail,
        )
        self.source = Source(
            cast(Machine, self.here),
            self.states,
            Address(f"unix:{through or self.far}", False),
            MigrationParameters,
            self._tell,
            lambda: self.arriving(),
        )

    def _tell(self, status: str) -> None:
        self.told.append(status)
        self.logged.append(self.here.logging)
        self.on_told(status)

    def _arrive(
        self,
        ran: bool,
        mark: Callable[[str], None],
        arrival: PacketDestination | None,
        tell: Callable[[list[str]], None],
    ) -> None:
        """As godwit.vm.vm does it."""
        with self.there.lock:
            self.states_there.set(S.PRELAUNCH_MIGRATE)
            if arrival is not None:
                arrival.draw(mark)
            self.there.resume(mark)
            if arrival is not None:
                arrival.settle()
            tell([*map(str, self.states_there.history), str(S.RUNNING)])
            self.states_there.set(S.RUNNING)

    def _fail(self, error: GodwitError) -> None:
        self.failed.append(error)
        self._failed.set()

    def wait_failed(self) -> None:
        """The destination has said that no guest will come."""
        assert self._failed.wait(30)

    def run(self) -> None:
        """To its end."""
        self.destination.start()
        self.source.start()
        self.source.join(30)
        assert not self.source.active

    def kill(self) -> None:
        """The destination's process dies, by SIGKILL."""
        self.dead = True

    def close(self) -> None:
        self.source.abandon()
        self.source.join(30)
        self.destination.close()
        self.here.close()
        self.there.close()

    @property
    def running(self) -> tuple[bool, bool]:
        """Whether the guest runs at its source, and at its destination."""
        return self.here.running, self.there.running and not self.dead
