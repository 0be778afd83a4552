"""The command for snapshots, which is Godwit's own: QEMU's have a disk to be in."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from godwit.qmp.controller import MigrationController
from godwit.spec.runstate import RunState

from .registry import Arguments, Command, states

_S = RunState


class Compression(StrEnum):
    """The kinds of compression of RAM."""

    NONE = "none"
    ZSTD = "zstd"


class SaveArguments(Arguments, frozen=True):
    """Arguments of godwit-save: an absolute path, and what becomes of guest and bytes."""

    path: Annotated[str, msgspec.Meta(max_length=4096)]
    keep_running: bool = False
    compress: Compression = Compression.NONE


def _save(controller: MigrationController, arguments: SaveArguments) -> None:
    compress = "" if arguments.compress is Compression.NONE else arguments.compress.value
    controller.save(arguments.path, arguments.keep_running, compress)


COMMANDS = {
    "godwit-save": Command(_save, SaveArguments, states(_S.RUNNING, _S.PAUSED)),
}
