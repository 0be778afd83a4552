"""The command line: the only place that exits, and that prints for people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from godwit import __version__
from godwit.errors import GodwitError
from godwit.spec.config import DEVICE_OPTIONS


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.action(arguments)
        return code
    except GodwitError as error:
        from .printable import printable

        print(f"godwit: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


class _Formatter(argparse.HelpFormatter):
    """A formatter of help that is as wide as the terminal.

    argparse asks shutil for the width, at each start and not only for help, and shutil brings three
    compressors along: a twentieth of the start-up of a guest.
    """

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size().columns
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=max((columns or 80) - 2, 20))


class _Parser(argparse.ArgumentParser):
    """A parser with that formatter, as are its subparsers."""

    def __init__(self, **given: Any) -> None:
        super().__init__(formatter_class=_Formatter, **given)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="godwit", description="A KVM VMM whose guests keep their network when they migrate."
    )
    parser.add_argument("--version", action="version", version=f"godwit {__version__}")
    sub = parser.add_subparsers(required=True, metavar="COMMAND")

    run = sub.add_parser("run", help="run a guest, or wait for one")
    run.add_argument("--kernel", help="a bzImage: /boot/vmlinuz-...")
    run.add_argument("--initrd", help="an initial RAM disk")
    run.add_argument("--append", default="console=ttyS0", help="the kernel's command line")
    run.add_argument(
        "--memory",
        default="256M",
        metavar="SIZE[,shared=on]",
        help="RAM: 256M, 2G (default %(default)s); shared=on: a memfd that others can map",
    )
    run.add_argument("--cpus", type=int, default=1, help="vCPUs (default %(default)s)")
    run.add_argument(
        "--cpu",
        default="host",
        metavar="MODEL[,FEATURE=off...]",
        help="the guest's CPU: host (default), x86-64-v2, x86-64-v3, or a file that "
        "'godwit cpu baseline' made; an incoming guest keeps the one that it has",
    )
    for option, device in DEVICE_OPTIONS.items():
        run.add_argument(
            option,
            dest="devices",
            action="append",
            default=[],
            type=_named(option),
            metavar=device.metavar,
            help=device.help,
        )
    run.add_argument(
        "--machine", default=None, help="machine type: godwit-0.1 to 0.3 (default: 0.3)"
    )
    run.add_argument("--qmp", metavar="PATH", help="QMP's Unix socket")
    run.add_argument(
        "--incoming",
        metavar="URI",
        help="wait for a guest: unix:PATH, tls:HOST:PORT, tcp:HOST:PORT, or defer (until "
        "migrate-incoming); "
        "or take it from a snapshot: file:PATH",
    )
    run.add_argument(
        "--insecure", action="store_true", help="allow tcp: beyond this host, unencrypted"
    )
    run.add_argument(
        "--user",
        metavar="NAME",
        help="the user as whom a VM that root starts goes on once all is open (default: nobody)",
    )
    run.add_argument(
        "--allow-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder where the running VM may make and read files and sockets: snapshots, "
        "migrate-incoming; may be given several times",
    )
    run.add_argument(
        "--no-sandbox",
        dest="sandbox",
        action="store_const",
        const="off",
        default="on",
        help="keep root's power, all files and all system calls",
    )
    run.add_argument(  # for python -m lab.syscalls: what is not allowed is logged by the kernel
        "--log-syscalls", dest="sandbox", action="store_const", const="log", help=argparse.SUPPRESS
    )
    run.add_argument(
        "--tls",
        metavar="DIR",
        help="certificates for migrations by tls:HOST:PORT: ca.pem, cert.pem and key.pem "
        "(see 'godwit pki')",
    )
    run.add_argument(
        "--tls-peer",
        action="append",
        default=[],
        metavar="NAME|sha256:HEX",
        help="what the other host's certificate is to be for; may be given several times "
        "(default: the HOST of the address, or any of the authority's for a host that connects)",
    )
    run.add_argument(
        "--migration-secret",
        metavar="FILE",
        help="a secret that the other end of each migration has to know too",
    )
    run.add_argument(
        "--restore",
        choices=("full", "lazy"),
        default="full",
        help="a guest from a file: all of it is read and checked before it runs, or its RAM is "
        "read as it is touched, and checked meanwhile (default %(default)s)",
    )
    run.add_argument(
        "--restore-clock",
        choices=("frozen", "now"),
        default="frozen",
        help="the clocks of a guest from a file go on from when it was saved, or from now "
        "(default %(default)s)",
    )
    run.add_argument(
        "--clone",
        action="store_true",
        help="a guest from a file is a copy beside its original: its NICs let nothing out that has "
        "one of the original's MAC or IP addresses, and show drivers that reset them new MACs",
    )
    run.add_argument(
        "--no-autostart", action="store_true", help="load, and wait for QMP's cont to run"
    )
    run.add_argument(
        "--on-panic",
        choices=("exit", "pause", "reboot", "run"),
        default="exit",
        help="what is done when the guest reports a panic by pvpanic (default %(default)s, code 4)",
    )
    run.add_argument(
        "--smbios",
        metavar="KEY=VALUE,...",
        help="the machine in words: manufacturer, product, serial, uuid",
    )
    run.add_argument(
        "--oem-string",
        action="append",
        default=[],
        metavar="TEXT",
        help="an SMBIOS OEM string, as io.systemd.credential:NAME=VALUE; once for each",
    )
    run.add_argument(
        "--no-reboot", action="store_true", help="end with code 3 when the guest reboots"
    )
    run.add_argument(
        "--console",
        default="stdio",
        metavar="stdio|file:PATH|none",
        help="the guest's serial console (default %(default)s; ctrl-] ends the VM)",
    )
    run.set_defaults(action=_run)

    migrate = sub.add_parser("migrate", help="migrate a running guest, or save it")
    migrate.add_argument("--qmp", required=True, help="the guest's QMP socket")
    migrate.add_argument("--insecure", action="store_true", help="allow tcp: beyond this host")
    migrate.add_argument(
        "uri", help="the address at which a 'godwit run --incoming' waits, or file:PATH"
    )
    migrate.set_defaults(action=_migrate)

    save = sub.add_parser("save", help="save a guest in a file")
    save.add_argument("--qmp", required=True, help="the guest's QMP socket")
    save.add_argument(
        "--keep-running",
        action="store_true",
        help="the guest runs on, and the file has a copy (default: the guest is in the file, and "
        "its VM ends)",
    )
    save.add_argument("--compress", choices=("zstd",), help="compress the guest's RAM")
    save.add_argument("file", metavar="FILE", help="'godwit run --incoming file:FILE' restores it")
    save.set_defaults(action=_save)

    console = sub.add_parser("console", help="reach a program in a guest without a network")
    console.add_argument("--qmp", required=True, help="the QMP socket of the guest's VM")
    console.add_argument("--port", required=True, type=_port, help="its vsock port: 22 for ssh")
    console.set_defaults(action=_console)

    pki = sub.add_parser("pki", help="make certificates for migrations by tls:")
    pki.add_argument("folder", metavar="DIR", help="where they go: DIR/ca, and DIR/HOST for each")
    pki.add_argument("hosts", metavar="HOST", nargs="+", help="a host's name or address")
    pki.set_defaults(action=_pki)
    cpu = sub.add_parser("cpu", help="describe this host's CPU, or find what several can give")
    commands = cpu.add_subparsers(required=True, metavar="COMMAND")
    describe = commands.add_parser("describe", help="print a description of this host's CPU")
    describe.set_defaults(action=_describe_cpu)
    baseline = commands.add_parser("baseline", help="print the CPU that all of these can give")
    baseline.add_argument("files", nargs="+", metavar="FILE", help="a host's description")
    baseline.set_defaults(action=_cpu_baseline)
    return parser


def _named(option: str) -> Callable[[str], tuple[str, str]]:
    return lambda value: (option, value)


def _run(arguments: argparse.Namespace) -> int:
    from .run import run

    return run(arguments)


def _migrate(arguments: argparse.Namespace) -> int:
    from .migrate import migrate

    return migrate(arguments.qmp, arguments.uri, arguments.insecure)


def _save(arguments: argparse.Namespace) -> int:
    from .migrate import save

    return save(arguments.qmp, arguments.file, arguments.keep_running, arguments.compress)


def _console(arguments: argparse.Namespace) -> int:
    from .console import console

    return console(arguments.qmp, arguments.port)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number up to 4294967295")
    return int(text)


def _pki(arguments: argparse.Namespace) -> int:
    from .pki import pki

    return pki(arguments.folder, arguments.hosts)


def _describe_cpu(arguments: argparse.Namespace) -> int:
    from .cpu import describe

    return describe()


def _cpu_baseline(arguments: argparse.Namespace) -> int:
    from .cpu import baseline

    return baseline(arguments.files)


if __name__ == "__main__":
    sys.exit(main())
