"""What many unit tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from godwit.hw.memory import GuestMemory
from packet_handover_bench import Handover


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """A guest's RAM of 32 MiB, shared by a file's tests."""
    memory = GuestMemory(32 << 20)
    yield memory
    memory.close()


@pytest.fixture
def handover() -> Iterator[Handover]:
    """Both hosts of a move at the moment of its commit."""
    handover = Handover()
    yield handover
    handover.close()
