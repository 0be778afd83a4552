"""``godwit run``: a VM with its console at the terminal.

In the order in which a guest needs things: the board first, and while its kernel unpacks itself,
all the rest, imports included.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from godwit.errors import ConfigError, GodwitError
from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.machine.vcpu import install_kick_handler
from godwit.spec.config import (
    DeviceConfig,
    DiskConfig,
    VmConfig,
    as_copy,
    parse_cpu,
    parse_devices,
    parse_memory,
    parse_smbios,
)
from godwit.spec.machine_types import DEFAULT, machine_type
from godwit.spec.restore import Restore

from .keyboard import Keyboard
from .sandbox import Sandbox

if TYPE_CHECKING:
    from godwit.migration.wire.address import Credentials
    from godwit.vm.vm import Vmm

    from .back_ends import BackEnds


def run(arguments: argparse.Namespace) -> int:
    """Run a VM until its end, and return the exit code.

    Raises:
        GodwitError: the VM could not be made.
    """
    memory, shared = parse_memory(arguments.memory)
    restore, devices = _restore(arguments), _devices(arguments)
    config = VmConfig(
        memory=memory,
        shared_memory=shared,
        cpus=arguments.cpus,
        cpu=parse_cpu(arguments.cpu),
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        command_line=arguments.append,
        devices=as_copy(devices) if restore.clone else devices,
        machine=machine_type(arguments.machine or DEFAULT),
        system=parse_smbios(arguments.smbios, arguments.oem_string),
    )
    if arguments.kernel is None and arguments.incoming is None:
        raise ConfigError(
            "nothing to run; give --kernel to boot, or --incoming to wait for a guest"
        )
    sandbox = Sandbox(arguments, config.devices)
    # Opened before the sandbox is entered, which has no right to make files.
    console = _open_console(arguments.console)
    back_ends = _start_back_ends(config, arguments.sandbox != "off")
    sandbox.enter()
    install_kick_handler()
    # A vCPU's exit waits for the interpreter at most this long behind another Python thread.
    sys.setswitchinterval(0.0002)
    gc.disable()  # until all is made: what a start makes, it keeps
    try:
        with Board(config) as board:
            if arguments.incoming is None:
                board.boot()
                if not arguments.no_autostart:
                    board.start_early()
            return _run(board, arguments, sandbox, console, back_ends, restore)
    except GodwitError as error:
        if back_ends is None:
            raise
        raise back_ends.explained(error) from error
    finally:
        gc.enable()
        if back_ends is not None:
            back_ends.close()


def _devices(arguments: argparse.Namespace) -> tuple[DeviceConfig, ...]:
    """Return the devices of the command line, each disk with its format.

    Raises:
        ConfigError: a value is wrong, or a disk's format is not to be guessed.
    """
    devices = parse_devices(arguments.devices)
    if any(isinstance(device, DiskConfig) for device in devices):
        from .formats import with_formats

        devices = with_formats(devices)
    return devices


def _start_back_ends(config: VmConfig, confine: bool) -> BackEnds | None:
    """Start the programs behind devices, if there are such devices.

    Raises:
        ConfigError: a program, or what is to be served, is not there.
    """
    if all(getattr(device, "serves", None) is None for device in config.devices):
        return None
    from .back_ends import BackEnds

    back_ends = BackEnds(config.devices, confine)
    config.devices = back_ends.devices
    return back_ends


def _run(
    board: Board,
    arguments: argparse.Namespace,
    sandbox: Sandbox,
    console_fd: int,
    back_ends: BackEnds | None,
    restore: Restore,
) -> int:
    """Make the rest of the VM, for a guest that may run already, and run the loop."""
    from . import fast_import as lean  # before all that needs msgspec

    del lean
    from godwit.vm.limited_reports import LimitedReports
    from godwit.vm.vm import Vmm

    from .printable import printable

    # A writer of its own: a terminal that somebody stopped must not hold a vCPU that complains.
    messages = Console(sys.stderr.fileno())

    def log(text: str) -> None:
        # The terminal may be raw: a bare line feed would leave the cursor where it is. And text
        # may be a peer's or a guest's: no part of it may move the cursor.
        messages.write(f"godwit: {printable(text)}\r\n".encode(errors="replace"))

    def report(source: str, message: str, suppressed: int) -> None:
        log(f"{source}: {message}" + (f" ({suppressed} more before)" if suppressed else ""))

    # At a rate: whatever it is, a guest might bring it about again and again.
    internal = LimitedReports(time.monotonic, report)
    loop = Loop(lambda error: internal.add("internal error", f"{type(error).__name__}: {error}"))
    with _console(console_fd) as (console, interactive):
        vmm = Vmm(
            board,
            loop,
            console,
            qmp=arguments.qmp,
            autostart=not arguments.no_autostart,
            reboot=not arguments.no_reboot,
            on_panic=arguments.on_panic,
            log=log,
            credentials=_credentials(arguments),
            restore=restore,
        )
        if back_ends is not None:
            back_ends.watch(loop, internal.add)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # In the loop: the signal may have come while this very thread holds a lock.
            signal.signal(number, lambda *_: loop.call_soon(vmm.end_by_signal))
        try:
            with _input(loop, vmm, interactive, log):
                # What is here by now stays, and need not be looked through ever again.
                gc.freeze()
                gc.enable()

                # All is open then, and nothing of a guest's or of a peer's was looked at yet.
                def opened() -> None:
                    board.keep_files()
                    sandbox.close_door(log)

                if arguments.incoming is None:
                    opened()
                    vmm.start()
                else:
                    uri = None if arguments.incoming == "defer" else arguments.incoming
                    vmm.await_guest(uri, arguments.insecure, opened)
                loop.run()
        finally:
            vmm.close()
            console.close()
            messages.close()
    return vmm.exit_code


def _restore(arguments: argparse.Namespace) -> Restore:
    """Return how a guest from a file is restored.

    Raises:
        ConfigError: no guest can come from a file.
    """
    now = arguments.restore_clock == "now"
    restore = Restore(arguments.restore == "lazy", now, arguments.clone)
    if any(restore) and (arguments.incoming or "").partition(":")[0] not in ("file", "defer"):
        raise ConfigError(
            "--restore, --restore-clock and --clone are for a guest from a file; give them with "
            "--incoming file:PATH, or leave them out"
        )
    return restore


def _credentials(arguments: argparse.Namespace) -> Credentials | None:
    """Return what the VM shows its migrations' other ends, or None for nothing.

    Raises:
        ConfigError: a file is missing or wrong.
    """
    if arguments.tls_peer and arguments.tls is None:
        raise ConfigError("--tls-peer has no effect without --tls; give both")
    if arguments.tls is None and arguments.migration_secret is None:
        return None
    from godwit.migration.wire import secret
    from godwit.migration.wire.address import Credentials

    tls = None
    if arguments.tls is not None:
        from godwit.migration.wire.tls import Tls

        tls = Tls(arguments.tls, arguments.tls_peer)
    path = arguments.migration_secret
    return Credentials(tls, None if path is None else secret.read(path))


def _open_console(spec: str) -> int:
    """Return the descriptor for the guest's output: standard output for ``stdio``.

    Raises:
        ConfigError: there is no such console.
    """
    kind, _, path = spec.partition(":")
    if spec == "stdio":
        return sys.stdout.fileno()
    if spec == "none":
        path = os.devnull
    elif kind != "file" or not path:
        raise ConfigError(f"--console {spec!r}: give stdio, file:PATH or none")
    return _open_log(path, spec)


@contextmanager
def _console(fd: int) -> Iterator[tuple[Console, bool]]:
    interactive = fd == sys.stdout.fileno()
    try:
        yield Console(fd), interactive
    finally:
        if not interactive:
            os.close(fd)


def _open_log(path: str, spec: str) -> int:
    """Open a file for a guest's output: for the owner alone, and no link.

    Raises:
        ConfigError: the file cannot be written, or is a link, or a pipe without a reader.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
        os.set_blocking(fd, True)
    except (OSError, ValueError) as error:
        reasons = {errno.ELOOP: "it is a symbolic link", errno.ENXIO: "nobody reads that pipe"}
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = reasons.get(getattr(error, "errno", None) or 0, reason or "")
        raise ConfigError(f"--console {spec!r}: {reason}; name a file of your own") from error
    return fd


@contextmanager
def _input(loop: Loop, vmm: Vmm, interactive: bool, log: Callable[[str], None]) -> Iterator[None]:
    """Send the terminal's keys to the guest, raw, until the escape."""
    fd = sys.stdin.fileno() if interactive and sys.stdin else -1
    if fd < 0:
        yield
        return
    before = termios.tcgetattr(fd) if os.isatty(fd) else None

    def escaped() -> None:
        log("left the console; the VM ends")
        vmm.end_by_signal()

    if before is not None:
        log("ctrl-] ends the VM")
        tty.setraw(fd)
    keyboard = Keyboard(loop, vmm.machine.serial, fd, None if before is None else escaped)
    try:
        keyboard.start()
        yield
    finally:
        keyboard.close()
        if before is not None:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
