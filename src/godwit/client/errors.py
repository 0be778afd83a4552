"""What a client's calls raise, beside the tree of ``godwit.errors``.

::

    ClientError
    ├── CommandRefused     the VM answered with an error (a ConfigError, too)
    └── VmGone             nobody answers, or no longer, or not in time (a HostError, too)
"""

from __future__ import annotations

from godwit.errors import ConfigError, GodwitError, HostError


class ClientError(GodwitError):
    """Base of every error that a client raises on purpose."""


class CommandRefused(ClientError, ConfigError):
    """The VM's answer to a command, if that is an error; its class is in ``error_class``."""

    def __init__(self, text: str, error_class: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class VmGone(ClientError, HostError):
    """No VM on the socket, or none that answers in time and as QMP has it."""
