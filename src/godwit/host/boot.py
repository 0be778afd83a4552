"""The boot of this host's kernel: two processes with the same one run on one kernel."""

from __future__ import annotations

_PATH = "/proc/sys/kernel/random/boot_id"


def boot_id() -> str:
    """Return the random number of this boot, or nothing where the kernel shows none."""
    try:
        with open(_PATH, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""
