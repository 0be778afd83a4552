"""``godwit cpu``: descriptions of hosts' CPUs, and the baseline of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import fast_import as lean  # before all that needs msgspec

del lean
from godwit.host.kvm.handles import System  # noqa: E402
from godwit.hw.cpu import baseline as of_several  # noqa: E402
from godwit.hw.cpu import files, host  # noqa: E402


def describe(open_kvm: Callable[[], System] = System) -> int:
    """Print what this host's CPU can give a guest, and return 0.

    Raises:
        GodwitError: KVM is missing.
    """
    with open_kvm() as system:
        print(files.to_text(host.describe(system)))
    return 0


def baseline(paths: Sequence[str]) -> int:
    """Print what the CPUs of all these descriptions can give a guest, and return 0.

    Raises:
        GodwitError: a file is no description, or the CPUs have no baseline.
    """
    print(files.to_text(of_several.baseline([files.read(path) for path in paths])))
    return 0
