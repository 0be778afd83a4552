"""The errors of a client's calls, beside the tree of ``godwit.errors``.

::

    ClientError
    ├── CommandRefused     the VM answered with an error (a ConfigError, too)
    └── VmGone             nobody answers, or no longer, or not in time (a HostError, too)
"""

from __future__ import annotations

from godwit.errors import ConfigError, GodwitError, HostError


class ClientError(GodwitError):
    """The base of every error a client raises on purpose."""


class CommandRefused(ClientError, ConfigError):
    """The VM's error for an answer to a command, with its class in ``error_class``."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class VmGone(ClientError, HostError):
    """The absence of a VM on the socket that answers in time and as QMP has it."""
