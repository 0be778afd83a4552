"""Descriptions and baselines of CPUs as JSON files, checked in the reading."""

from __future__ import annotations

import os
import stat
from typing import Annotated

import msgspec

from godwit.errors import ConfigError, StreamError

from .description import Cpu, check_entries

#: Longer than any description can be.
_LONGEST = 256 << 10


class CpuFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CPU in a file, under a key with the version of this form."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = msgspec.field(name="godwit-cpu")
    cpu: Cpu


def to_text(cpu: Cpu) -> str:
    """Return a CPU as JSON, with a line for each CPUID entry."""
    encode = msgspec.json.encode
    entries = ",\n  ".join(encode(entry).decode() for entry in cpu.cpuid)
    rest = encode(
        {name: value for name, value in msgspec.structs.asdict(cpu).items() if name != "cpuid"}
    )
    return (
        '{"godwit-cpu": 1, "cpu": {"cpuid": [\n  ' + entries + "\n ],\n " + rest.decode()[1:-1]
    ) + "}}"


def read(path: str) -> Cpu:
    """Return the CPU described in a file.

    Raises:
        ConfigError: the file cannot be read, or is no description; the message has the field.
    """
    try:
        # Non-blocking, so that a pipe that nobody writes is opened, and found to be no file.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the CPU description '{path}': {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"cannot read the CPU description '{path}': it is no regular file")
    with os.fdopen(fd, "rb") as file:
        text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise ConfigError(f"'{path}' is no CPU description: it has more than {_LONGEST} bytes")
    try:
        cpu = msgspec.json.decode(text, type=CpuFile).cpu
        check_entries(cpu.cpuid)
    except (ValueError, RecursionError, StreamError) as error:
        raise ConfigError(
            f"'{path}' is no CPU description: {error}; 'godwit cpu describe' and 'godwit cpu "
            "baseline' write them"
        ) from error
    return cpu
