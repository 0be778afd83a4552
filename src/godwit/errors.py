"""One error tree, named for what the caller can do about it.

::

    GodwitError
    ├── ConfigError        what was asked for is wrong: change the request
    ├── HostError          this host lacks something: the message says what and how to get it
    ├── StateError         not allowed in the present run state
    ├── KvmError           the kernel's KVM refused a call
    ├── GuestError         the guest misbehaved: the device stops, the VM lives
    └── MigrationError     the move did not happen
        ├── StreamError    the peer's stream is invalid
        ├── PeerRefused    the peer said no, and why
        └── LinkLost       the line to the peer broke or stayed silent

Only ``cli.py`` turns them into messages and exit codes; the cause is always kept (``raise from``).
"""


class GodwitError(Exception):
    """Base of every error that Godwit raises on purpose."""

    #: What ``godwit`` exits with when this ends it.
    exit_code = 1


class ConfigError(GodwitError):
    """What was asked for is wrong; the message names the value and the remedy."""


class HostError(GodwitError):
    """The host lacks something; the message says what and how to get it."""


class StateError(GodwitError):
    """Not allowed in the present run state; the message names the state."""


class KvmError(GodwitError):
    """KVM refused a call; the OSError is the cause."""


class GuestError(GodwitError):
    """The guest broke a rule of a device; the device needs a reset, the VM lives."""


class MigrationError(GodwitError):
    """The move did not happen; the guest runs where it ran."""


class StreamError(MigrationError):
    """The migration stream is invalid; the message names the field."""


class PeerRefused(MigrationError):
    """The peer refused the move; the message is the peer's reason."""


class LinkLost(MigrationError):
    """The line to the peer broke, or stayed silent past the deadline."""
