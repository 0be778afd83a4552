"""Run states of a VM: one table of transitions, one setter, listeners called with ``(old, new)``.

The names are QEMU's (qapi/run-state.json) where QEMU has the state. ``prelaunch-migrate`` is the
state of 'Send the gratuitous by guest' V7 (Jason Wang, qemu-devel, 2013-03-07): the incoming state
is loaded and the guest is about to start. Leaving it for ``running`` is what makes the VM announce
itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum

from godwit.errors import StateError


class RunState(StrEnum):
    """The states of a VM, with the values that QMP shows."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    PRELAUNCH_MIGRATE = "prelaunch-migrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    IO_ERROR = "io-error"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    SHUTDOWN = "shutdown"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"


_S = RunState

#: From a state in which the guest stands still: an SMP guest may be halfway to shutdown on another
#: vCPU when it is paused, and the exits that were already under way are reported from here too.
_STANDS_STILL = frozenset(
    {
        _S.RUNNING,
        _S.PRELAUNCH,
        _S.FINISH_MIGRATE,
        _S.SAVE_VM,
        _S.SHUTDOWN,
        _S.GUEST_PANICKED,
        _S.INTERNAL_ERROR,
    }
)
#: The one table: state -> states it may be left for. A state may not be "left" for itself.
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    _S.PRELAUNCH: frozenset({_S.RUNNING, _S.INMIGRATE, _S.RESTORE_VM, _S.SHUTDOWN}),
    _S.INMIGRATE: frozenset({_S.PRELAUNCH_MIGRATE, _S.RESTORE_VM, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.PRELAUNCH_MIGRATE: frozenset({_S.RUNNING, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.RUNNING: frozenset(
        {
            _S.PAUSED,
            _S.IO_ERROR,
            _S.FINISH_MIGRATE,
            _S.SAVE_VM,
            _S.SHUTDOWN,
            _S.GUEST_PANICKED,
            _S.INTERNAL_ERROR,
            _S.PRELAUNCH,  # a guest's reboot
        }
    ),
    _S.PAUSED: _STANDS_STILL,
    # A disk failed, and what the guest wanted of it is tried again.
    _S.IO_ERROR: _STANDS_STILL,
    # A failed migration goes back to what the guest did before.
    _S.FINISH_MIGRATE: frozenset(
        {
            _S.RUNNING,
            _S.PRELAUNCH,
            _S.PAUSED,
            _S.IO_ERROR,
            _S.POSTMIGRATE,
            _S.SHUTDOWN,
            _S.GUEST_PANICKED,
            _S.INTERNAL_ERROR,
        }
    ),
    _S.POSTMIGRATE: frozenset({_S.SHUTDOWN}),
    # The guest runs on after a save that succeeded, as after one that failed.
    _S.SAVE_VM: frozenset(
        {
            _S.RUNNING,
            _S.PRELAUNCH,
            _S.PAUSED,
            _S.IO_ERROR,
            _S.SHUTDOWN,
            _S.GUEST_PANICKED,
            _S.INTERNAL_ERROR,
        }
    ),
    # A guest from a file is one from elsewhere: left for the state from which it is announced.
    _S.RESTORE_VM: frozenset({_S.PRELAUNCH_MIGRATE, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.SHUTDOWN: frozenset(),
    _S.GUEST_PANICKED: frozenset({_S.SHUTDOWN}),
    _S.INTERNAL_ERROR: frozenset({_S.SHUTDOWN}),
}

#: States in which the vCPUs may execute guest code.
LIVE = frozenset({_S.RUNNING})

Listener = Callable[[RunState, RunState], None]


class RunStates:
    """The VM's run state, thread-safe, with listeners called in the setter's thread and in order.

    ``history`` keeps every state in order (bounded by the table: a VM makes few transitions; the
    newest 256 are kept).
    """

    def __init__(self, first: RunState = RunState.PRELAUNCH) -> None:
        self._state = first
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self.history: list[RunState] = [first]

    @property
    def current(self) -> RunState:
        """The run state of this moment."""
        return self._state

    def listen(self, listener: Listener) -> None:
        """Call ``listener(old, new)`` after each transition from now on."""
        self._listeners.append(listener)

    def set(self, new: RunState) -> None:
        """Change the run state to ``new``.

        Raises:
            StateError: the table has no such transition.
        """
        with self._lock:
            old = self._state
            if new not in TRANSITIONS[old]:
                raise StateError(f"the VM is in state '{old}', which cannot become '{new}'")
            self._state = new
            self.history.append(new)
            del self.history[:-256]
            # Each of them is notified, whatever becomes of another: the state has changed.
            problems: list[Exception] = []
            for listener in self._listeners:
                try:
                    listener(old, new)
                except Exception as error:
                    problems.append(error)
            if problems:
                raise problems[0]

    def require(self, *allowed: RunState) -> None:
        """Check that the run state is one of ``allowed``.

        Raises:
            StateError: the state is another; the message names all of them.
        """
        if self._state not in allowed:
            names = ", ".join(f"'{s}'" for s in allowed)
            raise StateError(f"the VM is in state '{self._state}'; this is allowed in {names}")
