"""The lab host, on which commands run that need KVM.

On a machine with KVM, the machine itself is the lab host. Elsewhere an emulated one is
(emulator.py).
"""

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL
from pathlib import Path

from godwit.client.kvm import why_unusable

from . import emulator, guest, kernels
from .errors import LabCrashed, LabError, LabTimeout

Log = Callable[[str], None]
#: Boots of the emulated host that may fail before the command starts.
_BOOTS = 3
_KEPT_LOGS = 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = CDLL(None)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cpus: int = 2,
    memory_mb: int = 4096,
    cpu: str | None = None,
    rw: Sequence[Path] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Log = lambda _: None,
) -> int:
    """Run a command where KVM works, and return the exit status.

    Standard output and error both arrive at once on this process's standard output. Standard
    input is empty. ``rw`` names directories (made if missing) shared for writing. The emulated
    host gives the command PATH, HOME, TERM, GODWIT_CACHE and ``env``, and the machine itself its
    whole environment and ``env``. ``cpu`` is the model of an emulated host's CPUs. An emulated
    host that dies before the command starts is booted again.

    Raises:
        LabCrashed: the emulated host died without a result.
        LabTimeout: the command did not exit within ``timeout_s`` seconds.
        LabError: a tool or kernel is missing, or a CPU is asked for that is not emulated.
    """
    where = (cwd or Path.cwd()).absolute()
    for path in rw:
        path.mkdir(parents=True, exist_ok=True)
    if why_unusable() is None:
        if cpu is not None:
            raise LabError(f"--cpu {cpu}: this machine has KVM, and emulates no other CPU")
        return _run_here(argv, timeout_s, where, env or {})
    _build_guests()
    deadline = time.monotonic() + timeout_s
    for boot in range(1, _BOOTS + 1):
        with emulator.job(argv, where, env or {}, rw) as job:
            in_time = _emulate(
                emulator.qemu_argv(job, rw, cpus, memory_mb, cpu or emulator.CPU), job, deadline
            )
            try:
                return _result(job, in_time)
            except LabCrashed as error:
                if boot == _BOOTS or (job / "started").exists():
                    raise
                log(f"the emulated host died at its boot; booting another ({error})")
    raise AssertionError("unreachable")


def shell(*, cpus: int = 2, memory_mb: int = 4096, rw: Sequence[Path] = ()) -> int:
    """Run an interactive shell where KVM works, on this terminal, and return the exit status.

    Raises:
        LabCrashed: the emulated host died without a result.
        LabError: a tool or kernel is missing.
    """
    if why_unusable() is None:
        return subprocess.call([os.environ.get("SHELL", "/bin/bash"), "-i"])
    _build_guests()
    size = shutil.get_terminal_size()
    first = f"stty rows {size.lines} cols {size.columns}\n"
    # Without the user's start-up files, which an emulated CPU may chew on for half a minute.
    argv = ["/bin/bash", "--norc", "-i"]
    env = {"PS1": r"lab:\w\$ "}
    with emulator.job(argv, Path.cwd(), env, rw, first) as job:
        (job / "interactive").touch()
        command = emulator.qemu_argv(job, rw, cpus, memory_mb)
        command += ["-chardev", "stdio,id=io,signal=off", "-device", "virtconsole,chardev=io"]
        saved = termios.tcgetattr(0) if sys.stdin.isatty() else None
        try:
            if saved:
                tty.setraw(0)
            with (job / "qemu.log").open("wb") as errors:
                subprocess.call(command, stderr=errors, preexec_fn=_die_with_parent)
        finally:
            if saved:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)
                os.set_blocking(0, True)  # QEMU leaves the terminal non-blocking
        return _result(job, True)


def _build_guests() -> None:
    """Bring the guests' images up to date here.

    The emulated host would do so slowly, and lose them at its end.
    """
    for name in kernels.META_PACKAGES:
        kernel = kernels.cached(name)
        if kernel is not None:
            guest.build(kernel)


def _die_with_parent() -> None:
    """Have the kernel kill this child when its parent dies for any reason (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_here(argv: Sequence[str], timeout_s: float, cwd: Path, env: Mapping[str, str]) -> int:
    sys.stdout.flush()
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise LabTimeout(
            f"no exit after {timeout_s:g} s (allow more): {shlex.join(argv)}"
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _emulate(command: list[str], job: Path, deadline: float) -> bool:
    """Run QEMU with the command's output on ours, and return False if the deadline came first."""
    command += ["-chardev", "stdio,id=io,signal=off", "-device", "virtserialport,chardev=io"]
    with (job / "qemu.log").open("wb") as errors:
        qemu = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # at its end QEMU would disconnect the port: never closed
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # the terminal's ^C is ours to act on
            preexec_fn=_die_with_parent,
        )
    try:
        assert qemu.stdout is not None
        return _copy(qemu.stdout.fileno(), deadline)
    finally:
        qemu.kill()
        qemu.wait()


def _copy(fd: int, deadline: float) -> bool:
    """Copy a file to standard output until its end (True) or the deadline (False)."""
    sys.stdout.flush()
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(fd, 65536)
        if not data:
            return True
        while data:
            data = data[os.write(1, data) :]
    return False


def _result(job: Path, in_time: bool) -> int:
    """Return the command's exit status, from the file that the emulated host left.

    Raises:
        LabCrashed: there is no such file, though there was time.
        LabTimeout: the time was up.
    """
    try:
        return int((job / "status").read_text())
    except (FileNotFoundError, ValueError):
        pass
    logs = kernels.cache_dir() / "lab-failures"
    logs.mkdir(parents=True, exist_ok=True)
    kept = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    parts = [
        path.read_bytes() for name in ("qemu.log", "console.log") if (path := job / name).exists()
    ]
    kept.write_bytes(b"\n".join(parts))
    for old in sorted(logs.iterdir())[:-_KEPT_LOGS]:
        old.unlink(missing_ok=True)
    if not in_time:
        raise LabTimeout(f"no exit within the time limit; the lab was killed (console: {kept})")
    text = kept.read_text(errors="replace")
    broken = re.search(
        r"^.*(?:BUG|Oops|int3|panic|general protection|invalid opcode).*$", text, re.M
    )
    reason = broken.group().strip() if broken else text.strip()[-300:]
    raise LabCrashed(f"the emulated host died without a result: {reason} (console: {kept})")
