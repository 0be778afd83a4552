"""The option of how long each target is fuzzed."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--fuzz-time`` and ``--fuzz-seed``."""
    group = parser.getgroup("fuzz")
    group.addoption(
        "--fuzz-time",
        type=float,
        metavar="SECONDS",
        help="fuzz each target for so long; else the corpus and a fixed number of inputs",
    )
    group.addoption("--fuzz-seed", type=int, default=1, metavar="N")
