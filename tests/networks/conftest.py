"""Fixtures of the tests with other projects' networks and programs: ``vm_plugin`` has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vm_bench import Bench

from lab.networks.arpwatch import ArpWatch


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin while options can still be added; a second time does nothing."""
    pluginmanager.import_plugin("vm_plugin")


@pytest.fixture(autouse=True)
def _nothing_broke(nothing_broke: None) -> None:
    """Judge each test of this folder, and no other, by its VMs' consoles."""


@pytest.fixture
def arpwatch(bench: Bench) -> Iterator[ArpWatch]:
    """An arpwatch on the client's untagged segment.

    The client asks anew for whom it talks to: arpwatch knows who has which address before anything
    changes. Each test says which changes it made; there must be no other.
    """
    with ArpWatch(bench.net.client.netns, bench.net.client.interface, bench.folder) as watch:
        bench.client_ip("neigh", "flush", "all")
        yield watch
