"""A check that KVM can run stock kernels on this machine."""

import os
import re

_REMEDY = (
    "; the lab of Godwit's sources emulates a host that has it: make lab, or python -m lab run -- "
    "COMMAND"
)


def why_unusable(dev: str = "/dev/kvm", cpuinfo: str = "/proc/cpuinfo") -> str | None:
    """Return None if KVM is usable, else one sentence that gives the reason and the remedy.

    A device node alone proves nothing: where the CPU offers neither VT-x (``vmx``) nor AMD-V
    (``svm``), whatever stands behind it cannot run an unmodified kernel.
    """
    try:
        # Flags are the same on every CPU, and the file is long on a big machine: the first will do.
        with open(cpuinfo, encoding="ascii", errors="replace") as file:
            flags = re.search(r"^flags\s*:(.*)$", file.read(), re.MULTILINE)
    except OSError as error:
        return f"{cpuinfo} cannot be read ({error.strerror}): mount /proc"
    if flags is None or not {"vmx", "svm"} & set(flags.group(1).split()):
        return (
            "this CPU shows neither vmx nor svm, so KVM cannot run guests here: enable "
            "virtualisation in the firmware, or nested virtualisation where this is itself a "
            f"virtual machine{_REMEDY}"
        )
    if not os.path.exists(dev):
        return f"{dev} is missing: load kvm_intel or kvm_amd (modprobe){_REMEDY}"
    try:
        os.close(os.open(dev, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return f"{dev} may not be opened by this user: run as root, or join its group (kvm)"
    except OSError as error:
        return f"{dev} cannot be opened ({error.strerror}): check that kvm_intel or kvm_amd works"
    return None
