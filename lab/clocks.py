"""Readings of a guest's clocks against this process's, as exact as the answers are quick."""

from __future__ import annotations

import time
from typing import NamedTuple

from .agent import Agent


class Reading(NamedTuple):
    """The guest's clocks minus ours, and the possible error, in seconds."""

    realtime: float
    monotonic: float
    error: float


def read(agent: Agent, asked: int = 40) -> Reading:
    """Read a guest's clocks ``asked`` times, and return the reading of the quickest answer.

    Raises:
        AgentError: the agent did not answer.
    """
    found = []
    for _ in range(asked):
        real_before, mono_before = time.time(), time.monotonic()
        real, mono = agent.clock()
        half = (time.monotonic() - mono_before) / 2
        found.append(
            Reading(real / 1e9 - real_before - half, mono / 1e9 - mono_before - half, half)
        )
    return min(found, key=lambda reading: reading.error)
