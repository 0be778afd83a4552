"""What an operator says about moves that do not converge. Checked here; obeyed by ``migration``."""

from __future__ import annotations

import enum

import msgspec

from godwit.errors import ConfigError

#: The most that a vCPU may be kept out of the guest, percent. QEMU: softmmu/cpu-throttle.c,
#: CPU_THROTTLE_PCT_MAX. What is left is one slice in a hundred, so that a guest never stands still.
MOST_THROTTLED = 99


class OnNoConvergence(enum.StrEnum):
    """What becomes of a move that the downtime limit does not allow to end.

    In the words of Xen (tools/include/xenguest.h, precopy_policy): XGS_POLICY_ABORT and
    XGS_POLICY_STOP_AND_COPY.
    """

    ABORT = "abort"
    STOP_AND_COPY = "stop-and-copy"


class ConvergenceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a guest may be slowed down for its move, and what follows if that is not enough.

    Names, ranges and defaults are QEMU's (qapi/migration.json; migration/options.c), but for the
    last, which is Godwit's own.

    Attributes:
        auto_converge: throttle the vCPUs of a guest that writes faster than the line takes; a
            capability in QEMU's terms.
        cpu_throttle_initial: share of the time for which they are kept out at first, percent.
        cpu_throttle_increment: what is added after each round that did not help, percent points.
        max_cpu_throttle: the bound, percent.
        on_no_convergence: give the move up, or stop the guest for however long it takes.

    Raises:
        ConfigError: a value is out of its range; the message names it.
    """

    auto_converge: bool = False
    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    max_cpu_throttle: int = MOST_THROTTLED
    on_no_convergence: OnNoConvergence = OnNoConvergence.ABORT

    def __post_init__(self) -> None:
        _check("cpu-throttle-initial", self.cpu_throttle_initial)
        _check("cpu-throttle-increment", self.cpu_throttle_increment)
        _check("max-cpu-throttle", self.max_cpu_throttle)
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            raise ConfigError(
                f"Parameter 'max-cpu-throttle' is {self.max_cpu_throttle}, less than "
                f"'cpu-throttle-initial', which is {self.cpu_throttle_initial}: raise the one or "
                "lower the other"
            )


def _check(name: str, value: int) -> None:
    if not 1 <= value <= MOST_THROTTLED:
        raise ConfigError(
            f"Parameter '{name}' is {value}: choose a value from 1 to {MOST_THROTTLED} percent"
        )
