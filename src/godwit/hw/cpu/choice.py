"""The guest's CPU as ``--cpu`` chooses it, from what the host offers."""

from __future__ import annotations

from godwit.errors import ConfigError, HostError
from godwit.host.kvm.cpuid import Entry, guest_cpuid
from godwit.spec.config import HOST_CPU, CpuConfig

from .compare import lacks
from .consistent import without
from .features import PLACES, features, has, spelled
from .levels import LEVELS, level


def chosen(config: CpuConfig, offered: list[Entry], count: int) -> list[Entry]:
    """Return the CPUID of the first of ``count`` vCPUs.

    Raises:
        ConfigError: the configuration names no feature, or no file of a CPU.
        HostError: the host lacks what the configuration asks for.
    """
    off = _names(config)
    if config.model == HOST_CPU:
        entries = offered
    elif config.model in LEVELS:
        entries = level(offered, config.model, off)
    else:
        entries = _of_file(config.model, offered, count, off)
    return without(entries, off) if off else entries


def _names(config: CpuConfig) -> set[str]:
    names = set()
    for given in config.off:
        name = spelled(given)
        if name not in PLACES:
            raise ConfigError(
                f"--cpu: {given}=off: no such feature; names are those of QEMU and /proc/cpuinfo"
            )
        names.add(name)
    if "invtsc" in names:
        # This timer counts by the TSC as well: a guest that may meet another rate must have none.
        names.add("tsc-deadline")
    return names


def _of_file(path: str, offered: list[Entry], count: int, off: set[str]) -> list[Entry]:
    from .files import read

    try:
        asked = read(path).cpuid
    except ConfigError as error:
        raise ConfigError(f"{error}; --cpu takes host, {', '.join(LEVELS)} or a file") from error
    deadline = has(features(asked), "tsc-deadline")
    entries = without(guest_cpuid(asked, 0, count, deadline), off)
    lacking = lacks(entries, offered, f"--cpu {path} asks for")
    if lacking:
        raise HostError("; ".join(lacking))
    return entries
