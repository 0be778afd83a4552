"""The system calls that VMs make in their sandbox, against those that its filter allows.

::

    mkdir out/traces
    GODWIT_TRACES=$PWD/out/traces python -m lab run -- .venv/bin/pytest tests/vm/...
    python -m lab.syscalls out/traces

The lab's VMs then run under strace, and log what they would be killed for. Prints what was called
and is not allowed, which is a fault of the list, and what is allowed and was never called.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .vm import FREQUENT

_CALL = re.compile(r"^\d+ +(?:<\.\.\. )?([a-z0-9_]+)(?:\(| resumed)")
_ENTERED = "seccomp(SECCOMP_SET_MODE_FILTER"


def called(traces: list[Path]) -> Counter[str]:
    """Return how often each call was made after its process had entered the sandbox."""
    found: Counter[str] = Counter()
    for path in traces:
        inside = False
        for line in path.read_text(errors="replace").splitlines():
            match = _CALL.match(line)
            if inside and match and "resumed" not in line:
                found[match[1]] += 1
            inside = inside or _ENTERED in line
    return found


def listed() -> tuple[set[str], set[str]]:
    """Return the names that the filter allows, and those that it answers as unknown."""
    script = (
        "from godwit.host.sandbox.syscalls import ALLOWED, CHECKED, UNKNOWN\n"
        "print(*ALLOWED, *CHECKED); print(*UNKNOWN)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    allowed, unknown = done.stdout.splitlines()
    return set(allowed.split()), set(unknown.split())


def main() -> int:
    """Print the comparison, and return 1 if something was called that is not allowed."""
    parser = argparse.ArgumentParser(prog="python -m lab.syscalls", description=__doc__)
    parser.add_argument("folder", type=Path)
    traces = sorted(parser.parse_args().folder.glob("*.strace"))
    found, (allowed, unknown) = called(traces), listed()
    forbidden = sorted(found.keys() - allowed - unknown)
    print(f"{len(traces)} traces, {len(found)} kinds of calls, {sum(found.values())} calls")
    print("called and not allowed:", *[f"{name} ({found[name]})" for name in forbidden] or ["none"])
    print("allowed and not called:", *sorted(allowed - found.keys() - set(FREQUENT)))
    return 1 if forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
