"""Fixtures of the VM tests: ``vm_plugin`` has them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_bench import SIZE
from vm_bench import Bench


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin while options can still be added; a second time does nothing."""
    pluginmanager.import_plugin("vm_plugin")


@pytest.fixture(autouse=True)
def _nothing_broke(nothing_broke: None) -> None:
    """Judge each test of this folder, and no other, by its VMs' consoles."""


@pytest.fixture
def image(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk image full of random bytes, of the test's own."""
    path = bench.folder / f"{hashlib.md5(request.node.name.encode()).hexdigest()}.raw"
    path.write_bytes(os.urandom(SIZE))
    yield path
    bench.drop_guest()
    path.unlink()
