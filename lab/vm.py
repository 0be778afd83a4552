"""A ``godwit run`` process in the lab's network, with the lab's guest."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from godwit.client.vm import Vm

from .guest import READY
from .netns import entering

#: The variable with the folder for traces of the VMs' system calls: see lab/syscalls.py.
TRACES = "GODWIT_TRACES"
#: Left out of a trace, which would be of little else.
FREQUENT = ("ioctl", "futex", "read", "write", "poll", "epoll_wait", "clock_gettime", "sendmsg")


@contextmanager
def vm_folder(parent: str | None = None, *, writable: bool = False) -> Iterator[Path]:
    """Make a folder for the block where VMs that root starts find each other's sockets.

    They run as 'nobody'; with ``writable`` they may make snapshots and sockets there, too.
    """
    with TemporaryDirectory(prefix="godwit-", dir=parent) as name:
        os.chmod(name, 0o711)
        if writable and os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(name, user.pw_uid, user.pw_gid)
        yield Path(name)


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
        status = folder.stat()
        if (
            os.geteuid() == 0 and status.st_uid != 0
        ):  # see vm_folder: what is made there is the VM's
            arguments = [*arguments, "--allow-path", str(folder)]
        super().__init__(name, folder, arguments, env=env, preexec=preexec)

    def _command(self) -> list[str]:
        folder = os.environ.get(TRACES)
        if folder is None:
            return super()._command()
        strace = ["strace", "-f", "-qq", "-e", "signal=none", "-e", f"trace=!{','.join(FREQUENT)}"]
        strace += ["-o", f"{folder}/{self.name}-{os.getpid()}.strace"]
        return [*strace, *super()._command(), "--log-syscalls"]

    def wait_ready(self, deadline: float = 60.0) -> float:
        """Wait until the guest's agent listens, and return the seconds since the process' start.

        Raises:
            VmGone: the agent does not listen within ``deadline`` seconds.
        """
        self.wait_console(READY, deadline)
        return time.monotonic() - self.started
