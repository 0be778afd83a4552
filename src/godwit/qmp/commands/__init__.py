"""The commands: one module for each feature, each with a table of its commands.

Names, arguments and results are QEMU's (qapi/*.json of 7.2) unless a docstring has others.
"""

from . import announce, devices, migration, network, snapshots, vm
from .registry import COMMANDS, execute

__all__ = ["COMMANDS", "execute"]

for _feature in (vm, migration, snapshots, announce, network, devices):
    COMMANDS.update(_feature.COMMANDS)
