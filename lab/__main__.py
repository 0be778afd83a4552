"""``python -m lab shell|run|demo``: a host with KVM, emulated where there is none."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import LabError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line's command, and return the exit status (75 if the lab died)."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.action(arguments)
        return status
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shell = commands.add_parser("shell", help="a shell in it")
    shell.set_defaults(action=_shell)

    run = commands.add_parser("run", help="run a command in it: run -- COMMAND")
    run.add_argument("--timeout", type=float, default=600.0, help="seconds (default 600)")
    run.add_argument("--cpus", type=int, default=2, help="of the host (default %(default)s)")
    run.add_argument("--cpu", help="QEMU's model of its CPUs, an AMD one (default EPYC)")
    run.add_argument("--rw", action="append", default=[], type=Path, help="a writable folder")
    run.add_argument("command", nargs=argparse.REMAINDER)
    run.set_defaults(action=_run, parser=run)

    demo = commands.add_parser("demo", help="migrate a guest to and fro inside 802.1Q, and judge")
    demo.add_argument("--out", default=Path("out"), type=Path, help="where results go")
    demo.set_defaults(action=_demo)
    return parser


def _shell(arguments: argparse.Namespace) -> int:
    from . import host

    return host.shell()


def _run(arguments: argparse.Namespace) -> int:
    from . import host

    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        arguments.parser.error("no command is given: python -m lab run -- COMMAND")
    return host.run(
        command,
        timeout_s=arguments.timeout,
        cpus=arguments.cpus,
        cpu=arguments.cpu,
        rw=arguments.rw,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    return demo.run(arguments.out, lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
