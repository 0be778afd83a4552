"""When the rounds of an announcement are due. Pure: no clock, no timers."""

from __future__ import annotations

from collections.abc import Iterator

from godwit.spec.parameters import AnnounceParameters


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
