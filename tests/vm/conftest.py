"""Fixtures of the VM tests: ``vm_plugin`` has them."""

from __future__ import annotations

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin while options can still be added; a second time does nothing."""
    pluginmanager.import_plugin("vm_plugin")


@pytest.fixture(autouse=True)
def _nothing_broke(nothing_broke: None) -> None:
    """Judge each test of this folder, and no other, by its VMs' consoles."""
