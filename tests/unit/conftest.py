"""What many unit tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from godwit.hw.memory import GuestMemory
from godwit.hw.virtio.vhost_user import link
from packet_handover_bench import Handover


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    """A guest's RAM of 32 MiB, shared by a file's tests."""
    memory = GuestMemory(32 << 20)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[GuestMemory]:
    """A guest's RAM of 32 MiB, shared with another process."""
    memory = GuestMemory(32 << 20, shared=True)
    yield memory
    memory.close()


@pytest.fixture
def quick_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another back end of vhost-user is looked for at once."""
    monkeypatch.setattr(link, "_AGAIN_S", 0.001)


@pytest.fixture
def handover() -> Iterator[Handover]:
    """Both hosts of a move at the moment of its commit."""
    handover = Handover()
    yield handover
    handover.close()
