"""When the rounds of an announcement are due. Pure: no clock, no timers."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ..errors import ConfigError

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
