"""A guest's clocks against ours, as exactly as its answers are quick."""

from __future__ import annotations

import time
from typing import NamedTuple

from .agent import Agent


class Reading(NamedTuple):
    """The guest's clocks minus ours, s, and by how much that may be wrong."""

    realtime: float
    monotonic: float
    error: float


def read(agent: Agent, asked: int = 40) -> Reading:
    """From the quickest of some answers: the guest read its clocks within that time.

    Raises:
        AgentError: no answer.
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
