"""A ``godwit run`` process in the lab's network, with the lab's guest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from godwit.client.vm import Vm

from .guest import READY
from .netns import entering


class LabVm(Vm):
    """A VM whose process runs in the namespace ``netns`` (None: this process's)."""

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: Sequence[str],
        netns: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        preexec = entering(netns) if netns else None
        super().__init__(name, folder, arguments, env=env, preexec=preexec)

    def wait_ready(self, deadline: float = 60.0) -> float:
        """Wait until the guest's agent listens, and return the seconds since the process' start.

        Raises:
            VmGone: the agent does not listen within ``deadline`` seconds.
        """
        self.wait_console(READY, deadline)
        return time.monotonic() - self.started
