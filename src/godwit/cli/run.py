"""``godwit run``: a VM with its console at the terminal.

In the order in which a guest needs things: the board first, and while its kernel unpacks itself,
all the rest, imports included.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from godwit.errors import ConfigError
from godwit.host.loop import Loop
from godwit.hw.console import Console
from godwit.machine.board import Board
from godwit.machine.vcpu import install_kick_handler
from godwit.spec.config import VmConfig, parse_cpu, parse_devices, parse_memory
from godwit.spec.machine_types import DEFAULT, machine_type

if TYPE_CHECKING:
    from godwit.vm.vm import Vmm

_ESCAPE = 0x1D  # ctrl-]


def run(arguments: argparse.Namespace) -> int:
    """Run a VM until its end, and return the exit code.

    Raises:
        GodwitError: the VM could not be made.
    """
    memory, shared = parse_memory(arguments.memory)
    config = VmConfig(
        memory=memory,
        shared_memory=shared,
        cpus=arguments.cpus,
        cpu=parse_cpu(arguments.cpu),
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        command_line=arguments.append,
        devices=parse_devices(arguments.devices),
        machine=machine_type(arguments.machine or DEFAULT),
    )
    if arguments.kernel is None and arguments.incoming is None:
        raise ConfigError(
            "nothing to run; give --kernel to boot, or --incoming to wait for a guest"
        )
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
            return _run(board, arguments)
    finally:
        gc.enable()


def _run(board: Board, arguments: argparse.Namespace) -> int:
    """Make the rest of the VM, for a guest that may run already, and run the loop."""
    from . import fast_import as lean  # before all that needs msgspec

    del lean
    from godwit.vm.vm import Vmm

    # A writer of its own: a terminal that somebody stopped must not hold a vCPU that complains.
    messages = Console(sys.stderr.fileno())

    def log(text: str) -> None:
        # The terminal may be raw: a bare line feed would leave the cursor where it is.
        messages.write(f"godwit: {text}\r\n".encode())

    loop = Loop(lambda error: log(f"internal error: {type(error).__name__}: {error}"))
    with _console(arguments.console) as (console, interactive):
        vmm = Vmm(
            board,
            loop,
            console,
            qmp=arguments.qmp,
            autostart=not arguments.no_autostart,
            reboot=not arguments.no_reboot,
            log=log,
        )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: vmm.end_by_signal())
        try:
            with _input(loop, vmm, interactive, log):
                # What is here by now stays, and need not be looked through ever again.
                gc.freeze()
                gc.enable()
                if arguments.incoming is None:
                    vmm.start()
                else:
                    defer = arguments.incoming == "defer"
                    vmm.await_guest(None if defer else arguments.incoming, arguments.insecure)
                loop.run()
        finally:
            vmm.close()
            console.close()
            messages.close()
    return vmm.exit_code


@contextmanager
def _console(spec: str) -> Iterator[tuple[Console, bool]]:
    kind, _, path = spec.partition(":")
    if spec == "stdio":
        yield Console(sys.stdout.fileno()), True
        return
    if spec == "none":
        path = os.devnull
    elif kind != "file" or not path:
        raise ConfigError(f"--console {spec}: give stdio, file:PATH or none")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"--console {spec}: {error.strerror}") from error
    try:
        yield Console(fd), False
    finally:
        os.close(fd)


@contextmanager
def _input(loop: Loop, vmm: Vmm, interactive: bool, log: Callable[[str], None]) -> Iterator[None]:
    """Send the terminal's keys to the guest, raw, until the escape."""
    fd = sys.stdin.fileno() if interactive and sys.stdin else -1
    if fd < 0:
        yield
        return
    before = termios.tcgetattr(fd) if os.isatty(fd) else None

    def typed() -> None:
        data = os.read(fd, 1024)
        if not data:
            loop.unwatch(fd)
        elif before is not None and _ESCAPE in data:
            vmm.machine.serial.receive(data[: data.index(_ESCAPE)])
            log("left the console; the VM ends")
            vmm.end_by_signal()
        else:
            vmm.machine.serial.receive(data)

    if before is not None:
        log("ctrl-] ends the VM")
        tty.setraw(fd)
    try:
        try:
            loop.watch(fd, typed)
        except PermissionError:
            pass  # a regular file or /dev/null: nothing to wait for
        yield
    finally:
        loop.unwatch(fd)
        if before is not None:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
