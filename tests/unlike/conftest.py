"""Fixtures of the tests on two unlike hosts, which ``vm_plugin`` has, and the folder between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin while options can still be added; a second time does nothing."""
    pluginmanager.import_plugin("vm_plugin")


@pytest.fixture(autouse=True)
def _nothing_broke(nothing_broke: None) -> None:
    """Judge each test of this folder by its VMs' consoles."""


@pytest.fixture
def between() -> Path:
    """The folder that both hosts share: ``scripts/unlike-hosts`` names it."""
    return Path(os.environ["GODWIT_UNLIKE"])
