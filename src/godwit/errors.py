"""One error tree, named for the caller's remedy.

::

    GodwitError
    ├── ConfigError        the request is wrong: change the request
    ├── HostError          this host lacks something: the message has what, and how to get it
    ├── StateError         not allowed in the present run state
    ├── KvmError           the kernel's KVM refused a call
    ├── GuestError         the guest misbehaved: the device stops, the VM lives
    └── MigrationError     the migration failed
        ├── StreamError    the peer's stream is invalid
        ├── PeerRefused    the peer refused, and why
        └── LinkLost       the connection to the peer broke or stayed silent

Only ``cli`` turns errors into messages and exit codes; the cause is always kept (``raise
from``).
"""


class GodwitError(Exception):
    """The base of every error Godwit raises on purpose."""

    #: The exit code of ``godwit`` when this error ends the process.
    exit_code = 1


class ConfigError(GodwitError):
    """A wrong request, whose message names the value and the remedy."""


class HostError(GodwitError):
    """A lack of the host's, whose message names the remedy."""


class StateError(GodwitError):
    """A request the present run state forbids, whose message names the state."""


class KvmError(GodwitError):
    """A call KVM refused, with the OSError as the cause."""


class GuestError(GodwitError):
    """A rule of a device the guest broke, so that the device needs a reset. The VM lives."""


class MigrationError(GodwitError):
    """A failed migration: the guest runs where it ran, unless the outcome is not known."""


class StreamError(MigrationError):
    """An invalid migration stream, whose message names the field."""


class PeerRefused(MigrationError):
    """A migration refused by the peer, with the peer's reason as the message."""


class LinkLost(MigrationError):
    """A connection to the peer that broke, or stayed silent past the deadline."""


def as_godwit_error(error: Exception) -> GodwitError:
    """Return the error itself, or a MigrationError that names one nobody expected."""
    if isinstance(error, GodwitError):
        return error
    return MigrationError(f"{type(error).__name__}: {error}")
