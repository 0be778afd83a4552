"""All targets, by name."""

from __future__ import annotations

from importlib import import_module

from .target import Target

NAMES = (
    "stream",
    "snapshot",
    "qmp",
    "dissect",
    "virtio",
    "control",
    "blk",
    "e1000",
    "platform",
    "migrations",
    "vcpus",
    "tls_and_first_messages",
    "vhost_user",
)


def load(name: str) -> Target:
    """Return the target of a name, with its module imported."""
    target: Target = import_module(f"tests.fuzz.fuzz_{name}").TARGET
    assert target.name == name
    return target
