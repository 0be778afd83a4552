"""When the rounds of an announcement are due. Pure: no clock, no timers."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import msgspec

from godwit.errors import ConfigError

from .pacing import RATE

#: Field -> (least, most), ms except rounds: QEMU's migration/options.c, migrate_params_check.
RANGES: dict[str, tuple[int, int]] = {
    "initial": (0, 100_000),
    "max": (0, 100_000),
    "rounds": (0, 1000),
    "step": (1, 10_000),
}


class AnnounceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often and how quickly a VM announces itself; QEMU's defaults (migration/options.c).

    Attributes:
        initial: delay before the second round, ms.
        max: longest delay between two rounds, ms.
        rounds: how many rounds; 0 for no announcement.
        step: what each delay is longer than the one before it, ms.

    Raises:
        ConfigError: a value is out of QEMU's range.
    """

    initial: int = 50
    max: int = 550
    rounds: int = 5
    step: int = 100

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                unit = "" if name == "rounds" else " ms"
                raise ConfigError(
                    f"announce parameter '{name}' is {value}{unit}: "
                    f"choose a value from {least} to {most}{unit}"
                )


class Verify(enum.StrEnum):
    """How an announcement is verified."""

    OFF = "off"
    FDB = "fdb"
    PROBE = "probe"


class AnnounceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is Godwit's own of an announcement.

    Attributes:
        deadline: how long the guest has to acknowledge, each of two times, ms.
        verify: ``fdb``: this host's bridge forwards to the tap; ``probe``: known peers, asked in
            the guest's name, answer to the tap.
        refresh: the guest's own neighbours, the gateway first, are asked where they are, and what
            they answer is told to the guest.
        rate: frames a second that the VM's announcements may cause; 0 for no limit.

    Raises:
        ConfigError: the deadline or the rate is out of range.
    """

    deadline: int = 400
    verify: Verify = Verify.OFF
    refresh: bool = False
    rate: int = RATE

    def __post_init__(self) -> None:
        if not 10 <= self.deadline <= 60_000:
            raise ConfigError(
                f"announce parameter 'deadline' is {self.deadline} ms: "
                "choose a value from 10 to 60000 ms"
            )
        if not 0 <= self.rate <= 1_000_000:
            raise ConfigError(
                f"announce parameter 'rate' is {self.rate} frames a second: "
                "choose a value from 1 to 1000000, or 0 for no limit"
            )


def delays(parameters: AnnounceParameters) -> Iterator[float]:
    """For each round in turn, how many seconds after the round before it it is due.

    The first is 0: it is made at the instant of the resume. The others are those of QEMU's
    net/announce.c, qemu_announce_timer_step: each ``step`` longer than the last, up to ``max``.
    """
    for number in range(parameters.rounds):
        if number == 0:
            yield 0.0
        else:
            delay = parameters.initial + (number - 1) * parameters.step
            yield min(delay, parameters.max) / 1000
