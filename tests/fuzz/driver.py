"""``python -m tests.fuzz.driver [NAME...]``: fuzz, or replay an input that found something."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .fuzzer import Fuzzer, Result, keep, shrink
from .targets import NAMES, load

_MODULE = "tests.fuzz.driver"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit status."""
    options = _parser().parse_args(arguments)
    names = options.names or list(NAMES)
    if options.replay:
        return _replay(names[0], options.replay)
    if options.atheris:
        from .guided import fuzz

        return fuzz(load(names[0]), options.time, options.seed)
    if len(names) == 1:
        return _one(names[0], options.time, options.seed)
    return _several(names, options.time, options.seed, options.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME")
    parser.add_argument("--time", type=float, default=60.0, help="seconds for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try this input alone")
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer guide")
    return parser


def line(result: Result) -> str:
    """Return a run's result on one line."""
    return (
        f"{result.name:24} seed {result.seed}: {result.inputs:8} inputs in "
        f"{result.seconds:6.1f} s, {result.edges:5} edges, {result.kept:4} kept, "
        f"{0 if result.found is None else 1} findings"
    )


def report(result: Result) -> str:
    """Keep the finding of a run, and return what it is and how to see it again."""
    assert result.found is not None
    target = load(result.name)
    data, what = result.found
    last = what.strip().splitlines()[-1]
    fuzzer = Fuzzer(target, 0)
    small = shrink(target, data, lambda shorter: last in (fuzzer.one(shorter) or ""))
    path = keep(target, small)
    return (
        f"{what}\n{result.name}: {len(small)} bytes in {path}; again by\n"
        f"    python -m {_MODULE} {result.name} --replay {path}"
    )


def _replay(name: str, path: Path) -> int:
    what = Fuzzer(load(name), 0).one(path.read_bytes())
    print(what or f"{name}: {path}: nothing found")
    return 1 if what else 0


def _one(name: str, seconds: float, seed: int) -> int:
    result = Fuzzer(load(name), seed).run(seconds)
    print(line(result), flush=True)
    if result.found is None:
        return 0
    print(report(result), flush=True)
    return 1


def _several(names: Sequence[str], seconds: float, seed: int, jobs: int) -> int:
    """Fuzz each target in a process of its own, some at a time, and show each one's output."""
    waiting, running, failed = list(names), list[subprocess.Popen[str]](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            command = [sys.executable, "-m", _MODULE, waiting.pop(0)]
            command += ["--time", str(seconds), "--seed", str(seed)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        time.sleep(0.1)
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            assert process.stdout is not None
            sys.stdout.write(process.stdout.read())
            sys.stdout.flush()
            if process.returncode:
                failed += 1
                print(f"exit status {process.returncode}: {' '.join(process.args)}")
    print(f"{len(names)} targets, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status:
        os._exit(status)  # a thread of a finding may hang
