"""A stock Debian image for the lab, by scripts/debian-image, and what tells it who it is."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import initramfs
from .errors import LabError
from .kernels import Log, cache_dir
from .netns import exec_argv

_SCRIPT = Path(__file__).parent.parent / "scripts/debian-image"
_SIZE = "1500M"
#: The kernel's command line: the root on the first disk, and what an emulated CPU need not do.
#: Quiet about XSAVE, of whose size the lab's KVM knows nothing (decision 0010).
CMDLINE = "root=/dev/vda rw quiet console=ttyS0 mitigations=off nowatchdog tsc=reliable panic=-1"
#: The lab's guest, in its one network without a VLAN.
_NETWORK = """[Match]
Type=ether
[Network]
Address=10.0.0.2/24
Gateway=10.0.0.1
"""


@dataclass(frozen=True)
class Image:
    """A built image, which is not to be written: see :meth:`copy`."""

    disk: Path

    @property
    def boot(self) -> list[str]:
        """The arguments of ``godwit run`` that boot it."""
        files = ("--kernel", f"{self.disk}.vmlinuz", "--initrd", f"{self.disk}.initrd")
        return [*files, "--append", CMDLINE]

    def copy(self, target: Path) -> Path:
        """Copy the disk, with its holes, for a guest of its own."""
        argv = ["cp", "--sparse=always", "--reflink=auto", str(self.disk), str(target)]
        subprocess.run(argv, check=True)
        return target


def _path() -> Path:
    return cache_dir() / f"images/debian-{initramfs.digest(_SCRIPT.read_bytes(), _SIZE.encode())}"


def cached() -> Image | None:
    """Return the image, or None if it was not built."""
    path = _path()
    return Image(path) if path.exists() else None


def build(log: Log = lambda _: None) -> Image:
    """Return the image, built first if the cache has none.

    Raises:
        LabError: it cannot be built.
    """
    path = _path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        log("building a Debian image (two minutes)")
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        argv = [str(_SCRIPT), "--size", _SIZE, str(scratch)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"scripts/debian-image failed: {done.stderr.strip()[-2000:]}")
        for suffix in (".vmlinuz", ".initrd", ""):  # the disk last: it stands for all
            Path(f"{scratch}{suffix}").rename(f"{path}{suffix}")
    return Image(path)


def make_key(folder: Path) -> Path:
    """Make an SSH key, and return the private file, beside which the public one is."""
    path = folder / "ssh-key"
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path


def identity(hostname: str, key: Path) -> list[str]:
    """Return the arguments that give a guest name, network, and a user 'op' with a key.

    cloud-init's NoCloud has the name from the SMBIOS serial; the rest are credentials of systemd's.
    """
    public = Path(f"{key}.pub").read_text().strip()
    files = (
        f"f~ /etc/systemd/network/05-lab.network 0644 - - - {_base64(_NETWORK)}\n"
        "d /home/op 0700 op op -\nd /home/op/.ssh 0700 op op -\n"
        f"f /home/op/.ssh/authorized_keys 0600 op op - {public}\n"
    )
    user = 'u op 1000 "Operator" /home/op /bin/bash\n'
    return [
        *("--smbios", f"serial=ds=nocloud;h={hostname};i={hostname}"),
        *_credential("tmpfiles.extra", files),
        *_credential("sysusers.extra", user),
        *_credential("ssh.authorized_keys.root", public),
    ]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _credential(name: str, value: str) -> tuple[str, str]:
    return "--oem-string", f"io.systemd.credential.binary:{name}={_base64(value)}"


@dataclass(frozen=True)
class Shell:
    """Commands in a Debian guest by SSH, from a network namespace."""

    key: Path
    netns: str
    user: str = "root"
    address: str = "10.0.0.2"
    qmp: Path | None = None
    """The VM's, by which the guest is reached by vsock, and not by the network."""

    @property
    def answers(self) -> bool:
        """Whether the guest is reached."""
        try:
            self.run("true", 30)
        except LabError:
            return False
        return True

    def run(self, command: str, timeout_s: float = 120.0) -> str:
        """Run a command, and return what it prints.

        Raises:
            LabError: it failed, or the guest was not reached in time.
        """
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        more: Sequence[str] = [word for option in options for word in ("-o", option)]
        argv = ["ssh", *more, "-o", "ConnectTimeout=30", "-i", str(self.key)]
        if self.qmp is not None:
            console = f"{sys.executable} -m godwit.cli.main console --qmp {self.qmp} --port 22"
            argv += ["-o", f"ProxyCommand={console}"]
        argv += [f"{self.user}@{self.address}", command]
        try:
            done = subprocess.run(
                exec_argv(self.netns, argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"in the guest, {command!r} took over {timeout_s:g} s") from error
        if done.returncode:
            raise LabError(
                f"in the guest, {command!r} ended with {done.returncode}: "
                f"{(done.stdout + done.stderr).strip()[-1000:]}"
            )
        return done.stdout
